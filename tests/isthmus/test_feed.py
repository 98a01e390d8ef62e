from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import stat
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import msgpack
import pytest

from isthmus import feed
from isthmus.feed import FeedFollower, FeedServer
from replication.core.change import Commit, RowChange
from routing.table import RoutingTable
from tests.isthmus.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable
    from pathlib import Path

    from replication.metrics import Sample
    from routing.target import Target


def commit(seq: int, rows: int = 1, filler: str = "") -> Commit:
    changes = (RowChange("apps", (f"a{seq}-{i}",), (f"a{seq}-{i}", filler, None)) for i in range(rows))
    return Commit(seq, tuple(changes), ())


class Worker:
    """A follower that records everything; `file_seq` is what the file holds when it is loaded."""

    def __init__(self, path: Path, name: str = "worker-0/1") -> None:
        self.applied: list[RowChange] = []
        self.loads: list[int] = []
        self.file_seq = 0
        self.load_errors: list[Exception] = []
        self.apply_errors: list[Exception] = []
        self.table = RoutingTable("n1")
        self.follower = FeedFollower(
            path, name, load=self.load, apply=self.apply, samples=self.samples, hints=self.table
        )
        self._task: asyncio.Task[None] | None = None

    async def load(self) -> int:
        if self.load_errors:
            raise self.load_errors.pop(0)
        self.loads.append(self.file_seq)
        return self.file_seq

    def apply(self, change: RowChange) -> None:
        if self.apply_errors:
            raise self.apply_errors.pop(0)
        self.applied.append(change)

    def samples(self) -> Iterable[Sample]:
        return [("isthmus_requests_total", (("app", "a"),), float(len(self.applied)))]

    @property
    def seq(self) -> int:
        return self.follower.seq

    async def reach(self, seq: int) -> None:
        await eventually(f"worker reaches {seq}", lambda: self.seq == seq)

    def start(self) -> None:
        self._task = asyncio.create_task(self.follower.run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None


class Agent:
    """The agent's end, with what it was told of metrics."""

    def __init__(self, path: Path, last_seq: int = 0) -> None:
        self.samples: list[tuple[str, Any]] = []
        self.gone: list[str] = []
        self.server = FeedServer(
            path, last_seq, lambda worker, samples: self.samples.append((worker, samples)), self.gone.append
        )

    def publish(self, *commits: Commit) -> None:
        for one in commits:
            self.server.publish(one)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "feed.sock"


@pytest.fixture
async def agent(path: Path) -> AsyncIterator[Agent]:
    agent = Agent(path)
    await agent.server.start()
    yield agent
    await agent.server.stop()


@pytest.fixture
async def worker(path: Path) -> AsyncIterator[Worker]:
    worker = Worker(path)
    yield worker
    await worker.stop()


def mode(path: Path) -> int | None:
    """The permissions of a socket, or None when there is none."""
    return stat.S_IMODE(path.stat().st_mode) if path.exists() else None


@asynccontextmanager
async def connected(path: Path) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A bare connection to the feed, for what a worker would not send."""
    reader, writer = await asyncio.open_unix_connection(str(path))
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def test_follower_sees_every_commit_in_order(agent: Agent, worker: Worker) -> None:
    worker.start()
    await eventually("worker follows", lambda: agent.server.followers == ["worker-0/1"])
    agent.publish(commit(1), commit(2, rows=3), commit(3))
    await worker.reach(3)
    assert [change.pk for change in worker.applied] == [
        ("a1-0",), ("a2-0",), ("a2-1",), ("a2-2",), ("a3-0",),
    ]  # fmt: skip
    assert worker.applied[0] == commit(1).changes[0]
    assert worker.loads == []


async def test_all_kinds_of_sql_values_and_deletions_arrive_as_they_were(
    agent: Agent, worker: Worker
) -> None:
    row = (None, -(2**63), 2**63 - 1, 0.1, "ü\x00", b"\xff")
    changes = (RowChange("t", (1, b"k"), row), RowChange("t", (2, b"k"), None))
    worker.start()
    agent.publish(Commit(1, changes, ()))
    await worker.reach(1)
    assert worker.applied == list(changes)


async def test_worker_that_comes_late_resumes_from_what_the_agent_keeps(agent: Agent, worker: Worker) -> None:
    agent.publish(*(commit(seq) for seq in range(1, 6)))
    worker.follower.seq = 3
    worker.start()
    await worker.reach(5)
    assert [change.pk for change in worker.applied] == [("a4-0",), ("a5-0",)]
    assert worker.loads == []


async def test_worker_that_is_up_to_date_is_told_nothing(agent: Agent, worker: Worker) -> None:
    agent.publish(commit(1))
    worker.follower.seq = 1
    worker.start()
    await eventually("worker follows", lambda: agent.server.followers)
    agent.publish(commit(2))
    await worker.reach(2)
    assert [change.pk for change in worker.applied] == [("a2-0",)]
    assert worker.loads == []


@pytest.mark.parametrize("seq", [0, 2])
async def test_worker_loads_the_file_when_the_agent_no_longer_keeps_what_it_missed(
    path: Path, worker: Worker, seq: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "COMMITS_KEPT", 2)
    agent = Agent(path)
    await agent.server.start()
    try:
        agent.publish(*(commit(n) for n in range(1, 6)))
        worker.follower.seq = seq
        worker.file_seq = 5
        worker.start()
        await worker.reach(5)
        assert worker.loads == [5]
        assert worker.applied == []
    finally:
        await agent.server.stop()


async def test_oldest_commit_kept_is_enough_to_resume_without_a_load(
    path: Path, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "COMMITS_KEPT", 2)
    agent = Agent(path)
    await agent.server.start()
    try:
        agent.publish(*(commit(n) for n in range(1, 6)))
        worker.follower.seq = 3
        worker.start()
        await worker.reach(5)
        assert worker.loads == []
        assert len(worker.applied) == 2
    finally:
        await agent.server.stop()


async def test_huge_commit_makes_workers_load_the_file(
    agent: Agent, worker: Worker, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "COMMIT_ROWS_MAX", 10)
    agent.publish(commit(1))
    worker.start()
    await worker.reach(1)
    worker.file_seq = 2
    agent.publish(commit(2, rows=11))
    await worker.reach(2)
    agent.publish(commit(3, rows=10))
    await worker.reach(3)
    assert worker.loads == [2]
    assert len(worker.applied) == 11

    late = Worker(path, "worker-1/2")
    late.follower.seq = 1
    late.file_seq = 3
    late.start()
    try:
        await late.reach(3)
        assert late.loads == [3]
    finally:
        await late.stop()


async def test_commit_that_does_not_name_its_rows_makes_workers_load_the_file(
    agent: Agent, worker: Worker
) -> None:
    agent.publish(commit(1))
    worker.start()
    await worker.reach(1)
    worker.file_seq = 2
    agent.publish(Commit(2, (), (), reload=("apps",)))
    await worker.reach(2)
    assert worker.loads == [2]


async def test_commit_that_never_came_makes_workers_load_the_file(agent: Agent, worker: Worker) -> None:
    agent.publish(commit(1))
    worker.start()
    await worker.reach(1)
    worker.file_seq = 3
    agent.publish(commit(3))
    await worker.reach(3)
    assert worker.loads == [3]


async def test_large_commit_is_applied_with_turns_for_requests(
    agent: Agent, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "ROWS_A_TURN", 10)
    worker.start()
    await eventually("the worker follows", lambda: agent.server.followers)
    agent.publish(commit(1, rows=100))
    seen = set()
    while worker.follower.seq < 1:
        await asyncio.sleep(0)
        seen.add(len(worker.applied))
    assert {10, 50, 90, 100} <= seen


async def test_commit_that_the_file_included_already_is_not_applied_again(
    agent: Agent, worker: Worker
) -> None:
    worker.follower.seq = 2
    worker.file_seq = 2
    worker.start()
    await eventually("worker is told to load, being ahead", lambda: worker.loads)
    agent.publish(commit(1), commit(2), commit(3))
    await worker.reach(3)
    assert [change.pk for change in worker.applied] == [("a3-0",)]


async def test_worker_that_does_not_read_is_cut_off_and_others_go_on(
    agent: Agent, worker: Worker, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "BACKLOG_BYTES_MAX", 1 << 16)
    worker.start()
    async with connected(path) as (reader, writer):
        reader._transport.pause_reading()
        writer.write(msgpack.packb(["follow", "stuck/1", 0]))
        await eventually("both follow", lambda: len(agent.server.followers) == 2)
        seq = 0
        while "stuck/1" in agent.server.followers:
            seq += 1
            assert seq < 1000, "never cut off"
            agent.publish(commit(seq, filler="x" * 20_000))
            await worker.reach(seq)
        reader._transport.resume_reading()
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(5):
                while await reader.read(1 << 20):
                    pass
    assert agent.server.followers == ["worker-0/1"]
    agent.publish(commit(seq + 1))
    await worker.reach(seq + 1)


async def test_worker_outlives_the_agent_and_follows_the_next_one(path: Path, worker: Worker) -> None:
    first = Agent(path)
    await first.server.start()
    worker.start()
    await eventually("worker follows", lambda: first.server.followers)
    first.publish(commit(1))
    await worker.reach(1)
    await first.server.stop()
    await eventually("worker notices", lambda: not worker.follower.connected)
    assert worker.seq == 1

    second = Agent(path, last_seq=4)
    await second.server.start()
    try:
        worker.file_seq = 4
        await worker.reach(4)
        assert worker.loads == [4]
        second.publish(commit(5))
        await worker.reach(5)
        assert worker.follower.connected
    finally:
        await second.server.stop()


async def test_worker_may_start_before_the_agent(path: Path, worker: Worker) -> None:
    worker.start()
    agent = Agent(path)
    await agent.server.start()
    try:
        agent.publish(commit(1))
        await worker.reach(1)
    finally:
        await agent.server.stop()


@pytest.fixture
def left_behind(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.usefixtures("left_behind")
async def test_socket_left_behind_by_a_killed_agent_is_replaced(path: Path, worker: Worker) -> None:
    agent = Agent(path)
    await agent.server.start()
    try:
        assert mode(path) == 0o600
        agent.publish(commit(1))
        worker.start()
        await worker.reach(1)
    finally:
        await agent.server.stop()
    assert mode(path) is None


@pytest.mark.parametrize(
    "garbage",
    [
        b"\xc1",
        msgpack.packb(5),
        msgpack.packb(["follow"]),
        msgpack.packb(["follow", "w", "x"]),
        msgpack.packb(["samples", "w", 5]),
        msgpack.packb(["samples", "w", [5]]),
        msgpack.packb(["loads", [["m1", 1]]]),
        msgpack.packb({(1, 2): 3}),
    ],
)
async def test_garbage_from_a_worker_costs_it_its_connection_and_nobody_else(
    path: Path, worker: Worker, garbage: bytes
) -> None:
    unpacked: list[Any] = []
    server = FeedServer(path, 0, lambda worker, samples: unpacked.extend((w, v) for w, _, v in samples))
    await server.start()
    try:
        worker.start()
        async with connected(path) as (reader, writer):
            writer.write(garbage)
            async with asyncio.timeout(5):
                assert await reader.read() == b""
        server.publish(commit(1))
        await worker.reach(1)
    finally:
        await server.stop()


@pytest.mark.parametrize(
    "garbage",
    [
        b"\xc1",
        msgpack.packb(5),
        msgpack.packb(["commit", 1]),
        msgpack.packb(["commit", 1, [5]]),
        msgpack.packb(["commit", 1, [["t"]]]),
    ],
)
async def test_garbage_from_an_agent_makes_the_worker_follow_again(
    path: Path, worker: Worker, garbage: bytes
) -> None:
    served = 0

    async def confuse(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal served
        served += 1
        writer.write(garbage)
        writer.close()

    async with await asyncio.start_unix_server(confuse, str(path)):
        worker.start()
        await eventually("worker tries again", lambda: served > 1)
    await worker_follows_a_good_agent(path, worker)


@pytest.mark.parametrize("error", [sqlite3.OperationalError("database is locked"), RuntimeError("anything")])
async def test_worker_that_fails_to_load_or_apply_tries_again(
    path: Path, worker: Worker, error: Exception
) -> None:
    worker.follower.seq = 99  # ahead of the agent: it is told to load
    worker.load_errors = [error]
    worker.apply_errors = [error]
    await worker_follows_a_good_agent(path, worker, start=True)
    assert not worker.load_errors
    assert not worker.apply_errors
    assert [change.pk for change in worker.applied] == [("a1-0",)]


async def worker_follows_a_good_agent(path: Path, worker: Worker, *, start: bool = False) -> None:
    agent = Agent(path)
    await agent.server.start()
    try:
        if start:
            worker.start()
            await eventually("worker loaded", lambda: worker.loads)
        agent.publish(commit(1))
        await worker.reach(1)
    finally:
        await agent.server.stop()


async def test_worker_that_fails_each_time_does_not_spin(path: Path, worker: Worker) -> None:
    served = 0

    async def refuse(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal served
        served += 1
        writer.close()

    loop = asyncio.get_running_loop()
    async with await asyncio.start_unix_server(refuse, str(path)):
        started = loop.time()
        worker.start()
        await eventually("four connections", lambda: served == 4)
        least = feed.RECONNECT_MIN_S * 0.5 * (1 + 2 + 4)
        assert loop.time() - started >= least
        await worker.stop()


async def test_metrics_of_a_worker_reach_the_agent(agent: Agent, worker: Worker) -> None:
    worker.start()
    await eventually("samples", lambda: agent.samples)
    assert agent.samples[0] == ("worker-0/1", (("isthmus_requests_total", (("app", "a"),), 0.0),))


async def test_agent_is_told_that_a_worker_is_gone_and_what_it_counted_last(
    agent: Agent, worker: Worker
) -> None:
    worker.start()
    await eventually("samples", lambda: agent.samples)
    worker.applied.append(commit(1).changes[0])
    worker.follower.report()
    await eventually("the last samples", lambda: agent.samples[-1][1][0][2] == 1.0)
    assert not agent.gone
    await worker.stop()
    await eventually("it is gone", lambda: agent.gone == ["worker-0/1"])
    worker.follower.report()  # to nobody


async def test_stopped_agent_lets_its_workers_go(agent: Agent, worker: Worker, path: Path) -> None:
    worker.start()
    await eventually("worker follows", lambda: agent.server.followers)
    await agent.server.stop()
    assert mode(path) is None
    await eventually("worker notices", lambda: not worker.follower.connected)
    await eventually("agent has nobody", lambda: agent.server.followers == [])


async def test_commit_too_large_to_send_makes_workers_load_the_file(
    agent: Agent, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "COMMIT_BYTES_MAX", 1_000)
    agent.publish(commit(1))
    worker.start()
    await worker.reach(1)
    worker.file_seq = 2
    agent.publish(commit(2, filler="x" * 1_000))
    await worker.reach(2)
    agent.publish(commit(3))
    await worker.reach(3)
    assert worker.loads == [2]


async def test_socket_that_somebody_removed_is_made_again(
    path: Path, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "SOCKET_LOOK_S", 0.01)
    agent, early = Agent(path), Worker(path, "worker-1/2")
    await agent.server.start()
    try:
        early.start()
        await eventually("a worker follows", lambda: agent.server.followers)
        path.unlink()  # noqa: ASYNC240 — a local file of the test
        worker.start()
        await eventually("both follow", lambda: agent.server.followers == ["worker-0/1", "worker-1/2"])
        assert mode(path) == 0o600
        agent.publish(commit(1))
        await worker.reach(1)
        await early.reach(1)
    finally:
        await early.stop()
        await agent.server.stop()
    assert mode(path) is None


class Interested:
    """Takes counts, and tells a worker that comes who is there."""

    def __init__(self) -> None:
        self.counts: dict[str, dict[str, int]] = {}

    def add_worker(self, worker: str) -> list[list[Any]]:
        self.counts[worker] = {}
        return [["present", ["n2"]], ["round_trips", "ams", [["syd", 9.0]]]]

    def drop_worker(self, worker: str) -> None:
        del self.counts[worker]

    def handle_counts(self, worker: str, counts: Iterable[tuple[str, int]]) -> None:
        self.counts[worker].update(counts)


def hold_load(worker: Worker) -> Target:
    """Give a worker's table a machine with something in flight here and on two nodes."""
    for table, key, values in (
        ("machines", ("m1",), ("m1", "web", "n1", "syd", "10.0.0.1:80", "started", 0, "")),
        ("loads", ("m1", "n2"), ("m1", "n2", 5, 0)),
        ("loads", ("m1", "n3"), ("m1", "n3", 70, 0)),
    ):
        worker.table.apply(table, key, values)
    machine = worker.table.machine("m1")
    assert machine is not None
    worker.table.busy.enter(machine)
    return machine


async def test_a_worker_tells_its_load_and_is_told_that_of_others(path: Path, worker: Worker) -> None:
    interested = Interested()
    server = FeedServer(path, 0, lambda *_: None, interested=interested)
    await server.start()
    try:
        machine = hold_load(worker)
        worker.start()
        await eventually("the count arrives", lambda: interested.counts == {"worker-0/1": {"m1": 1}})
        await eventually("only a node that is there counts", lambda: machine.load == 1 + 5)
        assert worker.table.regions.rtt_ms("ams", "syd") == 9.0
        server.send(["siblings", [["m1", 3]]], "worker-0/1")
        server.send(["siblings", [["m1", 9]]], "worker-1/1")
        await eventually("what siblings have counts", lambda: machine.load == 1 + 5 + 3)
        machine.in_flight -= 1
        await eventually("the end arrives", lambda: interested.counts == {"worker-0/1": {"m1": 0}})
        await worker.stop()
        await eventually("a worker that is gone has nothing", lambda: not interested.counts)
    finally:
        await server.stop()


async def test_without_an_agent_a_worker_forgets_what_it_was_told_of_loads(
    path: Path, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "LOADS_KEPT_S", 0.2)
    server = FeedServer(path, 0, lambda *_: None, interested=Interested())
    await server.start()
    machine = hold_load(worker)
    worker.start()
    server_side = ["siblings", [["m1", 3]]]
    await eventually("a follower", lambda: server.followers)
    server.send(server_side)
    await eventually("all is known", lambda: machine.load == 1 + 5 + 3)
    await server.stop()
    await eventually("siblings are forgotten at once", lambda: machine.load == 1 + 5)
    await eventually("and other nodes in a while", lambda: machine.load == 1)


class Trials:
    """Records what workers do about trials."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def handle_worker(self, worker: str) -> None:
        self.seen.append(("worker", worker))

    def handle_gone(self, worker: str, *, is_death: bool) -> None:
        self.seen.append(("death" if is_death else "leave", worker))

    def handle_tried(self, worker: str, token: int, problem: str) -> None:
        self.seen.append(("tried", worker, token, problem))


@pytest.fixture
async def trials(agent: Agent, worker: Worker) -> Trials:
    """What is recorded of a worker that follows."""
    trials = agent.server.trials = Trials()
    worker.start()
    await eventually("worker follows", lambda: trials.seen == [("worker", "worker-0/1")])
    trials.seen.clear()
    return trials


ROW = ("apps", ("a",), ("a", "", None))


async def test_worker_says_when_it_has_applied_what_it_was_to_try(
    agent: Agent, worker: Worker, trials: Trials
) -> None:
    agent.server.send(["try", 0, [ROW]], "worker-0/1")
    agent.server.send(["try", 7, [("apps", ("b",), None)]], "worker-0/1")
    await eventually("an answer", lambda: trials.seen)
    assert trials.seen == [("tried", "worker-0/1", 7, "")]
    assert worker.applied == [RowChange(*ROW), RowChange("apps", ("b",), None)]
    assert worker.seq == 0


async def test_error_in_any_part_of_a_trial_is_told_at_its_end(
    agent: Agent, worker: Worker, trials: Trials
) -> None:
    worker.apply_errors = [KeyError("x")]
    agent.server.send(["try", 0, [ROW]], "worker-0/1")
    agent.server.send(["try", 1, [ROW]], "worker-0/1")
    agent.server.send(["try", 2, [ROW]], "worker-0/1")
    await eventually("two answers", lambda: len(trials.seen) == 2)
    assert trials.seen == [("tried", "worker-0/1", 1, "KeyError('x')"), ("tried", "worker-0/1", 2, "")]


@pytest.mark.parametrize("leaves", [True, False])
async def test_worker_that_takes_its_leave_has_not_died(
    worker: Worker, trials: Trials, *, leaves: bool
) -> None:
    if leaves:
        worker.follower.leave()
    await worker.stop()
    await eventually("it is gone", lambda: trials.seen)
    assert trials.seen == [("leave" if leaves else "death", "worker-0/1")]


async def test_worker_that_is_cut_off_counts_as_dead(
    agent: Agent, trials: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "BACKLOG_BYTES_MAX", -1)
    agent.publish(commit(1))
    assert trials.seen == [("death", "worker-0/1")]


@pytest.mark.parametrize(("last", "loads"), [("settled", []), ("try", [9]), ("reload", [9])])
async def test_worker_that_loses_its_agent_in_a_trial_loads_the_file(
    path: Path, last: str, loads: list[int]
) -> None:
    agent, worker = Agent(path), Worker(path)
    trials = agent.server.trials = Trials()
    await agent.server.start()
    worker.start()
    try:
        await eventually("worker follows", lambda: agent.server.followers)
        worker.file_seq = 9
        agent.server.send(["try", 1, [ROW]])
        if last != "try":
            agent.server.send([last])
        await eventually("it has tried", lambda: len(trials.seen) > 1)
        await eventually("all is read", lambda: last != "reload" or worker.loads)
        await agent.server.stop()
        agent = Agent(path, last_seq=9 if last == "reload" else 0)
        await agent.server.start()
        await eventually("worker follows again", lambda: agent.server.followers)
        agent.publish(commit(10 if last != "settled" else 1))
        await eventually("it is up to date", lambda: worker.seq == agent.server.last_seq or worker.loads)
        assert worker.loads == loads
    finally:
        await worker.stop()
        await agent.server.stop()
