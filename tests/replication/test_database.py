"""Writers that share transactions, and disks that take no writes."""

import asyncio
import sqlite3
from contextlib import asynccontextmanager

import pytest

import replication.database
from replication.core.change import some
from replication.core.clock import SiteId
from replication.database import Database, is_transient
from replication.errors import BusyError, ReadOnlyError, StatementError, StoreError
from replication.schema import Schema
from replication.store import Store

NOW = 1_700_000_000_000
SCHEMA = Schema.parse("CREATE TABLE t (k INTEGER PRIMARY KEY, v CHECK (v IS NOT 'bad'));")
INSERT = "INSERT INTO t VALUES (?, ?)"


@asynccontextmanager
async def opened(path, **settings):
    commits = []
    database = await Database.open(
        path, SCHEMA, commits.append, rows_max=10_000, timeout_ms=5_000, **settings
    )
    try:
        yield database, commits
    finally:
        await database.close()


async def write(database, key, value="", sql=INSERT):
    return await database.execute([(sql, (key, value))], NOW)


async def keys(database):
    return [key for (key,) in (await database.query("SELECT k FROM t ORDER BY k")).rows]


@pytest.fixture
def file(tmp_path):
    return tmp_path / "isthmus.db"


# --- writers together ---------------------------------------------------------------------------------


async def test_writers_at_the_same_time_share_transactions_and_each_learns_its_version(file):
    async with opened(file) as (database, commits):
        written = await asyncio.gather(*(write(database, key) for key in range(100)))
        assert len(commits) < 10
        holds = {commit.changesets[0].version: {row.pk[0] for row in commit.changes} for commit in commits}
        assert all(key in holds[item.version] for key, item in enumerate(written))
        assert all(item.rows_affected == [1] for item in written)
        assert await keys(database) == list(range(100))


async def test_a_writer_that_fails_leaves_all_of_its_own_undone_and_nothing_of_others(file):
    async with opened(file) as (database, commits):
        both = [(INSERT, (50, "")), (INSERT, (51, "bad"))]
        outcomes = await asyncio.gather(
            *(write(database, key) for key in range(20)),
            database.execute(both, NOW),
            *(write(database, key) for key in range(20, 40)),
            return_exceptions=True,
        )
        (error,) = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
        assert isinstance(error, StatementError)
        assert error.index == 1
        assert await keys(database) == list(range(40))
        assert len(commits) == 1


async def test_a_writer_that_rolls_all_back_harms_nobody_else(file):
    async with opened(file) as (database, _):
        outcomes = await asyncio.gather(
            *(write(database, key) for key in range(10)),
            write(database, 10, "bad", "INSERT OR ROLLBACK INTO t VALUES (?, ?)"),
            *(write(database, key) for key in range(11, 20)),
            return_exceptions=True,
        )
        assert [key for key, outcome in enumerate(outcomes) if isinstance(outcome, Exception)] == [10]
        assert isinstance(outcomes[10], StatementError)
        assert await keys(database) == [key for key in range(20) if key != 10]


async def test_a_batch_ends_when_its_time_is_over_and_the_rest_is_written_next(file, monkeypatch):
    monkeypatch.setattr(replication.database, "BATCH_S", 0)
    async with opened(file) as (database, commits):
        written = await asyncio.gather(*(write(database, key) for key in range(20)))
        assert [item.version for item in written] == list(range(1, 21))
        assert len(commits) == 20


async def test_a_writer_that_goes_away_stops_nobody(file):
    async with opened(file) as (database, _):
        tasks = [asyncio.create_task(write(database, key)) for key in range(20)]
        await asyncio.sleep(0)
        tasks[3].cancel()
        await asyncio.wait(tasks)
        assert [task.cancelled() for task in tasks] == [key == 3 for key in range(20)]
        assert set(await keys(database)) >= set(range(20)) - {3}


async def test_what_was_begun_is_written_before_it_closes(file):
    async with opened(file) as (database, _):
        tasks = [asyncio.create_task(write(database, key)) for key in range(300)]
        await asyncio.sleep(0)
    assert [task.result().rows_affected for task in tasks] == [[1]] * 300


async def test_a_database_that_is_closed_says_so(file):
    async with opened(file) as (database, _):
        pass
    with pytest.raises(StoreError, match="closed"):
        await write(database, 1)


async def test_a_commit_that_nobody_could_take_keeps_no_writer_waiting(file):
    told = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["exception"]))

    def refuse(_):
        raise RuntimeError("not now")

    limits = {"rows_max": 10, "timeout_ms": 5_000}
    database = await Database.open(file, SCHEMA, refuse, **limits)
    for key in range(2):
        assert (await write(database, key)).version == key + 1
    await database.close()
    assert [str(error) for error in told] == ["not now"] * 2


async def test_writers_wait_no_longer_than_the_lock_and_are_told(file, monkeypatch):
    monkeypatch.setattr("replication.store.BUSY_TIMEOUT_MS", 1)
    async with opened(file) as (database, _):
        other = sqlite3.connect(file, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        outcomes = await asyncio.gather(*(write(database, key) for key in range(9)), return_exceptions=True)
        other.execute("ROLLBACK")
        other.close()
        assert [type(outcome) for outcome in outcomes] == [BusyError] * 9
        assert database.trouble is None
        assert (await write(database, 1)).version == 1


@pytest.mark.parametrize(("synchronous", "number"), [("normal", 1), ("full", 2)])
async def test_how_much_is_synced_can_be_chosen(file, synchronous, number):
    async with opened(file, synchronous=synchronous) as (database, _):
        found = await database.run(lambda store: store.connection.execute("PRAGMA synchronous").fetchone())
        assert found == (number,)


# --- a disk that takes no writes ----------------------------------------------------------------------


async def limit(database, pages):
    await database.run(lambda store: store.connection.execute(f"PRAGMA max_page_count = {pages}").fetchall())


async def fill(database):
    """Write until it is full, and return how many writes succeeded."""
    await limit(database, 60)
    for key in range(1000):
        try:
            await write(database, key, bytes(10_000))
        except ReadOnlyError:
            return key
    raise AssertionError("it is never full")


async def test_a_full_disk_is_told_until_there_is_room_and_no_write_is_needed_to_see_it(file, monkeypatch):
    monkeypatch.setattr(replication.database, "PROBE_S", 0.001)
    async with opened(file) as (database, _):
        rooms = [False]
        probe = Database._probe_once
        tried = asyncio.Event()

        def probed(self, store):
            self._loop.call_soon_threadsafe(tried.set)
            if not rooms[0]:
                raise OSError("no room")
            probe(self, store)

        monkeypatch.setattr(Database, "_probe_once", probed)
        count = await fill(database)
        assert database.trouble.startswith("database or disk is full, since ")
        await tried.wait()
        with pytest.raises(ReadOnlyError, match="full, since"):
            await write(database, 1000)
        assert await keys(database) == list(range(count))
        await limit(database, 10_000)
        rooms[0] = True
        await database._probing
        assert database.trouble is None
        assert (await write(database, 1000)).version == count + 1


async def test_what_a_full_disk_did_not_take_is_not_seen_and_can_be_applied_later(file, monkeypatch):
    source = Store.open(":memory:", SCHEMA, site=SiteId(b"s" * 16))
    sent = source.execute([(INSERT, (5000, bytes(300_000)))], NOW)[1].changesets

    def apply(store):
        return store.apply(sent, NOW)

    async with opened(file) as (database, commits):
        await fill(database)
        before = len(commits)
        with pytest.raises(ReadOnlyError) as caught:
            await database.commit(apply, lambda result: some(result.commit))
        assert is_transient(caught.value)
        assert source.site not in await database.run(Store.seen)
        await limit(database, 10_000)
        assert (await database.commit(apply, lambda result: some(result.commit))).applied == 1
        assert len(commits) == before + 1
    source.close()
