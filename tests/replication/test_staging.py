from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING

import pytest

from replication.core.change import RowChange
from replication.core.clock import Clock
from replication.schema import Schema
from replication.staging import StagedRow, select_shown
from replication.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from replication.core.change import Commit

SCHEMA = Schema.parse(
    """
    CREATE TABLE apps (name TEXT NOT NULL PRIMARY KEY, network TEXT NOT NULL DEFAULT 'usual', size INTEGER);
    CREATE TABLE hosts (port INTEGER NOT NULL, app TEXT, host TEXT NOT NULL, PRIMARY KEY (host, port));
    CREATE TABLE machines (id TEXT NOT NULL PRIMARY KEY, app TEXT);
    """
)
STAGED = ("apps", "hosts")
NOW_MS = 1_700_000_000_000


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "test.db"


@pytest.fixture
def store(file: Path) -> Iterator[Store]:
    store = Store.open(file, SCHEMA, staged=STAGED)
    yield store
    store.close()


def write(store: Store, *statements: str) -> Commit:
    _, commit = store.execute([(sql, ()) for sql in statements], NOW_MS)
    assert commit is not None
    return commit


def shown(store: Store, table: str = "apps") -> list[tuple[object, ...]]:
    return sorted(store.connection.execute(select_shown(store.connection, SCHEMA.tables[table])))


def held(store: Store) -> list[StagedRow]:
    return store.read_staged().rows


def release_all(store: Store) -> Commit | None:
    return store.release_staged({staged.clock for staged in held(store)})


def test_write_to_a_staged_table_is_passed_on_and_not_shown(store: Store) -> None:
    commit = write(
        store, "INSERT INTO apps (name) VALUES ('a')", "INSERT INTO machines (id, app) VALUES ('m', 'a')"
    )
    assert commit.changes == (RowChange("machines", ("m",), ("m", "a")),)
    assert commit.held == (RowChange("apps", ("a",), ("a", "usual", None)),)
    assert len(commit.changesets) == 1
    assert shown(store) == []
    assert shown(store, "machines") == [("m", "a")]


def test_released_rows_are_a_commit_of_their_own(store: Store) -> None:
    first = write(store, "INSERT INTO apps (name) VALUES ('a')")
    commit = release_all(store)
    assert commit is not None
    assert commit.seq == first.seq + 1
    assert commit.changes == (RowChange("apps", ("a",), ("a", "usual", None)),)
    assert (commit.changesets, commit.held) == ((), ())
    assert shown(store) == [("a", "usual", None)]
    assert held(store) == []
    assert release_all(store) is None


def test_changed_and_deleted_rows_are_shown_as_they_were(store: Store) -> None:
    write(store, "INSERT INTO apps VALUES ('a', 'n', 1), ('b', 'n', 2), ('c', 'n', 3)")
    release_all(store)
    write(store, "UPDATE apps SET size = 10 WHERE name = 'a'", "DELETE FROM apps WHERE name = 'b'")
    write(store, "INSERT OR REPLACE INTO apps VALUES ('c', 'n', 30)")
    write(store, "UPDATE apps SET size = 100 WHERE name = 'a'")
    assert shown(store) == [("a", "n", 1), ("b", "n", 2), ("c", "n", 3)]
    assert [(staged.pk, staged.shown, staged.row) for staged in held(store)] == [
        (("a",), ("a", "n", 1), ("a", "n", 100)),
        (("b",), ("b", "n", 2), None),
        (("c",), ("c", "n", 3), ("c", "n", 30)),
    ]
    release_all(store)
    assert shown(store) == [("a", "n", 100), ("c", "n", 30)]


def test_keys_of_several_columns_and_of_other_types(store: Store) -> None:
    write(store, "INSERT INTO hosts VALUES (80, 'a', 'h'), (81, 'a', 'h')")
    release_all(store)
    write(store, "UPDATE hosts SET app = 'b' WHERE port = 81", "UPDATE hosts SET host = 'i' WHERE port = 80")
    assert shown(store, "hosts") == [(80, "a", "h"), (81, "a", "h")]
    release_all(store)
    assert shown(store, "hosts") == [(80, "a", "i"), (81, "b", "h")]


def test_only_the_named_changesets_are_released(store: Store) -> None:
    write(store, "INSERT INTO apps (name) VALUES ('a'), ('b')")
    write(store, "UPDATE apps SET size = 1 WHERE name = 'b'", "INSERT INTO apps (name) VALUES ('c')")
    by_name = {staged.pk[0]: staged.clock for staged in held(store)}
    assert by_name["b"] == by_name["c"] != by_name["a"]
    store.release_staged({by_name["a"]})
    assert shown(store) == [("a", "usual", None)]
    # What was looked at before it was written again is not what is released.
    store.release_staged({by_name["a"]})
    assert len(held(store)) == 2


def test_merged_changes_are_held_back_under_the_clock_of_their_writer(store: Store) -> None:
    other = Store.open(":memory:", SCHEMA)
    commit = write(other, "INSERT INTO apps (name) VALUES ('a')", "INSERT INTO machines VALUES ('m', 'a')")
    merged = store.apply(commit.changesets, NOW_MS).commit
    assert merged is not None
    assert [change.table for change in merged.changes] == ["machines"]
    (staged,) = held(store)
    assert staged.clock.site == other.site
    assert shown(store) == []
    gone = write(other, "DELETE FROM apps")
    store.apply(gone.changesets, NOW_MS)
    assert held(store) == [], "it is again what it is shown as"
    other.close()


def test_snapshot_is_held_back(store: Store) -> None:
    other = Store.open(":memory:", SCHEMA)
    write(other, "INSERT INTO apps (name) VALUES ('a')")
    store.apply_snapshot(other.snapshot(1 << 20), NOW_MS)
    other.close()
    assert shown(store) == []
    release_all(store)
    assert shown(store) == [("a", "usual", None)]


def test_foreign_client_is_held_back_from_its_first_statement_on(store: Store, file: Path) -> None:
    with sqlite3.connect(file) as foreign:
        foreign.execute("INSERT INTO apps (name) VALUES ('a')")
    foreign.close()
    assert shown(store) == []
    assert held(store) == [], "nobody's yet: no changeset stands for it"
    store.capture(NOW_MS)
    (staged,) = held(store)
    assert staged.clock.site == store.site


def test_triggers_that_somebody_drops_are_made_again(store: Store, file: Path) -> None:
    store.foreign_writes()
    with sqlite3.connect(file) as foreign:
        foreign.execute("DROP TRIGGER _repl_stage_insert_apps")
    foreign.close()
    assert store.foreign_writes()
    write(store, "INSERT INTO apps (name) VALUES ('a')")
    assert shown(store) == []


def test_what_is_held_back_and_strikes_outlive_a_restart(file: Path) -> None:
    store = Store.open(file, SCHEMA, staged=STAGED)
    write(store, "INSERT INTO apps (name) VALUES ('a')")
    (staged,) = held(store)
    other = Clock(staged.clock.hlc, store.site)
    store.put_strikes({staged.clock: 2})
    store.put_strikes({other: 1})
    store.close()
    store = Store.open(file, SCHEMA, staged=STAGED)
    found = store.read_staged()
    assert found.rows == [staged]
    assert found.strikes == {staged.clock: 1}
    store.release_staged({staged.clock})
    assert store.read_staged() == ([], {})
    store.close()


def test_tables_that_are_not_staged_any_more_are_shown_as_they_are(file: Path) -> None:
    store = Store.open(file, SCHEMA, staged=STAGED)
    write(store, "INSERT INTO apps (name) VALUES ('a')")
    store.close()
    Store.open(file, SCHEMA).close()  # who knows nothing of it leaves it
    store = Store.open(file, SCHEMA, staged=STAGED)
    assert shown(store) == []
    store.close()
    store = Store.open(file, SCHEMA, staged=())
    assert shown(store) == [("a", "usual", None)]
    assert write(store, "INSERT INTO apps (name) VALUES ('b')").held == ()
    names = [name for (name,) in store.connection.execute("SELECT name FROM sqlite_master")]
    assert not [name for name in names if name.startswith("_repl_stage")]
    store.close()


def test_columns_that_are_added_are_in_what_was_held_back(file: Path) -> None:
    store = Store.open(file, SCHEMA, staged=STAGED)
    write(store, "INSERT INTO apps (name) VALUES ('a')")
    release_all(store)
    write(store, "UPDATE apps SET size = 1")
    store.close()
    wider = Schema.parse(
        "CREATE TABLE apps (name TEXT NOT NULL PRIMARY KEY, network TEXT NOT NULL DEFAULT 'usual', "
        "size INTEGER, extra TEXT NOT NULL DEFAULT 'x');"
        "CREATE TABLE hosts (port INTEGER NOT NULL, app TEXT, host TEXT NOT NULL, PRIMARY KEY (host, port));"
        "CREATE TABLE machines (id TEXT NOT NULL PRIMARY KEY, app TEXT)"
    )
    store = Store.open(file, wider, staged=STAGED)
    rows = store.connection.execute(select_shown(store.connection, wider.tables["apps"])).fetchall()
    assert rows == [("a", "usual", None, "x")]
    write(store, "UPDATE apps SET extra = 'y'")
    release_all(store)
    store.close()


def test_deletion_that_nobody_remembers_can_be_released_all_the_same(store: Store) -> None:
    write(store, "INSERT INTO apps (name) VALUES ('a')")
    release_all(store)
    write(store, "DELETE FROM apps")
    store.connection.execute("DELETE FROM _repl_clock_apps")
    assert shown(store) == [("a", "usual", None)]
    release_all(store)
    assert shown(store) == []
