"""Heartbeats: how old a view is, and what everybody has."""

from collections.abc import Sequence
from random import Random

import pytest

from replication.core.clock import NEVER, SiteId, hlc_from_ms
from replication.core.freshness import BeatDue, Freshness, FreshnessSettings, SendFrame
from replication.core.versions import VersionRanges
from replication.core.wire import Heartbeat

WALL = 1_000_000


def site(number: int) -> SiteId:
    return SiteId(bytes([number]) * 16)


US, A, B, C = (site(number) for number in range(4))


def beat(
    of: SiteId, version: int, ago_ms: int, complete_ago_ms: int | None = None, roll: int = 0
) -> Heartbeat:
    complete_ms = WALL - (ago_ms if complete_ago_ms is None else complete_ago_ms)
    return Heartbeat(of, version, hlc_from_ms(WALL - ago_ms), hlc_from_ms(complete_ms), roll)


class Node:
    """A core, with the heads that its store would have."""

    def __init__(self, *roll: SiteId, **settings: int) -> None:
        self.heads: dict[SiteId, int] = {}
        self.core = Freshness(US, FreshnessSettings(**settings), Random(1), seen=self.compute_seen)
        self.core.set_roll(roll)
        self.roll = self.due().roll

    def compute_seen(self) -> dict[SiteId, VersionRanges]:
        return {of: VersionRanges([(1, head)]) for of, head in self.heads.items() if head}

    def due(self, now_ms: float = 5_000) -> BeatDue:
        self.core.start(now_ms - 1_000)
        (due,) = (item for item in self.core.tick(now_ms, ()) if isinstance(item, BeatDue))
        return due

    def take(self, *beats: Heartbeat, peer: SiteId = A) -> list[Heartbeat]:
        """Take beats, and return what the peer is told."""
        return [one for frame in self.core.handle_beats(peer, beats, 5_000, WALL) for one in frame.beats]

    def export(self, now_ms: float) -> list[Heartbeat]:
        return [one for frame in self.core.export(now_ms) for one in frame.beats]

    def see(self, of: SiteId, head: int) -> None:
        self.heads[of] = head
        self.core.handle_seen(of)

    def beats(self) -> None:
        """Make our own beat, of this moment."""
        self.core.handle_own(self.due(), 1, hlc_from_ms(WALL), 5_000)

    def flush(self, *eager: SiteId, untried: Sequence[SiteId] = ()) -> dict[SiteId, list[SiteId]]:
        sent = [item for item in self.core.tick(5_200, eager, untried) if isinstance(item, SendFrame)]
        return {item.peer: [one.site for one in item.message.beats] for item in sent}


def test_a_view_is_as_old_as_the_newest_beat_of_which_it_has_all():
    node = Node(A)
    assert node.core.compute_staleness_ms(A, WALL) is None
    node.see(A, 3)
    node.take(beat(A, 3, ago_ms=900))
    assert node.core.compute_staleness_ms(A, WALL) == 900
    node.take(beat(A, 5, ago_ms=100))
    assert node.core.compute_staleness_ms(A, WALL) == 900
    node.see(A, 4)
    assert node.core.compute_staleness_ms(A, WALL) == 900
    node.see(A, 5)
    assert node.core.compute_staleness_ms(A, WALL) == 100
    assert node.core.compute_staleness_ms(US, WALL) == 0


def test_a_view_that_lags_behind_for_ever_still_ages_by_no_more_than_its_lag():
    node = Node(A)
    for number in range(1, 100):
        node.take(beat(A, number * 10, ago_ms=10_000 - number * 100))
        node.see(A, (number - 2) * 10 if number > 2 else 0)
    assert node.core.compute_staleness_ms(A, WALL) == 300


def test_an_older_beat_changes_nothing_and_is_not_passed_on():
    node = Node(A)
    node.take(beat(A, 0, ago_ms=100))
    node.flush(B)
    node.take(beat(A, 0, ago_ms=200), beat(A, 0, ago_ms=100))
    assert node.flush(B) == {}
    assert node.core.counters["beats_old"] == 2


def test_news_goes_to_eager_peers_but_not_back():
    node = Node(A, B)
    node.take(beat(A, 0, ago_ms=100), peer=A)
    node.take(beat(B, 0, ago_ms=100), peer=A)
    node.beats()
    assert node.flush(A, B, C) == {A: [US], B: [A, US], C: [A, B, US]}
    assert node.flush(A, B, C) == {}


def test_of_links_that_may_not_be_part_of_the_tree_news_goes_along_some_and_not_always_the_same():
    node = Node()
    untried = [site(number) for number in range(10, 20)]
    chosen = set()
    for ago_ms in range(100, 0, -10):
        node.take(beat(A, 0, ago_ms))
        sent = node.flush(B, *untried, untried=untried)
        assert B in sent
        assert len(sent) == 5
        chosen |= sent.keys()
    assert len(chosen) > 8


def test_news_is_batched_in_frames_of_bounded_size():
    node = Node(sites_max=3_000)
    node.take(*(beat(SiteId(number.to_bytes(16)), 0, ago_ms=1) for number in range(1, 3_000)))
    sent = node.core.tick(5_200, (B,))
    assert [len(item.message.beats) for item in sent] == [1_024, 1_024, 951]


def test_a_flush_waits_for_more_news():
    node = Node(A)
    node.take(beat(A, 0, ago_ms=1))
    assert node.core.next_at() == 5_150
    assert node.core.tick(5_149, (B,)) == []


def test_the_rarer_the_beats_the_longer_a_flush_waits():
    node = Node(*(site(number) for number in range(1, 100)), beat_interval_per_member_ms=200)
    node.take(beat(A, 0, ago_ms=1))
    assert node.core.next_at() == 5_000 + 20_000 / 40


def test_who_is_overdue_is_asked_for_and_a_peer_that_heard_of_it_since_answers():
    node = Node(A, B, C)
    node.take(beat(A, 3, ago_ms=2_000), beat(B, 3, ago_ms=2_000))
    node.core.handle_beats(A, [beat(B, 3, ago_ms=1_000)], 6_000, WALL)
    old = node.export(6_500)
    asked = {one.site: one.hlc for one in old}
    assert asked == {US: NEVER, A: hlc_from_ms(WALL - 2_000), C: NEVER}
    peer = Node(US, B, C)
    newer = [beat(A, 9, ago_ms=1_000), beat(C, 1, ago_ms=100)]
    peer.take(*newer)
    assert sorted(peer.take(*old, peer=US)) == sorted(newer)
    assert node.take(*newer) == []


def test_nobody_is_overdue_soon_after_the_start():
    node = Node(A)
    assert [one.site for one in node.export(5_400)] == [US]
    assert {one.site for one in node.export(5_500)} == {US, A}


def test_what_is_asked_for_at_once_is_bounded():
    node = Node(*(SiteId(number.to_bytes(16)) for number in range(1, 1_000)))
    assert len(node.export(1_000_000)) == 129


def test_a_question_is_no_news():
    node = Node(A, B)
    assert node.take(Heartbeat(B, 0, NEVER, NEVER, 0)) == []
    assert node.core.measure()["beats"][0] == 0
    assert node.flush(C) == {}


def test_what_comes_late_along_the_tree_is_not_answered():
    node = Node(A, B)
    node.take(beat(B, 0, ago_ms=100))
    assert node.take(beat(B, 0, ago_ms=100), beat(B, 0, ago_ms=1_099)) == []
    assert node.take(beat(B, 0, ago_ms=1_100)) == [beat(B, 0, ago_ms=100)]


def test_a_node_that_went_back_in_time_is_told_of_its_clock():
    node = Node(A)
    node.take(beat(A, 5, ago_ms=100))
    assert node.take(beat(A, 4, ago_ms=101), peer=A) == [beat(A, 5, ago_ms=100)]


@pytest.mark.parametrize(("members", "interval_ms"), [(2, 1_000), (40, 1_000), (1_000, 20_020)])
def test_the_more_members_the_rarer_each_beats(members, interval_ms):
    node = Node(*(SiteId(number.to_bytes(16)) for number in range(1, members + 1)))
    node.core.tick(node.core.next_at(), ())
    node.due(9_000)
    assert 0.75 * interval_ms <= node.core.next_at() - 9_000 <= 1.25 * interval_ms


def test_a_beat_from_the_future_is_refused():
    node = Node(A)
    node.take(beat(A, 0, ago_ms=-5_001))
    assert node.core.counters["beats_ahead"] == 1
    node.take(beat(A, 0, ago_ms=-4_000))
    assert node.core.compute_staleness_ms(A, WALL) == 0


def test_sites_are_bounded_and_members_stay():
    node = Node(A, B, sites_max=2)
    node.take(beat(A, 0, ago_ms=500), beat(C, 0, ago_ms=100), beat(B, 0, ago_ms=100))
    assert node.core.compute_staleness_ms(A, WALL) == 500
    assert node.core.compute_staleness_ms(B, WALL) == 100
    assert node.core.compute_staleness_ms(C, WALL) is None
    node.take(beat(C, 0, ago_ms=50))
    assert node.core.counters["beats_refused"] == 1
    assert node.core.measure() == {"beats": (2, 2)}


def test_our_own_beats_never_go_back():
    node = Node()
    node.beats()
    node.core.handle_own(node.due(), 2, hlc_from_ms(WALL - 1), 5_000)
    assert node.export(5_000) == [Heartbeat(US, 1, hlc_from_ms(WALL), hlc_from_ms(WALL), node.roll)]
    assert node.core.counters["own_clock_back"] == 1


def test_what_others_remember_of_our_clock_is_told():
    node = Node(A)
    node.take(beat(US, 9, ago_ms=70), beat(US, 8, ago_ms=90))
    assert node.core.own_hlc_floor == hlc_from_ms(WALL - 70)


def test_a_beat_says_up_to_when_we_have_everything_of_the_others():
    node = Node(A, B)
    assert node.due().complete_hlc == NEVER
    node.take(beat(A, 3, ago_ms=100), beat(B, 0, ago_ms=300))
    assert node.due().complete_hlc == NEVER
    node.see(A, 3)
    assert node.due().complete_hlc == hlc_from_ms(WALL - 300)


def test_a_node_alone_is_stable_up_to_its_last_beat():
    node = Node()
    assert node.core.compute_stable_hlc() == NEVER
    node.beats()
    assert node.core.compute_stable_hlc() == hlc_from_ms(WALL)


def test_stable_is_what_the_last_member_has():
    node = Node(A, B)
    node.beats()
    node.take(beat(A, 0, ago_ms=100, complete_ago_ms=400, roll=node.roll))
    assert node.core.compute_stable_hlc() == NEVER
    node.take(beat(B, 0, ago_ms=200, complete_ago_ms=300, roll=node.roll))
    assert node.core.compute_stable_hlc() == hlc_from_ms(WALL - 400)


def test_a_members_word_counts_once_we_have_what_it_wrote_before():
    node = Node(A)
    node.beats()
    node.take(beat(A, 0, ago_ms=900, complete_ago_ms=950, roll=node.roll))
    node.take(beat(A, 1, ago_ms=100, complete_ago_ms=200, roll=node.roll))
    assert node.core.compute_stable_hlc() == hlc_from_ms(WALL - 950)
    node.see(A, 1)
    assert node.core.compute_stable_hlc() == hlc_from_ms(WALL - 200)


def test_a_member_that_counts_other_members_proves_nothing():
    node = Node(A)
    node.beats()
    node.take(beat(A, 0, ago_ms=100, roll=node.roll))
    assert node.core.compute_stable_hlc() > NEVER
    node.core.set_roll([A, B])
    assert node.core.compute_stable_hlc() == NEVER
    node.take(beat(B, 0, ago_ms=100, roll=node.due().roll))
    assert node.core.compute_stable_hlc() == NEVER


def test_nothing_is_stable_while_members_have_seen_different_things_of_a_site_that_is_gone():
    node = Node(A)
    gone = SiteId(b"g" * 16)
    alike = node.roll
    node.see(gone, 3)
    node.beats()
    node.take(beat(A, 0, 0, roll=alike))
    assert node.core.compute_stable_hlc() == NEVER
    node.take(beat(A, 0, -1, 0, roll=node.due().roll))
    assert node.core.compute_stable_hlc() == hlc_from_ms(WALL)


def test_how_far_a_clock_is_ahead_is_known_whether_or_not_its_beat_is_taken() -> None:
    node = Node(A, B)
    assert node.core.compute_ahead_ms(A) is None
    node.take(beat(A, 1, ago_ms=-2_000))
    assert node.core.compute_ahead_ms(A) == 2_000
    node.take(beat(A, 2, ago_ms=-60_000), beat(B, 1, ago_ms=40))
    assert (node.core.compute_ahead_ms(A), node.core.compute_ahead_ms(B)) == (60_000, -40)
    assert node.core.counters["beats_ahead"] == 1


def test_what_strangers_say_of_the_time_takes_no_memory() -> None:
    node = Node(A, sites_max=2)
    node.take(*(beat(site(number), 1, ago_ms=-60_000) for number in range(10, 40)))
    node.take(*(beat(site(number), 1, ago_ms=-10) for number in range(10, 40)))
    known = [number for number in range(10, 40) if node.core.compute_ahead_ms(site(number)) is not None]
    assert len(known) <= 2
    node.take(beat(A, 1, ago_ms=-60_000))
    assert node.core.compute_ahead_ms(A) == 60_000
    node.core.set_roll([])
    assert node.core.compute_ahead_ms(A) is None
