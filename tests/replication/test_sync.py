"""What to ask for, when, and of whom; and which links to keep."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replication.core.clock import SiteId
from replication.core.needs import compute_missing, encode_seen, is_ahead, plan_needs, subtract
from replication.core.neighbours import compute_degree, plan_neighbours
from replication.core.sync import SyncSchedule, SyncSettings
from replication.core.timers import Timers
from replication.core.versions import VersionRanges
from replication.core.wire import RANGES_MAX

SITES = [SiteId(bytes([number]) * 16) for number in range(1, 40)]
ME, S, T = SITES[:3]

versions = st.sets(st.integers(1, 40))


def ranges_of(numbers: set[int]) -> VersionRanges:
    return VersionRanges((number, number) for number in numbers)


@given(versions, versions)
def test_subtraction_leaves_what_is_wanted_and_not_held(wanted, held):
    missing = subtract(ranges_of(wanted), ranges_of(held))
    assert {n for first, last in missing for n in range(first, last + 1)} == wanted - held
    assert missing == sorted(missing)


@given(
    st.dictionaries(st.sampled_from(SITES[:4]), versions),
    st.dictionaries(st.sampled_from(SITES[:4]), versions),
)
def test_who_asks_for_all_that_is_missing_has_all_that_the_other_has(ours, theirs):
    seen = {site: ranges_of(numbers) for site, numbers in ours.items()}
    peer = {site: ranges_of(numbers) for site, numbers in theirs.items()}
    plan = plan_needs(seen, encode_seen(peer), {}, needs_max=1_000)
    for site, first, last in plan.needs:
        seen.setdefault(site, VersionRanges()).add(first, last)
    assert not plan.snapshot
    assert not is_ahead(seen, encode_seen(peer))
    assert is_ahead({}, encode_seen(peer)) is any(theirs.values())


def test_what_is_below_the_floor_of_the_log_takes_a_snapshot():
    theirs = {S: ((1, 100),)}
    assert plan_needs({S: VersionRanges([(1, 89)])}, theirs, {S: 90}, needs_max=9).needs == ((S, 90, 100),)
    assert plan_needs({S: VersionRanges([(1, 88)])}, theirs, {S: 90}, needs_max=9).snapshot
    assert plan_needs({}, theirs, {S: 90}, needs_max=9).snapshot


def test_needs_are_bounded_and_begin_with_the_oldest():
    theirs = {S: tuple((n, n) for n in range(1, 100, 2)), T: ((1, 1),)}
    plan = plan_needs({}, theirs, {}, needs_max=5)
    assert plan.needs == tuple((S, n, n) for n in (1, 3, 5, 7, 9))


def test_a_view_with_very_many_gaps_is_cut_to_what_may_travel():
    seen = {S: VersionRanges((n, n) for n in range(1, 3 * RANGES_MAX, 2)), T: VersionRanges()}
    encoded = encode_seen(seen)
    assert len(encoded[S]) == RANGES_MAX
    assert T not in encoded
    assert compute_missing(seen, encoded) == {}


def schedule() -> SyncSchedule:
    return SyncSchedule(SyncSettings(), Random(1))


def test_a_peer_that_is_wanted_is_next_and_soon():
    plan = schedule()
    plan.choose([S], 0)
    assert plan.next_at() > 3_000
    plan.want(T, 0)
    assert plan.next_at() < 100
    assert plan.choose([S, T], 100) == T


def test_the_pace_follows_what_the_last_session_brought():
    pace = {}
    for received, ok in ((5, True), (0, True), (0, False)):
        plan = schedule()
        plan.handle_result(S, 0, ok=ok, received=received)
        pace[received, ok] = plan.next_at()
    assert pace[5, True] < 1_000
    assert pace[0, False] < 1_000
    assert pace[0, True] > 3_000


def test_another_wanted_peer_follows_at_once():
    plan = schedule()
    plan.want(S, 0)
    plan.want(T, 0)
    assert plan.choose([S, T], 0) == S
    plan.handle_result(S, 0, ok=True, received=0)
    assert plan.next_at() < 100


def test_a_wanted_peer_that_is_gone_is_not_waited_for():
    plan = schedule()
    plan.want(S, 0)
    assert plan.choose([T], 0) == T
    plan.handle_result(T, 0, ok=True, received=0)
    assert plan.next_at() > 3_000


def test_every_peer_has_its_turn():
    plan = schedule()
    peers = SITES[:20]
    chosen = [plan.choose(peers, number * 1_000) for number in range(60)]
    assert set(chosen) == set(peers)


def test_a_peer_that_failed_waits_unless_it_is_wanted():
    plan = schedule()
    plan.handle_result(S, 0, ok=False, received=0)
    assert plan.choose([S], 1_000) is None
    assert plan.choose([S], 4_000) == S
    plan.handle_result(S, 4_000, ok=False, received=0)
    plan.want(S, 4_100)
    assert plan.choose([S], 4_200) == S


def test_a_forgotten_peer_leaves_nothing_behind():
    plan = schedule()
    plan.want(S, 0)
    plan.handle_result(S, 0, ok=False, received=0)
    plan.forget(S)
    assert plan.choose([], 0) is None
    assert not plan._tried_ms
    assert not plan._failed_ms


@pytest.mark.parametrize("count", [0, 1, 8])
def test_with_few_members_everybody_is_linked(count):
    reachable = dict.fromkeys(SITES[:count])
    assert plan_neighbours([], reachable, Random(1)) == SITES[:count]


def test_with_many_members_some_near_and_some_random_ones_are_linked():
    reachable = {site: float(number) for number, site in enumerate(SITES[:30])}
    chosen = plan_neighbours([], reachable, Random(1))
    assert len(chosen) == len(set(chosen)) == compute_degree(30) == 7
    assert chosen[:3] == SITES[:3]


def test_links_stay_while_their_peers_do():
    reachable = dict.fromkeys(SITES[:30])
    before = plan_neighbours([], reachable, Random(1))
    assert plan_neighbours(before, reachable, Random(2)) == before
    del reachable[before[0]]
    after = plan_neighbours(before, reachable, Random(2))
    assert set(before[1:]) < set(after)
    assert len(after) == len(before)


def test_timers_come_up_in_order_and_ties_as_they_were_set():
    timers: Timers[str] = Timers()
    for at, token in ((5, "c"), (1, "a"), (5, "d"), (3, "b")):
        timers.set(at, token)
    assert timers.next_at() == 1
    assert timers.pop_due(0.5) is None
    assert [timers.pop_due(5) for _ in range(5)] == ["a", "b", "c", "d", None]
    assert timers.next_at() is None
