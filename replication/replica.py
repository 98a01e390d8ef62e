"""One replica among its peers: membership, broadcast and repair around one store.

Wires the cores to each other and to the store; what to do is decided by the cores. Knows nothing of event
loops, threads, sockets or files: those are its host's. Invariant: what the store commits is handed in through
`handle_commit`, in order, and own changesets go out from there and from nowhere else.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from replication.core import freshness, plumtree, swim
from replication.core.change import Commit, EncodedChangeset, some
from replication.core.clock import NEVER, Hlc, SiteId
from replication.core.freshness import Freshness, FreshnessSettings
from replication.core.inbox import Inbox
from replication.core.limits import ORIGINS_MAX, OriginLimits, OriginSettings
from replication.core.links import Link, Links
from replication.core.member import Address, MemberInfo, MemberState
from replication.core.needs import Seen, get_head, has_seen
from replication.core.neighbours import plan_neighbours
from replication.core.plumtree import Plumtree, PlumtreeSettings
from replication.core.probe import Rng
from replication.core.repeats import Repeats
from replication.core.swim import Swim, SwimSettings
from replication.core.sync import SyncSchedule, SyncSettings
from replication.core.tokens import Arrivals, Token
from replication.core.versions import VersionRanges
from replication.core.wire import (
    Beats,
    ChangesetId,
    DigestAsk,
    DigestRanges,
    Graft,
    IHave,
    Large,
    Members,
    Prune,
    Push,
    SnapshotAsk,
    SnapshotChunk,
    StatesAsk,
    StreamAck,
    StreamPing,
    SyncAsk,
    SyncBusy,
    SyncChanges,
    SyncDone,
    SyncOpen,
    SyncPart,
    SyncState,
    WireError,
    decode_datagram,
    decode_frame,
    encode,
)
from replication.errors import BusyError, ReadOnlyError, ReplacedError, SnapshotError, StoreError
from replication.host import Host, Spool
from replication.maintenance import Maintenance, MaintenanceSettings, Tidied
from replication.pulls import Failed, Puller
from replication.serving import CHUNK_BYTES, Server
from replication.store import ApplyResult, Store
from replication.verifier import Verifier, VerifySettings

if TYPE_CHECKING:
    from replication.core.recovery import Recovery

LOG = logging.getLogger(__name__)

# One transaction's worth: enough to share the cost of a commit, small enough not to hold up local writes.
BATCH_CHANGESETS = 512
BATCH_BYTES = 1024 * 1024
# A random part of the member list goes along with each session; gossip and other sessions bring the rest.
MEMBERS_EXCHANGED = 128
# Sessions that follow sooner carry only a few: links that come up in numbers would make it the main cost.
MEMBERS_INTERVAL_MS = 5_000.0
MEMBERS_EXCHANGED_SOON = 8
# So many changesets in one session are more than were on their way along the tree.
NEWS_MIN = 8
# How soon links are chosen again after membership changed: a cluster that forms changes many times.
RELINK_MS = 20.0
# After a batch that could not be applied: whatever is wrong with the file is not over at once.
RETRY_MS = 1_000.0
RESENDS_MAX = 256
# Whom nobody has told us of by then is no member.
SETTLED_MS = 60_000.0
# Who waits for a write holds a connection of the application's; so many at once are a queue that grows.
WAITING_MAX = 1_024


@dataclass(frozen=True, slots=True)
class ReplicaSettings(MaintenanceSettings):
    """The knobs of one replica; times as in AgentSettings."""

    swim: SwimSettings = field(default_factory=SwimSettings)
    plumtree: PlumtreeSettings = field(default_factory=PlumtreeSettings)
    sync: SyncSettings = field(default_factory=SyncSettings)
    freshness: FreshnessSettings = field(default_factory=FreshnessSettings)
    origins: OriginSettings = field(default_factory=OriginSettings)
    redial_ms: float = 200  # first wait before a lost link is dialled again, doubled up to the next
    redial_max_ms: float = 10_000
    # Without progress for this long a session is given up, and its link with it.
    session_timeout_ms: float = 10_000
    sessions_served_max: int = 4  # each holds a chunk in memory and shares the disk
    chunk_bytes: int = CHUNK_BYTES
    # What may wait to be applied; above it pushes are dropped, and sync brings them when there is room.
    inbox_bytes_max: int = 32 * 1024 * 1024
    verify: VerifySettings = field(default_factory=VerifySettings)


class Replica:
    """One node's replication; from `start` on it reacts to what its host reports."""

    def __init__(
        self,
        host: Host,
        settings: ReplicaSettings,
        me: MemberInfo,
        rng: Rng,
        *,
        seen: dict[SiteId, VersionRanges],
        view: Callable[[Seen], Seen] = lambda seen: seen,
        log: logging.Logger = LOG,
    ) -> None:
        self.counters: Counter[str] = Counter()
        self.sync_counters: Counter[str] = Counter()
        self.seen = seen  # the store's, as of its last commit that we know of
        self.parked = 0  # changesets that could not be applied, as of the last look
        self.recovery: Recovery | None = None  # while the host waits for our own versions
        self.swim = Swim(me, settings.swim, rng)
        self.origins = OriginLimits(settings.origins)
        self.tree = Plumtree(settings.plumtree, has=self._has, distance=self._distance, origins=self.origins)
        self.freshness = Freshness(me.site, settings.freshness, rng, seen=lambda: self.seen)
        self.inbox = Inbox(settings.inbox_bytes_max)
        self.arrivals = Arrivals(self.head, WAITING_MAX)
        self.links = Links(
            host,
            rng,
            on_peer_up=self._on_peer_up,
            on_peer_down=self.tree.handle_peer_down,
            redial_ms=settings.redial_ms,
            redial_max_ms=settings.redial_max_ms,
        )
        self.puller = Puller(
            host,
            me.site,
            self.sync_counters,
            seen=lambda: view(self.seen),
            apply=self._apply,
            adopt=self._adopt,
            members=self._export_members,
            on_over=self._on_sync_over,
            timeout_ms=settings.session_timeout_ms,
        )
        self.server = Server(
            host,
            self.sync_counters,
            seen=lambda: self.seen,
            members=self._export_members,
            on_peer_ahead=self.want_sync,
            timeout_ms=settings.session_timeout_ms,
            served_max=settings.sessions_served_max,
            chunk_bytes=settings.chunk_bytes,
            whole_bytes_max=settings.plumtree.push_bytes_max,
        )
        self.verifier = Verifier(
            host,
            settings.verify,
            rng,
            peers=self._find_equals,
            borrow=self.links.borrow,
            seen=lambda: self.seen,
            is_gone=self._is_gone,
        )
        self.collected = NEVER  # up to when deletions may have been forgotten here, as of the last look
        self.schema_problem = ""  # how others left the tables, as of the last look
        self._maintenance = Maintenance(
            host,
            settings,
            stable=self._compute_stable,
            members=self._find_members,
            on_tidied=self._on_tidied,
            on_failed=lambda error: self._note_failed("maintenance", error),
        )
        self._started_ms = 0.0
        self._host = host
        self._log = log
        self._told = Repeats()
        self._settings = settings
        self._rng = rng
        self._schedule = SyncSchedule(settings.sync, rng)
        self._is_started = False
        self._wake_at = float("inf")  # when the cores are due
        self._sync_at = float("inf")  # when the next session is due
        self._syncing = False  # from the choice of a peer to the end of the session
        self._applying = False  # while a batch of the inbox is under way, or the wait after one that failed
        self._heads_before: dict[SiteId, int] = {}  # of each site, when the last session began
        self._relinking = False
        self._exported_ms = float("-inf")  # when a large part of the member list last went along
        self._resends = 0

    @property
    def site(self) -> SiteId:
        """The identity of this database."""
        return self.swim.me.site

    def start(self, join: Iterable[Address], *, known: Iterable[MemberInfo] = ()) -> None:
        """Begin to look for peers; who is known from before counts as alive until it fails to answer."""
        self._is_started = True
        self._started_ms = self._host.now_ms()
        self.verifier.start()
        self.swim.set_join_addresses(join)
        self.swim.remember(known, self._host.now_ms())
        if self.swim.members:
            self._relink_soon()
        self.freshness.start(self._host.now_ms())
        self._run_swim(self.swim.start(self._host.now_ms()))
        self._arm_sync()
        self._maintenance.run()

    def set_join_addresses(self, addresses: Iterable[Address]) -> None:
        """Replace the addresses at which to look for a first peer."""
        self.swim.set_join_addresses(addresses)

    def leave(self) -> None:
        """Tell the peers that we go."""
        self._run_swim(self.swim.leave())

    # --- the store ------------------------------------------------------------------------------------

    def handle_commit(self, commit: Commit) -> None:
        """Take a commit, in order: spread what is ours."""
        self.counters["commits"] += 1
        for changeset in commit.changesets:
            self._mark_seen(changeset)
            if self._is_started and changeset.site == self.site:
                self._run_tree(self.tree.broadcast(changeset, self._host.now_ms()))

    def _apply(self, batch: Sequence[EncodedChangeset], done: Callable[[int], None], failed: Failed) -> None:
        """Apply changesets; `done` gets how many were new."""

        def act(store: Store) -> ApplyResult:
            return store.apply(batch, self._host.wall_ms())

        def applied(result: ApplyResult) -> None:
            # Those that lost or were parked are seen too, though their commit may not have named them.
            for changeset in batch:
                self._mark_seen(changeset)
            self.counters["changesets_applied"] += result.applied
            self.counters["changesets_parked"] += result.parked
            self.parked += result.parked
            self._run_tree(self.tree.announce_pulled(batch))
            done(result.applied + result.parked)

        self._host.commit(act, lambda result: some(result.commit), applied, failed)

    def _adopt(self, spool: Spool, done: Callable[[], None], failed: Failed) -> None:
        def act(store: Store) -> tuple[Commit | None, dict[SiteId, VersionRanges]]:
            commit = store.apply_snapshot(spool.read(), self._host.wall_ms())
            return commit, store.seen()

        def adopted(result: tuple[Commit | None, dict[SiteId, VersionRanges]]) -> None:
            self._merge_seen(result[1])
            done()

        self._host.commit(act, lambda result: some(result[0]), adopted, failed)

    def reread_seen(self) -> None:
        """Learn from the store what it has seen; what it had not told us of comes with this."""
        self._host.run(Store.seen, self._merge_seen, lambda error: self._note_failed("reread", error))

    def _merge_seen(self, seen: dict[SiteId, VersionRanges]) -> None:
        for site, ranges in seen.items():
            self.seen.setdefault(site, VersionRanges()).update(ranges)
            self._on_seen(site)

    def _mark_seen(self, changeset: EncodedChangeset) -> None:
        ranges = self.seen.setdefault(changeset.site, VersionRanges())
        ranges.add(changeset.version, changeset.version)
        self._on_seen(changeset.site)

    def _on_seen(self, site: SiteId) -> None:
        self.freshness.handle_seen(site)
        self.arrivals.handle_seen(site)

    def await_write(self, token: Token, act: Callable[[], None]) -> Callable[[], None]:
        """Call `act` when a write and all that its site wrote before are here; return what ends the wait.

        Raises BusyError when too many wait.
        """
        if self.arrivals.is_full:
            raise BusyError(f"{WAITING_MAX} others wait for writes to arrive")
        if self.head(token.site) < token.version and token.site != self.site:
            # If its site is out of reach, somebody else may have it.
            self.want_sync(token.site)
        return self.arrivals.wait(token, act)

    def head(self, site: SiteId) -> int:
        """Return up to which version all that a site wrote is here."""
        return get_head(self.seen, site)

    def _has(self, site: SiteId, version: int) -> bool:
        return has_seen(self.seen, site, version)

    def _take_in(self, changeset: EncodedChangeset) -> None:
        if not self.inbox.add(changeset):
            self.counters["inbox_overflows"] += 1
            self.tree.forget((changeset.site, changeset.version))
            return
        self._apply_inbox()

    def _apply_inbox(self) -> None:
        if self._applying or not len(self.inbox):
            return
        self._applying = True
        batch = self.inbox.take(BATCH_CHANGESETS, BATCH_BYTES)

        def done(_: int) -> None:
            self._applying = False
            self._apply_inbox()

        def failed(error: Exception) -> None:
            # Not seen, so a later copy or a sync brings them again.
            for changeset in batch:
                self.tree.forget((changeset.site, changeset.version))
            self._note_failed("apply", error)
            self._host.call_later(RETRY_MS, lambda: done(0))

        self._apply(batch, done, failed)

    def _compute_stable(self) -> Hlc:
        self.freshness.set_roll(self.swim.compute_roll(self._host.now_ms()))
        alone_ms = self._host.now_ms() - self._started_ms
        if not self.swim.members and len(self.seen) > 1 and alone_ms < self._settings.swim.forget_ms:
            # Somebody else has written here, and may not have been heard of yet. Who has not heard of anybody
            # for as long as the dead are remembered is alone.
            return NEVER
        return self.freshness.compute_stable_hlc()

    def _find_members(self) -> list[MemberInfo]:
        """Return whom to look for in the next life of this node."""
        return [item.info for item in self.swim.members.values() if item.state is not MemberState.LEFT]

    def _on_tidied(self, found: Tidied) -> None:
        self.parked = found.parked
        self.collected = found.collected_hlc
        self.schema_problem = found.schema_problem
        self.counters["tombstones_collected"] += found.tombstones
        self.counters["parked_dropped"] = found.parked_dropped

    def _note_failed(self, what: str, error: Exception) -> None:
        """Count and tell what the database refused; that what others are told of is no news."""
        self.counters[f"{what}_failed"] += 1
        if isinstance(error, BusyError | ReadOnlyError | ReplacedError):
            return
        if self._told.is_news(what, str(error), self._host.now_ms()):
            self._log.error("%s failed", what, exc_info=error)

    # --- what comes in --------------------------------------------------------------------------------

    def handle_datagram(self, data: bytes) -> None:
        """Take a datagram's content; raises WireError."""
        self._run_swim(self.swim.handle_message(decode_datagram(data), self._host.now_ms()))

    def handle_self(self, info: MemberInfo) -> None:
        """Take note of a stream, refused by now, whose other side says that it is our site."""
        self._run_swim(self.swim.handle_self_hello(info, self._host.now_ms()))

    def handle_link_up(self, link: Link) -> None:
        """Take note of a link and of who is at the other end."""
        self._run_swim(self.swim.handle_hello(link.peer, self._host.now_ms()))
        self.links.handle_link_up(link)

    def handle_link_down(self, link: Link) -> None:
        """Take note that a link is gone."""
        self.puller.handle_link_down(link)
        self.verifier.handle_link_down(link)
        self.server.handle_link_down(link)
        self.links.handle_link_down(link)
        if self.links.get(link.peer.site) is None:
            self.swim.handle_link_lost(link.peer.site)

    def handle_frame(self, link: Link, data: bytes) -> None:
        """Take a frame of a stream; raises WireError."""
        message = decode_frame(data)
        now_ms = self._host.now_ms()
        peer = link.peer.site
        self.swim.heard(peer, now_ms)
        match message:
            case Push() | IHave() | Graft() | Prune() | Large():
                self._run_tree(self.tree.handle_message(peer, message, now_ms))
            case StreamPing():
                link.send(encode(StreamAck(message.number)))
            case StreamAck():
                self._run_swim(self.swim.handle_stream_ack(peer, message.number, now_ms))
            case Members():
                if self.recovery is not None:
                    self.recovery.handle_claims(message.updates)
                self._run_swim(self.swim.handle_members(message, peer, now_ms))
            case Beats():
                newer = self.freshness.handle_beats(peer, message.beats, now_ms, self._host.wall_ms())
                self._send_beats(link, newer)
                self._arm()
            case SyncOpen() | SyncAsk() | SnapshotAsk() | DigestAsk() | StatesAsk():
                if isinstance(message, SyncOpen):
                    self._send_beats(link, self.freshness.export(now_ms))
                self.server.handle_request(link, message)
            case DigestRanges() | SyncState() | SnapshotChunk() | SyncDone() | SyncBusy() if (
                self.verifier.owns(message)
            ):
                self.verifier.handle_answer(link, message)
            case SyncState() | SyncBusy() | SyncChanges() | SyncPart() | SyncDone() | SnapshotChunk():
                self.puller.handle_answer(link, message)
            case _:
                raise WireError("kind")

    def _on_peer_up(self, site: SiteId) -> None:
        self.tree.handle_peer_up(site)
        # What was pushed while there was no link is lost.
        self.want_sync(site)

    # --- what the cores ask for -----------------------------------------------------------------------

    def _run_swim(self, outputs: Iterable[swim.Output]) -> None:
        for output in outputs:
            match output:
                case swim.SendDatagram(address, message):
                    self._host.send_datagram(address, encode(message))
                case swim.ProbeStream(site, number):
                    self.links.send(site, encode(StreamPing(number)))
                case swim.MemberChanged(info, state, _):
                    self._on_member_changed(info, state)
                case swim.SiteConflict(twin):
                    self._log.error(
                        "the node %s at %s:%d has the site id of this one, which becomes a new site",
                        *(twin.name, twin.host, twin.port),
                    )
        self._arm()

    def _on_member_changed(self, info: MemberInfo, state: MemberState) -> None:
        self._log.info("member %s at %s:%d is %s", info.name, info.host, info.port, state.name.lower())
        if info.name == self.swim.me.name and state is MemberState.ALIVE:
            self._log.error(
                "the node at %s:%d has the name of this one; give one of them another", info.host, info.port
            )
            self.counters["name_conflicts"] += 1
        if state in (MemberState.DEAD, MemberState.LEFT):
            self.links.close(info.site)
            self._schedule.forget(info.site)
        self._relink_soon()

    def _relink_soon(self) -> None:
        if not self._relinking:
            self._relinking = True
            self._host.call_later(RELINK_MS, self._relink)

    def _relink(self) -> None:
        self._relinking = False
        self.freshness.set_roll(self.swim.compute_roll(self._host.now_ms()))
        members = self.swim.reachable
        chosen = plan_neighbours(
            [*self.tree.eager, *self.tree.lazy],
            {site: self.swim.estimate_rtt_ms(site) for site in members},
            self._rng,
        )
        self.links.want({site: members[site].info.address for site in chosen})

    def _export_members(self) -> Members:
        now_ms = self._host.now_ms()
        is_due = now_ms - self._exported_ms >= MEMBERS_INTERVAL_MS
        if is_due:
            self._exported_ms = now_ms
        return self.swim.export(MEMBERS_EXCHANGED if is_due else MEMBERS_EXCHANGED_SOON, now_ms)

    def _run_tree(self, outputs: Iterable[plumtree.Output]) -> None:
        for output in outputs:
            match output:
                case plumtree.SendFrame(peer, message):
                    if self.links.send(peer, encode(message)) and isinstance(message, Push):
                        self.counters["payloads_pushed"] += 1
                case plumtree.Deliver(changeset):
                    self._take_in(changeset)
                case plumtree.Resend(peer, id_):
                    self._resend(peer, id_)
                case plumtree.NeedSync(peer):
                    self.want_sync(peer)
        self._arm()

    def _resend(self, peer: SiteId, id_: ChangesetId) -> None:
        """Push what the broadcast no longer remembers, out of the log; if it fails, sync brings it."""
        if self._resends >= RESENDS_MAX:
            self.counters["resends_dropped"] += 1
            return
        self._resends += 1
        site, version = id_

        def done(found: list[EncodedChangeset]) -> None:
            self._resends -= 1
            for changeset in found:
                self._run_tree(self.tree.resend(peer, changeset))

        def failed(error: Exception) -> None:
            self._resends -= 1
            self._note_failed("resend", error)

        self._host.run(lambda store: store.read_log(site, version, version, 1), done, failed)

    def _distance(self, site: SiteId) -> float:
        rtt_ms = self.swim.estimate_rtt_ms(site)
        return rtt_ms if rtt_ms is not None else float("inf")

    def _run_freshness(self) -> None:
        for output in self.freshness.tick(self._host.now_ms(), self.tree.eager, self.tree.untried):
            match output:
                case freshness.SendFrame(peer, message):
                    self.links.send(peer, encode(message))
                case freshness.BeatDue():
                    self._beat(output)
        self._arm()

    def _beat(self, due: freshness.BeatDue) -> None:
        floor = self.freshness.own_hlc_floor

        def done(own: tuple[int, Hlc]) -> None:
            self.freshness.handle_own(due, *own, self._host.now_ms())
            self._arm()

        self._host.run(
            lambda store: store.beat(self._host.wall_ms(), floor),
            done,
            lambda error: self._note_failed("beat", error),
        )

    def _send_beats(self, link: Link, messages: Iterable[Beats]) -> None:
        for message in messages:
            link.send(encode(message))

    def _find_equals(self) -> dict[SiteId, Address]:
        """Return the peers to compare tables with: they know of all deletions that we have forgotten.

        None while something is parked here: of what it stands for they would bring a part.
        """
        if self.parked:
            return {}
        reachable = self.swim.reachable
        return {
            site: reachable[site].info.address
            for site in self.freshness.find_complete(reachable, self.collected)
        }

    def _is_gone(self, site: SiteId) -> bool:
        """Return whether a site will not be heard of again, as far as can be told."""
        member = self.swim.members.get(site)
        if site == self.site or self._host.now_ms() - self._started_ms < SETTLED_MS:
            return False
        return member is None or member.state is MemberState.LEFT

    # --- time -----------------------------------------------------------------------------------------

    def _arm(self) -> None:
        """Wake up when the first core is due."""
        times = (self.swim.next_at(), self.tree.next_at(), self.freshness.next_at())
        due = min(at for at in times if at is not None)
        if not self._is_started or due >= self._wake_at:
            return
        self._wake_at = due
        self._host.call_later(due - self._host.now_ms(), lambda: self._wake(due))

    def _wake(self, due: float) -> None:
        if due != self._wake_at:
            return  # an earlier one was set meanwhile, and sets the next when it comes
        self._wake_at = float("inf")
        now_ms = self._host.now_ms()
        self._run_swim(self.swim.tick(now_ms))
        self._run_tree(self.tree.tick(now_ms))
        self._run_freshness()

    # --- repair ---------------------------------------------------------------------------------------

    def want_sync(self, site: SiteId) -> None:
        """Sync with this peer soon."""
        self._schedule.want(site, self._host.now_ms())
        self._arm_sync()

    def _arm_sync(self) -> None:
        due = self._schedule.next_at()
        if self._is_started and not self._syncing and due < self._sync_at:
            self._sync_at = due
            self._host.call_later(due - self._host.now_ms(), lambda: self._begin_sync(due))

    def _begin_sync(self, due: float) -> None:
        if due != self._sync_at:
            return
        self._sync_at = float("inf")
        if self._syncing:
            return  # the end of the session sets the next one
        peer = self._schedule.choose(self.swim.reachable, self._host.now_ms())
        if peer is None:
            self._arm_sync()
            return
        self._syncing = True
        self._heads_before = {site: ranges.head for site, ranges in self.seen.items()}

        def borrowed(link: Link | None, is_ours: bool) -> None:
            if link is None:
                self.sync_counters["failed_dial"] += 1
                self._end_sync(peer, ok=False, received=0)
            else:
                self._send_beats(link, self.freshness.export(self._host.now_ms()))
                self.puller.begin(peer, link, borrowed=is_ours)

        self.links.borrow(peer, self.swim.members[peer].info.address, borrowed)

    def _on_sync_over(self, peer: SiteId, received: int, error: Exception | None) -> None:
        if isinstance(error, StoreError):
            self._note_failed("sync", error)
        elif isinstance(error, SnapshotError):
            # Until somebody mends it nothing comes from whoever has no log of it.
            if self._told.is_news("snapshot", str(error), self._host.now_ms()):
                self._log.warning("a snapshot from %s cannot be taken in: %s", peer.hex(), error)
        elif error is not None:
            self._log.debug("sync with %s: %r", peer.hex(), error)
        else:
            self.sync_counters["sessions_complete"] += 1
            if self.recovery is not None:
                self.recovery.handle_synced(peer)
        self._tell_news(peer)
        self._end_sync(peer, ok=error is None, received=received)

    def _tell_news(self, peer: SiteId) -> None:
        """After a session that brought much, as we were apart from others, let our peers sync with us."""
        came = {
            site: head + 1
            for site, ranges in self.seen.items()
            if ranges.head > (head := self._heads_before.get(site, 0))
        }
        if sum(self.head(site) - first + 1 for site, first in came.items()) >= NEWS_MIN:
            self._run_tree(self.tree.announce_news(next(iter(came.items())), peer))

    def _end_sync(self, peer: SiteId, *, ok: bool, received: int) -> None:
        self._syncing = False
        self._schedule.handle_result(peer, self._host.now_ms(), ok=ok, received=received)
        self._arm_sync()

    # --- views ----------------------------------------------------------------------------------------

    def measure(self) -> dict[str, tuple[int, int]]:
        """Return what each bounded memory holds, and its bound."""
        inbox_max = self._settings.inbox_bytes_max + self._settings.chunk_bytes
        return {
            **self.tree.measure(),
            **self.swim.measure(),
            **self.freshness.measure(),
            "inbox_bytes": (self.inbox.bytes, inbox_max),
            "arrivals": (len(self.arrivals), WAITING_MAX),
            "origins": (len(self.origins), ORIGINS_MAX),
        }
