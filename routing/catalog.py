"""Rows of the replicated tables become typed values.

Decides which rows are acceptable and what is wrong with the others; refuses to know where rows
come from and what is made of them. SQLite does not enforce column types and any client may write,
so nothing of a row is taken on trust. Invariant: a bad row raises RowError, whatever it holds, and
says nothing about other rows.
"""

from __future__ import annotations

import importlib.resources
import ipaddress
import math
import re
import sys
from enum import Enum
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from .geo import AREAS
from .options import parse_options
from .peering import parse_peering
from .types import (
    WEIGHT_USUAL,
    AppRow,
    CheckRow,
    CheckStatus,
    Concurrency,
    Entity,
    GoalRow,
    HostnameRow,
    LoadRow,
    MachineFields,
    MachineRow,
    MachineState,
    NodeRow,
    Pk,
    RegionRow,
    Row,
    ServiceRow,
    SqlValue,
)

if TYPE_CHECKING:
    from collections.abc import Callable

# Names end up in headers, log lines, metrics and URLs: nothing in them needs escaping anywhere.
APP_NAME: Final = re.compile(r"[a-z0-9](?:[a-z0-9_-]{0,61}[a-z0-9])?")
IDENTIFIER: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,62}[A-Za-z0-9])?")
REGION_CODE: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?")
# A tag, or the name of an image with one. It ends up in paths and commands: nothing in it leads upwards.
RELEASE: Final = re.compile(r"[A-Za-z0-9](?!.*\.\.)[A-Za-z0-9._:/@+-]{0,254}")
_LABEL: Final = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_LABELS: Final = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_NUMERIC_LABEL: Final = re.compile(r"(?:[0-9]+|0x[0-9a-f]*)")
_PORT: Final = re.compile(r"[1-9][0-9]{0,4}")
# What nearly all addresses look like; a million of them are read when a worker starts.
_BYTE: Final = r"(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_V4_AND_PORT: Final = re.compile(rf"({_BYTE}(?:\.{_BYTE}){{3}}):([1-9][0-9]{{0,4}})")

HOST_CHARS_MAX: Final = 253  # RFC 1035 section 2.3.4
TEXT_CHARS_MAX: Final = 65_536  # check output and definitions; a longer one is a mistake or an attack
PREFIX_CHARS_MAX: Final = 1_024
WEIGHT_MAX: Final = 10_000
# Nodes, regions and ports that were found good, for the next row that names them and to be in memory once;
# there are as many nodes as the cluster has, or as somebody hostile makes up.
SEEN_MAX: Final = 65_536

_E = TypeVar("_E", bound=Enum)
_states: Final = {state.value: state for state in MachineState}
_ports: Final[dict[str, int]] = {}  # has an end of its own
_apps: Final[dict[str, str]] = {}
_nodes: Final[dict[str, str]] = {}
_regions: Final[dict[str, str]] = {}


class RowError(Exception):
    """A row that cannot be used; `reason` is one sentence for the operator."""

    def __init__(self, table: str, pk: Pk, reason: str) -> None:
        super().__init__(f"{table} {pk!r}: {reason}")
        self.table = table
        self.pk = pk
        self.reason = reason


def load_schema_sql() -> str:
    """Return the text of schema.sql, the tables that this package reads."""
    return importlib.resources.files("routing").joinpath("schema.sql").read_text(encoding="utf-8")


def parse_row(table: str, row: Row, pk: Pk | None = None) -> Entity:
    """Return the typed value of a row given in column order; raise RowError when it is not acceptable.

    Columns beyond the known ones are ignored, so that a cluster can be upgraded node by node. When
    `pk` is given, the row must agree with it.
    """
    spec = TABLES.get(table)
    if spec is None:
        raise RowError(table, row[:1] if pk is None else pk, "no such table")
    _check_shape(table, row, pk, spec.columns, spec.pk)
    try:
        return spec.parse(row)
    except ValueError as error:
        raise RowError(table, row[: spec.pk], str(error)) from None


def parse_machine(row: Row, pk: Pk) -> MachineFields:
    """Do what `parse_row` does for a row of machines; return the fields of its MachineRow alone."""
    _check_shape("machines", row, pk, MACHINE_COLUMNS, 1)
    try:
        return _parse_machine(row)
    except ValueError as error:
        raise RowError("machines", row[:1], str(error)) from None


def _check_shape(table: str, row: Row, pk: Pk | None, columns: int, keys: int) -> None:
    shown = pk if pk is not None else row[:1]
    if len(row) < columns:
        raise RowError(table, shown, f"{len(row)} columns where {columns} are needed")
    if pk is not None and not _agree(pk, row, keys):
        raise RowError(table, shown, "primary key and row disagree")


def _agree(pk: Pk, row: Row, length: int) -> bool:
    """True when a row has this key, in its types too: to SQLite 1 and 1.0 are one key, to us they are not."""
    if len(pk) != length:
        return False
    for own, said in zip(row, pk, strict=False):
        if own is not said and (own != said or type(own) is not type(said)):
            return False
    return True


def parse_address(text: str) -> tuple[str, int | None]:
    """Split 'host:port', '[v6]:port', 'host' or '[v6]' into host and port; raise ValueError.

    Strict on purpose: forms that resolvers read in surprising ways (0x7f.1, 127.1, zone ids, a port
    with a sign) are refused. Whether the address may be connected to is not decided here.
    """
    usual = _V4_AND_PORT.fullmatch(text)
    if usual is not None:
        return usual[1], _parse_port(usual[2], text)
    if text.startswith("["):
        host, closed, rest = text[1:].partition("]")
        if not closed or (rest and not rest.startswith(":")):
            raise ValueError(f"address {text!r}: expected '[v6]:port'")
        _check_v6(host, text)
        return host, _parse_port(rest[1:], text) if rest else None
    host, colon, port = text.partition(":")
    if ":" in port:
        raise ValueError(f"address {text!r}: an IPv6 address goes in brackets")
    if text.isdecimal() and len(text) <= 5:
        raise ValueError(f"address {text!r}: a port without a host, as in 127.0.0.1:{text}")
    check_host(host, text)
    return host, _parse_port(port, text) if colon else None


def check_host(host: str, shown: str) -> None:
    """Raise ValueError unless the text is an IPv4 address or a host name in lower case."""
    if len(host) > HOST_CHARS_MAX or not _LABELS.fullmatch(host):
        raise ValueError(f"{shown!r} is not a host name in lower-case ASCII")
    if _NUMERIC_LABEL.fullmatch(host.rpartition(".")[2]):
        try:
            ipaddress.IPv4Address(host)
        except ValueError:
            raise ValueError(f"{shown!r} is neither a host name nor an IPv4 address") from None


def _check_v6(host: str, shown: str) -> None:
    try:
        address = ipaddress.IPv6Address(host)
    except ValueError:
        raise ValueError(f"{shown!r} is not an IPv6 address") from None
    if address.scope_id is not None:
        raise ValueError(f"{shown!r}: zone ids mean something else on every node")


def _parse_port(text: str, shown: str) -> int:
    port = _ports.get(text)
    if port is None:
        if not _PORT.fullmatch(text) or int(text) > 65_535:
            raise ValueError(f"{shown!r}: the port must be 1 to 65535")
        port = _ports[text] = int(text)
    return port


def canonical_hostname(text: str) -> str:
    """Return a hostname pattern as the table wants it (lower case, no trailing dot); raise ValueError."""
    name = text.lower().removesuffix(".")
    if name == "*":
        return name
    if name.startswith("["):
        if not name.endswith("]"):
            raise ValueError(f"hostname {text!r}: expected '[v6]' without a port")
        _check_v6(name[1:-1], text)
        return name
    check_host(name.removeprefix("*."), text)
    return name


def canonical_prefix(text: str) -> str:
    """Return a path prefix as the table wants it: decoded, no trailing slash; raise ValueError."""
    if not text.startswith("/"):
        raise ValueError(f"path prefix {text!r} must begin with '/'")
    prefix = text if text == "/" else text.rstrip("/") or "/"
    if len(prefix) > PREFIX_CHARS_MAX:
        raise ValueError(f"path prefix is longer than {PREFIX_CHARS_MAX} characters")
    if not prefix.isprintable() or any(mark in prefix for mark in "%?#\\ "):
        raise ValueError(
            f"path prefix {text!r} must be plain: no %, ?, #, backslash, space, control characters"
        )
    if any(segment in {"", ".", ".."} for segment in prefix[1:].split("/")) and prefix != "/":
        raise ValueError(f"path prefix {text!r} has an empty or dot segment")
    return prefix


def _text(value: SqlValue, column: str, chars_max: int = 255) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{column} must be text, not {_kind(value)}")  # noqa: TRY004 - all of a row's faults are ValueErrors
    if len(value) > chars_max:
        raise ValueError(f"{column} is longer than {chars_max} characters")
    return value


def _matching(value: SqlValue, column: str, pattern: re.Pattern[str]) -> str:
    text = _text(value, column)
    if not pattern.fullmatch(text):
        raise ValueError(f"{column} {text!r} does not match {pattern.pattern}")
    return text


def _app(value: SqlValue, column: str = "app") -> str:
    # Rows of five tables name it, and where all hold the same object, looking it up compares no letters.
    known = _apps.get(value) if isinstance(value, str) else None
    return known if known is not None else _remember(sys.intern(_matching(value, column, APP_NAME)), _apps)


def _id(value: SqlValue, column: str) -> str:
    return _matching(value, column, IDENTIFIER)


def _name(value: SqlValue, column: str) -> str:
    """Return an identifier, or the empty text that stands for none."""
    return "" if value == "" else _id(value, column)


def _node(value: SqlValue, column: str = "node") -> str:
    known = _nodes.get(value) if isinstance(value, str) else None
    return known if known is not None else _remember(_id(value, column), _nodes)


def _region(value: SqlValue, column: str = "region") -> str:
    known = _regions.get(value) if isinstance(value, str) else None
    if known is not None:
        return known
    code = _matching(value, column, REGION_CODE)
    if code in AREAS:
        raise ValueError(f"{column} {code!r} is the name of an area, not of a region")
    return _remember(code, _regions)


def _remember(text: str, seen: dict[str, str]) -> str:
    if len(seen) >= SEEN_MAX:
        seen.clear()
    seen[text] = text
    return text


def _integer(value: SqlValue, column: str, least: int, most: int = 2**63 - 1) -> int:
    if not isinstance(value, int):
        raise ValueError(f"{column} must be an integer, not {_kind(value)}")  # noqa: TRY004 - as in _text
    if not least <= value <= most:
        raise ValueError(f"{column} {value} is not within {least} and {most}")
    return value


def _degrees(value: SqlValue, column: str, most: float) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value) or abs(value) > most:
        raise ValueError(f"{column} must be a number within -{most} and {most}")
    return float(value)


def _state(value: SqlValue) -> MachineState:
    known = _states.get(value) if isinstance(value, str) else None
    return known if known is not None else _member(value, "state", MachineState)


def _member(value: SqlValue, column: str, enum: type[_E]) -> _E:
    text = _text(value, column)
    try:
        return enum(text)
    except ValueError:
        known = ", ".join(str(member.value) for member in enum)
        raise ValueError(f"{column} {text!r} is none of {known}") from None


def _kind(value: SqlValue) -> str:
    return "NULL" if value is None else type(value).__name__


def _parse_node(row: Row) -> NodeRow:
    address = _text(row[2], "address")
    if address:
        parse_address(address)
    return NodeRow(
        id=_id(row[0], "id"),
        region=_region(row[1]),
        address=address,
        started_ms=_integer(row[3], "started_ms", 0),
        software=_text(row[4], "software"),
        peering=parse_peering(_text(row[5], "peering", TEXT_CHARS_MAX), parse_address)
        if len(row) > 5
        else None,
    )


def _parse_region(row: Row) -> RegionRow:
    return RegionRow(
        code=_region(row[0], "code"),
        name=_text(row[1], "name"),
        latitude=_degrees(row[2], "latitude", 90.0),
        longitude=_degrees(row[3], "longitude", 180.0),
    )


def _parse_app(row: Row) -> AppRow:
    return AppRow(
        name=_app(row[0], "name"),
        network=_id(row[1], "network"),
        managed_by=_text(row[2], "managed_by"),
    )


def _parse_hostname(row: Row) -> HostnameRow:
    # One spelling per route: two rows that differ only in spelling would make the winner a matter of order.
    hostname = _text(row[0], "hostname")
    if (canonical := canonical_hostname(hostname)) != hostname:
        raise ValueError(f"hostname {hostname!r} must be written {canonical!r}")
    prefix = _text(row[1], "path_prefix", PREFIX_CHARS_MAX + 1)
    if (canonical := canonical_prefix(prefix)) != prefix:
        raise ValueError(f"path_prefix {prefix!r} must be written {canonical!r}")
    return HostnameRow(hostname, prefix, app=_app(row[2]), managed_by=_text(row[3], "managed_by"))


def _parse_service(row: Row) -> ServiceRow:
    return ServiceRow(
        app=_app(row[0]),
        port=_integer(row[1], "port", 0, 65_535),
        internal_port=None if row[2] is None else _integer(row[2], "internal_port", 1, 65_535),
        concurrency=_member(row[3], "concurrency", Concurrency),
        soft_limit=_integer(row[4], "soft_limit", 1),
        hard_limit=None if row[5] is None else _integer(row[5], "hard_limit", 1),
        checks=_text(row[6], "checks", TEXT_CHARS_MAX),
        managed_by=_text(row[7], "managed_by"),
        options=parse_options(_text(row[8], "options", TEXT_CHARS_MAX)) if len(row) > 8 else None,
    )


def _parse_machine(row: Row) -> MachineFields:
    host, port = parse_address(_text(row[4], "address"))
    return (
        _id(row[0], "id"),
        _app(row[1]),
        _node(row[2]),
        _region(row[3]),
        host,
        port,
        _state(row[5]),
        _integer(row[6], "cordoned", 0, 1) == 1,
        _text(row[7], "managed_by"),
        _name(row[8], "driver") if len(row) > 8 else "",
        _integer(row[9], "since_ms", 0) if len(row) > 9 else 0,
        _text(row[10], "problem", TEXT_CHARS_MAX) if len(row) > 10 else "",
        _integer(row[11], "weight", 1, WEIGHT_MAX) if len(row) > 11 else WEIGHT_USUAL,
        _integer(row[12], "version", 0) if len(row) > 12 else 0,
    )


def _make_machine(row: Row) -> MachineRow:
    return MachineRow(*_parse_machine(row))


def _parse_goal(row: Row) -> GoalRow:
    state = _member(row[1], "state", MachineState)
    if state is MachineState.STARTING:
        raise ValueError("state 'starting' is on the way to somewhere, and nothing to ask for")
    return GoalRow(
        machine=_id(row[0], "machine"),
        state=state,
        asked_by=_text(row[2], "asked_by"),
        reason=_text(row[3], "reason"),
        asked_ms=_integer(row[4], "asked_ms", 0),
        version=_integer(row[5], "version", 0) if len(row) > 5 and row[5] is not None else None,
        release=_release(row[6]) if len(row) > 6 else "",
    )


def _release(value: SqlValue) -> str:
    """Return what a release is called; empty for none."""
    return "" if value == "" else _matching(value, "release", RELEASE)


def _parse_check(row: Row) -> CheckRow:
    return CheckRow(
        machine=_id(row[0], "machine"),
        name=_text(row[1], "name"),
        node=_node(row[2]),
        status=_member(row[3], "status", CheckStatus),
        output=_text(row[4], "output", TEXT_CHARS_MAX),
        updated_ms=_integer(row[5], "updated_ms", 0),
        since_ms=_integer(row[6], "since_ms", 0) if len(row) > 6 else 0,
    )


def _parse_load(row: Row) -> LoadRow:
    return LoadRow(
        machine=_id(row[0], "machine"),
        node=_id(row[1], "node"),
        in_flight=_integer(row[2], "in_flight", 0),
        updated_ms=_integer(row[3], "updated_ms", 0),
    )


class TableSpec(NamedTuple):
    """How many columns a row has at least, how many of them, from the left, are its key, and who reads it.

    `added` more came later: rows of nodes that are not upgraded yet do without.
    """

    columns: int
    pk: int
    parse: Callable[[Row], Entity]
    added: int = 0


MACHINE_COLUMNS: Final = 8

TABLES: Final[dict[str, TableSpec]] = {
    "nodes": TableSpec(5, 1, _parse_node, added=1),
    "regions": TableSpec(4, 1, _parse_region),
    "apps": TableSpec(3, 1, _parse_app),
    "hostnames": TableSpec(4, 2, _parse_hostname),
    "services": TableSpec(8, 2, _parse_service, added=1),
    "machines": TableSpec(MACHINE_COLUMNS, 1, _make_machine, added=5),
    "goals": TableSpec(5, 1, _parse_goal, added=2),
    "checks": TableSpec(6, 2, _parse_check, added=1),
    "loads": TableSpec(4, 2, _parse_load),
}
