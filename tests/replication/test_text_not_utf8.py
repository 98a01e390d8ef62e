"""SQLite takes any bytes for text. A client that writes such a text must harm nobody."""

from pathlib import Path

from replication.core.change import some
from replication.database import Database
from replication.schema import Schema
from replication.store import Store

NOW = 1_700_000_000_000
SCHEMA = Schema.parse("CREATE TABLE t (k INTEGER PRIMARY KEY, v TEXT NOT NULL DEFAULT '');")
WRITE = [("INSERT INTO t VALUES (1, CAST(x'ff41' AS TEXT)), (2, 'sound')", ())]
SHOWN = [(1, "\ufffdA"), (2, "sound")]


def test_snapshot_is_made_of_a_replica_that_holds_one(tmp_path: Path) -> None:
    source = Store.open(tmp_path / "a.db", SCHEMA)
    other = Store.open(tmp_path / "b.db", SCHEMA)
    source.execute(WRITE, NOW)
    other.apply_snapshot(source.snapshot(1_000), NOW)
    assert other.connection.execute("SELECT * FROM t ORDER BY k").fetchall() == SHOWN
    source.close()
    other.close()


async def test_query_finds_all_rows_of_a_table_that_holds_one(tmp_path: Path) -> None:
    database = await Database.open(tmp_path / "a.db", SCHEMA, lambda _: None, rows_max=10, timeout_ms=1_000)
    try:
        await database.commit(lambda store: store.execute(WRITE, NOW), lambda result: some(result[1]))
        assert (await database.query("SELECT * FROM t ORDER BY k")).rows == SHOWN
    finally:
        await database.close()
