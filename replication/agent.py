"""One replica among its peers: wires the store, the cores and the sockets together.

Decides in which order things start, run and stop; what to do is decided by the cores. Knows nothing of
what the tables are for. Invariant: `on_commit` is called on the event loop once for every commit, in the
order in which they were made, whoever made them.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from replication.core import plumtree, swim
from replication.core.change import Commit, EncodedChangeset
from replication.core.clock import SiteId
from replication.core.member import Address, MemberInfo, MemberState, is_address_literal
from replication.core.neighbours import plan_neighbours
from replication.core.plumtree import Plumtree
from replication.core.probe import Rng
from replication.core.recovery import Recovery
from replication.core.swim import Swim
from replication.core.sync import SyncSchedule
from replication.core.versions import VersionRanges
from replication.core.wire import (
    ChangesetId,
    Graft,
    Hello,
    IHave,
    Members,
    Prune,
    Push,
    SnapshotAsk,
    StreamAck,
    StreamPing,
    SyncAsk,
    SyncOpen,
    WireError,
    decode_datagram,
    decode_frame,
    encode,
)
from replication.database import Database, Params, QueryResult, Statement, is_transient
from replication.errors import ReplicationError, StoreError
from replication.links import Links
from replication.metrics import Sample, collect_samples
from replication.repair import Repair
from replication.report import MemberView, Parts, describe_parts, view_members
from replication.schema import Schema
from replication.seal import KeyRing, make_seal
from replication.settings import AgentSettings, parse_address
from replication.store import ApplyResult, Store
from replication.transport import Link, Transport

log = logging.getLogger(__name__)

# What may wait to be applied; above it pushes are dropped, and sync brings them when there is room.
INBOX_BYTES_MAX = 32 * 1024 * 1024
# One transaction's worth: enough to share the cost of a commit, small enough not to hold up local writes.
BATCH_CHANGESETS = 512
BATCH_BYTES = 1024 * 1024
# A random part of the member list goes along with each session; gossip and other sessions bring the rest.
MEMBERS_EXCHANGED = 128
# How soon links are chosen again after membership changed: a cluster that forms changes many times.
RELINK_S = 0.02
MAINTENANCE_S = 15.0
RESTART_S = 1.0
RESENDS_MAX = 256
# How long a database that was put back waits for peers to tell what it had written since; a supervisor that
# waits for a node to start must wait longer.
RECOVERY_S = 30.0
RECOVERY_LOOK_S = 0.05


@dataclass(frozen=True, slots=True)
class ExecuteResult:
    """What a write did; `version` is None when no value changed, and may hold other writes too."""

    rows_affected: list[int]
    version: int | None
    site: SiteId


class Agent:
    """One node's replication; all methods are for the event loop that started it."""

    def __init__(
        self,
        settings: AgentSettings,
        schema: Schema,
        *,
        on_commit: Callable[[Commit], None],
        wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        monotonic: Callable[[], float] = time.monotonic,
        rng: Rng | None = None,
    ) -> None:
        self.counters: Counter[str] = Counter()
        self._settings = settings
        self._schema = schema
        self._on_commit = on_commit
        self._wall_ms = wall_ms
        self._monotonic = monotonic
        self._rng = rng if rng is not None else random.Random()
        self._seal = make_seal(settings.keys, settings.cluster)
        self._tree = Plumtree(settings.plumtree, has=self._has, distance=self._distance)
        self._schedule = SyncSchedule(settings.sync, self._rng)
        self._seen: dict[SiteId, VersionRanges] = {}  # the store's, as of its last commit that we know of
        self._inbox: deque[EncodedChangeset] = deque()  # pushed to us and not yet applied
        self._inbox_bytes = 0
        self._seq = 0
        self._parked = 0  # as of the last look
        # Events: something came in; the schedule or membership changed.
        self._inbox_filled = asyncio.Event()
        self._sync_moved = asyncio.Event()
        self._relink_timer: asyncio.TimerHandle | None = None
        self._wake_timer: asyncio.TimerHandle | None = None
        self._wake_at = float("inf")
        self._tasks: list[asyncio.Task[None]] = []
        self._resends: set[asyncio.Task[None]] = set()
        self._running = False  # from the end of start to the beginning of stop
        self._recovery: Recovery | None = None  # while start waits for our own versions
        # Set by start, in this order.
        self._database: Database
        self._transport: Transport
        self._links: Links
        self._swim: Swim
        self._repair: Repair

    # --- life -----------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Open the file and the sockets and begin to look for peers.

        Raises StoreError, SchemaError, OSError; nothing is left open then. Returns as soon as the node may
        write, which for a database that was put back as the same site takes its peers.
        """
        settings = self._settings
        async with contextlib.AsyncExitStack() as undo:
            self._database = await Database.open(
                settings.path,
                self._schema,
                self._publish,
                rows_max=settings.query_rows_max,
                timeout_ms=settings.query_timeout_ms,
                synchronous=settings.synchronous,
            )
            undo.push_async_callback(self._database.close)
            site = await self._database.run(lambda store: store.site)
            self._seen = await self._database.run(Store.seen)
            self._seq = await self._database.run(lambda store: store.seq)
            self._transport = Transport(
                settings.bind,
                self._seal,
                self._hello,
                self,
                handshake_timeout_s=settings.connect_timeout_ms / 1000,
            )
            undo.push_async_callback(self._transport.stop)
            await self._transport.bind()
            host, port = await self._resolve_advertised()
            info = MemberInfo(site, settings.name, host, port, incarnation=max(0, self._wall_ms()))
            self._wire_up(info)
            if await self._database.run(lambda store: store.is_held):
                self._recovery = Recovery()
            # What was written while no agent ran; peers get it by sync.
            await self._database.commit(lambda store: store.capture(self._wall_ms()), lambda commit: commit)
            await self._transport.serve()
            undo.pop_all()
        self._running = True
        self._swim.set_join_addresses(self._literal_joins())
        self._run_swim(self._swim.start(self._now_ms()))
        for name, loop in (
            ("apply", self._apply_loop),
            ("sync", self._sync_loop),
            ("poll", self._poll_loop),
            ("resolve", self._resolve_loop),
            ("maintenance", self._maintenance_loop),
        ):
            self._tasks.append(asyncio.create_task(self._keep_running(name, loop), name=f"agent {name}"))
        if self._recovery is not None:
            try:
                await self._recover(self._recovery)
            except BaseException:
                await self.stop()
                raise
            self._recovery = None

    async def _recover(self, recovery: Recovery) -> None:
        """Fetch our own versions from all members, then let the store write again; raises StoreError."""
        log.info("this database was put back; it waits for what it had written since")
        deadline = self._monotonic() + RECOVERY_S
        asked: list[SiteId] = []
        while True:
            recovery.handle_claims(member.update for member in self._swim.members.values())
            known = recovery.compute_known(self.site)
            if recovery.is_over(known, self._now_ms()):
                break
            missing = recovery.compute_missing(known)
            if self._monotonic() > deadline:
                names = ", ".join(known[site] for site in missing)
                raise StoreError(
                    "this database was put back as the same site and lacks what it wrote since: "
                    + (f"no answer from {names}" if names else "no other node is in reach")
                    + "; start it when they are, or restore it as a new site"
                )
            if missing != asked:
                asked = missing
                for site in missing:
                    self._want_sync(site)
            await asyncio.sleep(RECOVERY_LOOK_S)
        await self._database.run(Store.release)

    def _wire_up(self, info: MemberInfo) -> None:
        settings = self._settings
        self._swim = Swim(info, settings.swim, self._rng)
        self._links = Links(
            self._transport,
            self._rng,
            on_peer_up=self._on_peer_up,
            on_peer_down=self._on_peer_down,
            redial_ms=settings.redial_ms,
            redial_max_ms=settings.redial_max_ms,
        )
        self._repair = Repair(
            self._database,
            info.site,
            settings.path.absolute().parent,
            seen=lambda: self._seen,
            apply=self._apply,
            apply_snapshot=self._apply_snapshot,
            members=lambda: Members(self._swim.export(MEMBERS_EXCHANGED)),
            on_peer_ahead=self._want_sync,
            timeout_ms=settings.session_timeout_ms,
            served_max=settings.sessions_served_max,
        )

    async def stop(self) -> None:
        """Take leave of the peers and close everything; does nothing when not started."""
        if not self._running:
            return
        self._running = False
        for _ in range(2):  # a datagram may get lost
            self._run_swim(self._swim.leave())
            await asyncio.sleep(0.02)
        for timer in (self._relink_timer, self._wake_timer):
            if timer is not None:
                timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, *self._resends, return_exceptions=True)
        self._tasks.clear()
        await self._repair.stop()
        await self._links.stop()
        await self._transport.stop()
        await self._database.close()

    @property
    def address(self) -> Address:
        """Where the sockets are bound."""
        return self._transport.address

    @property
    def site(self) -> SiteId:
        """The identity of this database."""
        return self._swim.me.site

    def replace_keys(self, keys: Sequence[bytes]) -> None:
        """Adopt a new key ring; open streams stay open. Raises ValueError when there were no keys before."""
        if not isinstance(self._seal, KeyRing):
            # Not a TypeError: which seal there is follows from the settings.
            raise ValueError("an agent that started without keys stays without")  # noqa: TRY004
        self._seal.replace(keys)

    # --- the database ---------------------------------------------------------------------------------

    async def execute(self, statements: Sequence[Statement]) -> ExecuteResult:
        """Write in one transaction and broadcast it; raises StatementError, BusyError, StoreError.

        Writes that come at the same time share a changeset. ReadOnlyError means that the disk takes none.
        """
        written = await self._database.execute(statements, self._wall_ms())
        return ExecuteResult(written.rows_affected, written.version, self.site)

    async def query(self, sql: str, params: Params = ()) -> QueryResult:
        """Read; raises QueryError for what is not a read, or too large, or too slow."""
        return await self._database.query(sql, params)

    async def _capture_foreign(self) -> None:
        def act(store: Store) -> Commit | None:
            return store.capture(self._wall_ms()) if store.foreign_writes() else None

        if await self._database.commit(act, lambda commit: commit) is not None:
            self.counters["captures"] += 1

    async def _apply(self, batch: Sequence[EncodedChangeset]) -> int:
        """Apply changesets and return how many were new; raises what the store raises."""

        def act(store: Store) -> ApplyResult:
            return store.apply(batch, self._wall_ms())

        result = await self._database.commit(act, lambda result: result.commit)
        # Those that lost or were parked are seen too, though their commit may not have named them.
        for changeset in batch:
            self._mark_seen(changeset)
        self.counters["changesets_applied"] += result.applied
        self._parked += result.parked
        return result.applied + result.parked

    async def _apply_snapshot(self, chunks: Iterator[bytes]) -> None:
        await self._database.commit(
            lambda store: store.apply_snapshot(chunks, self._wall_ms()), lambda commit: commit
        )
        for site, ranges in (await self._database.run(Store.seen)).items():
            self._seen.setdefault(site, VersionRanges()).update(ranges)

    def _publish(self, commit: Commit) -> None:
        """Take a commit, on the event loop, in order: spread what is ours and tell the application."""
        self._seq = commit.seq
        self.counters["commits"] += 1
        for changeset in commit.changesets:
            self._mark_seen(changeset)
            if self._running and changeset.site == self.site:
                self._run_tree(self._tree.broadcast(changeset, self._now_ms()))
        try:
            self._on_commit(commit)
        except Exception:
            self.counters["callbacks_failed"] += 1
            log.exception("on_commit failed at seq %d", commit.seq)

    def _mark_seen(self, changeset: EncodedChangeset) -> None:
        ranges = self._seen.setdefault(changeset.site, VersionRanges())
        ranges.add(changeset.version, changeset.version)

    def _has(self, site: SiteId, version: int) -> bool:
        ranges = self._seen.get(site)
        return ranges is not None and ranges.contains(version)

    # --- what the transport reports -------------------------------------------------------------------

    def handle_datagram(self, data: bytes) -> None:
        """Take a datagram's content; raises WireError."""
        self._run_swim(self._swim.handle_message(decode_datagram(data), self._now_ms()))

    def handle_link_up(self, link: Link) -> None:
        """Take note of a link and of who is at the other end."""
        self._run_swim(self._swim.handle_hello(link.peer, self._now_ms()))
        self._links.handle_link_up(link)

    def handle_link_down(self, link: Link) -> None:
        """Take note that a link is gone."""
        self._repair.handle_link_down(link)
        self._links.handle_link_down(link)
        if self._links.get(link.peer.site) is None:
            self._swim.handle_link_lost(link.peer.site)

    async def handle_frame(self, link: Link, data: bytes) -> None:
        """Take a frame; raises WireError."""
        message = decode_frame(data)
        now_ms = self._now_ms()
        peer = link.peer.site
        self._swim.heard(peer, now_ms)
        match message:
            case Push() | IHave() | Graft() | Prune():
                self._run_tree(self._tree.handle_message(peer, message, now_ms))
            case StreamPing():
                link.send(encode(StreamAck(message.number)))
            case StreamAck():
                self._run_swim(self._swim.handle_stream_ack(peer, message.number, now_ms))
            case Members():
                if self._recovery is not None:
                    self._recovery.handle_claims(message.updates)
                self._run_swim(self._swim.handle_members(message.updates, peer, now_ms))
            case SyncOpen() | SyncAsk() | SnapshotAsk():
                self._repair.handle_request(link, message)
            case Hello():
                raise WireError("hello")
            case _:
                await self._repair.handle_answer(link, message)

    def _on_peer_up(self, site: SiteId) -> None:
        self._tree.handle_peer_up(site)
        # What was pushed while there was no link is lost.
        self._want_sync(site)

    def _on_peer_down(self, site: SiteId) -> None:
        self._tree.handle_peer_down(site)

    # --- what the cores ask for -----------------------------------------------------------------------

    def _run_swim(self, outputs: Iterable[swim.Output]) -> None:
        for output in outputs:
            match output:
                case swim.SendDatagram(address, message):
                    self._transport.send_datagram(address, encode(message))
                case swim.ProbeStream(site, number):
                    self._links.send(site, encode(StreamPing(number)))
                case swim.MemberChanged(info, state, _):
                    self._on_member_changed(info, state)
        self._arm()

    def _on_member_changed(self, info: MemberInfo, state: MemberState) -> None:
        log.info("member %s at %s:%d is %s", info.name, info.host, info.port, state.name.lower())
        if info.name == self._settings.name and state is MemberState.ALIVE:
            log.error(
                "the node at %s:%d has the name of this one; give one of them another", info.host, info.port
            )
            self.counters["name_conflicts"] += 1
        if state in (MemberState.DEAD, MemberState.LEFT):
            self._links.close(info.site)
            self._schedule.forget(info.site)
        if self._relink_timer is None and self._running:
            self._relink_timer = asyncio.get_running_loop().call_later(RELINK_S, self._relink)

    def _relink(self) -> None:
        self._relink_timer = None
        members = {site: item for site, item in self._swim.members.items() if item.is_reachable}
        chosen = plan_neighbours(
            [*self._tree.eager, *self._tree.lazy],
            {site: item.rtt_ms for site, item in members.items()},
            self._rng,
        )
        self._links.want({site: members[site].info.address for site in chosen})

    def _run_tree(self, outputs: Iterable[plumtree.Output]) -> None:
        for output in outputs:
            match output:
                case plumtree.SendFrame(peer, message):
                    self._links.send(peer, encode(message))
                case plumtree.Deliver(changeset):
                    self._take_in(changeset)
                case plumtree.Resend(peer, id_):
                    self._resend(peer, id_)
                case plumtree.NeedSync(peer):
                    self._want_sync(peer)
        self._arm()

    def _take_in(self, changeset: EncodedChangeset) -> None:
        if self._inbox_bytes > INBOX_BYTES_MAX:
            self.counters["inbox_overflows"] += 1
            self._tree.forget((changeset.site, changeset.version))
            return
        self._inbox.append(changeset)
        self._inbox_bytes += len(changeset.payload)
        self._inbox_filled.set()

    def _resend(self, peer: SiteId, id_: ChangesetId) -> None:
        """Push what the broadcast no longer remembers, out of the log; if it fails, sync brings it."""
        if len(self._resends) >= RESENDS_MAX:
            self.counters["resends_dropped"] += 1
            return
        task = asyncio.ensure_future(self._push_logged(peer, id_))
        self._resends.add(task)
        task.add_done_callback(self._resends.discard)

    async def _push_logged(self, peer: SiteId, id_: ChangesetId) -> None:
        site, version = id_
        for changeset in await self._database.run(lambda store: store.read_log(site, version, version, 1)):
            self._links.send(peer, encode(Push(changeset)))

    def _want_sync(self, site: SiteId) -> None:
        self._schedule.want(site, self._now_ms())
        self._sync_moved.set()

    def _distance(self, site: SiteId) -> float:
        member = self._swim.members.get(site)
        return member.rtt_ms if member is not None and member.rtt_ms is not None else float("inf")

    # --- time -----------------------------------------------------------------------------------------

    def _now_ms(self) -> float:
        return self._monotonic() * 1000

    def _arm(self) -> None:
        """Wake up when the first core is due."""
        if not self._running:
            return
        due = min(at for at in (self._swim.next_at(), self._tree.next_at(), float("inf")) if at is not None)
        if due >= self._wake_at or due == float("inf"):
            return
        if self._wake_timer is not None:
            self._wake_timer.cancel()
        self._wake_at = due
        delay_s = max(0.0, due - self._now_ms()) / 1000
        self._wake_timer = asyncio.get_running_loop().call_later(delay_s, self._wake)

    def _wake(self) -> None:
        self._wake_at = float("inf")
        now_ms = self._now_ms()
        self._run_swim(self._swim.tick(now_ms))
        self._run_tree(self._tree.tick(now_ms))

    # --- loops ----------------------------------------------------------------------------------------

    async def _keep_running(self, name: str, loop: "Callable[[], asyncio.Future[None] | Any]") -> None:
        """Run a loop again when it failed: an error in one place must not end replication unseen."""
        while True:
            try:
                await loop()
            except Exception as error:
                self.counters[f"{name}_failed"] += 1
                if not is_transient(error):
                    log.exception("%s failed", name)
            await asyncio.sleep(RESTART_S)

    async def _apply_loop(self) -> None:
        while True:
            if not self._inbox:
                self._inbox_filled.clear()
                await self._inbox_filled.wait()
            batch: list[EncodedChangeset] = []
            size = 0
            while self._inbox and len(batch) < BATCH_CHANGESETS and size < BATCH_BYTES:
                batch.append(self._inbox.popleft())
                size += len(batch[-1].payload)
            self._inbox_bytes -= size
            try:
                await self._apply(batch)
            except BaseException:
                # Not seen, so a later copy or a sync brings them again.
                for changeset in batch:
                    self._tree.forget((changeset.site, changeset.version))
                raise

    async def _poll_loop(self) -> None:
        while True:
            await asyncio.sleep(self._settings.poll_interval_ms / 1000)
            await self._capture_foreign()

    async def _sync_loop(self) -> None:
        while True:
            self._sync_moved.clear()
            delay_s = (self._schedule.next_at() - self._now_ms()) / 1000
            if delay_s > 0:
                # Not wait_for: in Python 3.11 it loses a cancellation that comes together with the event.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(delay_s):
                        await self._sync_moved.wait()
                continue
            reachable = [site for site, member in self._swim.members.items() if member.is_reachable]
            peer = self._schedule.choose(reachable, self._now_ms())
            if peer is None:
                continue
            received = 0
            ok = True
            try:
                received = await self._sync_with(peer)
                if self._recovery is not None:
                    self._recovery.handle_synced(peer)
            except (ReplicationError, OSError, TimeoutError) as error:
                ok = False
                reason = getattr(error, "reason", type(error).__name__)
                self._repair.counters[f"failed_{reason}"] += 1
                log.debug("sync with %s: %r", peer.hex(), error)
                if isinstance(error, StoreError):
                    log.exception("sync: the database refuses changes")
            self._schedule.handle_result(peer, self._now_ms(), ok=ok, received=received)

    async def _sync_with(self, peer: SiteId) -> int:
        link, borrowed = await self._links.borrow(peer, self._swim.members[peer].info.address)
        try:
            return await self._repair.pull(link)
        except TimeoutError:
            link.close()
            raise
        finally:
            if borrowed:
                await link.close_gently()

    async def _resolve_loop(self) -> None:
        """Look join names up again and again: addresses change, and a resolver that fails may recover."""
        loop = asyncio.get_running_loop()
        while True:
            found: dict[Address, None] = {}
            failed = False
            for text in self._settings.join:
                host, port = parse_address(text)
                try:
                    for info in await loop.getaddrinfo(host, port, family=self._transport.family):
                        found[str(info[4][0]), port] = None
                except OSError as error:
                    failed = True
                    self.counters["resolves_failed"] += 1
                    log.warning("cannot resolve %s to join: %s", host, error)
            if found or not failed:
                self._swim.set_join_addresses(found)
            wait_ms = (
                self._settings.swim.join_backoff_max_ms if failed else self._settings.resolve_interval_ms
            )
            await asyncio.sleep(wait_ms / 1000 * (0.75 + 0.5 * self._rng.random()))

    async def _maintenance_loop(self) -> None:
        """Keep the log bounded, and try again what is parked for a clock that was ahead."""
        while True:
            keep = {
                site: ranges.head - self._settings.log_versions_max
                for site, ranges in self._seen.items()
                if ranges.head > self._settings.log_versions_max
            }
            if keep:
                await self._database.run(partial(Store.prune_log, keep=keep))
            self._parked = await self._database.run(lambda store: len(store.parked()))
            if self._parked:
                await self._database.commit(
                    lambda store: store.retry_parked(self._wall_ms()), lambda commit: commit
                )
                self._parked = await self._database.run(lambda store: len(store.parked()))
            await asyncio.sleep(MAINTENANCE_S)

    # --- who we are -----------------------------------------------------------------------------------

    def _hello(self) -> Hello:
        return Hello(self._settings.cluster, self._swim.me, lasting=False)

    async def _resolve_advertised(self) -> Address:
        host, port = self._settings.advertise or self._transport.address
        found = await asyncio.get_running_loop().getaddrinfo(host, port, family=self._transport.family)
        return (str(found[0][4][0]), port)

    def _literal_joins(self) -> list[Address]:
        """Return the join addresses that need no look-up, so that the first round can use them."""
        addresses = [parse_address(text) for text in self._settings.join]
        return [address for address in addresses if is_address_literal(address[0])]

    # --- views ----------------------------------------------------------------------------------------

    def members(self) -> list[MemberView]:
        """Return all nodes that this one knows of, itself first."""
        return view_members(self._swim, self._now_ms())

    def status(self) -> dict[str, Any]:
        """Return what an operator wants to see, fit for JSON."""
        sites = {
            site.hex(): {"head": ranges.head, "last": ranges.last, "gaps": ranges.missing(ranges.last)}
            for site, ranges in self._seen.items()
        }
        return {
            "name": self._settings.name,
            "cluster": self._settings.cluster,
            "site": self.site.hex(),
            "address": list(self._swim.me.address),
            "seq": self._seq,
            "read_only": self._database.trouble,
            "sites": sites,
            "parked": self._parked,
            "apply_queue": len(self._inbox),
            **describe_parts(self._parts()),
        }

    def samples(self) -> Iterable[Sample]:
        """Yield the metrics that METRICS names."""
        yield from collect_samples(self._parts(), self._now_ms())
        yield ("isthmus_apply_queue_changesets", (), len(self._inbox))
        yield ("isthmus_parked_changesets", (), self._parked)
        yield ("isthmus_commit_seq", (), self._seq)
        yield ("isthmus_database_read_only", (), float(self._database.trouble is not None))

    def _parts(self) -> Parts:
        return Parts(self._swim, self._tree, self._links, self._repair, self._transport, self.counters)
