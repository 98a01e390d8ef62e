"""A file that others replace, change or read while a store has it open."""

import contextlib
import shutil
import sqlite3
import threading
from contextlib import closing

import pytest

from replication.core.change import RowChange
from replication.errors import ReplacedError, StoreError
from replication.schema import Schema
from replication.store import Store

NOW = 1_700_000_000_000
SCHEMA = Schema.parse("CREATE TABLE t (k INTEGER PRIMARY KEY, v);")
PAGE = "x" * 4000


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.db"


@pytest.fixture
def store(path):
    store = Store.open(path, SCHEMA)
    store.execute([("INSERT INTO t VALUES (1, 'one')", ())], NOW)
    store.foreign_writes()
    yield store
    store.close()


def write(store, k, v="v"):
    return store.execute([("REPLACE INTO t (k, v) VALUES (?, ?)", (k, v))], NOW)[1]


def shell(path, *statements):
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        for sql in statements:
            other.execute(sql)


def back_up(path):
    older = path.with_name("older.db")
    with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(older)) as target:
        source.backup(target)
    return older


def restore(older, path):
    with closing(sqlite3.connect(older)) as source, closing(sqlite3.connect(path)) as target:
        source.backup(target)


def assert_becomes_another_site(store, path):
    former = store.site
    store.close()
    with closing(Store.open(path, SCHEMA)) as again:
        assert again.site != former
        assert write(again, 7).changesets[0].version == 1


@pytest.mark.parametrize(
    "drop",
    [
        "DROP TABLE t",
        "DROP TRIGGER _repl_insert_t",
        "ALTER TABLE t RENAME TO u",
        "ALTER TABLE t ADD COLUMN more",
    ],
)
def test_what_others_drop_is_made_again_and_writes_go_on(store, path, drop):
    shell(path, drop)
    assert store.foreign_writes()
    shell(path, "INSERT INTO t (k, v) VALUES (2, 'two')")
    assert store.capture(NOW).changes == (RowChange("t", (2,), (2, "two")),)
    assert write(store, 3) is not None
    assert ("more" in store.schema_problem) is ("more" in drop)


def test_an_older_state_put_into_the_file_is_noticed_and_becomes_another_site(store, path):
    older = back_up(path)
    write(store, 2)
    restore(older, path)
    with pytest.raises(ReplacedError, match="another state"):
        store.foreign_writes()
    assert_becomes_another_site(store, path)


def test_nothing_is_written_to_a_file_that_holds_an_older_state(store, path):
    older = back_up(path)
    write(store, 2)
    restore(older, path)
    for _ in range(2):
        with pytest.raises(ReplacedError):
            write(store, 3)
    assert_becomes_another_site(store, path)


def test_a_failing_statement_does_not_make_an_older_state_ours(store, path):
    older = back_up(path)
    write(store, 2)
    restore(older, path)
    with pytest.raises(ReplacedError):
        store.execute([("INSERT INTO nowhere VALUES (1)", ())], NOW)
    assert_becomes_another_site(store, path)


def test_an_older_file_copied_over_it_is_noticed(store, path):
    older = back_up(path)
    write(store, 2)
    store.checkpoint(0, 0)
    shutil.copyfile(older, path)
    with pytest.raises(ReplacedError, match="another state"):
        store.check_file()
    assert_becomes_another_site(store, path)


def test_an_older_file_that_does_not_fit_the_wal_is_noticed_after_a_failure_too(store, path):
    older = back_up(path)
    write(store, 2)
    store.checkpoint(0, 0)
    store.check_file()
    shell(
        path,
        "PRAGMA writable_schema = ON",
        "UPDATE sqlite_master SET rootpage = 9999 WHERE name = '_repl_state'",
        "PRAGMA schema_version = 999",
    )
    with pytest.raises(StoreError, match="malformed"):
        write(store, 3)
    shutil.copyfile(older, path)
    with pytest.raises(ReplacedError, match="another state"):
        store.foreign_writes()
    assert_becomes_another_site(store, path)


def overwrite(older, path):
    shutil.copyfile(older, path)


def put_in_place(older, path):
    older.replace(path)


@pytest.mark.parametrize(("act", "told"), [(overwrite, "another state"), (put_in_place, "another file")])
@pytest.mark.parametrize("noticed", [Store.foreign_writes, Store.check_file])
def test_a_file_is_what_was_put_there_and_nothing_of_the_former_wal(store, path, act, told, noticed):
    older = back_up(path)
    former = store.site
    for number in range(2, 30):
        write(store, number, PAGE * 10)
    store.checkpoint(0, 0)
    store.foreign_writes()
    for number in range(2, 60):
        write(store, number, PAGE)
    assert store.wal_bytes() > 100_000
    with closing(sqlite3.connect(path)) as reader:
        reader.execute("SELECT count(*) FROM t").fetchone()
        act(older, path)
        with pytest.raises(ReplacedError, match=told):
            noticed(store)
        store.close()
    with closing(Store.open(path, SCHEMA)) as again:
        assert again.site != former
        assert again.connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert again.connection.execute("SELECT k, v FROM t").fetchall() == [(1, "one")]


def test_a_file_that_was_removed_is_noticed_and_made_anew(store, path):
    write(store, 2)
    path.unlink()
    with pytest.raises(ReplacedError, match="removed"):
        store.foreign_writes()
    store.close()
    assert not path.exists()
    with closing(Store.open(path, SCHEMA)) as again:
        assert again.connection.execute("SELECT count(*) FROM t").fetchone() == (0,)


def test_something_that_is_no_database_is_noticed_after_a_while(store, path):
    store.checkpoint(0, 0)
    path.write_bytes(b"no database" * 10_000)

    def look() -> None:
        for _ in range(100):
            store.foreign_writes()

    with pytest.raises(ReplacedError, match="no database of ours"):
        look()


def test_checkpoints_of_ours_and_others_are_no_reason_to_refuse(store, path):
    for number in range(20):
        write(store, number, PAGE * 400)
        assert store.wal_bytes() or number
        shell(path, f"INSERT INTO t VALUES ({number + 100}, 'x')", "PRAGMA wal_checkpoint(TRUNCATE)")
        store.foreign_writes()
        store.capture(NOW)
        store.check_file()


def test_a_file_that_is_no_replica_any_more_is_noticed(store, path):
    shell(path, "DROP TABLE _repl_state")
    with pytest.raises(StoreError, match="not a replica"):
        store.foreign_writes()


@contextlib.contextmanager
def readers_that_take_turns(path):
    """Have somebody read at any moment: each begins before the one before ends."""
    is_over = threading.Event()
    has_begun = threading.Event()

    def take_turns():
        connections = [sqlite3.connect(path, isolation_level=None, timeout=30) for _ in range(2)]
        reading = None
        while not is_over.is_set():
            for connection in connections:
                connection.execute("BEGIN")
                connection.execute("SELECT sum(length(v)) FROM t").fetchone()
                if reading is not None:
                    reading.execute("COMMIT")
                reading = connection
                has_begun.set()
        for connection in connections:
            connection.close()

    thread = threading.Thread(target=take_turns)
    thread.start()
    has_begun.wait(10)
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def test_the_wal_stays_bounded_under_readers_that_come_and_go(store, path):
    largest = 0
    with readers_that_take_turns(path):
        for number in range(300):
            write(store, number % 10, f"{number:40000}")
            store.checkpoint(1 << 20, 100)
            largest = max(largest, store.wal_bytes())
    assert 1 << 19 < largest < 4 << 20


def test_a_wal_that_a_reader_holds_up_is_emptied_when_it_has_gone(store, path):
    reader = sqlite3.connect(path, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM t").fetchone()
    for number in range(50):
        write(store, number, PAGE * 10)
    assert store.checkpoint(1 << 20, 0) > 1 << 20
    reader.close()
    assert store.checkpoint(1 << 20, 0) == 0


def test_a_wal_that_one_large_transaction_made_shrinks_by_itself(store):
    write(store, 1, PAGE * 10_000)
    assert store.wal_bytes() > 32 << 20
    write(store, 2)
    assert store.wal_bytes() <= 8 << 20
