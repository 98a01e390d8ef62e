"""Backups of one replica's file: what is in them, what is refused, and what they come back as."""

from __future__ import annotations

import sqlite3
import threading
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from replication import backup as backup_module
from replication.backup import BackupError, check_backup, make_backup, restore_backup
from replication.schema import Schema
from replication.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

NOW = 1_700_000_000_000
SCHEMA = Schema.parse("CREATE TABLE t (k INTEGER PRIMARY KEY, v);")

Open = "Callable[[Path], Store]"


@pytest.fixture
def opened() -> Iterator[Open]:
    stores = []

    def open_store(path: Path) -> Store:
        stores.append(Store.open(path, SCHEMA))
        return stores[-1]

    yield open_store
    for store in stores:
        store.close()


@pytest.fixture
def database(tmp_path: Path, opened: Open) -> Path:
    """A replica that somebody has open, with rows on several pages."""
    path = tmp_path / "node" / "data.db"
    path.parent.mkdir()
    put(opened(path), *range(1, 101))
    return path


def put(store: Store, *keys: int) -> None:
    store.execute([("INSERT INTO t VALUES (?, ?)", (key, f"value {key} " * 20)) for key in keys], NOW)


def keys(store: Store) -> list[int]:
    return [key for (key,) in store.connection.execute("SELECT k FROM t ORDER BY k")]


def names(directory: Path) -> list[str]:
    return sorted(file.name for file in directory.iterdir())


def test_a_backup_holds_what_was_written_and_nothing_later(
    database: Path, tmp_path: Path, opened: Open
) -> None:
    store = opened(database)
    made = make_backup(database, tmp_path / "copy.db", NOW)
    put(store, 101)
    assert (made.site, made.version, made.taken_ms) == (store.site, 1, NOW)
    assert check_backup(tmp_path / "copy.db") == made
    restore_backup(made.path, tmp_path / "restored.db", NOW)
    assert keys(opened(tmp_path / "restored.db")) == list(range(1, 101))


def test_writes_go_on_while_a_backup_is_copied(
    database: Path, tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(database)
    copy = backup_module._copy
    written = []

    def write_meanwhile(source: sqlite3.Connection, part: Path) -> None:
        put(store, 101)  # the view is fixed, and the write lock is free again
        with closing(sqlite3.connect(database)) as foreign, foreign:
            foreign.execute("INSERT INTO t VALUES (102, 'foreign')")
        written.append(part)
        copy(source, part)

    monkeypatch.setattr(backup_module, "_copy", write_meanwhile)
    make_backup(database, tmp_path / "copy.db", NOW)
    assert len(written) == 1
    restore_backup(tmp_path / "copy.db", tmp_path / "restored.db", NOW)
    restored = opened(tmp_path / "restored.db")
    assert keys(restored) == list(range(1, 101))
    assert restored.capture(NOW) is None


def test_a_backup_waits_until_foreign_writes_are_gathered(
    database: Path, tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(database)
    with closing(sqlite3.connect(database)) as foreign, foreign:
        foreign.execute("INSERT INTO t VALUES (101, 'foreign')")
    waits = []

    def gather(_seconds: float) -> None:
        waits.append(1)
        store.capture(NOW)

    monkeypatch.setattr(backup_module.time, "sleep", gather)
    assert make_backup(database, tmp_path / "copy.db", NOW).version == 2
    assert waits == [1]


def test_a_backup_without_anyone_to_gather_foreign_writes_is_refused(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backup_module, "GATHER_S", 0.0)
    with closing(sqlite3.connect(database)) as foreign, foreign:
        foreign.execute("INSERT INTO t VALUES (101, 'foreign')")
    with pytest.raises(BackupError, match="start the node"):
        make_backup(database, tmp_path / "copy.db", NOW)
    assert names(tmp_path) == ["node"]


def test_a_backup_overwrites_nothing(database: Path, tmp_path: Path) -> None:
    (tmp_path / "copy.db").write_text("precious")
    with pytest.raises(BackupError, match="overwrites nothing"):
        make_backup(database, tmp_path / "copy.db", NOW)
    assert (tmp_path / "copy.db").read_text() == "precious"


def test_a_backup_is_for_its_owner_alone_and_needs_no_file_beside_it(database: Path, tmp_path: Path) -> None:
    made = make_backup(database, tmp_path / "copy.db", NOW)
    assert made.path.stat().st_mode & 0o777 == 0o600
    assert names(tmp_path) == ["copy.db", "node"]
    with closing(sqlite3.connect(made.path)) as copy:
        assert copy.execute("PRAGMA journal_mode").fetchone() == ("delete",)


def test_a_directory_keeps_the_newest_and_what_is_not_ours(database: Path, tmp_path: Path) -> None:
    directory = tmp_path / "backups"
    directory.mkdir()
    (directory / "data-notes.db").write_text("mine")
    for second in range(4):
        make_backup(database, directory, NOW + second * 1000, keep=2)
    assert names(directory) == [
        "data-20231114T221322.000Z.db",
        "data-20231114T221323.000Z.db",
        "data-notes.db",
    ]


def test_the_backup_just_made_is_kept_when_the_clock_went_back(database: Path, tmp_path: Path) -> None:
    directory = tmp_path / "backups"
    directory.mkdir()
    for at in (NOW, NOW + 1000, NOW - 1000):
        made = make_backup(database, directory, at, keep=1)
    assert names(directory) == [made.path.name]


def test_what_a_killed_backup_left_is_removed_by_the_next(database: Path, tmp_path: Path) -> None:
    directory = tmp_path / "backups"
    directory.mkdir()
    (directory / ".data-20231114T221319.000Z.db.part").write_bytes(b"half a file")
    (directory / ".data-20231114T221319.000Z.db.part-journal").write_bytes(b"and more")
    made = make_backup(database, directory, NOW)
    assert names(directory) == [made.path.name]


def test_a_directory_for_more_than_one_is_made(database: Path, tmp_path: Path) -> None:
    directory = tmp_path / "backups"
    made = make_backup(database, directory, NOW, keep=2)
    assert names(directory) == [made.path.name]
    with pytest.raises(BackupError, match=r"exists|directory"):
        make_backup(database, made.path, NOW, keep=2)


@pytest.mark.parametrize("keep", [0, -1])
def test_keeping_none_is_refused(database: Path, tmp_path: Path, keep: int) -> None:
    with pytest.raises(BackupError, match="from 1 on"):
        make_backup(database, tmp_path, NOW, keep=keep)


def test_a_failed_backup_leaves_the_old_ones(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "backups"
    directory.mkdir()
    made = make_backup(database, directory, NOW, keep=1)

    def fail(_source: sqlite3.Connection, part: Path) -> None:
        part.write_bytes(b"half a file")
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(backup_module, "_copy", fail)
    with pytest.raises(BackupError, match="disk is full"):
        make_backup(database, directory, NOW + 1000, keep=1)
    assert names(directory) == [made.path.name]


def test_one_backup_at_a_time_goes_into_a_directory(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = backup_module._copy
    refusals = []

    def second_meanwhile(source: sqlite3.Connection, part: Path) -> None:
        with pytest.raises(BackupError, match="under way") as refusal:
            make_backup(database, tmp_path / "second.db", NOW)
        refusals.append(refusal)
        copy(source, part)

    monkeypatch.setattr(backup_module, "_copy", second_meanwhile)
    make_backup(database, tmp_path / "first.db", NOW)
    assert len(refusals) == 1
    assert names(tmp_path) == ["first.db", "node"]


def test_a_damaged_source_is_noticed_when_it_is_backed_up(
    database: Path, tmp_path: Path, opened: Open
) -> None:
    opened(database).close()
    content = bytearray(database.read_bytes())
    page = len(content) // 4096 // 2 * 4096
    content[page : page + 64] = bytes(64)
    database.write_bytes(content)
    with pytest.raises(BackupError, match=r"damaged|malformed"):
        make_backup(database, tmp_path / "copy.db", NOW)
    assert names(tmp_path) == ["node"]


def _flip(content: bytearray) -> None:
    at = content.index(b"value 50 ")  # within a value, where SQLite's own check does not look
    content[at] ^= 1


def _truncate(content: bytearray) -> None:
    del content[-4096:]


def _scribble(content: bytearray) -> None:
    content[:100] = b"\x55" * 100


def _append(content: bytearray) -> None:
    content += b"more"


@pytest.mark.parametrize("harm", [_flip, _truncate, _scribble, _append])
def test_a_damaged_backup_is_refused_and_what_is_in_place_stays(
    database: Path, tmp_path: Path, opened: Open, harm: Callable[[bytearray], None]
) -> None:
    made = make_backup(database, tmp_path / "copy.db", NOW)
    content = bytearray(made.path.read_bytes())
    harm(content)
    made.path.write_bytes(content)
    before = names(database.parent)
    with pytest.raises(BackupError, match=r"copy\.db is damaged"):
        restore_backup(made.path, database, NOW)
    assert names(database.parent) == before
    assert keys(opened(database)) == list(range(1, 101))


@pytest.mark.parametrize("content", [b"", b"no database at all" * 100])
def test_what_is_no_backup_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "copy.db").write_bytes(content)
    with pytest.raises(BackupError, match=r"copy\.db is (damaged|not a backup)"):
        restore_backup(tmp_path / "copy.db", tmp_path / "data.db", NOW)
    assert names(tmp_path) == ["copy.db"]


def test_a_plain_copy_of_a_replica_is_no_backup(database: Path, tmp_path: Path, opened: Open) -> None:
    opened(database).close()
    (tmp_path / "copy.db").write_bytes(database.read_bytes())
    with pytest.raises(BackupError, match="not a backup"):
        restore_backup(tmp_path / "copy.db", tmp_path / "data.db", NOW)


@pytest.mark.parametrize("name", ["missing.db", "missing/copy.db"])
def test_a_missing_backup_or_database_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(BackupError, match="missing"):
        restore_backup(tmp_path / name, tmp_path / "data.db", NOW)
    with pytest.raises(BackupError, match="missing"):
        make_backup(tmp_path / name, tmp_path / "copy.db", NOW)
    assert names(tmp_path) == []


def test_a_restored_replica_is_a_new_site_that_knows_the_old_ones_versions(
    database: Path, tmp_path: Path, opened: Open
) -> None:
    source = opened(database)
    make_backup(database, tmp_path / "copy.db", NOW)
    first = restore_backup(tmp_path / "copy.db", tmp_path / "first.db", NOW)
    second = restore_backup(tmp_path / "copy.db", tmp_path / "second.db", NOW)
    restored = opened(tmp_path / "first.db")
    assert restored.site == first.site
    assert len({source.site, first.site, second.site}) == 3
    assert restored.seen()[source.site].encode() == [(1, 1)]
    put(restored, 101)
    put(source, 102)
    assert restored.seen()[restored.site].encode() == [(1, 1)]
    for here, there in ((source, restored), (restored, source)):
        here.apply(there.read_log(there.site, 1, 9, 1 << 20), NOW)
    assert keys(source) == keys(restored) == list(range(1, 103))
    assert source.digest("t") == restored.digest("t")


def test_a_backup_put_in_place_by_hand_is_a_new_site_too(
    database: Path, tmp_path: Path, opened: Open
) -> None:
    source = opened(database)
    make_backup(database, tmp_path / "copy.db", NOW)
    assert opened(tmp_path / "copy.db").site != source.site


def test_what_was_in_the_place_is_set_aside_with_its_wal(
    database: Path, tmp_path: Path, opened: Open
) -> None:
    make_backup(database, tmp_path / "copy.db", NOW)
    place = tmp_path / "place.db"
    writer = opened(place)
    put(writer, 7)
    wal = place.with_name("place.db-wal").read_bytes()
    crashed = tmp_path / "crashed"
    crashed.mkdir()
    (crashed / "data.db").write_bytes(place.read_bytes())
    (crashed / "data.db-wal").write_bytes(wal)
    restored = restore_backup(tmp_path / "copy.db", crashed / "data.db", NOW)
    assert names(crashed) == [
        "data.db",
        "data.db.replaced-20231114T221320.000Z",
        "data.db.replaced-20231114T221320.000Z-wal",
    ]
    assert keys(opened(crashed / "data.db")) == list(range(1, 101))
    assert restored.replaced is not None
    assert keys(opened(restored.replaced)) == [7]


def test_a_backup_of_a_restored_replica_is_one_like_any_other(
    database: Path, tmp_path: Path, opened: Open
) -> None:
    make_backup(database, tmp_path / "copy.db", NOW)
    restored = restore_backup(tmp_path / "copy.db", tmp_path / "second.db", NOW)
    made = make_backup(tmp_path / "second.db", tmp_path / "again.db", NOW + 1)
    assert (made.site, made.taken_ms) == (restored.site, NOW + 1)


def test_backups_run_on_any_thread(database: Path, tmp_path: Path) -> None:
    thread = threading.Thread(target=make_backup, args=(database, tmp_path / "copy.db", NOW))
    thread.start()
    thread.join()
    assert check_backup(tmp_path / "copy.db").version == 1
