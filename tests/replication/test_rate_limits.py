"""A node that is written to faster than it may be."""

import contextlib
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from replication.core.limits import ALL, OriginSettings
from replication.errors import RateLimitedError
from replication.metrics import METRICS
from replication.schema import Schema
from replication.store import Store
from replication.verifier import VerifySettings
from tests.replication.test_agent import SCHEMA, Cluster, eventually, ids, insert

NOW = 1_700_000_000_000
TWO = Schema.parse(
    "CREATE TABLE hot (k INTEGER PRIMARY KEY, v); CREATE TABLE calm (k INTEGER PRIMARY KEY, v);"
)


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    cluster = Cluster(tmp_path)
    yield cluster
    for agent in list(cluster.agents):
        await cluster.stop(agent)


@pytest.fixture
def stores(tmp_path: Path):
    """A store, and a connection of another program to its file."""
    with (
        contextlib.closing(Store.open(tmp_path / "a.db", TWO)) as store,
        contextlib.closing(sqlite3.connect(tmp_path / "a.db", isolation_level=None)) as shell,
    ):
        yield store, shell


def tables_of(commit) -> list[str]:
    return [] if commit is None else [change.table for change in commit.changes]


def samples(agent) -> dict[str, float]:
    found = {name: value for name, _, value in agent.samples()}
    assert found.keys() <= METRICS.keys()
    return found


def test_what_is_deferred_stays_in_the_file_until_it_is_not(stores):
    store, shell = stores
    store.deferred = frozenset({"hot"})
    shell.execute("INSERT INTO hot VALUES (1, 1)")
    shell.execute("INSERT INTO calm VALUES (1, 1)")
    assert tables_of(store.capture(NOW)) == ["calm"]
    for value in range(100):
        shell.execute("UPDATE hot SET v = ?", (value,))
    assert store.capture(NOW) is None
    _, commit = store.execute([("INSERT INTO calm VALUES (2, 2)", ())], NOW)
    assert tables_of(commit) == ["calm"]
    store.deferred = frozenset()
    commit = store.capture(NOW)
    assert [change.row for change in commit.changes] == [(1, 99)]
    assert len(commit.changesets) == 1


def test_a_write_of_ours_takes_along_what_waits_in_its_table(stores):
    store, shell = stores
    for run in (store.execute, lambda statements, now: store.execute_many([statements, statements], now)):
        store.deferred = frozenset({"hot", "calm"})
        shell.execute("INSERT OR REPLACE INTO hot VALUES (1, random())")
        shell.execute("INSERT OR REPLACE INTO calm VALUES (1, random())")
        _, commit = run([("INSERT OR REPLACE INTO hot VALUES (2, random())", ())], NOW)
        assert tables_of(commit) == ["hot", "hot"]
        assert store.deferred == {"calm"}


def test_what_waits_gets_its_time_before_something_is_merged_into_its_table(stores, tmp_path):
    store, shell = stores
    with contextlib.closing(Store.open(tmp_path / "b.db", TWO)) as other:
        _, hot = other.execute([("INSERT INTO hot VALUES (1, 'other')", ())], NOW - 1_000)
        _, calm = other.execute([("INSERT INTO calm VALUES (1, 'other')", ())], NOW - 1_000)
    store.deferred = frozenset({"hot"})
    shell.execute("INSERT INTO hot VALUES (1, 'ours'), (2, 'ours')")
    assert tables_of(store.apply(calm.changesets, NOW).commit) == ["calm"]
    assert len(store.apply(hot.changesets, NOW).commit.changesets) == 2
    assert store.deferred == frozenset()
    rows = store.connection.execute("SELECT * FROM hot ORDER BY k").fetchall()
    assert rows == [(1, "ours"), (2, "ours")], "the later write wins"


async def test_a_caller_above_the_limit_is_told_when_to_come_again(cluster):
    a = await cluster.start("a", writes_per_s={"items": 1})
    assert samples(a)["isthmus_tables_deferred"] == 0
    await a.execute([("INSERT INTO items (id) VALUES (1), (2), (3)", ())])
    with pytest.raises(RateLimitedError, match="more than 1 rows a second are written into items") as refused:
        await insert(a, 4)
    assert 1_000 < refused.value.retry_after_ms <= 2_000
    assert await ids(a) == [1, 2, 3]
    assert samples(a)["isthmus_writes_refused_total"] == 1


async def test_a_limit_of_all_tables_is_one_for_every_write(cluster):
    a = await cluster.start("a", writes_per_s={ALL: 1})
    await insert(a, 1, 2)
    with pytest.raises(RateLimitedError, match="all tables together"):
        await insert(a, 3)


async def test_writes_that_fail_use_nothing_up(cluster):
    a = await cluster.start("a", writes_per_s={ALL: 1})
    for _ in range(20):
        with pytest.raises(Exception, match="no such table"):
            await a.execute([("INSERT INTO absent VALUES (1)", ())])
    await insert(a, 1)


async def test_a_row_that_another_client_rewrites_all_the_time_leaves_at_the_pace_that_is_allowed(cluster):
    never = VerifySettings(pause_ms=600_000, interval_ms=600_000)  # it gathers what waits before it compares
    a = await cluster.start("a", writes_per_s={"items": 1}, poll_interval_ms=1, verify=never)
    b = await cluster.start("b", poll_interval_ms=1, verify=never)
    with contextlib.closing(sqlite3.connect(cluster.folder / "a.db", isolation_level=None)) as shell:
        shell.execute("INSERT INTO items VALUES (1, 'first')")

        async def write_until_deferred() -> bool:
            shell.execute("UPDATE items SET v = random()")
            return a.status()["deferred"] == ["items"]

        await eventually(write_until_deferred)
        before = a._replica.head(a.site)
        for _ in range(50):
            shell.execute("UPDATE items SET v = random()")
        shell.execute("UPDATE items SET v = 'last'")

    async def is_there() -> bool:
        return (await b.query("SELECT v FROM items")).rows == [("last",)]

    await eventually(is_there)
    assert a._replica.head(a.site) - before <= 5, "50 writes travel as a few changesets"
    await insert(a, 2)  # what callers may write is not used up


async def test_a_limit_for_a_table_that_is_not_there_is_told(cluster, caplog):
    await cluster.start("a", writes_per_s={"item": 1, ALL: 1})
    assert "a limit for writes into item, and no such table" in caplog.text
    assert "item" not in SCHEMA.tables


async def test_an_origin_that_pushes_too_much_is_counted_and_still_arrives(cluster):
    a = await cluster.start("a")
    b = await cluster.start("b", origins=OriginSettings(changesets_per_s=5))
    await insert(a, 0)
    await eventually(lambda: b._replica.head(a.site) >= 1)
    await insert(a, *range(1, 200))

    async def all_are_there() -> bool:
        return await ids(b) == list(range(200))

    await eventually(all_are_there, within_s=30)
    assert samples(b)["isthmus_origin_pushes_refused_total"] > 100
    assert b.status()["origins_refused"].keys() == {a.site.hex()}
