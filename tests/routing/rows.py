"""Rows of the routing tables with defaults, and a table built from them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from routing.table import RoutingTable

if TYPE_CHECKING:
    from routing.types import Row, SqlValue

_COLUMNS: dict[str, tuple[int, dict[str, SqlValue]]] = {
    "nodes": (
        1,
        {"id": "n1", "region": "ams", "address": "", "started_ms": 0, "software": "", "peering": "{}"},
    ),
    "regions": (1, {"code": "lab", "name": "", "latitude": 0.0, "longitude": 0.0}),
    "apps": (1, {"name": "web", "network": "default", "managed_by": ""}),
    "hostnames": (2, {"hostname": "web.test", "path_prefix": "/", "app": "web", "managed_by": ""}),
    "services": (
        2,
        {
            "app": "web",
            "port": 0,
            "internal_port": None,
            "concurrency": "requests",
            "soft_limit": 20,
            "hard_limit": None,
            "checks": "[]",
            "managed_by": "",
            "options": "{}",
        },
    ),
    "machines": (
        1,
        {
            "id": "m1",
            "app": "web",
            "node": "n1",
            "region": "ams",
            "address": "10.0.0.1:8080",
            "state": "started",
            "cordoned": 0,
            "managed_by": "",
            "driver": "",
            "since_ms": 0,
            "problem": "",
            "weight": 100,
            "version": 0,
        },
    ),
    "goals": (
        1,
        {
            "machine": "m1",
            "state": "started",
            "asked_by": "n1",
            "reason": "command",
            "asked_ms": 0,
            "version": None,
            "release": "",
        },
    ),
    "checks": (
        2,
        {
            "machine": "m1",
            "name": "alive",
            "node": "n1",
            "status": "passing",
            "output": "",
            "updated_ms": 0,
            "since_ms": 0,
        },
    ),
    "loads": (2, {"machine": "m1", "node": "n2", "in_flight": 0, "updated_ms": 0}),
}

TABLES = tuple(_COLUMNS)


def row(table: str, /, **columns: SqlValue) -> tuple[str, Row, Row]:
    """Return (table, pk, row) with the given columns and usual values for the others."""
    pk, defaults = _COLUMNS[table]
    unknown = columns.keys() - defaults.keys()
    assert not unknown, unknown
    values = tuple({**defaults, **columns}.values())
    return table, values[:pk], values


def put(table: RoutingTable, name: str, /, **columns: SqlValue) -> None:
    """Apply one row."""
    table.apply(*row(name, **columns))


def drop(table: RoutingTable, name: str, /, **columns: SqlValue) -> None:
    """Delete the row with the key of these columns."""
    _, pk, _ = row(name, **columns)
    table.apply(name, pk, None)


def table_with(*rows: tuple[str, Row, Row]) -> RoutingTable:
    """Return a table that holds an app with a route and a service, and these rows."""
    table = RoutingTable(own_node="n1")
    for one in (row("apps"), row("hostnames"), row("services"), *rows):
        table.apply(*one)
    return table
