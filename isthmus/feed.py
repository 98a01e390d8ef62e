"""The change feed between the agent and its workers: msgpack messages over a Unix socket.

Decides how a worker catches up and what happens to one that cannot. Knows no table. Invariant: a follower
sees every commit after the one that it named, in order and without a hole, or is told to load the file
again.

Messages, agent to worker: `["commit", seq, [[table, pk, row or nil], …]]`, `["reload"]`, and `["lost"]` when
the next agent will count anew; worker to agent: `["follow", worker, seq]` first, then
`["samples", worker, [[name, labels, value], …]]` now and then. What is known of loads and distances comes and
goes beside the table: `["loads", [[machine, in flight], …]]` from a worker, and from the agent the three
messages of `Hints`, all of them to a worker that has just come. `["start", machine]` from a worker names a
machine that requests wait for, `["failing", [[machine, failures, seconds], …]]` those that it leaves out.

Rows that are held back from all others come to one worker as `["try", token, [[table, pk, row or nil], …]]`,
and it answers `["tried", token, problem]`; with token 0 there is more of it to come. It ends with
`["settled"]` when the others have them as well, else with a reload. `["bye"]` is a worker's leave: one that
is gone without it has died.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

import msgpack

from replication.core.change import Commit, RowChange

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence
    from pathlib import Path

    from proxy.metrics import Sample
    from routing.health import Failing
    from routing.loads import Busy

log = logging.getLogger(__name__)


# A worker that was away for fewer commits than this resumes without reading the file again.
COMMITS_KEPT = 4096
# A commit larger than this is cheaper read from the file than sent to each worker.
COMMIT_ROWS_MAX = 10_000
COMMIT_BYTES_MAX = 4 << 20
# What a worker applies before it turns to its requests again: at 10 to 30 µs a row, some milliseconds.
ROWS_A_TURN = 256
# A worker this far behind is stuck: it is cut off, and loads the file when it comes back.
BACKLOG_BYTES_MAX = 16 << 20
# The feed is local and trusted, but a confused peer must not take the memory.
MESSAGE_BYTES_MAX = 64 << 20

# What a worker names that has to load the file, whatever an agent has published.
NO_SEQ = -1

# Of an error that is told, for people.
PROBLEM_CHARS_MAX = 200

SAMPLES_INTERVAL_S = 1.0
# How late, at most, an agent hears of what a worker has in flight.
LOADS_INTERVAL_S = 0.1
# A worker without an agent routes for so long by what other nodes had in flight.
LOADS_KEPT_S = 5.0
# Cleaners of temporary directories remove sockets; a worker that lost its agent routes on stale rows.
SOCKET_LOOK_S = 2.0
RECONNECT_MIN_S, RECONNECT_MAX_S = 0.05, 1.0


class Hints(Protocol):
    """The worker's side of what is told beside the table."""

    busy: Busy  # what is told to the agent, and the next
    failing: Failing

    def set_siblings(self, counts: Iterable[tuple[str, int]]) -> None:
        """`["siblings", counts]`: what the other workers of this node have in flight at these machines."""

    def forget_siblings(self) -> None:
        """Nobody says any more what the other workers have."""

    def follow_loads(self) -> None:
        """Ten times a second: bring averages of loads up to now."""

    def set_present(self, nodes: Iterable[str]) -> None:
        """`["present", nodes]`: those whose loads count."""

    def set_round_trips(self, origin: str, round_trips: Iterable[tuple[str, float]]) -> None:
        """`["round_trips", region, …]`: milliseconds from that region to others, where they were measured."""


class Followers(Protocol):
    """Who wants to know of workers, on the agent's side."""

    def add_worker(self, worker: str) -> Iterable[list[Any]]:
        """A worker follows; returns the messages that it starts with."""

    def drop_worker(self, worker: str) -> None:
        """A worker is gone."""

    def handle_counts(self, worker: str, counts: Iterable[tuple[str, int]]) -> None:
        """A worker tells what it has in flight where that has changed."""


class Trials(Protocol):
    """Who has workers try what is held back, on the agent's side."""

    def handle_worker(self, worker: str) -> None:
        """A worker follows."""

    def handle_gone(self, worker: str, *, is_death: bool) -> None:
        """A worker follows no more."""

    def handle_tried(self, worker: str, token: int, problem: str) -> None:
        """A worker has applied what it was to try, or says why it could not."""


def _pack(message: list[Any]) -> bytes:
    packed: bytes = msgpack.packb(message)
    return packed


def _unpacker() -> msgpack.Unpacker:
    return msgpack.Unpacker(use_list=False, max_buffer_size=MESSAGE_BYTES_MAX)


class FeedServer:
    """The agent's end: publishes commits to every follower and collects their metrics.

    `last_seq` is the newest commit published; `_recent` holds packed commits up to it, without holes.
    """

    def __init__(
        self,
        path: Path,
        last_seq: int,
        on_samples: Callable[[str, Iterable[Sample]], None],
        on_gone: Callable[[str], None] = lambda _: None,
        interested: Followers | None = None,
    ) -> None:
        self._path = path
        self._on_samples = on_samples
        self._interested = interested
        self._on_gone = on_gone
        # What each worker leaves out now: machine, failures in a row, seconds that are left of it.
        self.failing: dict[str, tuple[tuple[str, int, float], ...]] = {}
        # Called with a machine that requests wait for; may be replaced.
        self.on_start: Callable[[str], None] = lambda _: None
        self.trials: Trials | None = None  # may be set before `start`
        self.deaths = 0  # of followers that went without a word
        self.last_seq = last_seq
        self._recent: deque[tuple[int, bytes]] = deque(maxlen=COMMITS_KEPT)
        self._followers: dict[asyncio.StreamWriter, str] = {}
        self._server: asyncio.Server | None = None
        self._keeper: asyncio.Task[None] | None = None

    @property
    def followers(self) -> list[str]:
        """The workers that follow right now, as `worker-<index>/<process id>`."""
        return sorted(self._followers.values())

    async def start(self) -> None:
        """Listen. A socket that an earlier agent left behind is replaced."""
        await self._listen()
        self._keeper = asyncio.create_task(self._keep_listening())

    async def _listen(self) -> None:
        self._path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._serve, str(self._path))
        self._path.chmod(0o600)

    async def _keep_listening(self) -> None:
        """Make the socket's file again when somebody removed it: no worker could find the feed without it."""
        while True:
            await asyncio.sleep(SOCKET_LOOK_S)
            if self._path.exists():
                continue
            log.warning("the feed's socket is gone and is made again", extra={"path": self._path})
            old = self._server
            try:
                await self._listen()
            except OSError as error:
                log.warning("the feed's socket cannot be made", extra={"error": repr(error)})
                continue
            if old is not None:
                old.close()

    async def stop(self) -> None:
        """Close the socket and every follower."""
        if self._keeper is not None:
            self._keeper.cancel()
        if self._server is not None:
            self._server.close()
        for writer in list(self._followers):
            writer.close()
        with contextlib.suppress(OSError):
            self._path.unlink()

    def publish(self, commit: Commit) -> None:
        """Send one commit to all followers. Never blocks: one that does not read is cut off."""
        packed = self._pack_commit(commit)
        if packed is None:
            self._recent.clear()
            packed = _pack(["reload"])
        else:
            self._recent.append((commit.seq, packed))
        self.last_seq = commit.seq
        for writer in list(self._followers):
            if writer.transport.get_write_buffer_size() > BACKLOG_BYTES_MAX:
                log.warning("a worker does not read its feed and is cut off")
                self._forget(writer, is_death=True)
                writer.transport.abort()
            else:
                writer.write(packed)

    def publish_lost(self) -> None:
        """Have all followers load the file when they find the next agent: it may hold something else then."""
        for writer in self._followers:
            writer.write(_pack(["lost"]))

    def send(self, message: list[Any], worker: str | None = None) -> None:
        """Send a hint to one worker, or to all. One that does not read misses it, and will be cut off."""
        packed = _pack(message)
        for writer, name in self._followers.items():
            if worker in {None, name} and writer.transport.get_write_buffer_size() < BACKLOG_BYTES_MAX:
                writer.write(packed)

    def _pack_commit(self, commit: Commit) -> bytes | None:
        """Return the message of a commit; None when workers had better read the file.

        That is so for a large one, and when one before it never came here: the file has it.
        """
        if commit.reload or len(commit.changes) > COMMIT_ROWS_MAX or commit.seq > self.last_seq + 1:
            return None
        packed = _pack(["commit", commit.seq, commit.changes])
        return packed if len(packed) <= COMMIT_BYTES_MAX else None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        unpacker = _unpacker()
        is_death = True
        try:
            while data := await reader.read(1 << 16):
                unpacker.feed(data)
                for message in unpacker:
                    if message == ("bye",):
                        is_death = False
                    else:
                        self._handle(message, writer)
        except ConnectionError:
            pass  # it ended while something was on its way to it
        except (OSError, ValueError, TypeError, msgpack.UnpackException) as error:
            log.warning("a worker's feed connection failed", extra={"error": repr(error)})
        finally:
            self._forget(writer, is_death=is_death)
            writer.close()

    def _forget(self, writer: asyncio.StreamWriter, *, is_death: bool) -> None:
        worker = self._followers.pop(writer, None)
        if worker is None or worker in self._followers.values():
            return
        self.deaths += is_death
        self.failing.pop(worker, None)
        self._on_gone(worker)
        if self._interested is not None:
            self._interested.drop_worker(worker)
        if self.trials is not None:
            self.trials.handle_gone(worker, is_death=is_death)

    def _handle(self, message: Any, writer: asyncio.StreamWriter) -> None:
        match message:
            case ("follow", str(worker), int(seq)):
                self._followers[writer] = worker
                writer.writelines(self._catch_up(seq))
                if self._interested is not None:
                    writer.writelines(map(_pack, self._interested.add_worker(worker)))
                if self.trials is not None:
                    self.trials.handle_worker(worker)
            case ("loads", tuple(counts)) if writer in self._followers:
                if self._interested is not None:
                    self._interested.handle_counts(self._followers[writer], counts)
            case ("failing", tuple(machines)) if writer in self._followers:
                self.failing[self._followers[writer]] = machines
            case ("tried", int(token), str(problem)) if writer in self._followers:
                if self.trials is not None:
                    self.trials.handle_tried(self._followers[writer], token, problem)
            case ("start", str(machine)):
                self.on_start(machine)
            case ("samples", str(worker), tuple(samples)):
                self._on_samples(worker, samples)
            case _:
                raise ValueError(f"unknown feed message {message!r:.80}")

    def _catch_up(self, seq: int) -> list[bytes]:
        """Return what a follower that has seen `seq` is missing."""
        if seq == self.last_seq:
            return []
        first_kept = self._recent[0][0] if self._recent else self.last_seq + 1
        if seq > self.last_seq or seq < first_kept - 1:
            return [_pack(["reload"])]
        return [packed for kept, packed in self._recent if kept > seq]


class FeedFollower:
    """A worker's end: applies what the agent publishes, and outlives the agent.

    `connected` is true while the agent answers; `heard` is the monotonic time of the last sign of it.
    """

    def __init__(
        self,
        path: Path,
        worker: str,
        *,
        load: Callable[[], Awaitable[int]],
        apply: Callable[[RowChange], None],
        samples: Callable[[], Iterable[Sample]],
        hints: Hints,
    ) -> None:
        self._hints = hints
        self._path = path
        self._worker = worker
        self._told_failing = False  # whether the agent has a list of ours that is not empty
        self._problem = ""  # of the trial that goes on
        self._is_trying = False  # while the table has rows that the file, as it is shown, has not
        self._load = load
        self._apply = apply
        self._samples = samples
        self.seq = 0
        self._writer: asyncio.StreamWriter | None = None  # set while `connected`
        self.connected = False
        self.linked = asyncio.Event()  # set while `connected`
        self.heard = time.monotonic()

    async def run(self) -> None:
        """Follow for ever; a lost agent is looked for with growing pauses while routing goes on."""
        pause = RECONNECT_MIN_S
        while True:
            try:
                reader, writer = await asyncio.open_unix_connection(str(self._path))
            except OSError:
                pause = await self._rest(pause)
                continue
            self.connected, self._writer = True, writer
            self.linked.set()
            connected_at = time.monotonic()
            reporter = asyncio.create_task(self._report(writer))
            teller = asyncio.create_task(self._tell_loads(writer))
            try:
                writer.write(_pack(["follow", self._worker, NO_SEQ if self._is_trying else self.seq]))
                await self._follow(reader)
            except Exception as error:  # noqa: BLE001 — whatever the agent says, the worker must follow it again
                log.warning("the feed failed", extra={"error": repr(error)})
            finally:
                self.connected, self._writer = False, None
                self.linked.clear()
                reporter.cancel()
                teller.cancel()
                writer.close()
                self._hints.forget_siblings()
                self.heard = time.monotonic()
            log.info("the agent is away; routing goes on with the last table")
            if time.monotonic() - connected_at > RECONNECT_MAX_S:
                pause = RECONNECT_MIN_S
            pause = await self._rest(pause)

    async def _rest(self, pause: float) -> float:
        """Wait before the next try, and return how long to wait before the one after it."""
        self._hints.follow_loads()
        if time.monotonic() - self.heard > LOADS_KEPT_S:
            self._hints.set_present(())
        await asyncio.sleep(pause * random.uniform(0.5, 1.0))
        return min(pause * 2, RECONNECT_MAX_S)

    async def _follow(self, reader: asyncio.StreamReader) -> None:
        unpacker = _unpacker()
        while data := await reader.read(1 << 18):
            unpacker.feed(data)
            self.heard = time.monotonic()
            for message in unpacker:
                match message:
                    case ("commit", int(seq), tuple(changes)):
                        if seq > self.seq:
                            await self._apply_all(changes)
                            self.seq = seq
                    case ("reload",):
                        self.seq = await self._load()
                        self._is_trying = False
                    case ("try", int(token), tuple(changes)):
                        await self._try(token, changes)
                    case ("settled",):
                        self._is_trying = False
                    case ("lost",):
                        self.seq = NO_SEQ
                    case ("siblings", tuple(counts)):
                        self._hints.set_siblings(counts)
                    case ("present", tuple(nodes)):
                        self._hints.set_present(nodes)
                    case ("round_trips", str(origin), tuple(round_trips)):
                        self._hints.set_round_trips(origin, round_trips)
                    case _:
                        raise ValueError(f"unknown feed message {message!r:.80}")

    async def _apply_all(self, changes: Sequence[Any]) -> None:
        """Apply one commit: a usual one at once, a large one with pauses in which requests are served."""
        for start in range(0, len(changes), ROWS_A_TURN):
            if start:
                await asyncio.sleep(0)
            for change in changes[start : start + ROWS_A_TURN]:
                self._apply(RowChange(*change))

    async def _try(self, token: int, changes: Sequence[Any]) -> None:
        """Apply rows that nobody else has yet, and say so."""
        self._is_trying = True
        try:
            await self._apply_all(changes)
        except Exception as error:  # noqa: BLE001 - to find out is what the trial is for
            self._problem = repr(error)[:PROBLEM_CHARS_MAX]
        if token:
            self.ask(["tried", token, self._problem])
            self._problem = ""

    def leave(self) -> None:
        """Tell the agent that this worker ends as it should."""
        self.ask(["bye"])

    async def _report(self, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while True:
                self.report()
                await writer.drain()
                await asyncio.sleep(SAMPLES_INTERVAL_S)

    def report(self) -> None:
        """Tell the agent, if it is there, what has been counted up to now."""
        if self._writer is not None:
            self._writer.write(_pack(["samples", self._worker, list(self._samples())]))
            failing = self._hints.failing.collect(asyncio.get_running_loop().time())
            if failing or self._told_failing:
                self._writer.write(_pack(["failing", failing]))
            self._told_failing = bool(failing)

    def ask(self, message: list[Any]) -> bool:
        """Send the agent a message; False when it is away."""
        if self._writer is None:
            return False
        self._writer.write(_pack(message))
        return True

    async def _tell_loads(self, writer: asyncio.StreamWriter) -> None:
        self._hints.busy.forget_told()  # this agent may be another one than the last
        with contextlib.suppress(OSError):
            while True:
                self._hints.follow_loads()
                if counts := self._hints.busy.collect():
                    writer.write(_pack(["loads", counts]))
                    await writer.drain()
                await asyncio.sleep(LOADS_INTERVAL_S)
