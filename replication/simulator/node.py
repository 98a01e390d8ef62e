"""One life of a simulated node: the real store and the real cores, in virtual time.

Does what `agent` does, without an event loop: decides nothing that a core decides. Knows nothing of which
faults there are. Invariant: after its life has ended nothing of a node acts any more, whatever was under way.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from random import Random

from replication.core import plumtree, swim
from replication.core.change import Commit, EncodedChangeset
from replication.core.clock import SiteId
from replication.core.linktable import LinkTable
from replication.core.member import Address, MemberInfo, MemberState
from replication.core.needs import encode_seen, is_ahead
from replication.core.neighbours import plan_neighbours
from replication.core.plumtree import Plumtree
from replication.core.probe import jitter
from replication.core.pull import ROUNDS_MAX, Adopt, Answer, Ask, Keep, Over, PullRound, SyncError, Take
from replication.core.swim import Swim
from replication.core.sync import SyncSchedule
from replication.core.versions import VersionRanges
from replication.core.wire import (
    Graft,
    IHave,
    Members,
    Prune,
    Push,
    SnapshotAsk,
    SnapshotChunk,
    StreamAck,
    StreamPing,
    SyncAsk,
    SyncChanges,
    SyncDone,
    SyncOpen,
    SyncState,
    decode_datagram,
    decode_frame,
    encode,
)
from replication.errors import SnapshotError, StoreError
from replication.repair import CHUNK_BYTES, read_floors, read_needs
from replication.simulator.checkers import Checkers, InvariantError
from replication.simulator.events import EventQueue
from replication.simulator.machine import Disk, WallClock
from replication.simulator.network import Link, Network
from replication.simulator.planted import Build
from replication.simulator.settings import NodeSettings
from replication.simulator.trace import Trace
from replication.store import Statement, Store

Output = swim.Output | plumtree.Output


@dataclass(frozen=True, slots=True)
class World:
    """What all nodes share."""

    queue: EventQueue
    trace: Trace
    network: Network
    checkers: Checkers
    settings: NodeSettings
    build: Build


@dataclass(slots=True)
class _Pull:
    """Our session: one at a time."""

    peer: SiteId
    link: Link
    borrowed: bool
    round: PullRound
    rounds: int = 1
    received: int = 0
    came: int = 0  # in this round
    moved: int = 0  # answers taken, so that a timeout can tell whether there was progress
    spool: list[bytes] = field(default_factory=list)


def _round_up_us(at_ms: float) -> int:
    """Return the first microsecond at which a core that waits for this time sees that it has come."""
    return int(at_ms * 1000) + 1


class NodeKilledError(Exception):
    """The process was killed within a call of the store."""


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
        self._links: LinkTable[Link] = LinkTable(on_peer_up=self._on_peer_up, on_peer_down=self._on_peer_down)
        self._ends: dict[Link, None] = {}  # all links that are open, in order
        self._wanted: dict[SiteId, Address] = {}
        self._redials: dict[SiteId, int] = {}  # failures in a row
        self._dialling: dict[SiteId, None] = {}
        settings = world.settings
        info = MemberInfo(self.store.site, f"n{index}", *address, incarnation=max(0, self.wall_ms()))
        self.swim = Swim(info, settings.swim, self._rng)
        self.tree = Plumtree(settings.plumtree, has=self._has, distance=self._distance)
        self._schedule = SyncSchedule(settings.sync, self._rng)
        self._seen = self.store.seen()
        self._inbox: deque[EncodedChangeset] = deque()
        self._inbox_bytes = 0
        self._applying = False
        self._relinking = False
        self._wake_us: int | None = None
        self._sync_us: int | None = None
        self._pull: _Pull | None = None
        self._pulling = False  # from the choice of a peer to the end of the session
        self._number = 0

    @property
    def info(self) -> MemberInfo:
        """Who answers here."""
        return self.swim.me

    @property
    def now_ms(self) -> float:
        """The monotonic clock."""
        return self._world.queue.now_us / 1000

    def wall_ms(self) -> int:
        """Return what the clock on the board shows."""
        return self._clock.compute_ms(self._world.queue.now_us)

    def note(self, text: str) -> None:
        """Write to the timeline."""
        self._world.trace.note(self._world.queue.now_us, self.index, text)

    def count(self, name: str, by: int = 1) -> None:
        """Count what happened, for the report."""
        self._world.network.counters[name] += by

    # --- life -----------------------------------------------------------------------------------------

    def start(self, join: Iterable[Address]) -> None:
        """Begin to look for peers."""
        self.note(f"starts as site {self.store.site.hex()[:8]} with seq {self.store.seq}")
        self._world.checkers.check_opened(self)
        self._world.checkers.note_synced(self.index)
        self.swim.set_join_addresses(join)
        self._run_swim(self.swim.start(self.now_ms))
        self._arm_sync()
        self._after(self._world.settings.fsync_ms * self._rng.random(), self._sync_disk)
        self._after(self._world.settings.maintenance_ms, self._maintain)

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

    def enter(self, act: Callable[[], None]) -> None:
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

    def _after(self, delay_ms: float, act: Callable[[], None]) -> None:
        self._world.queue.after(int(delay_ms * 1000), lambda: self.enter(act))

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

    def _write(self, act: Callable[[], Commit | None]) -> Commit | None:
        """Run a call that may commit, with the fault that waits for it; raises what the store raises."""
        try:
            if not self.fail_in_steps:
                commit = act()
            else:
                with self._disk.failing(self.fail_in_steps, lasting=self.failure_lasts):
                    self.fail_in_steps = 0
                    commit = act()
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
        return commit

    def _publish(self, commit: Commit) -> None:
        self._world.checkers.check_commit(self, commit)
        for changeset in commit.changesets:
            self._mark_seen(changeset)
            if changeset.site == self.store.site:
                self._run_tree(self.tree.broadcast(changeset, self.now_ms))

    def _apply(self, batch: list[EncodedChangeset]) -> int:
        applied = 0

        def act() -> Commit | None:
            nonlocal applied
            result = self.store.apply(batch, self.wall_ms())
            applied = result.applied + result.parked
            if result.parked:
                self.note(f"parks {result.parked} changesets")
                self.count("changesets_parked", result.parked)
            return result.commit

        commit = self._write(act)
        if commit is not None:
            self._publish(commit)
        for changeset in batch:
            self._mark_seen(changeset)
        return applied

    def _mark_seen(self, changeset: EncodedChangeset) -> None:
        ranges = self._seen.setdefault(changeset.site, VersionRanges())
        ranges.add(changeset.version, changeset.version)

    def _has(self, site: SiteId, version: int) -> bool:
        ranges = self._seen.get(site)
        return ranges is not None and ranges.contains(version)

    def _take_in(self, changeset: EncodedChangeset) -> None:
        if self._inbox_bytes > self._world.settings.inbox_bytes_max:
            self.tree.forget((changeset.site, changeset.version))
            return
        self._inbox.append(changeset)
        self._inbox_bytes += len(changeset.payload)
        if not self._applying:
            self._applying = True
            self._after(self._world.settings.disk_ms * (0.5 + self._rng.random()), self._apply_inbox)

    def _apply_inbox(self) -> None:
        """Apply what was pushed meanwhile, at once."""
        batch = list(self._inbox)
        self._inbox.clear()
        self._inbox_bytes = 0
        self._applying = False
        try:
            self._apply(batch)
        except StoreError as error:
            self.note(f"cannot apply {len(batch)} changesets: {error}")
            self.count("merges_failed")
            for changeset in batch:
                self.tree.forget((changeset.site, changeset.version))

    def _sync_disk(self) -> None:
        self._disk.sync()
        self._world.checkers.note_synced(self.index)
        self._after(jitter(self._rng, self._world.settings.fsync_ms), self._sync_disk)

    def _maintain(self) -> None:
        """Keep the log bounded, and try again what is parked for a clock that was ahead."""
        limit = self._world.settings.log_versions_max
        keep = {site: ranges.head - limit for site, ranges in self._seen.items() if ranges.head > limit}
        try:
            if keep:
                self.store.prune_log(keep)
            if self.store.parked():
                commit = self._write(lambda: self.store.retry_parked(self.wall_ms()))
                if commit is not None:
                    self._publish(commit)
        except StoreError as error:
            self.note(f"maintenance failed: {error}")
        self._world.checkers.check_bounds(self)
        self._after(self._world.settings.maintenance_ms, self._maintain)

    # --- what the network brings ----------------------------------------------------------------------

    def handle_datagram(self, data: bytes) -> None:
        """Take a datagram."""
        self._run_swim(self.swim.handle_message(decode_datagram(data), self.now_ms))

    def handle_link_up(self, link: Link) -> None:
        """Take note of a link and of who is at the other end."""
        if not link.is_open:
            return  # it broke before this node got to it
        self._ends[link] = None
        self._run_swim(self.swim.handle_hello(link.peer, self.now_ms))
        self._links.handle_link_up(link)

    def handle_link_down(self, link: Link) -> None:
        """Take note that a link is gone."""
        if link not in self._ends:
            return
        del self._ends[link]
        pull = self._pull
        self._links.handle_link_down(link)
        if pull is not None and pull.link is link:
            self._finish_pull(ok=False)
        site = link.peer.site
        if self._links.get(site) is None:
            self.swim.handle_link_lost(site)
        if link.dialled and link.lasting and self.running:
            self._redial(site)

    def handle_frame(self, link: Link, data: bytes) -> None:
        """Take a frame of a stream."""
        message = decode_frame(data)
        peer = link.peer.site
        self.swim.heard(peer, self.now_ms)
        match message:
            case Push() | IHave() | Graft() | Prune():
                self._run_tree(self.tree.handle_message(peer, message, self.now_ms))
            case StreamPing():
                link.send(encode(StreamAck(message.number)))
            case StreamAck():
                self._run_swim(self.swim.handle_stream_ack(peer, message.number, self.now_ms))
            case Members():
                self._run_swim(self.swim.handle_members(message.updates, peer, self.now_ms))
            case SyncOpen():
                if is_ahead(self._seen, message.seen):
                    self._want_sync(peer)
                floors = read_floors(self.store, self._seen, message.seen)
                link.send(encode(Members(self.swim.export(128))))
                link.send(encode(SyncState(message.session, encode_seen(self._seen), floors)))
            case SyncAsk():
                self._serve_changes(link, message)
            case SnapshotAsk():
                for chunk in self.store.snapshot(self._world.settings.snapshot_chunk_bytes):
                    link.send(encode(SnapshotChunk(message.session, chunk)))
                link.send(encode(SyncDone(message.session, complete=True)))
                self.count("snapshots_served")
            case SyncState() | SyncChanges() | SyncDone() | SnapshotChunk():
                self._handle_answer(link, message)
            case _:
                raise AssertionError(f"nobody sends {message}")

    def _serve_changes(self, link: Link, ask: SyncAsk) -> None:
        needs = list(ask.needs)
        while needs:
            changesets, needs = read_needs(self.store, needs)
            if changesets:
                link.send(encode(SyncChanges(ask.session, tuple(changesets))))
                self.count("payloads_synced", len(changesets))
        link.send(encode(SyncDone(ask.session, complete=True)))

    # --- what the cores ask for -----------------------------------------------------------------------

    def _run_swim(self, outputs: Iterable[swim.Output]) -> None:
        for output in outputs:
            match output:
                case swim.SendDatagram(address, message):
                    self._world.network.send_datagram(self, address, encode(message))
                case swim.ProbeStream(site, number):
                    self._links.send(site, encode(StreamPing(number)))
                case swim.MemberChanged(info, state, _):
                    self._on_member_changed(info, state)
        self._arm()

    def _on_member_changed(self, info: MemberInfo, state: MemberState) -> None:
        self.note(f"sees {info.name} ({info.site.hex()[:8]}) {state.name.lower()}")
        if state in (MemberState.DEAD, MemberState.LEFT):
            self._links.close(info.site)
            self._schedule.forget(info.site)
        if not self._relinking:
            self._relinking = True
            self._after(20, self._relink)

    def _run_tree(self, outputs: Iterable[plumtree.Output]) -> None:
        for output in outputs:
            match output:
                case plumtree.SendFrame(peer, message):
                    if self._links.send(peer, encode(message)) and isinstance(message, Push):
                        self.count("payloads_pushed")
                case plumtree.Deliver(changeset):
                    self._take_in(changeset)
                case plumtree.Resend(peer, (site, version)):
                    for changeset in self.store.read_log(site, version, version, 1):
                        self._links.send(peer, encode(Push(changeset)))
                        self.count("payloads_pushed")
                case plumtree.NeedSync(peer):
                    self._want_sync(peer)
        self._arm()

    def _distance(self, site: SiteId) -> float:
        member = self.swim.members.get(site)
        return member.rtt_ms if member is not None and member.rtt_ms is not None else float("inf")

    def _arm(self) -> None:
        """Wake up when the first core is due."""
        due = [at for at in (self.swim.next_at(), self.tree.next_at()) if at is not None]
        if not due:
            return
        due_us = _round_up_us(min(due))
        if self._wake_us is None or due_us < self._wake_us:
            self._wake_us = due_us
            self._world.queue.at(due_us, lambda: self.enter(lambda: self._wake(due_us)))

    def _wake(self, due_us: int) -> None:
        if due_us != self._wake_us:
            return  # an earlier one was set meanwhile, and sets the next when it comes
        self._wake_us = None
        self._run_swim(self.swim.tick(self.now_ms))
        self._run_tree(self.tree.tick(self.now_ms))

    # --- links ----------------------------------------------------------------------------------------

    def _on_peer_up(self, site: SiteId) -> None:
        self.tree.handle_peer_up(site)
        self._want_sync(site)

    def _on_peer_down(self, site: SiteId) -> None:
        self.tree.handle_peer_down(site)

    def _relink(self) -> None:
        self._relinking = False
        members = {site: item for site, item in self.swim.members.items() if item.is_reachable}
        chosen = plan_neighbours(
            [*self.tree.eager, *self.tree.lazy],
            {site: item.rtt_ms for site, item in members.items()},
            self._rng,
        )
        self._wanted = {site: members[site].info.address for site in chosen}
        for link in [link for link in self._ends if link.dialled and link.lasting]:
            if link.peer.site not in self._wanted:
                link.close()
        for site in chosen:
            if not any(link.dialled and link.lasting and link.peer.site == site for link in self._ends):
                self._dial(site)

    def _dial(self, site: SiteId) -> None:
        address = self._wanted.get(site)
        if address is None or site in self._dialling:
            return
        self._dialling[site] = None

        def done(link: Link | None) -> None:
            del self._dialling[site]
            if link is not None and link.peer.site == site and site in self._wanted:
                self._redials.pop(site, None)
                self.handle_link_up(link)
                return
            if link is not None:
                link.close()
            self._redial(site)

        self._world.network.dial(
            self, address, lasting=True, timeout_ms=self._world.settings.connect_timeout_ms, on_done=done
        )

    def _redial(self, site: SiteId) -> None:
        failures = self._redials[site] = self._redials.get(site, 0) + 1
        settings = self._world.settings
        wait_ms = min(settings.redial_max_ms, settings.redial_ms * 2 ** min(failures - 1, 16))
        self._after(jitter(self._rng, wait_ms), lambda: self._dial(site))

    # --- repair ---------------------------------------------------------------------------------------

    def _want_sync(self, site: SiteId) -> None:
        self._schedule.want(site, self.now_ms)
        self._arm_sync()

    def _arm_sync(self) -> None:
        due_us = _round_up_us(self._schedule.next_at())
        if self._sync_us is None or due_us < self._sync_us:
            self._sync_us = due_us
            self._world.queue.at(due_us, lambda: self.enter(lambda: self._begin_sync(due_us)))

    def _begin_sync(self, due_us: int) -> None:
        if due_us != self._sync_us:
            return
        self._sync_us = None
        if self._pulling:
            return  # the end of the session sets the next one
        peer = self._schedule.choose(
            [site for site, member in self.swim.members.items() if member.is_reachable], self.now_ms
        )
        if peer is None:
            self._arm_sync()
            return
        self._pulling = True
        link = self._links.get(peer)
        if link is not None:
            self._begin_round(_Pull(peer, link, False, self._make_round()))
            return

        def done(link: Link | None) -> None:
            if link is not None:
                self.handle_link_up(link)
                if link.peer.site == peer:
                    self._begin_round(_Pull(peer, link, True, self._make_round()))
                    return
                link.close()
            self._end_sync(peer, ok=False, received=0)

        address = self.swim.members[peer].info.address
        self._world.network.dial(
            self, address, lasting=False, timeout_ms=self._world.settings.connect_timeout_ms, on_done=done
        )

    def _make_round(self) -> PullRound:
        self._number += 1
        return PullRound(self._number, self.store.site, lambda: self._world.build.view(self._seen))

    def _begin_round(self, pull: _Pull) -> None:
        self._pull = pull
        pull.came = 0
        self.count("sync_rounds")
        pull.link.send(encode(Members(self.swim.export(128))))
        pull.link.send(encode(pull.round.open()))
        self._watch_pull(pull)

    def _watch_pull(self, pull: _Pull) -> None:
        moved = pull.moved

        def check() -> None:
            if self._pull is not pull:
                return
            if pull.moved != moved:
                self._watch_pull(pull)
            else:
                self.note("gives up a sync that does not move")
                pull.link.close()

        self._after(self._world.settings.session_timeout_ms, check)

    def _handle_answer(self, link: Link, answer: Answer) -> None:
        pull = self._pull
        if pull is None or pull.link is not link or pull.round.number != answer.session:
            return
        pull.moved += 1
        try:
            match pull.round.handle_answer(answer):
                case Ask(frame):
                    link.send(encode(frame))
                case Take(changesets):
                    pull.came += self._apply(list(changesets))
                case Keep(chunk):
                    pull.spool.append(chunk)
                case Adopt():
                    self._adopt(pull)
                    self._end_round(pull, more=True)
                case Over(more):
                    self._end_round(pull, more=more)
        except (StoreError, SnapshotError, SyncError) as error:
            self.note(f"sync failed: {error}")
            self._finish_pull(ok=False)

    def _adopt(self, pull: _Pull) -> None:
        commit = self._write(lambda: self.store.apply_snapshot(pull.spool, self.wall_ms()))
        self.note(f"adopts a snapshot of {len(pull.spool)} chunks")
        self.count("snapshots_adopted")
        pull.spool.clear()
        pull.came = 1
        if commit is not None:
            self._publish(commit)
        for site, ranges in self.store.seen().items():
            self._seen.setdefault(site, VersionRanges()).update(ranges)

    def _end_round(self, pull: _Pull, *, more: bool) -> None:
        pull.received += pull.came
        if pull.came and more and pull.rounds < ROUNDS_MAX:
            pull.rounds += 1
            pull.round = self._make_round()
            self._begin_round(pull)
        else:
            self._finish_pull(ok=True)

    def _finish_pull(self, *, ok: bool) -> None:
        pull, self._pull = self._pull, None
        assert pull is not None, "there is a session to finish"
        if pull.borrowed:
            pull.link.close()
        self._end_sync(pull.peer, ok=ok, received=pull.received)

    def _end_sync(self, peer: SiteId, *, ok: bool, received: int) -> None:
        self._pulling = False
        self._schedule.handle_result(peer, self.now_ms, ok=ok, received=received)
        self._arm_sync()

    # --- views ----------------------------------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        """Whether nothing that came waits to be applied."""
        return not self._inbox and not self.store.parked()

    def measure(self) -> dict[str, tuple[int, int]]:
        """Return what each bounded thing holds, and its bound."""
        inbox_max = self._world.settings.inbox_bytes_max + CHUNK_BYTES
        return {**self.tree.measure(), **self.swim.measure(), "inbox_bytes": (self._inbox_bytes, inbox_max)}
