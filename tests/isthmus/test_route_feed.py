from __future__ import annotations

import asyncio
import sqlite3
from typing import TYPE_CHECKING

import pytest

from isthmus import route_feed
from isthmus.route_feed import RouteFeed, routing_schema
from replication.store import Store
from routing.catalog import TABLES
from routing.table import RoutingTable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from replication.core.change import Commit

PUT_APP = "INSERT INTO apps (name) VALUES (?)"
PUT_HOST = "INSERT INTO hostnames (hostname, app) VALUES (?, ?)"
PUT_SERVICE = "INSERT INTO services (app) VALUES (?)"
PUT_MACHINE = "INSERT INTO machines (id, app, node, region, address) VALUES (?, ?, 'n1', 'ams', ?)"
WEB = [
    (PUT_APP, ("web",)),
    (PUT_HOST, ("web.test", "web")),
    (PUT_SERVICE, ("web",)),
    (PUT_MACHINE, ("m1", "web", "10.0.0.1:80")),
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "a b?#%20.db"


@pytest.fixture
def store(file: Path) -> Iterator[Store]:
    store = Store.open(file, routing_schema())
    yield store
    store.close()


def write(store: Store, *statements: tuple[str, tuple[str, ...]]) -> Commit:
    _, commit = store.execute(statements, 1_700_000_000_000)
    assert commit is not None
    return commit


def machines_of(table: RoutingTable) -> list[str]:
    service = table.find(b"web.test", b"/", 80)
    return sorted(target.id for target in service.targets()) if service is not None else []


def test_text_that_is_not_utf_8_costs_its_own_row_only(store: Store, file: Path) -> None:
    write(store, *WEB, (PUT_MACHINE, ("m3", "web", "10.0.0.3:80")))
    bad = PUT_MACHINE.replace("'ams', ?", "'ams', CAST(x'31ff' AS TEXT)")
    with sqlite3.connect(file) as connection:
        for (trigger,) in connection.execute(
            "SELECT name FROM sqlite_master WHERE type = 'trigger'"
        ).fetchall():
            connection.execute(f'DROP TRIGGER "{trigger}"')
        connection.execute(bad, ("m2", "web"))
    connection.close()
    table = RoutingTable()
    RouteFeed(table, file).load()
    assert machines_of(table) == ["m1", "m3"]
    assert list(table.rejected) == [("machines", ("m2",))]


def test_replicated_schema_is_what_routing_reads() -> None:
    tables = routing_schema().tables
    assert list(tables) == list(TABLES)
    for name, spec in TABLES.items():
        assert len(tables[name].columns) == spec.columns + spec.added
        assert tuple(tables[name].columns[: spec.pk]) == tuple(tables[name].pk)


def test_empty_file_loads_as_an_empty_table(file: Path, store: Store) -> None:
    table = RoutingTable("n1")
    assert RouteFeed(table, file).load() == store.seq
    assert machines_of(table) == []


def test_loaded_table_routes_as_the_file_says(file: Path, store: Store) -> None:
    commit = write(store, *WEB)
    table = RoutingTable("n1")
    assert RouteFeed(table, file).load() == commit.seq
    assert machines_of(table) == ["m1"]


def test_commits_bring_a_table_to_where_a_load_does(file: Path, store: Store) -> None:
    followed, loaded = RoutingTable("n1"), RoutingTable("n1")
    feed = RouteFeed(followed, file)
    feed.load()
    for statements in (
        WEB,
        [(PUT_MACHINE, ("m2", "web", "10.0.0.2:80"))],
        [("UPDATE machines SET state = 'stopped' WHERE id = ?", ("m1",))],
        [("DELETE FROM machines WHERE id = ?", ("m1",))],
    ):
        for change in write(store, *statements).changes:
            feed.apply(change)
        RouteFeed(loaded, file).load()
        for name in TABLES:
            assert followed.rows(name) == loaded.rows(name)
    assert machines_of(followed) == ["m2"]


def test_load_removes_what_is_no_longer_there(file: Path, store: Store) -> None:
    write(store, *WEB)
    table = RoutingTable("n1")
    feed = RouteFeed(table, file)
    feed.load()
    write(store, ("DELETE FROM machines", ()))
    feed.load()
    assert machines_of(table) == []


def test_row_that_cannot_be_used_is_named_and_the_others_take_effect(file: Path, store: Store) -> None:
    write(store, *WEB, (PUT_MACHINE, ("bad", "web", "not an address")))
    table = RoutingTable("n1")
    RouteFeed(table, file).load()
    assert machines_of(table) == ["m1"]
    assert list(table.rejected) == [("machines", ("bad",))]


def test_file_is_read_while_another_connection_writes(file: Path, store: Store) -> None:
    commit = write(store, *WEB)
    other = sqlite3.connect(file, isolation_level=None)
    try:
        other.execute("BEGIN IMMEDIATE")
        other.execute(PUT_MACHINE, ("m2", "web", "10.0.0.2:80"))
        table = RoutingTable("n1")
        assert RouteFeed(table, file).load() == commit.seq
        assert machines_of(table) == ["m1"]
    finally:
        other.execute("ROLLBACK")
        other.close()


def test_absent_file_is_an_error_and_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(sqlite3.OperationalError):
        RouteFeed(RoutingTable("n1"), tmp_path / "none.db").load()
    assert list(tmp_path.iterdir()) == []


async def test_reload_ends_where_a_load_does_and_lets_requests_run_meanwhile(
    file: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(route_feed, "ROWS_A_TURN", 10)
    machines = [(PUT_MACHINE, (f"old{n}", "web", "10.0.0.1:80")) for n in range(50)]
    write(store, *WEB[:3], *machines)
    table = RoutingTable("n1")
    feed = RouteFeed(table, file)
    feed.load()
    machines = [(PUT_MACHINE, (f"new{n}", "web", "10.0.0.2:80")) for n in range(50)]
    commit = write(store, ("DELETE FROM machines", ()), *machines)

    reloading = asyncio.create_task(feed.reload())
    seen = set()
    while not reloading.done():
        await asyncio.sleep(0)
        seen.add(len(machines_of(table)))
    assert reloading.result() == commit.seq
    assert machines_of(table) == sorted(f"new{n}" for n in range(50))
    assert len(seen) > 5, "there were turns between the rows"
    assert min(seen) >= 50, "a request always finds machines"


def test_rows_that_are_held_back_are_read_as_they_were(file: Path) -> None:
    store = Store.open(file, routing_schema())
    write(store, *WEB)
    store.close()
    held = Store.open(file, routing_schema(), staged=("apps", "hostnames", "services"))
    write(held, ("UPDATE hostnames SET app = 'other'", ()), (PUT_HOST, ("new.test", "web")))
    table = RoutingTable("n1")
    RouteFeed(table, file).load()
    assert machines_of(table) == ["m1"]
    assert table.find(b"new.test", b"/", 80) is None
    held.close()
