from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replication.core.versions import VersionRanges

pairs = st.tuples(st.integers(1, 40), st.integers(0, 8)).map(lambda pair: (pair[0], sum(pair)))


@given(st.lists(pairs))
def test_is_the_set_of_what_was_added(added):
    ranges = VersionRanges(added)
    model = {version for first, last in added for version in range(first, last + 1)}
    assert {version for first, last in ranges for version in range(first, last + 1)} == model
    assert all(ranges.contains(version) == (version in model) for version in range(60))
    encoded = ranges.encode()
    assert all(last + 1 < first for (_, last), (first, _) in pairwise(encoded))
    missing = {version for first, last in ranges.missing(50) for version in range(first, last + 1)}
    assert missing == set(range(1, 51)) - model
    assert ranges.last == max(model, default=0)
    assert VersionRanges.decode(encoded) == ranges == ranges.copy()


def test_head_stops_at_the_first_gap():
    assert VersionRanges([(1, 4), (6, 9)]).head == 4
    assert VersionRanges([(2, 4)]).head == 0


def test_refuses_what_is_no_range():
    with pytest.raises(ValueError, match="not a range"):
        VersionRanges([(0, 3)])
