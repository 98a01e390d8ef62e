import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replication.core.change import Changeset, TableChange
from replication.core.clock import Clock, Hlc, SiteId
from replication.core.codec import CodecError, decode_changeset, encode_changeset

SITE = SiteId(b"s" * 16)
cells = st.none() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text() | st.binary()


@given(st.lists(st.tuples(cells, cells)), st.lists(st.tuples(cells)))
def test_values_survive_the_round_trip_with_their_types(rows, deleted):
    created = tuple(Clock(Hlc(index + 1), SITE) if index % 2 else None for index in range(len(rows)))
    change = TableChange("t", False, ("k",), ("k", "v"), tuple(rows), created, tuple(deleted))
    before = Changeset(Hlc(2**40), (change,))
    after = decode_changeset(encode_changeset(before))
    assert repr(after) == repr(before)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"\x91" * 5000,
        msgpack.packb(7),
        msgpack.packb((2, 1, [], [])),
        msgpack.packb((1, -1, [], [])),
        msgpack.packb((1, 2**63, [], [])),
        msgpack.packb((1, 1, [b"short"], [])),
        msgpack.packb((1, 1, [], [("t", False, ("k",), ("k",), [(2**63,)], None, [])])),
        msgpack.packb((1, 1, [], [("t", False, ("k",), ("k",), [(True,)], None, [])])),
        msgpack.packb((1, 1, [], [("t", False, ("k",), ("k", "v"), [(1,)], None, [])])),
        msgpack.packb((1, 1, [], [("t", False, ("k",), ("v",), [(1,)], None, [])])),
        msgpack.packb((1, 1, [], [("t", False, ("k",), ("k",), [(1,)], [(1, 0)], [])])),
        msgpack.packb((1, 1, [b"s" * 16], [("t", False, ("k",), ("k",), [(1,)], [(2, 0)], [])])),
    ],
)
def test_refuses_what_is_not_a_changeset(payload):
    with pytest.raises(CodecError):
        decode_changeset(payload)


@given(st.binary(max_size=40))
def test_noise_is_refused_and_nothing_else_happens(noise):
    with pytest.raises(CodecError):
        decode_changeset(noise)
