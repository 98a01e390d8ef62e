"""Sync sessions: asks a peer for what is missing, and serves what others miss.

Moves what `core.pull` asks for and what others ask of us; `core.sync` decides when. Knows nothing of what a
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
from replication.core.needs import Need, Seen, WireSeen, encode_seen, is_ahead
from replication.core.pull import ROUNDS_MAX, Answer, Ask, Keep, Over, PullRound, SyncError, Take
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

# What one answer frame holds, and so what a session holds in memory on either side.
CHUNK_BYTES = 256 * 1024
# A log entry can be very small; this keeps a frame under the wire's limit of items.
CHUNK_VERSIONS = 4_096
SNAPSHOT_BYTES_MAX = 16 * 1024**3


class _Session:
    """Our side of one exchange with a peer."""

    def __init__(self, round_: PullRound, link: Link) -> None:
        self.round = round_
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
            session = self._session = _Session(PullRound(self._number, self._us, self._seen), link)
            try:
                came, more = await self._run_round(session)
            finally:
                self._session = None
                session.close()
            received += came
            if not came or not more:
                break
        return received

    async def _run_round(self, session: _Session) -> tuple[int, bool]:
        """Return how many changesets or snapshots came, and whether there may be more."""
        self.counters["sessions"] += 1
        await self._send(session.link, self._members())
        await self._send(session.link, session.round.open())
        received = 0
        while True:
            step = session.round.handle_answer(await self._next(session))
            match step:
                case Ask(frame):
                    self.own_versions_lost += session.round.own_versions_lost
                    await self._send(session.link, frame)
                    if isinstance(frame, SnapshotAsk):
                        await self._pull_snapshot(session)
                        return 1, True
                case Take(changesets):
                    received += await self._apply(changesets)
                    self.counters["changesets_received"] += len(changesets)
                case Over(more):
                    return received, more

    async def _pull_snapshot(self, session: _Session) -> None:
        with _Spool(self._directory) as spool:
            while isinstance(step := session.round.handle_answer(await self._next(session)), Keep):
                spool.write(step.chunk)
            await self._apply_snapshot(spool.read())
        self.counters["snapshots_received"] += 1

    async def _next(self, session: _Session) -> Answer:
        async with asyncio.timeout(self._timeout_s):
            answer = await session.answers.get()
        if answer is None:
            raise SyncError("link_lost")
        return answer

    async def handle_answer(self, link: Link, answer: Answer) -> None:
        """Hand an answer to our session; waits while the session is busy with the one before."""
        session = self._session
        if session is None or session.link is not link or session.round.number != answer.session:
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
        # A copy, for it is read on the store's thread while what comes in goes on to be seen.
        seen = {site: ranges.copy() for site, ranges in self._seen().items()}
        if is_ahead(seen, request.seen):
            self._on_peer_ahead(link.peer.site)
        floors = await self._database.run(partial(read_floors, seen=seen, theirs=request.seen))
        await self._send(link, self._members())
        await self._send(link, SyncState(request.session, encode_seen(seen), floors))

    async def _serve_changes(self, link: Link, request: SyncAsk) -> None:
        needs = list(request.needs)
        while needs:
            changesets, needs = await self._database.run(partial(read_needs, needs=needs))
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


def read_floors(store: Store, seen: Seen, theirs: WireSeen) -> dict[SiteId, int]:
    """Return where our log begins, for the sites of which a peer has seen something else than we have."""
    return {
        site: store.log_floor(site)
        for site, ranges in seen.items()
        if theirs.get(site) != tuple(ranges.encode())
    }


def read_needs(store: Store, needs: Sequence[Need]) -> tuple[list[EncodedChangeset], list[Need]]:
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
