"""What a replica answers to a peer that asks."""

from collections import Counter

from replication.core.change import EncodedChangeset
from replication.core.clock import SiteId
from replication.core.member import MemberInfo
from replication.core.versions import VersionRanges
from replication.core.wire import (
    Members,
    SnapshotAsk,
    SnapshotChunk,
    SyncAsk,
    SyncBusy,
    SyncChanges,
    SyncDone,
    SyncOpen,
    SyncPart,
    SyncState,
)
from replication.errors import StoreError
from replication.schema import Schema
from replication.serving import PIECE_BYTES, SPOOLED_AT_ONCE, Server
from replication.store import Store
from tests.fakes.host import FakeHost
from tests.fakes.links import FakeLink

SCHEMA = Schema.parse("CREATE TABLE items (id INTEGER PRIMARY KEY, v TEXT NOT NULL DEFAULT '');")
US, PEER = SiteId(b"u" * 16), SiteId(b"p" * 16)
CHUNK = 1_000
WHOLE = 800


class Served:
    """A server over a real store, with what it told."""

    def __init__(self, served_max: int = 4) -> None:
        self.store = Store.open(":memory:", SCHEMA, site=US)
        self.host = FakeHost(self.store)
        self.counters: Counter[str] = Counter()
        self.seen: dict[SiteId, VersionRanges] = {}
        self.ahead: list[SiteId] = []
        self.server = Server(
            self.host,
            self.counters,
            seen=lambda: self.seen,
            members=lambda: Members(()),
            on_peer_ahead=self.ahead.append,
            timeout_ms=1_000,
            served_max=served_max,
            chunk_bytes=CHUNK,
            whole_bytes_max=WHOLE,
        )
        self.link = FakeLink(MemberInfo(PEER, "p", "10.0.0.1", 1, 1), on_close=self.server.handle_link_down)

    def write(self, count: int, *, size: int = 400) -> None:
        for _ in range(count):
            self.store.execute([("INSERT INTO items (v) VALUES (?)", ("x" * size,))], 1_700_000_000_000)
        self.seen = self.store.seen()


def test_state_is_told_as_it_was_when_asked_for_while_more_comes_in() -> None:
    served = Served()
    served.write(5)
    served.server.handle_request(served.link, SyncOpen(7, {}))
    served.seen[PEER] = VersionRanges([(1, 9)])
    served.host.settle()
    assert served.link.frames == [Members(()), SyncState(7, {US: ((1, 5),)}, {US: 1})]


def test_a_peer_that_has_seen_more_is_noted() -> None:
    served = Served()
    served.server.handle_request(served.link, SyncOpen(1, {PEER: ((1, 3),)}))
    assert served.ahead == [PEER]


def test_changes_go_out_in_chunks_and_wait_for_a_slow_peer() -> None:
    served = Served()
    served.write(7)
    served.server.handle_request(served.link, SyncAsk(1, ((US, 1, 7),)))
    served.host.settle()
    assert len(served.link.frames) == 1, "the next chunk waits until the link is writable"
    while served.link.waits:
        served.link.waits.pop(0)()
        served.host.settle()
    *chunks, last = served.link.frames
    assert last == SyncDone(1, complete=True)
    versions = [
        item.version for chunk in chunks if isinstance(chunk, SyncChanges) for item in chunk.changesets
    ]
    assert versions == list(range(1, 8))
    assert len(chunks) > 2


def test_a_large_changeset_goes_in_parts_from_where_the_peer_has_it_between_whole_ones() -> None:
    served = Served()
    served.write(2)
    served.write(1, size=5_000)
    served.write(2)
    (large,) = served.store.read_log(US, 3, 3, 1)
    served.server.handle_request(served.link, SyncAsk(1, ((US, 3, 3), (US, 1, 5)), offset=1_500))
    served.host.settle()
    while served.link.waits:
        served.link.waits.pop(0)()
        served.host.settle()
    assert served.link.frames[-1] == SyncDone(1, complete=True)
    resumed, whole = bytearray(large.payload[:1_500]), bytearray()
    versions = []
    for frame in served.link.frames:
        if isinstance(frame, SyncPart):
            assert (frame.version, frame.total_bytes) == (3, len(large.payload))
            assert len(frame.data) <= CHUNK
            target = whole if versions else resumed
            assert frame.offset == len(target)
            target += frame.data
        elif isinstance(frame, SyncChanges):
            versions += [item.version for item in frame.changesets]
    assert resumed == whole == large.payload
    assert versions == [1, 2, 4, 5]


def test_a_chunk_with_a_large_row_goes_in_pieces() -> None:
    served = Served()
    served.write(1, size=3 * PIECE_BYTES)
    served.server.handle_request(served.link, SnapshotAsk(1))
    served.host.settle()
    pieces = [frame for frame in served.link.frames if isinstance(frame, SnapshotChunk)]
    assert max(len(piece.chunk) for piece in pieces) == PIECE_BYTES
    assert [piece.more for piece in pieces].count(False) == 3, "head, rows, end"


def test_a_peer_that_takes_nothing_for_a_while_loses_its_link() -> None:
    served = Served()
    served.write(7)
    served.server.handle_request(served.link, SyncAsk(1, ((US, 1, 7),)))
    served.host.settle()
    served.link.is_writable = False
    served.host.fire()  # it has moved since the watch began
    assert not served.link.is_closed
    served.host.fire()
    assert served.link.is_closed
    assert served.counters["served_failed"] == 1
    assert not served.server._serving


def test_a_snapshot_is_spooled_in_turns_with_others_and_sent_as_the_peer_takes_it() -> None:
    served = Served()
    served.write(40)
    served.server.handle_request(served.link, SnapshotAsk(1))
    turns = 0
    while served.host.calls:
        served.host.step()
        turns += 1
    assert turns > 40 * 400 / CHUNK / SPOOLED_AT_ONCE
    *chunks, last = served.link.frames
    assert last == SyncDone(1, complete=True)
    assert served.host.spools[0].is_closed
    other = Store.open(":memory:", SCHEMA)
    data = [chunk.chunk for chunk in chunks if isinstance(chunk, SnapshotChunk) and chunk.chunk]
    other.apply_snapshot(data, 1_700_000_000_000)
    assert other.digest("items") == served.store.digest("items")


def test_who_waits_for_a_snapshot_that_is_being_read_hears_that_there_is_progress() -> None:
    served = Served()
    served.write(40)
    served.server.handle_request(served.link, SnapshotAsk(1))
    served.host.step()
    served.host.step()
    assert served.link.frames == [SnapshotChunk(1, b"", more=True)]


def test_a_snapshot_is_let_go_when_its_peer_is_gone() -> None:
    served = Served()
    served.write(40)
    served.server.handle_request(served.link, SnapshotAsk(1))
    served.host.step()
    served.link.close()
    assert served.host.spools[0].is_closed
    served.host.settle()
    assert served.link.frames == []


def test_who_asks_when_too_many_are_served_is_told_so() -> None:
    served = Served(served_max=1)
    served.write(1)
    served.server.handle_request(served.link, SyncAsk(1, ((US, 1, 1),)))
    served.server.handle_request(served.link, SyncAsk(2, ((US, 1, 1),)))
    assert served.link.frames == [SyncBusy(2)]


def test_a_store_that_fails_ends_the_answer_as_incomplete() -> None:
    served = Served()
    served.host.store = _Broken()  # type: ignore[assignment]  # all that is asked of it here
    served.server.handle_request(served.link, SyncAsk(1, ((US, 1, 1),)))
    served.host.settle()
    assert served.link.frames == [SyncDone(1, complete=False)]
    assert not served.server._serving


class _Broken:
    def read_log(self, *_: object) -> list[EncodedChangeset]:
        raise StoreError("disk I/O error")
