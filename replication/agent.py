"""One replica among its peers, as a program: opens the file and the sockets, and runs a replica on them.

Decides in which order things start, run and stop. Knows nothing of what the tables are for, and leaves to
`replica` what is said to peers. Invariant: `on_commit` is called on the event loop once for every commit, in
the order in which they were made, whoever made them.
"""

import asyncio
import contextlib
import logging
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from replication.core.change import Commit, some
from replication.core.clock import Clock, SiteId
from replication.core.limits import ALL, WriteLimits
from replication.core.member import Address, MemberInfo, is_address_literal
from replication.core.probe import Rng
from replication.core.recovery import Recovery
from replication.core.repeats import Repeats
from replication.core.tokens import Token
from replication.core.wire import Hello
from replication.database import Database, Params, QueryResult, Statement, is_transient
from replication.errors import BehindError, ParkedError, RateLimitedError, ReplacedError, StoreError
from replication.loop_host import LoopHost
from replication.metrics import Sample, collect_samples
from replication.replica import Replica, ReplicaSettings
from replication.report import MemberView, Parts, compute_stable_ms_ago, describe_parts, view_members
from replication.schema import Schema
from replication.seal import KeyRing, make_seal
from replication.settings import AgentSettings, parse_address
from replication.staging import Staged
from replication.store import Store
from replication.transport import Link, Transport

log = logging.getLogger(__name__)

RESTART_S = 1.0
# How long a database that was put back waits for peers to tell what it had written since; a supervisor that
# waits for a node to start must wait longer.
RECOVERY_S = 30.0
RECOVERY_LOOK_S = 0.05
# Whoever can reach the port can have this said.
STRANGERS_TOLD_MS = 3_600_000
_PARKED = (
    "SELECT p.reason FROM _repl_parked AS p JOIN _repl_site AS s ON s.ordinal = p.site "
    "WHERE s.site = ? AND p.version = ?"
)


@dataclass(frozen=True, slots=True)
class ExecuteResult:
    """What a write did; `version` is None when no value changed, and may hold other writes too."""

    rows_affected: list[int]
    version: int | None
    site: SiteId

    @property
    def token(self) -> Token | None:
        """What `wait_for` takes on another node."""
        return None if self.version is None else Token(self.site, self.version)


class Agent:
    """One node's replication; all methods are for the event loop that started it.

    `on_lost` is called once, when the file was replaced or another node is found to write as our site.
    Nothing is written then; only to stop this agent and to start another one helps, which is a new site.
    """

    def __init__(
        self,
        settings: AgentSettings,
        schema: Schema,
        *,
        on_commit: Callable[[Commit], None],
        on_lost: Callable[[ReplacedError], None] = lambda _: None,
        wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        monotonic: Callable[[], float] = time.monotonic,
        rng: Rng | None = None,
    ) -> None:
        self.counters: Counter[str] = Counter()
        self._settings = settings
        self._schema = schema
        self._on_commit = on_commit
        self._on_lost = on_lost
        self._wall_ms = wall_ms
        self._monotonic = monotonic
        self._rng = rng if rng is not None else random.Random()
        self._seal = make_seal(settings.keys, settings.cluster)
        self._seq = 0
        now_ms = monotonic() * 1000
        # Apart, so that another client gone mad does not use up what callers may write.
        self._writes = WriteLimits(settings.writes_per_s, now_ms)
        self._foreign_writes = WriteLimits(settings.writes_per_s, now_ms)
        self._told = Repeats()
        self._joins: tuple[Address, ...] = ()  # where others should be, as last looked up
        self._told_alone = False  # that nobody answers there; cleared when somebody does
        self._strangers_told_ms = -math.inf
        self._deferred: frozenset[str] = frozenset()  # set by each look at the file
        self._tasks: list[asyncio.Task[None]] = []
        self._running = False  # from the end of start to the beginning of stop
        # Set by start, in this order.
        self._database: Database
        self._transport: Transport
        self._host: LoopHost
        self._replica: Replica

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
                staged=settings.staged,
                on_lost=self._on_lost,
            )
            undo.push_async_callback(self._database.close)
            self._transport = Transport(
                settings.bind,
                self._seal,
                self._hello,
                self,
                handshake_timeout_s=settings.connect_timeout_ms / 1000,
                tls=settings.tls,
            )
            undo.push_async_callback(self._transport.stop)
            await self._transport.bind()
            self._host = LoopHost(
                self._database,
                self._transport,
                settings.path.absolute().parent,
                wall_ms=self._wall_ms,
                monotonic=self._monotonic,
            )
            undo.push_async_callback(self._host.stop)
            self._replica = await self._make_replica()
            if await self._database.run(lambda store: store.is_held):
                self._replica.recovery = Recovery()
            # What was written while no agent ran; peers get it by sync.
            await self._database.commit(lambda store: store.capture(self._wall_ms()), some)
            known = await self._database.run(Store.members)
            await self._transport.serve()
            undo.pop_all()
        for table in self._settings.writes_per_s.keys() - self._schema.tables.keys() - {ALL}:
            log.warning("there is a limit for writes into %s, and no such table", table)
        self._running = True
        self._replica.start(self._literal_joins(), known=known)
        loops = (("poll", self._poll_loop), ("resolve", self._resolve_loop), ("look", self._look_loop))
        for name, loop in loops:
            self._tasks.append(asyncio.create_task(self._keep_running(name, loop), name=f"agent {name}"))
        if self._replica.recovery is not None:
            try:
                await self._recover(self._replica.recovery)
            except BaseException:
                await self.stop()
                raise
            self._replica.recovery = None

    async def _make_replica(self) -> Replica:
        settings = self._settings
        site, self._seq = await self._database.run(lambda store: (store.site, store.seq))
        host, port = await self._resolve_advertised()
        return Replica(
            self._host,
            ReplicaSettings(
                swim=settings.swim,
                plumtree=settings.plumtree,
                sync=settings.sync,
                redial_ms=settings.redial_ms,
                redial_max_ms=settings.redial_max_ms,
                session_timeout_ms=settings.session_timeout_ms,
                sessions_served_max=settings.sessions_served_max,
                log_versions_max=settings.log_versions_max,
                tombstone_keep_ms=settings.tombstone_keep_ms,
                verify=settings.verify,
                origins=settings.origins,
            ),
            MemberInfo(site, settings.name, host, port, incarnation=max(0, self._wall_ms())),
            self._rng,
            seen=await self._database.run(Store.seen),
        )

    async def _recover(self, recovery: Recovery) -> None:
        """Fetch our own versions from all members, then let the store write again; raises StoreError."""
        log.info("this database was put back; it waits for what it had written since")
        deadline = self._monotonic() + RECOVERY_S
        asked: list[SiteId] = []
        while True:
            recovery.handle_claims(member.update for member in self._replica.swim.members.values())
            known = recovery.compute_known(self.site)
            if recovery.is_over(known, self._host.now_ms()):
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
                    self._replica.want_sync(site)
            await asyncio.sleep(RECOVERY_LOOK_S)
        await self._database.run(Store.release)
        # Other clients may have written to the file all the while, or before it was copied.
        await self._database.commit(lambda store: store.capture(self._wall_ms()), some)

    async def catch_up(self, within_s: float) -> None:
        """Wait until a peer has brought what it had, or for so long."""
        deadline = self._monotonic() + within_s
        while not self._replica.sync_counters["sessions_complete"] and self._monotonic() < deadline:  # noqa: ASYNC110 - for seconds, once in a life
            await asyncio.sleep(RECOVERY_LOOK_S)

    async def stop(self, *, leaves: bool = True) -> None:
        """Take leave of the peers and close everything; does nothing when not started.

        Whoever is back at once does not leave: peers notice nothing, or miss it for a moment.
        """
        if not self._running:
            return
        for _ in range(2 if leaves else 0):  # a datagram may get lost
            self._replica.leave()
            await asyncio.sleep(0.02)
        self._running = False
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        await self._host.stop()
        await self._transport.stop()
        await self._database.close()

    @property
    def address(self) -> Address:
        """Where the sockets are bound."""
        return self._transport.address

    @property
    def site(self) -> SiteId:
        """The identity of this database."""
        return self._replica.site

    def replace_keys(self, keys: Sequence[bytes]) -> None:
        """Adopt a new key ring; streams made with a key that is gone are made anew.

        Raises ValueError when there were no keys before.
        """
        if not isinstance(self._seal, KeyRing):
            # Not a TypeError: which seal there is follows from the settings.
            raise ValueError("an agent that started without keys stays without")  # noqa: TRY004
        self._seal.replace(keys)

    # --- the database ---------------------------------------------------------------------------------

    async def execute(self, statements: Sequence[Statement]) -> ExecuteResult:
        """Write in one transaction and broadcast it; raises StatementError, BusyError, StoreError.

        Writes that come at the same time share a changeset. ReadOnlyError means that the disk takes none,
        RateLimitedError that it is too much at once.
        """
        if self._writes:
            return await self._execute_limited(statements)
        written = await self._database.execute(statements, self._wall_ms())
        return ExecuteResult(written.rows_affected, written.version, self.site)

    async def _execute_limited(self, statements: Sequence[Statement]) -> ExecuteResult:
        found = [self._writes.find(sql) for sql, _ in statements]
        limits = list(chain.from_iterable(found))
        refusal = self._writes.begin(limits, self._host.now_ms())
        if refusal is not None:
            raise RateLimitedError(
                f"more than {refusal.rows_per_s:g} rows a second are written into "
                f"{refusal.table or 'all tables together'}; try again in {refusal.wait_ms / 1000:.1f} s",
                refusal.wait_ms,
            )
        try:
            written = await self._database.execute(statements, self._wall_ms())
        finally:
            self._writes.end(limits)
        for names, rows in zip(found, written.rows_affected, strict=True):
            for name in names:
                self._writes.spend(name, rows, self._host.now_ms())
        return ExecuteResult(written.rows_affected, written.version, self.site)

    async def extend(self, schema: Schema, declared: str) -> None:
        """Take up tables, columns and indexes that a schema has beyond ours; raises SchemaError for the rest.

        declared is kept in the file: the text of the schema file. What waited for the schema is applied.
        """
        await self._database.run(lambda store: store.extend(schema, declared))
        self._schema = schema
        await self._database.commit(lambda store: store.retry_parked(self._wall_ms()), some)

    async def query(self, sql: str, params: Params = ()) -> QueryResult:
        """Read; raises QueryError for what is not a read, or too large, or too slow."""
        return await self._database.query(sql, params)

    async def wait_for(self, token: Token, timeout_ms: float) -> None:
        """Return when a write and all that its site wrote before it are here, and it was applied.

        Of what its site wrote before, something may be parked. Raises BehindError at the timeout, ParkedError
        for this write, BusyError when too many wait.
        """
        arrived = asyncio.Event()
        forget = self._replica.await_write(token, arrived.set)
        try:
            async with asyncio.timeout(timeout_ms / 1000):
                await arrived.wait()
        except TimeoutError:
            head = self._replica.head(token.site)
            raise BehindError(
                f"version {token.version} of site {token.site.hex()} is not here after {timeout_ms:g} ms: "
                + (f"this node has up to version {head}" if head else "this node has nothing of that site")
            ) from None
        finally:
            forget()
        for (reason,) in (await self._database.query(_PARKED, token)).rows:
            raise ParkedError(f"version {token.version} of site {token.site.hex()} is parked: {reason!s}")

    async def retry_parked(self) -> int:
        """Try to apply at once what is parked; return how many changesets remain so."""

        def act(store: Store) -> tuple[Commit | None, int]:
            return store.retry_parked(self._wall_ms()), len(store.parked())

        _, self._replica.parked = await self._database.commit(act, lambda result: some(result[0]))
        return self._replica.parked

    async def drop_parked(self, site: SiteId, version: int) -> bool:
        """Give up a changeset that is parked; return whether it was."""
        was_parked = await self._database.run(lambda store: store.drop_parked(site, version))
        self._replica.parked -= was_parked
        return was_parked

    async def read_staged(self) -> Staged:
        """Return what is held back of the staged tables, and what harm it has done."""
        return await self._database.run(Store.read_staged)

    async def release_staged(self, clocks: Collection[Clock]) -> None:
        """Show those who follow what these changesets wrote."""
        await self._database.commit(lambda store: store.release_staged(clocks), some)

    async def put_strikes(self, strikes: Mapping[Clock, int]) -> None:
        """Keep over restarts how often changesets that are held back have done harm."""
        await self._database.run(lambda store: store.put_strikes(strikes))

    def _publish(self, commit: Commit) -> None:
        """Take a commit, on the event loop, in order: spread what is ours and tell the application."""
        if commit.seq > self._seq + 1:
            # A bug; but what was not told must not stay unknown until the next start.
            self.counters["commits_missed"] += 1
            log.error("commits %d to %d were not told; all is read again", self._seq + 1, commit.seq - 1)
            commit = replace(commit, reload=tuple(self._schema.tables))
            self._replica.reread_seen()
        self._seq = commit.seq
        self._replica.handle_commit(commit)
        try:
            self._on_commit(commit)
        except Exception:
            self.counters["callbacks_failed"] += 1
            log.exception("on_commit failed at seq %d", commit.seq)

    # --- what the transport reports -------------------------------------------------------------------

    def handle_datagram(self, data: bytes) -> None:
        """Take a datagram's content; raises WireError."""
        if self._running:
            self._replica.handle_datagram(data)

    def handle_self(self, info: MemberInfo) -> None:
        """Take note of a stream to ourselves, or to a node with our site."""
        if self._running:
            self._replica.handle_self(info)

    def handle_link_up(self, link: Link) -> None:
        """Take note of a link and of who is at the other end."""
        self._replica.handle_link_up(link)

    def handle_link_down(self, link: Link) -> None:
        """Take note that a link is gone."""
        self._replica.handle_link_down(link)

    def handle_frame(self, link: Link, data: bytes) -> None:
        """Take a frame; raises WireError."""
        if self._running:
            self._replica.handle_frame(link, data)

    # --- loops ----------------------------------------------------------------------------------------

    async def _keep_running(self, name: str, loop: "Callable[[], asyncio.Future[None] | Any]") -> None:
        """Run a loop again when it failed: an error in one place must not end replication unseen."""
        while True:
            try:
                await loop()
            except Exception as error:
                self.counters[f"{name}_failed"] += 1
                is_told = is_transient(error) or self._database.lost is not None
                if not is_told and self._told.is_news(name, str(error), self._host.now_ms()):
                    log.exception("%s failed", name)
            await asyncio.sleep(RESTART_S)

    async def _poll_loop(self) -> None:
        """Gather what others wrote to the file, as far as they may write."""

        def act(store: Store) -> Commit | None:
            released = store.deferred - self._deferred
            store.deferred = self._deferred
            return store.capture(self._wall_ms()) if store.foreign_writes() or released else None

        while self._database.lost is None:
            await asyncio.sleep(self._settings.poll_interval_ms / 1000)
            twin = self._replica.swim.get_twin(self._host.now_ms())
            if twin is not None:
                await self._give_way(twin)
            limits = self._foreign_writes
            self._deferred = limits.compute_exhausted(self._schema.tables, self._host.now_ms())
            commit = await self._database.commit(act, some)
            if commit is not None:
                self.counters["captures"] += 1
                written = (change.table for change in (*commit.changes, *commit.held))
                limits.spend_tables(written, self._host.now_ms())

    async def _give_way(self, twin: MemberInfo) -> None:
        """Write nothing more as our site, for another node does; raises ReplacedError."""
        reason = f"the node {twin.name} at {twin.host}:{twin.port} writes as the same site"
        await self._database.run(lambda store: store.renounce(reason))

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
                    if self._told.is_news(f"resolve {host}", str(error), self._host.now_ms()):
                        log.warning("cannot resolve %s to join: %s", host, error)
            if found or not failed:
                self._joins = tuple(found)
                self._replica.set_join_addresses(found)
            wait_ms = (
                self._settings.swim.join_backoff_max_ms if failed else self._settings.resolve_interval_ms
            )
            await asyncio.sleep(wait_ms / 1000 * (0.75 + 0.5 * self._rng.random()))

    async def _look_loop(self) -> None:
        """Say what could only be seen in counters: that nobody answers, and that somebody has another key."""
        while True:
            await asyncio.sleep(self._settings.look_interval_ms / 1000)
            self._tell_alone()
            self._tell_strangers()

    def _tell_alone(self) -> None:
        swim = self._replica.swim
        others = [f"{host}:{port}" for host, port in self._joins if (host, port) != swim.me.address]
        alone = bool(others) and not any(member.is_reachable for member in swim.members.values())
        if alone and not self._told_alone:
            log.warning(
                "nobody answers at %s: it takes a node there with the same cluster and cluster key, "
                "and UDP and TCP that get through%s",
                ", ".join(others),
                "" if self._seal.secret else "; without a key nothing is sent beyond this machine",
            )
        self._told_alone = alone

    def _tell_strangers(self) -> None:
        stranger, now_ms = self._transport.stranger, self._host.now_ms()
        if stranger is not None and now_ms - self._strangers_told_ms >= STRANGERS_TOLD_MS:
            self._strangers_told_ms = now_ms
            log.warning(
                "what comes from %s:%d is dropped: a node there has another cluster key, "
                "or is of another cluster",
                *stranger,
            )
        self._transport.stranger = None

    # --- who we are -----------------------------------------------------------------------------------

    def _hello(self) -> Hello:
        return Hello(self._settings.cluster, self._replica.swim.me, lasting=False)

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
        return view_members(self._replica, self._host.now_ms(), self._host.wall_ms())

    def stable_ms_ago(self) -> int | None:
        """Return how long ago all that was written had reached every member; None while that is not known."""
        return compute_stable_ms_ago(self._replica, self._host.wall_ms())

    def status(self) -> dict[str, Any]:
        """Return what an operator wants to see, fit for JSON."""
        replica = self._replica
        sites = {
            site.hex(): {"head": ranges.head, "last": ranges.last, "gaps": ranges.missing(ranges.last)}
            for site, ranges in replica.seen.items()
        }
        return {
            "name": self._settings.name,
            "cluster": self._settings.cluster,
            "site": self.site.hex(),
            "address": list(replica.swim.me.address),
            "seq": self._seq,
            "read_only": self._database.trouble,
            "sites": sites,
            "parked": replica.parked,
            "schema_problem": replica.schema_problem,
            "passes_verified": replica.verifier.passes,
            "apply_queue": len(replica.inbox),
            "deferred": sorted(self._deferred),
            "origins_refused": {
                site.hex() if site else "others": count for site, count in replica.origins.refused.items()
            },
            **describe_parts(self._parts(), self._host.now_ms(), self._host.wall_ms()),
        }

    def samples(self) -> Iterable[Sample]:
        """Yield the metrics that METRICS names."""
        yield from collect_samples(self._parts(), self._host.now_ms(), self._host.wall_ms())
        yield ("isthmus_commit_seq", (), self._seq)
        yield ("isthmus_tables_deferred", (), len(self._deferred))
        for table, count in self._writes.refused.items():
            yield ("isthmus_writes_refused_total", (("table", table or "*"),), count)
        yield ("isthmus_database_read_only", (), float(self._database.trouble is not None))

    def _parts(self) -> Parts:
        return Parts(self._replica, self._transport, self._replica.counters + self.counters)
