import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replication.core.change import Changeset, TableChange
from replication.core.clock import Clock, Hlc, SiteId
from replication.core.codec import CodecError, decode_changeset, encode_bounded, encode_changeset

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


@given(st.lists(st.binary(max_size=300), max_size=40), st.integers(0, 10))
def test_a_changeset_beyond_the_limit_becomes_several_with_the_same_rows(values, deleted):
    rows = tuple((number, value) for number, value in enumerate(values))
    gone = tuple((number,) for number in range(1_000, 1_000 + deleted))
    changes = tuple(
        TableChange(table, False, ("k",), ("k", "v"), rows, (None,) * len(rows), gone) for table in ("t", "u")
    )
    parts = [decode_changeset(payload) for payload in encode_bounded(Changeset(Hlc(2**40), changes), 1_000)]
    sizes = [len(payload) for payload in encode_bounded(Changeset(Hlc(2**40), changes), 1_000)]
    assert max(sizes) <= 1_000
    for table in ("t", "u"):
        of_table = [change for part in parts for change in part.changes if change.table == table]
        assert tuple(row for change in of_table for row in change.rows) == rows
        assert tuple(key for change in of_table for key in change.deleted) == gone
        assert all(len(change.created) == len(change.rows) for change in of_table)
