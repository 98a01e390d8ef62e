"""Sync sessions from the side that is asked.

Sends what others miss, as fast as they take it. Knows nothing of what a changeset holds. Invariant: no more
than a chunk of anybody's answer is in memory, beside what their links may hold.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

from replication.core.change import EncodedChangeset
from replication.core.clock import SiteId
from replication.core.links import Link
from replication.core.needs import Need, Seen, WireSeen, encode_seen, is_ahead
from replication.core.versions import VersionRanges
from replication.core.wire import (
    PART_BYTES_MAX,
    DigestAsk,
    DigestRange,
    DigestRanges,
    Frame,
    Members,
    SnapshotAsk,
    SnapshotChunk,
    StatesAsk,
    SyncAsk,
    SyncBusy,
    SyncChanges,
    SyncDone,
    SyncOpen,
    SyncPart,
    SyncState,
    encode,
)
from replication.host import Host, Spool
from replication.store import Store
from replication.verifying import read_range_states, read_ranges

Request = SyncOpen | SyncAsk | SnapshotAsk | DigestAsk | StatesAsk
T = TypeVar("T")

# What one answer frame holds, and so what a session holds in memory on either side.
CHUNK_BYTES = 256 * 1024
# A log entry can be very small; this keeps a frame under the wire's limit of items.
CHUNK_VERSIONS = 4_096
# A chunk with a large row takes several frames of this.
PIECE_BYTES = 1024 * 1024
# What a peer may make us read at once to compare it with its own: 80 ms of the store's time.
VERIFIED_ROWS_MAX = 16_384
# Chunks of a snapshot that are read before the store's other callers get their turn: about 20 ms.
SPOOLED_AT_ONCE = 4


class Batch(NamedTuple):
    """What was read of a log at once: changesets, or one that is too large; and what is still needed."""

    changesets: list[EncodedChangeset]
    large: tuple[SiteId, int, int] | None  # site, version, bytes
    remaining: list[Need]


class _Serving:
    """One request that is being answered. `moved` counts its frames, so that one that stalls is found."""

    def __init__(self, link: Link, request: Request) -> None:
        self.link = link
        self.request = request
        self.moved = 0
        self.spool: Spool | None = None  # while something waits there to be sent


class Server:
    """One replica's answers."""

    def __init__(
        self,
        host: Host,
        counters: Counter[str],
        *,
        seen: Callable[[], Seen],
        members: Callable[[], Members],
        on_peer_ahead: Callable[[SiteId], None],
        timeout_ms: float,
        served_max: int,
        chunk_bytes: int,
        whole_bytes_max: int,
    ) -> None:
        self._host = host
        self._counters = counters
        self._seen = seen
        self._members = members
        self._on_peer_ahead = on_peer_ahead
        self._timeout_ms = timeout_ms
        self._served_max = served_max
        self._chunk_bytes = chunk_bytes
        self._whole_bytes_max = whole_bytes_max  # what is larger goes in parts
        self._serving: dict[_Serving, None] = {}

    def handle_request(self, link: Link, request: Request) -> None:
        """Begin to answer a peer."""
        if len(self._serving) >= self._served_max:
            self._counters["refused_busy"] += 1
            link.send(encode(SyncBusy(request.session)))
            return
        serving = _Serving(link, request)
        self._serving[serving] = None
        self._watch(serving)
        match request:
            case SyncOpen():
                self._serve_state(serving, request)
            case SyncAsk():
                self._serve_changes(serving, list(request.needs), request.offset)
            case SnapshotAsk():
                self._serve_snapshot(serving)
            case DigestAsk():
                self._serve_digests(serving, request)
            case StatesAsk():
                self._serve_states(serving, request)

    def handle_link_down(self, link: Link) -> None:
        """Give up what was being sent on this link."""
        for serving in [serving for serving in self._serving if serving.link is link]:
            self._counters["served_failed"] += 1
            self._end(serving)

    def _serve_state(self, serving: _Serving, request: SyncOpen) -> None:
        # A copy, for it is read on the store's thread while what comes in goes on to be seen.
        seen = {site: ranges.copy() for site, ranges in self._seen().items()}
        if is_ahead(seen, request.seen):
            self._on_peer_ahead(serving.link.peer.site)

        def done(floors: dict[SiteId, int]) -> None:
            self._send(serving, self._members())
            self._send(serving, SyncState(request.session, encode_seen(seen), floors))
            self._end(serving)

        self._run(serving, lambda store: read_floors(store, seen, request.seen), done)

    def _serve_changes(self, serving: _Serving, needs: list[Need], offset: int = 0) -> None:
        if not needs:
            self._finish(serving)
            return

        def done(batch: Batch) -> None:
            if batch.large is not None:
                self._serve_parts(serving, batch.large, offset, batch.remaining)
                return
            if batch.changesets:
                if not self._send(serving, SyncChanges(serving.request.session, tuple(batch.changesets))):
                    return
                self._counters["changesets_served"] += len(batch.changesets)
            self._when_writable(serving, lambda: self._serve_changes(serving, batch.remaining))

        read = partial(
            read_needs, needs=needs, chunk_bytes=self._chunk_bytes, whole_bytes_max=self._whole_bytes_max
        )
        self._run(serving, read, done)

    def _serve_parts(
        self, serving: _Serving, large: tuple[SiteId, int, int], offset: int, remaining: list[Need]
    ) -> None:
        site, version, size = large
        spool = self._make_spool(serving)
        if spool is None:
            return

        def act(store: Store) -> None:
            for part in store.read_parts(site, version, offset, min(self._chunk_bytes, PART_BYTES_MAX)):
                spool.write(part)

        position = offset

        def make(part: bytes) -> Sequence[Frame]:
            nonlocal position
            frame = SyncPart(serving.request.session, site, version, size, position, part)
            position += len(part)
            return (frame,)

        def sent() -> None:
            self._drop_spool(serving)
            self._counters["changesets_served"] += 1
            self._serve_changes(serving, remaining)

        self._run(serving, act, lambda _: self._send_spooled(serving, spool.read(), make, sent))

    def _serve_snapshot(self, serving: _Serving) -> None:
        spool = self._make_spool(serving)
        if spool is None:
            return

        def begun(chunks: Iterator[bytes]) -> None:
            self._run(serving, partial(_spool_part, chunks=chunks, spool=spool), partial(written, chunks))

        def written(chunks: Iterator[bytes], is_over: bool) -> None:
            if not is_over:
                # All is read before any of it is sent; that there is progress the peer must hear meanwhile.
                if serving.link.is_writable:
                    self._send(serving, SnapshotChunk(serving.request.session, b"", more=True))
                begun(chunks)  # writes of others get their turn in between
                return
            self._send_spooled(serving, spool.read(), make, sent)

        make = partial(_make_pieces, serving.request.session)

        def sent() -> None:
            self._counters["snapshots_served"] += 1
            self._finish(serving)

        self._run(serving, lambda store: store.snapshot(self._chunk_bytes), begun)

    def _serve_digests(self, serving: _Serving, request: DigestAsk) -> None:
        def done(found: tuple[list[DigestRange], bool]) -> None:
            ranges, is_last = found
            self._send(serving, DigestRanges(request.session, tuple(ranges), is_last))
            self._end(serving)

        rows_max = min(request.rows_max, VERIFIED_ROWS_MAX)
        self._run(serving, lambda store: read_ranges(store, request.table, request.after, rows_max), done)

    def _serve_states(self, serving: _Serving, request: StatesAsk) -> None:
        spool = self._make_spool(serving)
        if spool is None:
            return

        def act(store: Store) -> dict[SiteId, VersionRanges]:
            table, lower, upper = request.table, request.lower, request.upper
            for chunk in read_range_states(store, table, lower, upper, self._chunk_bytes):
                spool.write(chunk)
            return store.seen()

        def done(seen: dict[SiteId, VersionRanges]) -> None:
            # What the states hold: who lacks some of it would see a part of a transaction.
            self._send(serving, SyncState(request.session, encode_seen(seen), {}))
            make = partial(_make_pieces, request.session)
            self._send_spooled(serving, spool.read(), make, lambda: self._finish(serving))

        self._run(serving, act, done)

    # --- what waits on disk ---------------------------------------------------------------------------

    def _make_spool(self, serving: _Serving) -> Spool | None:
        try:
            serving.spool = self._host.make_spool()
        except OSError as error:
            self._fail(serving, error)
        return serving.spool

    def _drop_spool(self, serving: _Serving) -> None:
        if serving.spool is not None:
            serving.spool.close()
            serving.spool = None

    def _send_spooled(
        self,
        serving: _Serving,
        chunks: Iterator[bytes],
        make: Callable[[bytes], Sequence[Frame]],
        sent: Callable[[], None],
    ) -> None:
        """Send chunks, as the frames that `make` returns, as fast as the peer takes them."""
        while serving.link.is_writable:
            chunk = next(chunks, None)
            if chunk is None:
                sent()
                return
            if not all(self._send(serving, frame) for frame in make(chunk)):
                return
        self._when_writable(serving, lambda: self._send_spooled(serving, chunks, make, sent))

    # --- one step -------------------------------------------------------------------------------------

    def _run(self, serving: _Serving, act: Callable[[Store], T], done: Callable[[T], None]) -> None:
        def go_on(result: T) -> None:
            if serving in self._serving:
                done(result)

        self._host.run(act, go_on, lambda error: self._fail(serving, error))

    def _send(self, serving: _Serving, frame: Frame) -> bool:
        """Send a frame; when it was dropped the peer would wait in vain, so the link goes."""
        serving.moved += 1
        if serving.link.send(encode(frame)):
            return True
        serving.link.close()
        return False

    def _when_writable(self, serving: _Serving, act: Callable[[], None]) -> None:
        serving.link.when_writable(lambda: act() if serving in self._serving else None)

    def _watch(self, serving: _Serving) -> None:
        moved = serving.moved

        def check() -> None:
            if serving not in self._serving:
                return
            if serving.moved != moved or serving.link.is_writable:
                self._watch(serving)
            else:
                # It does not take what it asked for; the link is of no more use to either.
                serving.link.close()

        self._host.call_later(self._timeout_ms, check)

    def _finish(self, serving: _Serving) -> None:
        self._send(serving, SyncDone(serving.request.session, complete=True))
        self._end(serving)

    def _fail(self, serving: _Serving, error: Exception) -> None:
        if serving in self._serving:
            self._counters["served_failed"] += 1
            self._counters[f"served_failed_{type(error).__name__}"] += 1
            self._send(serving, SyncDone(serving.request.session, complete=False))
            self._end(serving)

    def _end(self, serving: _Serving) -> None:
        if serving not in self._serving:
            return
        del self._serving[serving]
        self._drop_spool(serving)


def _make_pieces(session: int, chunk: bytes) -> Sequence[Frame]:
    """Return the frames in which a chunk travels."""
    starts = range(0, len(chunk), PIECE_BYTES)
    return [
        SnapshotChunk(session, chunk[start : start + PIECE_BYTES], more=start != starts[-1])
        for start in starts
    ]


def read_floors(store: Store, seen: Seen, theirs: WireSeen) -> dict[SiteId, int]:
    """Return where our log begins, for the sites of which a peer has seen something else than we have."""
    return {
        site: store.log_floor(site)
        for site, ranges in seen.items()
        if theirs.get(site) != tuple(ranges.encode())
    }


def read_needs(store: Store, needs: Sequence[Need], chunk_bytes: int, whole_bytes_max: int) -> Batch:
    """Return one chunk of log entries and what then remains to be read; runs on the store's thread."""
    chunk: list[EncodedChangeset] = []
    size = 0
    remaining = list(needs)
    while remaining and size < chunk_bytes and len(chunk) < CHUNK_VERSIONS:
        site, first, last = remaining.pop(0)
        until = min(last, first + CHUNK_VERSIONS - 1)
        large = store.find_large(site, first, until, whole_bytes_max)
        if large is not None and large[0] == first:
            if chunk:
                remaining.insert(0, (site, first, last))
                break
            if first < last:
                remaining.insert(0, (site, first + 1, last))
            return Batch([], (site, *large), remaining)
        if large is not None:
            until = large[0] - 1
        part = store.read_log(site, first, until, chunk_bytes - size)
        chunk += part
        size += sum(len(changeset.payload) for changeset in part)
        # A hole in our log is skipped: the asker will see that it did not come, and ask somebody else.
        following = part[-1].version + 1 if part else until + 1
        if following <= last:
            remaining.insert(0, (site, following, last))
    return Batch(chunk, None, remaining)


def _spool_part(_: Store, chunks: Iterator[bytes], spool: Spool) -> bool:
    """Spool some chunks; return whether that was all."""
    for _count in range(SPOOLED_AT_ONCE):
        chunk = next(chunks, None)
        if chunk is None:
            return True
        spool.write(chunk)
    return False
