"""One life of a simulated node: the real replica and the real store, in virtual time.

Is the replica's host: says what time it is, runs calls of the store after the time that a disk takes, with
the faults that wait for them. Decides nothing that the product decides. Invariant: after its life has ended
nothing of a node acts any more, whatever was under way.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from replication.core.change import Commit
from replication.core.links import Link as AnyLink
from replication.core.member import Address, MemberInfo
from replication.core.probe import jitter
from replication.errors import StoreError
from replication.replica import Replica
from replication.simulator.checkers import Checkers, InvariantError
from replication.simulator.events import EventQueue
from replication.simulator.machine import Disk, WallClock
from replication.simulator.network import Link, Network
from replication.simulator.planted import Build
from replication.simulator.settings import NodeSettings
from replication.simulator.trace import Trace
from replication.statements import Statement
from replication.store import Store

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class World:
    """What all nodes share."""

    queue: EventQueue
    trace: Trace
    network: Network
    checkers: Checkers
    settings: NodeSettings
    build: Build


class NodeKilledError(Exception):
    """The process was killed within a call of the store."""


class _Timeline(logging.Handler):
    """Writes what a replica logs to the timeline."""

    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self._note = note

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        error = f": {record.exc_info[1]}" if record.exc_info else ""
        self._note(record.getMessage() + error)


class MemorySpool:
    """A spool of the simulated disk."""

    def __init__(self) -> None:
        self._chunks: list[bytes] = []

    def write(self, chunk: bytes) -> None:
        """Add a chunk."""
        self._chunks.append(chunk)

    def read(self) -> Iterator[bytes]:
        """Return the chunks from the first on."""
        yield from self._chunks

    def close(self) -> None:
        """Let go of what is held."""
        self._chunks.clear()


class Node:
    """A running node, from its start to its crash."""

    def __init__(
        self, world: World, index: int, life: int, address: Address, *, disk: Disk, clock: WallClock
    ) -> None:
        self.index = index
        self.running = True
        self.paused_until_us = 0
        self.fail_in_steps = 0  # the next call of the store that writes is interrupted there; 0: not
        self.failure_lasts = False  # until that call is over
        self.dies_when_failing = False
        self.store: Store = disk.open()
        self._world = world
        self._disk = disk
        self._clock = clock
        self._rng = Random(f"{world.settings.seed}/node/{index}/{life}")
        self._ends: dict[Link, None] = {}  # all links that are open, in order
        self._disk_free_us = 0  # when the calls of the store that were made so far are done
        info = MemberInfo(self.store.site, f"n{index}", *address, incarnation=max(0, self.wall_ms()))
        # A logger of its own, known to nobody else: what a simulated node says is for the timeline alone.
        log = logging.Logger(info.name, logging.INFO)  # noqa: LOG001
        log.addHandler(_Timeline(self.note))
        self.replica = Replica(
            self,
            world.settings.replica,
            info,
            self._rng,
            seen=self.store.seen(),
            view=world.build.view,
            log=log,
        )

    @property
    def info(self) -> MemberInfo:
        """Who answers here."""
        return self.replica.swim.me

    def note(self, text: str) -> None:
        """Write to the timeline."""
        self._world.trace.note(self._world.queue.now_us, self.index, text)

    def count(self, name: str, by: int = 1) -> None:
        """Count what happened, for the report."""
        self._world.network.counters[name] += by

    # --- life -----------------------------------------------------------------------------------------

    def start(self, join: Iterable[Address], known: Iterable[MemberInfo] = ()) -> None:
        """Begin to look for peers, and for those that are known from before."""
        self.note(f"starts as site {self.store.site.hex()[:8]} with seq {self.store.seq}")
        self._world.checkers.check_opened(self)
        self._world.checkers.note_synced(self.index)
        self.replica.start(join, known=[*known] or self.store.members())
        self.call_later(self._world.settings.fsync_ms * self._rng.random(), self._sync_disk)

    def end(self, *, power: bool) -> None:
        """Stop at once; peers learn of a killed process from the operating system, of a power failure not."""
        if not self.running:
            return
        self.running = False
        if power:
            self._disk.cut_power()
            self._world.checkers.note_power_lost(self.index)
        else:
            self._disk.kill()
        for link in list(self._ends):
            link.is_open = False
            link.abandon(told=not power)
        self._ends.clear()
        self._world.network.counters.update(self.counters())

    def counters(self) -> dict[str, int]:
        """Return what the report counts of this life."""
        replica = self.replica
        return {
            "payloads_pushed": replica.counters["payloads_pushed"],
            "payloads_synced": replica.sync_counters["changesets_served"],
            "sync_rounds": replica.sync_counters["sessions"],
            "snapshots_served": replica.sync_counters["snapshots_served"],
            "snapshots_adopted": replica.sync_counters["snapshots_received"],
            "slices_verified": replica.verifier.counters["slices"],
            "rows_healed": replica.verifier.counters["rows_healed"],
            "tombstones_collected": replica.counters["tombstones_collected"],
            "changesets_parked": replica.counters["changesets_parked"],
            "merges_failed": replica.counters["apply_failed"],
        }

    def enter(self, act: Callable[[], object]) -> None:
        """Do something in this life, now or when a pause is over."""
        if not self.running:
            return
        queue = self._world.queue
        if queue.now_us < self.paused_until_us:
            self.count("pauses")
            queue.at(self.paused_until_us, lambda: self.enter(act))
            return
        try:
            act()
        except NodeKilledError:
            self.end(power=False)
        except InvariantError:
            raise
        except Exception as error:
            found = f"node {self.index}: {type(error).__name__}: {error}"
            raise InvariantError("errors_handled", found, frozenset((self.index,))) from error

    def _sync_disk(self) -> None:
        self._disk.sync()
        self._world.checkers.note_synced(self.index)
        self.call_later(jitter(self._rng, self._world.settings.fsync_ms), self._sync_disk)

    # --- the replica's host ---------------------------------------------------------------------------

    def now_ms(self) -> float:
        """Return the monotonic time."""
        return self._world.queue.now_us / 1000

    def wall_ms(self) -> int:
        """Return what the clock on the board shows."""
        return self._clock.compute_ms(self._world.queue.now_us)

    def call_later(self, delay_ms: float, act: Callable[[], None]) -> None:
        """Call `act` after a while, if this life still lasts."""
        # Rounded up to the first microsecond at which a core that waits for this time sees that it has come.
        self._world.queue.after(max(0, int(delay_ms * 1000)) + 1, lambda: self.enter(act))

    def send_datagram(self, to: Address, data: bytes) -> None:
        """Send, and forget."""
        self._world.network.send_datagram(self, to, data)

    def dial(self, address: Address, *, lasting: bool, done: Callable[[AnyLink | None], None]) -> None:
        """Open a link."""

        def dialled(link: Link | None) -> None:
            if link is not None:
                self.handle_link_up(link)
                if not link.is_open:
                    link = None
            done(link)

        timeout_ms = self._world.settings.connect_timeout_ms
        self._world.network.dial(self, address, lasting=lasting, timeout_ms=timeout_ms, on_done=dialled)

    def make_spool(self) -> MemorySpool:
        """Return an empty spool."""
        return MemorySpool()

    def run(
        self, act: Callable[[Store], T], done: Callable[[T], None], failed: Callable[[Exception], None]
    ) -> None:
        """Run something on the store that makes no commit."""
        self._on_disk(lambda: act(self.store), lambda _: (), done, failed)

    def commit(
        self,
        act: Callable[[Store], T],
        commits_of: Callable[[T], Sequence[Commit]],
        done: Callable[[T], None],
        failed: Callable[[Exception], None],
    ) -> None:
        """Run something on the store that may commit, with the fault that waits for it."""
        self._on_disk(lambda: self._write(lambda: act(self.store)), commits_of, done, failed)

    def _on_disk(
        self,
        act: Callable[[], T],
        commits_of: Callable[[T], Sequence[Commit]],
        done: Callable[[T], None],
        failed: Callable[[Exception], None],
    ) -> None:
        """Call `act` when the disk has done what was asked for before."""

        def run() -> None:
            try:
                result = act()
            except (NodeKilledError, InvariantError):
                raise
            except Exception as error:  # noqa: BLE001 - whoever asked decides
                failed(error)
                return
            for commit in commits_of(result):
                self._publish(commit)
            done(result)

        queue = self._world.queue
        took_us = int(self._world.settings.disk_ms * 1000 * (0.5 + self._rng.random()))
        self._disk_free_us = max(self._disk_free_us, queue.now_us) + took_us
        queue.at(self._disk_free_us, lambda: self.enter(run))

    # --- the store ------------------------------------------------------------------------------------

    def execute(self, statements: list[Statement], tx: str, parts: int) -> bool:
        """Write in one transaction; return whether it was acknowledged."""
        try:
            commit = self._write(lambda: self.store.execute(statements, self.wall_ms())[1])
        except StoreError as error:
            self.note(f"refuses {tx}: {error}")
            self.count("writes_refused")
            return False
        assert commit is not None, "each transaction of the workload changes something"
        own = next(item for item in reversed(commit.changesets) if item.site == self.store.site)
        self.note(f"writes {tx} as version {own.version}")
        self._world.checkers.acknowledge(self.index, (own.site, own.version), tx, parts)
        self._publish(commit)
        return True

    def _write(self, act: Callable[[], T]) -> T:
        """Run a call of the store, with the fault that waits for it; raises what the store raises."""
        try:
            if not self.fail_in_steps:
                result = act()
            else:
                with self._disk.failing(self.fail_in_steps, lasting=self.failure_lasts):
                    self.fail_in_steps = 0
                    result = act()
        except StoreError:
            if self.dies_when_failing:
                self.note("is killed in the middle of a transaction")
                self.count("killed_in_transaction")
                raise NodeKilledError from None
            raise
        finally:
            died, self.dies_when_failing = self.dies_when_failing, False
        if died:
            self.note("is killed right after a transaction")
            raise NodeKilledError
        return result

    def _publish(self, commit: Commit) -> None:
        self._world.checkers.check_commit(self, commit)
        self.replica.handle_commit(commit)

    # --- what the network brings ----------------------------------------------------------------------

    def handle_datagram(self, data: bytes) -> None:
        """Take a datagram."""
        self.replica.handle_datagram(data)

    def handle_link_up(self, link: Link) -> None:
        """Take note of a link and of who is at the other end."""
        if not link.is_open:
            return  # it broke before this node got to it
        self._ends[link] = None
        self.replica.handle_link_up(link)

    def handle_link_down(self, link: Link) -> None:
        """Take note that a link is gone."""
        if link in self._ends:
            del self._ends[link]
            self.replica.handle_link_down(link)

    def handle_frame(self, link: Link, data: bytes) -> None:
        """Take a frame of a stream."""
        self.replica.handle_frame(link, data)

    # --- views ----------------------------------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        """Whether nothing that came waits to be applied."""
        waits = len(self.replica.inbox) or self._disk_free_us > self._world.queue.now_us
        return not waits and not self.store.parked()

    def measure(self) -> dict[str, tuple[int, int]]:
        """Return what each bounded thing holds, and its bound."""
        return self.replica.measure()
