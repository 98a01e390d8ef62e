"""The wire format: what goes out comes back, and nothing else gets in."""

import contextlib
from dataclasses import fields

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replication.core import wire
from replication.core.change import EncodedChangeset
from replication.core.clock import HLC_MAX, Hlc, SiteId
from replication.core.member import INCARNATION_MAX, MemberInfo, MemberState, Update
from replication.core.vivaldi import REACH_MS, Coordinate

SITE = SiteId(b"s" * 16)
INFO = MemberInfo(SITE, "ams-1", "fdaa::3", 7946, 41)
UPDATE = Update(INFO, MemberState.SUSPECT)
CHANGESET = EncodedChangeset(SITE, 7, b"payload")
PLACE = Coordinate((1.5, -REACH_MS, 0.001, 0.0), 0.25, 0.125)
BEAT = wire.Heartbeat(SITE, 7, Hlc(9 << 16), Hlc(8 << 16), 2**32 - 1)

DATAGRAMS = [
    wire.Ping(1, SITE, INFO, (UPDATE,)),
    wire.Ack(2**32 - 1, INFO, coordinate=PLACE),
    wire.PingRequest(3, INFO, INFO, (UPDATE, UPDATE)),
    wire.Nack(4, INFO),
    wire.Join(INFO, (UPDATE,)),
    wire.Rumors(INFO, (UPDATE,)),
]
FRAMES = [
    wire.Hello("isthmus", INFO, lasting=True),
    wire.StreamPing(1),
    wire.StreamAck(1),
    wire.Members((UPDATE,), (wire.Whereabouts(SITE, PLACE, 7),)),
    wire.Push(CHANGESET),
    wire.IHave(((SITE, 1), (SITE, 2))),
    wire.Graft(((SITE, 1),)),
    wire.Prune(),
    wire.SyncOpen(1, {SITE: ((1, 5), (7, 7))}),
    wire.SyncState(1, {SITE: ((1, 5),)}, {SITE: 3}),
    wire.SyncBusy(1),
    wire.SyncAsk(1, ((SITE, 6, 9),), 512),
    wire.SyncChanges(1, (CHANGESET,)),
    wire.SyncDone(1, complete=False),
    wire.SnapshotAsk(1),
    wire.SnapshotChunk(1, b"chunk"),
    wire.Large(((SITE, 1, 2**32),)),
    wire.SyncPart(1, SITE, 2, 10, 7, b"end"),
    wire.DigestAsk(1, "machines", None, 1_000),
    wire.DigestRanges(1, ((b"k", 9, b"8 bytes."), (b"l", 0, b"8 bytes.")), is_last=True),
    wire.StatesAsk(1, "machines", b"k", None),
    wire.Beats((BEAT,)),
]


@pytest.mark.parametrize("message", DATAGRAMS, ids=lambda message: type(message).__name__)
def test_a_datagram_comes_back_as_it_went(message):
    assert wire.decode_datagram(wire.encode(message)) == message


@pytest.mark.parametrize("message", FRAMES, ids=lambda message: type(message).__name__)
def test_a_frame_comes_back_as_it_went(message):
    assert wire.decode_frame(wire.encode(message)) == message


def test_every_kind_is_tested_and_numbered_by_its_place():
    assert [type(message) for message in DATAGRAMS + FRAMES] == wire._Registry.KINDS


def test_a_frame_is_not_taken_for_a_datagram_or_the_other_way_round():
    with pytest.raises(wire.WireError, match="kind"):
        wire.decode_datagram(wire.encode(wire.Prune()))
    with pytest.raises(wire.WireError, match="kind"):
        wire.decode_frame(wire.encode(DATAGRAMS[0]))


@pytest.mark.parametrize("message", FRAMES, ids=lambda message: type(message).__name__)
def test_the_kind_of_a_frame_is_told_without_decoding_it(message):
    assert wire.get_kind(wire.encode(message)) is type(message)


def altered(message: wire.Message, field: str, value: object) -> bytes:
    row = list(msgpack.unpackb(wire.encode(message), use_list=False))
    row[2 + [item.name for item in fields(message)].index(field)] = value
    return msgpack.packb(row)


LONG = b"\x01" * 17


@pytest.mark.parametrize(
    ("message", "field", "value"),
    [
        (wire.StreamPing(1), "number", -1),
        (wire.StreamPing(1), "number", 2**32),
        (wire.StreamPing(1), "number", True),
        (wire.StreamPing(1), "number", 1.0),
        (wire.StreamPing(1), "number", "1"),
        (wire.StreamPing(1), "number", None),
        (wire.StreamPing(1), "number", {}),
        (wire.Push(CHANGESET), "changeset", (LONG, 1, b"")),
        (wire.Push(CHANGESET), "changeset", (SITE, 0, b"")),
        (wire.Push(CHANGESET), "changeset", (SITE, wire.VERSION_MAX, b"")),
        (wire.Push(CHANGESET), "changeset", (SITE, 1, "text")),
        (wire.Push(CHANGESET), "changeset", (SITE, 1)),
        (wire.SyncOpen(1, {}), "seen", {SITE: ((5, 1),)}),
        (wire.SyncOpen(1, {}), "seen", {SITE: ((1, 5), (5, 6))}),
        (wire.SyncOpen(1, {}), "seen", {SITE: ((0, 5),)}),
        (wire.SyncOpen(1, {}), "seen", {SITE: (1, 5)}),
        (wire.SyncOpen(1, {}), "seen", {b"short": ((1, 5),)}),
        (wire.SyncOpen(1, {}), "seen", [SITE]),
        (wire.SyncAsk(1, ()), "needs", ((SITE, 3, 2),)),
        (wire.SyncAsk(1, ()), "offset", -1),
        (wire.SyncDone(1, complete=True), "complete", 1),
        (wire.Large(()), "ids", ((SITE, 0, 1),)),
        (wire.Large(()), "ids", ((SITE, 1, wire.PAYLOAD_BYTES_MAX + 1),)),
        (wire.SyncPart(1, SITE, 2, 10, 7, b"end"), "version", 0),
        (wire.SyncPart(1, SITE, 2, 10, 7, b"end"), "data", b"past the end"),
        (wire.SyncPart(1, SITE, 2, 10, 7, b"end"), "data", b""),
        (wire.SyncPart(1, SITE, 2, 10, 7, b"end"), "offset", 8),
        (wire.SyncPart(1, SITE, 2, 2**30, 0, b"all"), "data", bytes(wire.PART_BYTES_MAX + 1)),
        (wire.DigestAsk(1, "t", None, 1), "rows_max", 0),
        (wire.DigestAsk(1, "t", None, 1), "rows_max", wire.DIGEST_ROWS_MAX + 1),
        (wire.DigestAsk(1, "t", None, 1), "table", ""),
        (wire.DigestAsk(1, "t", None, 1), "table", "t" * (wire.TABLE_CHARS_MAX + 1)),
        (wire.DigestAsk(1, "t", None, 1), "after", "text"),
        (wire.DigestAsk(1, "t", None, 1), "after", bytes(wire.KEY_BYTES_MAX + 1)),
        (wire.DigestRanges(1, (), is_last=True), "ranges", ((b"k", 1, b"short"),)),
        (wire.DigestRanges(1, (), is_last=True), "ranges", ((b"k", 1, bytes(33)),)),
        (wire.DigestRanges(1, (), is_last=True), "ranges", ((b"k", -1, bytes(8)),)),
        (wire.DigestRanges(1, (), is_last=True), "ranges", ((None, 1, bytes(8)),)),
        (wire.Beats(()), "beats", ((SITE, 1, 5, 6, 0),)),
        (wire.Beats(()), "beats", ((SITE, 1, HLC_MAX + 1, 6, 0),)),
        (wire.Beats(()), "beats", ((SITE, 1, 5, 5, 2**32),)),
        (wire.Beats(()), "beats", ((SITE, 1, 5, 5),)),
        (wire.Members(()), "whereabouts", ((SITE, None, 0),)),
        (wire.Members(()), "whereabouts", ((SITE, (0, 0, 0, 0, 0, 0), -1),)),
        (wire.Members(()), "whereabouts", ((SITE, (0, 0, 0, 0, -1, 0), 0),)),
        (wire.Members(()), "whereabouts", ((SITE, (0, 0, 0, 0, 0, -1), 0),)),
        (wire.Members(()), "whereabouts", ((SITE, (0.5, 0, 0, 0, 0, 0), 0),)),
        (wire.Members(()), "whereabouts", ((SITE, (float("nan"), 0, 0, 0, 0, 0), 0),)),
        (wire.Members(()), "whereabouts", ((SITE, (10_000_001, 0, 0, 0, 0, 0), 0),)),
        (wire.Members(()), "whereabouts", ((SITE, (0, 0, 0, 0, 0), 0),)),
        (wire.Members(()), "updates", (((), 0),)),
        (wire.Members(()), "updates", (((SITE, "a", "127.0.0.1", 1, INCARNATION_MAX), 0),)),
        (wire.Members(()), "updates", (((SITE, "a", "127.0.0.1", 1, -1), 0),)),
        (wire.Members(()), "updates", (((SITE, "a", "127.0.0.1", 0, 1), 0),)),
        (wire.Members(()), "updates", (((SITE, "a", "example.com", 1, 1), 0),)),
        (wire.Members(()), "updates", (((SITE, "a", "fe80::1%eth0", 1, 1), 0),)),
        (wire.Members(()), "updates", (((SITE, "a\nb", "127.0.0.1", 1, 1), 0),)),
        (wire.Members(()), "updates", (((SITE, "a" * 65, "127.0.0.1", 1, 1), 0),)),
        (wire.Members(()), "updates", (((SITE, "", "127.0.0.1", 1, 1), 0),)),
        (wire.Members(()), "updates", (((SITE, {}, "127.0.0.1", 1, 1), 0),)),
        (wire.Members(()), "updates", (((SITE, "a", "127.0.0.1", 1, 1), 4),)),
        (wire.Members(()), "updates", (((SITE, "a", "127.0.0.1", 1, 1), True),)),
    ],
)
def test_a_field_of_the_wrong_type_or_range_is_refused(message, field, value):
    with pytest.raises(wire.WireError):
        wire.decode_frame(altered(message, field, value))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x91" * 10_000,  # nesting
        b"\x81\xa1a" * 10_000,
        b"\xdd\xff\xff\xff\xff",  # an array of 2^32
        b"\xdf\xff\xff\xff\xff",  # a map of 2^32
        b"\xc6\xff\xff\xff\xff",  # bytes of 2^32
        b"\xd6\xff\x00\x00\x00\x00",  # a timestamp
        b"\xc7\x01\x05\x00",  # an extension
        b"\x93\x01\x00\xa1\xff",  # not UTF-8
        b"\x82\x93\x01\x02\x03\x01\x01\x01",  # an array as a key
        msgpack.packb([]),
        msgpack.packb([1]),
        msgpack.packb(1),
        msgpack.packb([2, 7, 1]),  # a later version
        msgpack.packb([1, 99]),
        msgpack.packb([1, -1]),
        msgpack.packb([1, True, 1]),
        wire.encode(wire.StreamPing(1)) + b"\x00",
        wire.encode(wire.StreamPing(1))[:-1],
    ],
)
def test_bytes_that_are_no_message_are_refused(data):
    with pytest.raises(wire.WireError):
        wire.decode_frame(data)


def test_a_member_that_equals_one_that_was_checked_but_has_other_types_is_refused():
    def encode(port: object) -> bytes:
        return altered(wire.Members(()), "updates", (((SITE, "a", "127.0.0.1", port, 1), 0),))

    assert wire.decode_frame(encode(1)).updates[0].info.port == 1
    for port in (True, 1.0):
        with pytest.raises(wire.WireError):
            wire.decode_frame(encode(port))


def test_a_part_that_no_peer_would_take_is_not_made():
    with pytest.raises(wire.WireError, match="part"):
        wire.SyncPart(1, SITE, 2, 10, 7, b"past the end")


uint32s = st.integers(0, 2**32 - 1)
sites = st.binary(min_size=16, max_size=16).map(SiteId)
versions = st.integers(1, wire.VERSION_MAX - 1)
hlcs = st.integers(0, HLC_MAX).map(Hlc)
keys = st.none() | st.binary(max_size=40)
tables = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=20)
reaches = st.integers(0, int(REACH_MS * 1000)).map(lambda value: value / 1000)
places = st.builds(
    Coordinate,
    st.tuples(*[st.tuples(reaches, st.sampled_from([-1, 1])).map(lambda p: p[0] * p[1])] * 4),
    reaches,
    reaches,
)
beats = st.builds(
    lambda site, version, times, roll: wire.Heartbeat(site, version, max(times), min(times), roll),
    sites,
    versions,
    st.tuples(hlcs, hlcs),
    uint32s,
)
built = st.one_of(
    st.builds(wire.Large, st.lists(st.tuples(sites, versions, uint32s), max_size=5).map(tuple)),
    st.builds(
        lambda session, site, version, before, data, after: wire.SyncPart(
            session, site, version, before + len(data) + after, before, data
        ),
        uint32s,
        sites,
        versions,
        st.integers(0, 2**30),
        st.binary(min_size=1, max_size=40),
        st.integers(0, 2**30),
    ),
    st.builds(wire.DigestAsk, uint32s, tables, keys, st.integers(1, wire.DIGEST_ROWS_MAX)),
    st.builds(
        wire.DigestRanges,
        uint32s,
        st.lists(
            st.tuples(st.binary(max_size=40), st.integers(0, 2**20), st.binary(min_size=8, max_size=32))
        ).map(tuple),
        st.booleans(),
    ),
    st.builds(wire.StatesAsk, uint32s, tables, keys, keys),
    st.builds(wire.Beats, st.lists(beats, max_size=5).map(tuple)),
    st.builds(
        wire.Members,
        st.just(()),
        st.lists(st.builds(wire.Whereabouts, sites, places, st.integers(0, wire.AGE_S_MAX)), max_size=5).map(
            tuple
        ),
    ),
    st.builds(wire.SyncAsk, uint32s, st.just(((SITE, 6, 9),)), uint32s),
    st.builds(wire.SyncState, uint32s, st.just({SITE: ((1, 5),)}), st.just({})),
)


@given(built)
def test_any_values_in_range_come_back_as_they_went(message):
    assert wire.decode_frame(wire.encode(message)) == message


def test_size_is_checked_before_anything_is_decoded():
    with pytest.raises(wire.WireError, match="size"):
        wire.decode_datagram(b"\x00" * (wire.DATAGRAM_BYTES_MAX + 1))
    with pytest.raises(wire.WireError, match="size"):
        wire.decode_frame(b"\x00" * 5_000, size_max=wire.HELLO_BYTES_MAX)


@given(st.binary(max_size=400))
def test_no_bytes_raise_anything_but_a_wire_error(data):
    for decode in (wire.decode_datagram, wire.decode_frame):
        with contextlib.suppress(wire.WireError):
            decode(data)


@given(st.sampled_from(DATAGRAMS + FRAMES), st.data())
def test_a_message_with_a_flipped_bit_is_a_message_or_refused(message, data):
    encoded = bytearray(wire.encode(message))
    bit = data.draw(st.integers(0, len(encoded) * 8 - 1))
    encoded[bit // 8] ^= 1 << bit % 8
    decode = wire.decode_datagram if message in DATAGRAMS else wire.decode_frame
    try:
        other = decode(bytes(encoded))
    except wire.WireError:
        return
    # Not always the same bytes again, as msgpack has several forms of one number.
    assert decode(wire.encode(other)) == other


def test_as_many_updates_as_are_said_to_fit_do_fit():
    info = MemberInfo(SITE, "ä" * 64, "fdaa:fdaa:fdaa:fdaa:fdaa:fdaa:fdaa:fdaa", 65_535, INCARNATION_MAX - 1)
    update = Update(info, MemberState.LEFT)
    widest = Coordinate((-REACH_MS,) * 4, REACH_MS, REACH_MS)
    budget = wire.DATAGRAM_BYTES_MAX - 64 - wire.compute_update_bytes(update)
    updates = wire.fit_updates([update] * 100, budget)
    assert 3 <= len(updates) < 100
    assert len(wire.encode(wire.Ping(2**32 - 1, SITE, info, updates, widest))) <= wire.DATAGRAM_BYTES_MAX
