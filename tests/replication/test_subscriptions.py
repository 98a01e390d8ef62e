"""Subscriptions of one replica: sharing, limits, pace, and what outlives a restart."""

from __future__ import annotations

import asyncio
import sqlite3
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from replication.core.clock import SiteId
from replication.core.subscription import REST_MIN_MS, unpack_cells
from replication.database import QueryError
from replication.errors import BusyError
from replication.schema import Schema
from replication.store import Store
from replication.subscriptions import (
    METRICS,
    SubscriptionError,
    SubscriptionLimits,
    Subscriptions,
    TooManyError,
    UnknownSubscriptionError,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

SCHEMA = Schema.parse(
    "CREATE TABLE a (id INTEGER PRIMARY KEY, x); CREATE TABLE b (id INTEGER PRIMARY KEY, y TEXT);"
)
ALL = "SELECT id, x FROM a"
SLOW = (
    "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r WHERE n < (SELECT max(x) FROM a)) "
    "SELECT max(n) FROM r"
)


class Replica:
    """A store and its subscriptions; time is what the test says."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "replica.db"
        self.store = Store.open(self.path, SCHEMA, site=SiteId(b"1" * 16))
        self.now_ms = 1_000_000.0
        self.boot = "first"
        self.subscriptions: Subscriptions

    async def start(self, **limits: Any) -> Subscriptions:
        self.subscriptions = Subscriptions(
            self.path,
            SCHEMA,
            SubscriptionLimits(**limits),
            monotonic=lambda: self.now_ms / 1000,
            boot=lambda: self.boot,
        )
        await self.subscriptions.start()
        return self.subscriptions

    def write(self, *statements: Any) -> None:
        _, commit = self.store.execute([(sql, ()) for sql in statements], 1_000_000)
        if commit is not None:
            self.subscriptions.handle_commit(commit)

    def pass_time(self, ms: float) -> None:
        self.now_ms += ms
        self.subscriptions._kick.set()

    @property
    def runs(self) -> int:
        return self.subscriptions.counters["runs"]

    async def wait_for(self, condition: Any) -> None:
        async with asyncio.timeout(10):
            while not condition():  # noqa: ASYNC110 - what is waited for happens on another thread
                await asyncio.sleep(0)

    async def settle(self) -> None:
        """Let every query that has rested and is wanted run."""
        await self.wait_for(lambda: not any(self._is_due(item) for item in self.items()))

    def _is_due(self, item: Any) -> bool:
        return item.wanted_seq is not None and item.ready_at_ms <= self.now_ms

    def items(self) -> list[Any]:
        return list(self.subscriptions._by_id.values())


@pytest.fixture
async def replica(tmp_path: Path) -> AsyncIterator[Replica]:
    made = Replica(tmp_path)
    yield made
    await made.subscriptions.stop()
    made.store.close()


async def take(listener: Any) -> list[Any]:
    changes = await listener.read(5)
    return [(c.id, c.kind.value, *unpack_cells(c.cells)) for c in changes]


async def test_only_queries_that_read_what_changed_run_again(replica: Replica) -> None:
    subscriptions = await replica.start()
    await subscriptions.subscribe(ALL)
    await subscriptions.subscribe("SELECT count(*) FROM b")
    replica.pass_time(1000)
    replica.write("INSERT INTO b VALUES (1, '')")
    await replica.settle()
    assert replica.runs == 3
    assert [item.live.last_id for item in replica.items()] == [0, 1]


async def test_queries_run_again_for_a_commit_that_names_only_tables(replica: Replica) -> None:
    subscriptions = await replica.start()
    await subscriptions.subscribe(ALL)
    await subscriptions.subscribe("SELECT count(*) FROM b")
    replica.pass_time(1000)
    _, commit = replica.store.execute([("INSERT INTO b VALUES (1, '')", ())], 1_000_000)
    assert commit is not None
    subscriptions.handle_commit(replace(commit, changes=(), reload=("b",)))
    await replica.settle()
    assert replica.runs == 3


async def test_first_change_comes_at_once_and_those_after_it_together(replica: Replica) -> None:
    subscriptions = await replica.start()
    with subscriptions.listen(await subscriptions.subscribe(ALL)) as listener:
        replica.pass_time(REST_MIN_MS)
        replica.write("INSERT INTO a VALUES (1, 1)")
        assert await take(listener) == [(1, "insert", 1, 1)]
        for number in range(2, 7):
            replica.write(f"INSERT INTO a VALUES ({number}, 1)")
            await replica.settle()
        replica.write("DELETE FROM a WHERE id = 6")
        runs = replica.runs
        assert await listener.read(0) == []
        replica.pass_time(5_000)
        assert await take(listener) == [(n, "insert", n, 1) for n in range(2, 6)]
        assert replica.runs == runs + 1


async def test_commit_between_the_first_run_and_its_end_is_not_missed(replica: Replica) -> None:
    subscriptions = await replica.start()
    making = asyncio.ensure_future(subscriptions.subscribe(ALL))
    read = subscriptions._reader.read

    def read_and_write(sql: str, params: Any) -> Any:
        answer = read(sql, params)
        _, commit = replica.store.execute([("INSERT INTO a VALUES (1, 1)", ())], 1_000_000)
        subscriptions.handle_commit(commit)
        subscriptions._reader.read = read
        return answer

    subscriptions._reader.read = read_and_write
    with subscriptions.listen(await making) as listener:
        assert listener.rows == []
        replica.pass_time(5_000)
        assert await take(listener) == [(1, "insert", 1, 1)]


async def test_who_asks_for_the_same_shares_it(replica: Replica) -> None:
    subscriptions = await replica.start()
    sql = "SELECT id FROM a WHERE x = :x AND id > :id"
    first, second = await asyncio.gather(
        subscriptions.subscribe(sql, {"x": 1, "id": 2}),
        subscriptions.subscribe(f" {sql}\n", {"id": 2, "x": 1}),
    )
    assert first is second
    assert first is not await subscriptions.subscribe(sql, {"x": 1.0, "id": 2})
    assert subscriptions.find(sql, {"id": 2, "x": 1}) is first
    assert subscriptions.get(first.id) is first
    assert replica.runs == 2


@pytest.mark.parametrize(
    ("sql", "problem"),
    [
        ("DELETE FROM a", "only a query"),
        ("SELECT * FROM a; SELECT * FROM a", "one statement at a time"),
        ("", "no columns"),
        ("-- nothing", "no columns"),
        ("PRAGMA user_version", "only a query"),
        ("ATTACH ':memory:' AS m", "only a query"),
        ("SELECT 1", "reads no replicated table"),
        ("SELECT * FROM json_each('[1]')", "reads no replicated table"),
        ("SELECT * FROM a, sqlite_master", "`sqlite_master` is no replicated table"),
        ("SELECT * FROM _repl_clock_a", "`_repl_clock_a` is no replicated table"),
        ("SELECT id FROM a WHERE x IN (SELECT hlc FROM _repl_state)", "`_repl_state` is no replicated table"),
        ("SELECT id FROM a ORDER BY random()", r"random\(\) gives another answer each time"),
        ("SELECT load_extension('x') FROM a", "load_extension|no such function"),
        ("SELECT nix FROM a", "no such column"),
        ("SELECT id FROM a WHERE x = ?", "binding"),
    ],
)
async def test_query_that_cannot_be_followed_is_refused(replica: Replica, sql: str, problem: str) -> None:
    subscriptions = await replica.start()
    with pytest.raises(QueryError, match=problem):
        await subscriptions.subscribe(sql)
    assert replica.items() == []
    await subscriptions.subscribe(ALL)


LIMITS: dict[str, tuple[dict[str, Any], str, str]] = {
    "rows": ({"rows_max": 2}, ALL, "more than 2 rows"),
    "bytes": ({"result_bytes_max": 40}, ALL, "more than 40 bytes"),
    "time": ({"query_ms_max": 1}, SLOW, "took longer than 1 ms"),
}
TOO_MUCH = ("INSERT INTO a SELECT value, 100000 FROM json_each('[11,12,13,14,15,16,17,18,19]')",)


@pytest.mark.parametrize("limit", LIMITS)
async def test_query_beyond_a_limit_is_refused(replica: Replica, limit: str) -> None:
    limits, sql, problem = LIMITS[limit]
    subscriptions = await replica.start(**limits)
    real_clock(subscriptions, limit)
    replica.write(*TOO_MUCH)
    with pytest.raises(QueryError, match=problem):
        await subscriptions.subscribe(sql)
    assert replica.items() == []


@pytest.mark.parametrize("limit", LIMITS)
async def test_query_that_grows_beyond_a_limit_ends_with_the_reason(replica: Replica, limit: str) -> None:
    limits, sql, problem = LIMITS[limit]
    subscriptions = await replica.start(**limits)
    real_clock(subscriptions, limit)
    made = await subscriptions.subscribe(sql)
    with subscriptions.listen(made) as listener:
        replica.pass_time(5_000)
        replica.write(*TOO_MUCH)
        with pytest.raises(SubscriptionError, match=problem):
            await listener.read(5)
    with pytest.raises(UnknownSubscriptionError, match=made.id):
        subscriptions.get(made.id)
    assert subscriptions.counters["ended_failed"] == 1


def real_clock(subscriptions: Subscriptions, limit: str) -> None:
    """Let a query that is to exceed its time see another time at each look."""
    if limit == "time":
        ticks = iter(range(10**9))
        subscriptions._reader._monotonic = lambda: next(ticks) / 10_000


async def test_longest_quiet_subscription_makes_room_and_those_with_listeners_do_not(
    replica: Replica,
) -> None:
    subscriptions = await replica.start(subscriptions_max=2)
    first = await subscriptions.subscribe(ALL)
    replica.pass_time(1)
    with subscriptions.listen(await subscriptions.subscribe(ALL + " WHERE id = 2")):
        with subscriptions.listen(await subscriptions.subscribe(ALL + " WHERE id = 3")):
            with pytest.raises(UnknownSubscriptionError):
                subscriptions.get(first.id)
            with pytest.raises(TooManyError, match="2 subscriptions already"):
                await subscriptions.subscribe(ALL)
        await subscriptions.subscribe(ALL)


async def test_listeners_are_bounded(replica: Replica) -> None:
    subscriptions = await replica.start(listeners_max=1)
    made = await subscriptions.subscribe(ALL)
    with subscriptions.listen(made), pytest.raises(TooManyError, match="1 listeners already"):
        subscriptions.listen(made)
    subscriptions.listen(made)


async def test_listener_that_falls_behind_is_told_so(replica: Replica) -> None:
    subscriptions = await replica.start(log_changes_max=2)
    with subscriptions.listen(await subscriptions.subscribe(ALL)) as listener:
        for number in range(4):
            replica.pass_time(5_000)
            replica.write(f"INSERT INTO a VALUES ({number}, 1)")
            await replica.settle()
        with pytest.raises(SubscriptionError, match="already deleted older changes, min change id: 3"):
            await listener.read(0)
    assert subscriptions.counters["resume_failed"] == 1


async def test_subscription_ends_when_nobody_has_listened_for_long(replica: Replica) -> None:
    subscriptions = await replica.start(idle_ms=600_000)
    made = await subscriptions.subscribe(ALL)
    with subscriptions.listen(made):
        replica.pass_time(700_000)
        await subscriptions.subscribe("SELECT x FROM a")  # so that the runner has had its turn
        assert made in replica.items()
    replica.pass_time(599_999)
    await asyncio.sleep(0)
    assert made in replica.items()
    replica.pass_time(1)
    await replica.wait_for(lambda: not replica.items())
    assert subscriptions.counters["ended_idle"] == 2


async def test_changed_columns_end_a_subscription(replica: Replica) -> None:
    subscriptions = await replica.start()
    with sqlite3.connect(replica.path) as other:
        other.execute("CREATE VIEW v AS SELECT id FROM a")
    with subscriptions.listen(await subscriptions.subscribe("SELECT * FROM v")) as listener:
        other.execute("DROP VIEW v")
        other.execute("CREATE VIEW v AS SELECT id, x FROM a")
        other.close()
        replica.pass_time(5_000)
        replica.write("INSERT INTO a VALUES (1, 1)")
        with pytest.raises(SubscriptionError, match="columns of the query have changed"):
            await listener.read(5)


async def test_locked_database_is_tried_again(replica: Replica) -> None:
    subscriptions = await replica.start()
    read = subscriptions._reader.read
    failures = 0

    def fail_once(sql: str, params: Any) -> Any:
        nonlocal failures
        failures += 1
        subscriptions._reader.read = read
        raise BusyError("locked")

    with subscriptions.listen(await subscriptions.subscribe(ALL)) as listener:
        subscriptions._reader.read = fail_once
        replica.pass_time(5_000)
        replica.write("INSERT INTO a VALUES (1, 1)")
        await replica.wait_for(lambda: failures)
        await replica.settle()
        replica.pass_time(5_000)
        assert await take(listener) == [(1, "insert", 1, 1)]


async def test_stop_ends_streams_without_an_error(replica: Replica) -> None:
    subscriptions = await replica.start()
    with subscriptions.listen(await subscriptions.subscribe(ALL)) as listener:
        reading = asyncio.ensure_future(listener.read(5))
        await asyncio.sleep(0)
        await subscriptions.stop()
        assert await reading is None


async def follow(replica: Replica) -> str:
    """Subscribe, and leave change 1 behind."""
    subscriptions = replica.subscriptions
    made = await subscriptions.subscribe(ALL, ())
    with subscriptions.listen(made) as listener:
        replica.pass_time(5_000)
        replica.write("INSERT INTO a VALUES (1, 1)")
        assert len(await take(listener)) == 1
    return made.id


async def crash(replica: Replica) -> None:
    file = replica.subscriptions._file
    file.close = file._connection.close  # as when the process is killed
    await replica.subscriptions.stop()


async def test_crash_does_not_lose_or_renumber_changes(replica: Replica) -> None:
    await replica.start()
    id_ = await follow(replica)
    await crash(replica)
    replica.store.execute([("UPDATE a SET x = 2", ())], 1_000_000)
    subscriptions = await replica.start()
    with subscriptions.listen(subscriptions.get(id_), from_id=0) as listener:
        assert await take(listener) == [(1, "insert", 1, 1)]
        assert await take(listener) == [(2, "update", 1, 2)]


async def test_subscriptions_are_forgotten_when_the_power_failed(replica: Replica) -> None:
    await replica.start()
    await follow(replica)
    await crash(replica)
    replica.boot = "second"
    assert (await replica.start()).describe() == []


async def test_subscriptions_outlive_an_orderly_restart_of_the_machine(replica: Replica) -> None:
    await replica.start()
    id_ = await follow(replica)
    await replica.subscriptions.stop()
    replica.boot = "second"
    (await replica.start()).get(id_)


async def test_ended_subscription_is_not_there_after_a_restart(replica: Replica) -> None:
    subscriptions = await replica.start(idle_ms=600_000)
    await follow(replica)
    replica.pass_time(600_000)
    await replica.wait_for(lambda: subscriptions.counters["ended_idle"])
    await replica.subscriptions.stop()
    assert (await replica.start()).describe() == []


@pytest.mark.parametrize("content", [b"", b"not a database" * 100])
async def test_damaged_file_is_made_anew(replica: Replica, content: bytes) -> None:
    file = replica.path.with_name("replica.db-subscriptions")
    file.write_bytes(content)
    await replica.start()
    id_ = await follow(replica)
    await replica.subscriptions.stop()
    (await replica.start()).get(id_)


async def test_file_that_fails_is_removed_and_subscriptions_go_on(replica: Replica) -> None:
    subscriptions = await replica.start()
    with subscriptions.listen(await subscriptions.subscribe(ALL)) as listener:
        await subscriptions._on_thread(lambda: subscriptions._file._execute("PRAGMA query_only = 1"))
        for number in (1, 2):
            replica.pass_time(5_000)
            replica.write(f"INSERT INTO a VALUES ({number}, 1)")
            assert await take(listener) == [(number, "insert", number, 1)]
    assert subscriptions._file.is_lost
    assert not replica.path.with_name("replica.db-subscriptions").exists()
    await subscriptions.stop()
    assert (await replica.start()).describe() == []


async def test_metrics_are_described(replica: Replica) -> None:
    await replica.start()
    await follow(replica)
    names = {name for name, _, _ in replica.subscriptions.samples()}
    assert names == set(METRICS)
