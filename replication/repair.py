"""Sync sessions: asks a peer for what is missing, and serves what others miss.

Decides the course of a session; `core.sync` decides when, `core.needs` what. Knows nothing of what a
changeset holds. Invariant: at most one session of ours at a time, so that nothing is asked for twice,
and no more than a chunk of anybody's answer in memory.
"""

import asyncio
import logging
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO, Self, cast

from replication.core.change import EncodedChangeset
from replication.core.clock import SiteId
from replication.core.needs import Need, Seen, compute_missing, encode_seen, is_ahead, plan_needs
from replication.core.wire import (
    Frame,
    Members,
    SnapshotAsk,
    SnapshotChunk,
    SyncAsk,
    SyncBusy,
    SyncChanges,
    SyncDone,
    SyncOpen,
    SyncState,
    encode,
)
from replication.database import Database
from replication.errors import ReplicationError
from replication.store import Store
from replication.transport import Link, LinkError

log = logging.getLogger(__name__)

Request = SyncOpen | SyncAsk | SnapshotAsk
Answer = SyncState | SyncBusy | SyncChanges | SyncDone | SnapshotChunk

# What one answer frame holds, and so what a session holds in memory on either side.
CHUNK_BYTES = 256 * 1024
# A log entry can be very small; this keeps a frame under the wire's limit of items.
CHUNK_VERSIONS = 4_096
# Asked for at once; what is over comes in the next round.
NEEDS_MAX = 1_024
ROUNDS_MAX = 64
SNAPSHOT_BYTES_MAX = 16 * 1024**3


class SyncError(ReplicationError):
    """A session that ended early; `reason` is fit for a metric's label."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class _Session:
    """Our side of one exchange with a peer."""

    def __init__(self, number: int, link: Link) -> None:
        self.number = number
        self.link = link
        self.answers: asyncio.Queue[Answer | None] = asyncio.Queue(maxsize=2)  # None: the link is gone

    def close(self) -> None:
        """Let a reader that waits to hand over an answer go on."""
        while not self.answers.empty():
            self.answers.get_nowait()


class Repair:
    """One agent's sync sessions, asking and serving."""

    def __init__(
        self,
        database: Database,
        us: SiteId,
        directory: Path,
        *,
        seen: Callable[[], Seen],
        apply: Callable[[Sequence[EncodedChangeset]], Awaitable[int]],
        apply_snapshot: Callable[[Iterator[bytes]], Awaitable[None]],
        members: Callable[[], Members],
        on_peer_ahead: Callable[[SiteId], None],
        timeout_ms: float,
        served_max: int,
    ) -> None:
        self.counters: Counter[str] = Counter()
        # Versions of our own site that a peer has and we do not: this database went back in time.
        self.own_versions_lost = 0
        self._database = database
        self._us = us
        self._directory = directory
        self._seen = seen
        self._apply = apply
        self._apply_snapshot = apply_snapshot
        self._members = members
        self._on_peer_ahead = on_peer_ahead
        self._timeout_s = timeout_ms / 1000
        self._served_max = served_max
        self._session: _Session | None = None  # while `pull` runs
        self._number = 0
        self._serving: set[asyncio.Task[None]] = set()

    # --- asking ---------------------------------------------------------------------------------------

    async def pull(self, link: Link) -> int:
        """Bring over what the peer has and we lack; return how many changesets or snapshots came.

        Raises SyncError, LinkError, OSError, TimeoutError, and what applying raises.
        """
        received = 0
        for _ in range(ROUNDS_MAX):
            self._number = (self._number + 1) % 2**32
            session = self._session = _Session(self._number, link)
            try:
                came, more = await self._round(session)
            finally:
                self._session = None
                session.close()
            received += came
            if not came or not more:
                break
        return received

    async def _round(self, session: _Session) -> tuple[int, bool]:
        """Return how many changesets came, and whether there is more to ask for."""
        self.counters["sessions"] += 1
        await self._send(session.link, self._members())
        await self._send(session.link, SyncOpen(session.number, encode_seen(self._seen())))
        state = await self._next(session)
        if not isinstance(state, SyncState):
            raise SyncError("unexpected")
        seen = self._seen()
        lost = compute_missing(seen, state.seen).get(self._us, [])
        # They are fetched like any others; the count stays, for somebody to ask how that could happen.
        self.own_versions_lost += sum(last - first + 1 for first, last in lost)
        plan = plan_needs(seen, state.seen, state.floors, needs_max=NEEDS_MAX)
        if plan.snapshot:
            await self._pull_snapshot(session)
            return 1, True
        if not plan.needs:
            return 0, False
        await self._send(session.link, SyncAsk(session.number, plan.needs))
        received = 0
        while True:
            answer = await self._next(session)
            if isinstance(answer, SyncDone):
                if not answer.complete:
                    raise SyncError("incomplete")
                return received, True
            if not isinstance(answer, SyncChanges):
                raise SyncError("unexpected")
            received += await self._apply(answer.changesets)
            self.counters["changesets_received"] += len(answer.changesets)

    async def _pull_snapshot(self, session: _Session) -> None:
        await self._send(session.link, SnapshotAsk(session.number))
        with _Spool(self._directory) as spool:
            while isinstance(answer := await self._next(session), SnapshotChunk):
                spool.write(answer.chunk)
            if not isinstance(answer, SyncDone) or not answer.complete:
                raise SyncError("incomplete")
            await self._apply_snapshot(spool.read())
        self.counters["snapshots_received"] += 1

    async def _next(self, session: _Session) -> Answer:
        async with asyncio.timeout(self._timeout_s):
            answer = await session.answers.get()
        if answer is None:
            raise SyncError("link_lost")
        if isinstance(answer, SyncBusy):
            raise SyncError("busy")
        return answer

    async def handle_answer(self, link: Link, answer: Answer) -> None:
        """Hand an answer to our session; waits while the session is busy with the one before."""
        session = self._session
        if session is None or session.link is not link or session.number != answer.session:
            self.counters["answers_late"] += 1
            return
        await session.answers.put(answer)

    def handle_link_down(self, link: Link) -> None:
        """End our session if it was on this link."""
        session = self._session
        if session is not None and session.link is link:
            session.close()
            session.answers.put_nowait(None)

    # --- serving --------------------------------------------------------------------------------------

    def handle_request(self, link: Link, request: Request) -> None:
        """Begin to answer a peer."""
        if len(self._serving) >= self._served_max:
            self.counters["refused_busy"] += 1
            link.send(encode(SyncBusy(request.session)))
            return
        task = asyncio.ensure_future(self._serve(link, request))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def stop(self) -> None:
        """Stop serving."""
        tasks = list(self._serving)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, link: Link, request: Request) -> None:
        try:
            match request:
                case SyncOpen():
                    await self._serve_state(link, request)
                case SyncAsk():
                    await self._serve_changes(link, request)
                case SnapshotAsk():
                    await self._serve_snapshot(link, request)
        except (LinkError, OSError, TimeoutError):
            # It does not take what it asked for; the link is of no more use to either.
            self.counters["served_failed"] += 1
            link.close()
        except ReplicationError:
            self.counters["served_failed"] += 1
            log.exception("could not serve a sync")
            link.send(encode(SyncDone(request.session, complete=False)))

    async def _serve_state(self, link: Link, request: SyncOpen) -> None:
        seen = self._seen()
        if is_ahead(seen, request.seen):
            self._on_peer_ahead(link.peer.site)
        theirs = {site: ranges for site, ranges in request.seen.items() if site in seen}
        wanting = [site for site in seen if theirs.get(site) != tuple(seen[site].encode())]
        floors = await self._database.run(lambda store: {site: store.log_floor(site) for site in wanting})
        await self._send(link, self._members())
        await self._send(link, SyncState(request.session, encode_seen(seen), floors))

    async def _serve_changes(self, link: Link, request: SyncAsk) -> None:
        needs = list(request.needs)
        while needs:
            changesets, needs = await self._database.run(partial(_read_needs, needs=needs))
            if changesets:
                await self._send(link, SyncChanges(request.session, tuple(changesets)))
                self.counters["changesets_served"] += len(changesets)
        await self._send(link, SyncDone(request.session, complete=True))

    async def _serve_snapshot(self, link: Link, request: SnapshotAsk) -> None:
        with _Spool(self._directory) as spool:
            await self._database.run(partial(_spool_snapshot, spool=spool))
            for chunk in spool.read():
                await self._send(link, SnapshotChunk(request.session, chunk))
        await self._send(link, SyncDone(request.session, complete=True))
        self.counters["snapshots_served"] += 1

    async def _send(self, link: Link, message: Frame) -> None:
        if not link.send(encode(message)):
            raise LinkError("slow")
        async with asyncio.timeout(self._timeout_s):
            await link.drain()


def _read_needs(store: Store, needs: Sequence[Need]) -> tuple[list[EncodedChangeset], list[Need]]:
    """Return one chunk of log entries and what then remains to be read; runs on the store's thread."""
    chunk: list[EncodedChangeset] = []
    size = 0
    remaining = list(needs)
    while remaining and size < CHUNK_BYTES and len(chunk) < CHUNK_VERSIONS:
        site, first, last = remaining.pop(0)
        until = min(last, first + CHUNK_VERSIONS - 1)
        part = store.read_log(site, first, until, CHUNK_BYTES - size)
        chunk += part
        size += sum(len(changeset.payload) for changeset in part)
        # A hole in our log is skipped: the asker will see that it did not come, and ask somebody else.
        following = part[-1].version + 1 if part else until + 1
        if following <= last:
            remaining.insert(0, (site, following, last))
    return chunk, remaining


def _spool_snapshot(store: Store, spool: "_Spool") -> None:
    for chunk in store.snapshot(CHUNK_BYTES):
        spool.write(chunk)


class _Spool:
    """Chunks on disk beside the database: a snapshot waits there, not in memory, for a slow peer."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._size = 0

    def __enter__(self) -> Self:
        # cast: typeshed has a wrapper class for what is a plain file
        self._file = cast("BinaryIO", tempfile.TemporaryFile(dir=self._directory))
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, chunk: bytes) -> None:
        """Add a chunk; raises SyncError when a peer sends without end."""
        self._size += len(chunk)
        if self._size > SNAPSHOT_BYTES_MAX:
            raise SyncError("snapshot_size")
        self._file.write(len(chunk).to_bytes(4, "big"))
        self._file.write(chunk)

    def read(self) -> Iterator[bytes]:
        """Return the chunks from the first on."""
        self._file.seek(0)
        while header := self._file.read(4):
            yield self._file.read(int.from_bytes(header, "big"))
