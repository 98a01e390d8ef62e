from hypothesis import given
from hypothesis import strategies as st

from replication.core.clock import Clock, Hlc, SiteId
from replication.core.merge import Record, is_theirs, join, normalise

clocks = st.builds(Clock, st.integers(1, 6).map(Hlc), st.sampled_from([SiteId(b"a" * 16), SiteId(b"b" * 16)]))
# A clock stands for one event: even times delete, odd ones create.
records = st.builds(
    lambda life, base, cells: normalise(Record(life, life.hlc % 2 == 0, base, cells)),
    clocks,
    st.none() | clocks,
    st.dictionaries(st.sampled_from("xy"), clocks),
)


@given(records, records)
def test_join_does_not_depend_on_who_asks(a, b):
    assert join(a, b) == join(b, a)


@given(records)
def test_joining_what_is_known_changes_nothing(a):
    assert join(a, a) == a


def at(hlc: int) -> Clock:
    return Clock(Hlc(hlc), SiteId(b"a" * 16))


def test_delete_beats_a_later_update_of_what_it_deleted():
    updated = Record(at(1), False, at(9))
    assert join(updated, Record(at(5), True, None)).dead


def test_insert_after_a_delete_revives_and_the_latest_values_show():
    limbo = join(Record(at(1), False, at(9)), Record(at(5), True, None))
    assert join(limbo, Record(at(7), False, at(7))) == Record(at(7), False, at(9))


def test_values_not_after_the_deletion_are_forgotten():
    assert join(Record(at(1), False, at(4)), Record(at(5), True, None)) == Record(at(5), True, None)


def test_columns_not_after_the_deletion_are_forgotten():
    mine = Record(at(1), False, at(1), {"x": at(4), "y": at(6)})
    assert join(mine, Record(at(5), True, None)) == Record(at(5), True, None, {"y": at(6)})


def test_each_column_is_taken_from_who_wrote_it_last():
    mine = Record(at(1), False, at(1), {"x": at(5)})
    theirs = Record(at(1), False, at(1), {"x": at(4), "y": at(4)})
    assert not is_theirs(mine, theirs, "x")
    assert is_theirs(mine, theirs, "y")
    assert join(mine, theirs).cells == {"x": at(5), "y": at(4)}
