"""Whatever the bytes: the declared errors and no others, in memory bounded by how many bytes there are."""

from __future__ import annotations

import gc
import struct
import tracemalloc
from typing import TYPE_CHECKING, Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replication.core.change import Changeset, EncodedChangeset, TableChange
from replication.core.clock import Clock, Hlc, SiteId
from replication.core.codec import INT64_MAX, INT64_MIN, CodecError, decode_changeset, encode_changeset
from replication.core.member import MemberInfo, MemberState, Update
from replication.core.wire import (
    DATAGRAM_BYTES_MAX,
    Hello,
    Members,
    Ping,
    Push,
    SyncChanges,
    SyncState,
    WireError,
    decode_datagram,
    decode_frame,
    encode,
)
from replication.seal import HANDSHAKE_BYTES, KeyRing, SealError, make_seal
from replication.snapshot import read_snapshot, read_states_chunk

if TYPE_CHECKING:
    from collections.abc import Callable

SITE, OTHER = SiteId(b"s" * 16), SiteId(b"o" * 16)
# A datagram that a message of the largest size fills; a chunk, roughly.
SIZE = 100_000
# The dearest value: a sequence of one is 1 byte here and 56 in memory; and one more for what is made of it.
MEMORY_PER_BYTE = 112
MEMORY_BASE = 256 * 1024


def open_snapshot(chunk: bytes) -> None:
    """Read a chunk wherever in a snapshot it may come."""
    head = msgpack.packb((1, "head", [], 0))
    end = msgpack.packb((1, "end", 2))
    if chunk[:7] == head[:7]:
        list(read_snapshot([chunk, msgpack.packb((1, "end", 1))]))
    else:
        list(read_snapshot([head, chunk, end]))


READERS: dict[str, tuple[Callable[[bytes], Any], type[Exception]]] = {
    "datagram": (decode_datagram, WireError),
    "frame": (decode_frame, WireError),
    "changeset": (decode_changeset, CodecError),
    "snapshot": (open_snapshot, CodecError),
    "states": (read_states_chunk, CodecError),
}

INFO = MemberInfo(SITE, "n1", "10.0.0.1", 8472, 7)
CHANGESET = encode_changeset(
    Changeset(
        Hlc(10**15),
        (
            TableChange(
                "t",
                False,
                ("a",),
                ("a", "b"),
                ((1, "x"), (INT64_MAX, b"y"), (INT64_MIN, None)),
                (None, Clock(Hlc(5), SITE), Clock(Hlc(6), OTHER)),
                ((2.5,), ("é",)),
            ),
        ),
    )
)
ENCODED = EncodedChangeset(SITE, 3, CHANGESET)
VALID: dict[str, list[bytes]] = {
    "datagram": [encode(Ping(1, OTHER, INFO, (Update(INFO, MemberState.SUSPECT),)))],
    "frame": [
        encode(Hello("c", INFO, lasting=True)),
        encode(Members((Update(INFO, MemberState.DEAD),) * 3)),
        encode(Push(ENCODED)),
        encode(SyncState(1, {SITE: ((1, 4), (6, 9)), OTHER: ((2, 2),)}, {SITE: 3})),
        encode(SyncChanges(1, (ENCODED, ENCODED))),
    ],
    "changeset": [CHANGESET],
    "snapshot": [
        msgpack.packb((1, "head", [(SITE, [(1, 4), (6, 9)]), (OTHER, [])], 7)),
        msgpack.packb((1, "parked", [(SITE, 3, CHANGESET)])),
    ],
}
VALID["states"] = [
    msgpack.packb(
        (
            1,
            "rows",
            "t",
            True,
            ("a",),
            ("b",),
            [SITE, OTHER],
            [((1,), (5, 0), False, (6, 1), {"b": (7, 1)}, ("x",)), ((2,), (9, 1), True, None, {}, None)],
        )
    )
]
VALID["snapshot"] += VALID["states"]


def read(kind: str, data: bytes) -> bool:
    """Return whether the bytes are valid; raises whatever is not the declared error."""
    reader, declared = READERS[kind]
    try:
        reader(data)
    except declared:
        return False
    return True


@pytest.mark.parametrize("kind", READERS)
def test_what_the_mutations_start_from_is_valid(kind: str) -> None:
    assert all(read(kind, data) for data in VALID[kind])


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=20)
    | st.just(SITE)
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=4)),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=30,
)


@pytest.mark.parametrize("kind", READERS)
@given(data=st.binary(max_size=300))
def test_any_bytes(kind: str, data: bytes) -> None:
    read(kind, data)


@pytest.mark.parametrize("kind", READERS)
@given(
    head=st.sampled_from([[1], [1, "rows"], [1, "head"], [1, "parked"], *([1, n] for n in range(30))]),
    tail=st.lists(values, max_size=8),
)
def test_any_values(kind: str, head: list[Any], tail: list[Any]) -> None:
    read(kind, msgpack.packb(head + tail))


def replace_somewhere(draw: st.DrawFn, tree: Any) -> Any:
    """Return the tree with one of its values, at any depth, replaced, doubled or taken out."""
    if isinstance(tree, list) and tree and draw(st.integers(0, 9)):
        index = draw(st.integers(0, len(tree) - 1))
        return [*tree[:index], replace_somewhere(draw, tree[index]), *tree[index + 1 :]]
    if isinstance(tree, dict) and tree and draw(st.integers(0, 9)):
        key = draw(st.sampled_from(sorted(tree)))
        return {**tree, key: replace_somewhere(draw, tree[key])}
    if isinstance(tree, list):
        return draw(st.sampled_from([tree[1:], tree * 2, list(reversed(tree))]) | values)
    return draw(values)


@st.composite
def near_misses(draw: st.DrawFn, kind: str) -> bytes:
    """Valid bytes with one value replaced; or with bytes flipped, cut, doubled or taken out."""
    data = draw(st.sampled_from(VALID[kind]))
    if draw(st.booleans()):
        return msgpack.packb(replace_somewhere(draw, msgpack.unpackb(data, strict_map_key=False)))
    at = draw(st.integers(0, len(data) - 1))
    other = draw(st.binary(max_size=9))
    cut = draw(st.integers(0, 9))
    return data[:at] + other + data[at + cut :]


@pytest.mark.parametrize("kind", READERS)
@settings(max_examples=400)
@given(data=st.data())
def test_nearly_valid_bytes(kind: str, data: st.DataObject) -> None:
    read(kind, data.draw(near_misses(kind)))


def declared(head: bytes, size: int) -> bytes:
    return head + struct.pack(">I", size)


BOMBS: dict[str, bytes] = {
    "deep": b"\x91" * SIZE,
    "deep and wide": declared(b"\xdd", SIZE) * (SIZE // 5),
    "deep and 16 bits wide": b"\xdc\x40\x00" * (SIZE // 3),
    "a long list with nothing in it": declared(b"\xdd", 2**32 - 1),
    "a large map with nothing in it": declared(b"\xdf", 2**32 - 1),
    "a long text that is not there": declared(b"\xdb", 2**32 - 1),
    "long bytes that are not there": declared(b"\xc6", 2**32 - 1),
    "an extension that is not there": declared(b"\xc9", 2**32 - 1) + b"\x01",
    "a time stamp": b"\xd7\xff" + b"\xff" * 8,
    "empty maps": declared(b"\xdd", SIZE) + b"\x80" * SIZE,
    "nested maps": b"\x81\xa1a" * (SIZE // 3) + b"\xc0",
    "one key many times": declared(b"\xdf", SIZE // 3) + b"\xa1a\xc0" * (SIZE // 3),
    "keys that are maps": b"\x81\x80\xc0" * (SIZE // 3),
    "small lists": declared(b"\xdd", SIZE // 2) + b"\x91\xc0" * (SIZE // 2),
    "small chains": declared(b"\xdd", SIZE // 10) + (b"\x91" * 9 + b"\xc0") * (SIZE // 10),
    "extensions": declared(b"\xdd", SIZE // 3) + b"\xd4\x01x" * (SIZE // 3),
    "huge numbers": declared(b"\xdd", SIZE // 9) + b"\xcf" + b"\xff" * (SIZE // 9 * 9 - 1),
    "text that is not UTF-8": declared(b"\xdb", SIZE) + b"\xff" * SIZE,
    "more behind the end": b"\xc0" * SIZE,
}
# The same behind the beginning of something valid.
PREFIXES: dict[str, list[bytes]] = {
    "datagram": [b"", b"\x96\x01\x00"],
    "frame": [b"", b"\x93\x01\x09", b"\x95\x01\x0c\x01"],
    "changeset": [b"", b"\x94\x01\x05\x90", b"\x94\x01\x05\x90\x91\x97\xa1t\xc2\x91\xa1a\x91\xa1a"],
    "snapshot": [
        b"",
        b"\x93\x01\xa4head",
        b"\x93\x01\xa6parked",
        b"\x98\x01\xa4rows\xa1t\xc2\x91\xa1a\x90\x90",
    ],
    "states": [b"", b"\x98\x01\xa4rows\xa1t\xc2\x91\xa1a\x90\x90"],
}


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_costs_a_multiple_of_its_own_size(kind: str, bomb: str) -> None:
    for prefix in PREFIXES[kind]:
        data = prefix + BOMBS[bomb]
        if kind == "datagram":
            data = data[:DATAGRAM_BYTES_MAX]
        gc.collect()
        tracemalloc.start()
        try:
            assert not read(kind, data)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak <= MEMORY_BASE + MEMORY_PER_BYTE * len(data), f"{peak:,} bytes for {len(data):,}"


@pytest.mark.parametrize("kind", ["snapshot", "states"])
def test_the_dearest_rows_cost_a_multiple_of_their_size(kind: str) -> None:
    row = b"\x96\x91\xc0\x92\x01\x00\xc3\xc0\x80\xc0"
    data = (
        b"\x98\x01\xa4rows\xa1t\xc2\x91\xa1a\x90"
        b"\x91\xc4\x10" + SITE + declared(b"\xdd", 10_000) + row * 10_000
    )
    gc.collect()
    tracemalloc.start()
    try:
        assert read(kind, data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= MEMORY_BASE + MEMORY_PER_BYTE * len(data), f"{peak:,} bytes for {len(data):,}"


@pytest.mark.parametrize("kind", READERS)
def test_an_error_does_not_repeat_what_was_sent(kind: str) -> None:
    """What a stranger says must not fill a log."""
    long = "x" * SIZE
    reader, error = READERS[kind]
    for fields in (
        (long, 1),
        (1, long, 2, 3),
        (1, long, [], []),
        (1, 5, [], [(long, False, ("a",), ("b",), ((1,),), None, ())]),
        (1, 5, [], [(long, False, ("a",), ("a", "a"), (), None, ())]),
        (1, "rows", long, False, (long,), (), [], [0]),
    ):
        with pytest.raises(error) as caught:
            reader(msgpack.packb(fields))
        assert len(str(caught.value)) < 500


ROW = ((1,), (5, 0), False, None, {}, (2,))

LOOKALIKES: dict[str, tuple[str, Any]] = {
    "letters for columns": ("changeset", (1, 9, [], [("t", False, "a", "ab", ((1, 2),), None, ())])),
    "a text for no rows": ("changeset", (1, 9, [], [("t", False, ("a",), ("a",), "", None, ())])),
    "a text for no tables": ("changeset", (1, 9, [], "")),
    "a key column twice": ("changeset", (1, 9, [], [("t", False, ("a", "a"), ("a",), (), None, ((1, 2),))])),
    "true for the format": ("changeset", (True, 9, [], [])),
    "a map for a row": ("states", (1, "rows", "t", False, ("a",), ("b",), [SITE], [{"x": 1}])),
    "a number for a table": ("states", (1, "rows", 7, False, ("a",), ("b",), [SITE], [ROW])),
    "bytes for a column of a cell": (
        "states",
        (1, "rows", "t", True, ("a",), ("b",), [SITE], [(*ROW[:4], {b"b": (5, 0)}, ROW[5])]),
    ),
    "a text for a site": ("snapshot", (1, "parked", [("s" * 16, 1, b"")])),
    "a version beyond what the log packs": ("snapshot", (1, "parked", [(SITE, 2**40, b"")])),
    "halves of versions": ("snapshot", (1, "head", [(SITE, [(1.5, 2.5)])], 0)),
    "ranges out of order": ("snapshot", (1, "head", [(SITE, [(5, 6), (1, 2)])], 0)),
}


@pytest.mark.parametrize("name", LOOKALIKES)
def test_what_python_would_take_for_something_else_is_refused(name: str) -> None:
    kind, fields = LOOKALIKES[name]
    assert not read(kind, msgpack.packb(fields))


# --- what is sealed -----------------------------------------------------------------------------------

KEY = b"k" * 32


@given(data=st.binary(max_size=200))
def test_any_first_bytes_of_a_stream(data: bytes) -> None:
    for seal in (make_seal((KEY,), "c"), make_seal((), "c")):
        for handshake in (seal.dial(), seal.accept()):
            with pytest.raises(SealError):
                handshake.finish(data)
            with pytest.raises(SealError):
                handshake.finish(data.ljust(HANDSHAKE_BYTES, b"\0")[:HANDSHAKE_BYTES])


@given(message=st.binary(max_size=100), data=st.data())
def test_a_sealed_message_that_was_touched_is_refused(message: bytes, data: st.DataObject) -> None:
    a, b = KeyRing((KEY,), "c"), KeyRing((KEY,), "c")
    dial, accept = a.dial(), b.accept()
    theirs = accept.finish(dial.first_bytes())
    ours = dial.finish(accept.first_bytes())
    for sealed, reader in ((a.seal_datagram(message), b.open_datagram), (ours.seal(message), theirs.open)):
        at = data.draw(st.integers(0, len(sealed) - 1))
        cut = data.draw(st.integers(0, len(sealed)))
        touched = sealed[:at] + data.draw(st.binary(max_size=20)) + sealed[at + cut :]
        if touched != sealed:
            with pytest.raises(SealError):
                reader(touched)
        assert reader(sealed) == message
        with pytest.raises(SealError):
            reader(sealed)
