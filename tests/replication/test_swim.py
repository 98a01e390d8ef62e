"""One node's membership: messages and time in, outputs out."""

import itertools
from random import Random

import pytest

from replication.core.clock import SiteId
from replication.core.member import INCARNATION_JUMP_MAX, INCARNATION_MAX, MemberInfo, MemberState, Update
from replication.core.probe import LocalHealth, ProbeOrder, jitter, pick
from replication.core.rumors import Rumors as RumorQueue
from replication.core.suspicion import Suspicion, compute_confirmations_wanted, compute_suspicion_bounds_ms
from replication.core.swim import MemberChanged, ProbeStream, SendDatagram, SiteConflict, Swim, SwimSettings
from replication.core.vivaldi import ORIGIN, Coordinate
from replication.core.wire import Ack, Join, Members, Nack, Ping, PingRequest, Rumors, Whereabouts

ALIVE, SUSPECT, DEAD, LEFT = MemberState


def info(number: int, incarnation: int = 1, *, host: int | None = None) -> MemberInfo:
    site = SiteId(bytes([number]) * 16)
    return MemberInfo(site, f"n{number}", f"10.0.0.{host or number}", 7946, incarnation)


class Node:
    """A core with what it sent, sorted by kind."""

    def __init__(self, *others: MemberInfo, **settings: float) -> None:
        self.swim = Swim(info(1), SwimSettings(**settings), Random(1))
        self.now = 0.0
        self.out = self.swim.start(self.now)
        for other in others:
            self.take(Rumors(other))
        self.out.clear()

    def take(self, message: object) -> None:
        self.out += self.swim.handle_message(message, self.now)

    def run(self, duration_ms: float) -> None:
        end = self.now + duration_ms
        while (at := self.swim.next_at()) is not None and at <= end:
            self.now = max(self.now, at)
            self.out += self.swim.tick(self.now)
        self.now = end

    def sent(self, kind: type, to: MemberInfo | None = None) -> list:
        return [
            output.message
            for output in self.out
            if isinstance(output, SendDatagram)
            and isinstance(output.message, kind)
            and (to is None or output.address == to.address)
        ]

    def told(self) -> set[Update]:
        """Run a gossip round and return what was told."""
        self.out.clear()
        self.run(300)
        return {update for message in self.sent(Rumors) for update in message.updates}

    def conflicts(self) -> list[MemberInfo]:
        return [output.twin for output in self.out if isinstance(output, SiteConflict)]

    def state(self, other: MemberInfo) -> MemberState | None:
        member = self.swim.members.get(other.site)
        return member.state if member is not None else None

    def until_ping(self, other: MemberInfo) -> Ping:
        """Answer all probes until the other is probed; return that one, unanswered."""
        for _ in range(100):
            self.out.clear()
            self.run(100)
            for ping in self.sent(Ping):
                if ping.target == other.site:
                    return ping
                self.take(Ack(ping.number, self.swim.members[ping.target].info))
        raise AssertionError("never probed")


def test_members_known_from_before_are_probed_at_once_and_not_told_as_news():
    swim = Swim(info(1), SwimSettings(), Random(1))
    swim.remember([info(1), info(2), info(3)], 0)
    assert set(swim.members) == set(swim.reachable) == {info(2).site, info(3).site}
    out = swim.start(0) + swim.tick(2_000)
    pings = [output.message for output in out if isinstance(output, SendDatagram)]
    assert any(isinstance(message, Ping) for message in pings)
    assert not any(isinstance(output, MemberChanged) for output in out)
    assert not any(message.updates for message in pings)


def test_the_dead_are_not_reachable_until_they_are_back():
    node = Node(info(2), info(3))
    node.take(Rumors(info(3), (Update(info(2), DEAD),)))
    assert set(node.swim.reachable) == {info(3).site}
    node.take(Rumors(info(2, incarnation=2)))
    assert set(node.swim.reachable) == {info(2).site, info(3).site}


def test_answers_a_ping_with_an_ack_of_its_number():
    node = Node()
    node.take(Ping(77, info(1).site, info(2)))
    (ack,) = node.sent(Ack, info(2))
    assert ack.number == 77


def test_is_silent_to_a_ping_meant_for_another_site():
    node = Node()
    node.take(Ping(77, info(9).site, info(2)))
    assert not node.sent(Ack)


def test_whoever_sends_something_becomes_a_member_and_is_told_of():
    node = Node(info(3))
    node.take(Ping(1, info(1).site, info(2)))
    assert MemberChanged(info(2), ALIVE, None) in node.out
    assert Update(info(2), ALIVE) in node.told()


@pytest.mark.parametrize("state", [SUSPECT, DEAD, LEFT])
def test_only_the_living_are_introduced(state):
    node = Node(info(2))
    node.take(Rumors(info(2), (Update(info(3), state),)))
    assert node.state(info(3)) is None


@pytest.mark.parametrize("state", [SUSPECT, DEAD, LEFT])
def test_refutes_what_is_said_of_it_with_a_higher_incarnation(state):
    node = Node(info(2))
    node.take(Rumors(info(2), (Update(info(1, 5), state),)))
    assert node.swim.me.incarnation == 6
    assert Update(info(1, 6), ALIVE) in node.told()


def test_an_old_claim_about_it_needs_no_refutation():
    node = Node(info(2))
    node.take(Rumors(info(2), (Update(info(1, 0), DEAD),)))
    assert node.swim.me.incarnation == 1


def test_another_node_with_our_site_is_counted_as_a_conflict():
    node = Node(info(2))
    node.take(Rumors(info(2), (Update(info(1, 4, host=99), ALIVE),)))
    assert node.swim.counters["identity_conflicts"] == 1
    assert node.swim.me.incarnation == 5


@pytest.mark.parametrize("incarnation", [INCARNATION_MAX - 1, INCARNATION_JUMP_MAX + 2])
def test_a_wild_jump_of_an_incarnation_is_not_believed(incarnation):
    node = Node(info(2), info(3))
    node.take(Rumors(info(2), (Update(info(3, incarnation), DEAD), Update(info(1, incarnation), DEAD))))
    assert node.state(info(3)) is ALIVE
    assert node.swim.me.incarnation == 1
    assert node.swim.counters["claims_refused"] == 2


def test_a_fallen_member_is_not_raised_by_hearsay_of_the_same_incarnation():
    node = Node(info(2), info(3))
    node.take(Rumors(info(2), (Update(info(3), DEAD),)))
    node.take(Rumors(info(2), (Update(info(3), ALIVE),)))
    assert node.state(info(3)) is DEAD


def test_a_fallen_member_of_whom_somebody_hears_is_told_what_is_held_against_it():
    node = Node(info(2), info(3))
    node.take(Rumors(info(2), (Update(info(3), DEAD),)))
    node.out.clear()
    node.take(Rumors(info(2), (Update(info(3), ALIVE),)))
    (join,) = node.sent(Join, info(3))
    assert join.updates == (Update(info(3), DEAD),)
    node.out.clear()
    node.take(Rumors(info(2), (Update(info(3), ALIVE),)))
    assert not node.sent(Join), "it was told a moment ago"


def test_a_member_that_refutes_is_alive_again():
    node = Node(info(2), info(3))
    node.take(Rumors(info(2), (Update(info(3), DEAD),)))
    node.take(Rumors(info(3, 2)))
    assert node.state(info(3)) is ALIVE
    assert MemberChanged(info(3, 2), ALIVE, DEAD) in node.out


def test_an_unanswered_probe_goes_by_others_and_by_stream_then_becomes_suspicion():
    node = Node(info(2), info(3))
    ping = node.until_ping(info(2))
    node.run(450)
    (request,) = node.sent(PingRequest, info(3))
    assert request.target == info(2)
    assert request.number == ping.number
    assert ProbeStream(info(2).site, ping.number) in node.out
    node.run(700)
    assert node.state(info(2)) is SUSPECT


@pytest.mark.parametrize("answer", ["direct", "relayed", "stream"])
def test_any_answer_within_the_interval_saves_the_target(answer):
    node = Node(info(2), info(3))
    ping = node.until_ping(info(2))
    node.run(450)
    if answer == "direct":
        node.take(Ack(ping.number, info(2)))
    elif answer == "relayed":
        node.take(Ack(ping.number, info(3)))
    else:
        node.out += node.swim.handle_stream_ack(info(2).site, ping.number, node.now)
    node.run(600)
    assert node.state(info(2)) is ALIVE


def test_an_answer_by_somebody_who_was_not_asked_saves_nobody():
    node = Node(info(2))
    ping = node.until_ping(info(2))
    node.take(Ack(ping.number, info(3)))
    node.run(1_100)
    assert node.swim.counters["acks_unexpected"] == 1
    assert node.state(info(2)) is SUSPECT


def test_notes_the_round_trip_of_a_direct_answer():
    node = Node(info(2))
    ping = node.until_ping(info(2))
    sent_at = next(iter(node.swim._probes.values())).sent_ms
    node.now = sent_at + 30
    node.take(Ack(ping.number, info(2)))
    assert node.swim.members[info(2).site].rtt_ms == 30


def test_relays_a_probe_and_its_answer():
    node = Node(info(2), info(3))
    node.take(PingRequest(5, info(3), info(2)))
    (ping,) = node.sent(Ping, info(3))
    node.take(Ack(ping.number, info(3)))
    (ack,) = node.sent(Ack, info(2))
    assert ack.number == 5
    node.run(1_000)
    assert not node.sent(Nack)


def test_says_that_it_tried_when_the_target_does_not_answer_and_still_passes_on_a_late_answer():
    node = Node(info(2), info(3))
    node.take(PingRequest(5, info(3), info(2)))
    (ping,) = node.sent(Ping, info(3))
    node.run(250)
    (nack,) = node.sent(Nack, info(2))
    assert nack.number == 5
    node.take(Ack(ping.number, info(3)))
    assert [ack.number for ack in node.sent(Ack, info(2))] == [5]


def test_says_once_that_a_target_does_not_answer_and_then_forgets_it():
    node = Node(info(2), info(3))
    node.take(PingRequest(5, info(3), info(2)))
    node.run(2_000)
    assert len(node.sent(Nack, info(2))) == 1
    assert not node.swim._relays


def test_a_suspect_hears_of_it_first_of_all():
    node = Node(info(2), info(3), info(4))
    node.take(Rumors(info(3), (Update(info(2), SUSPECT),)))
    ping = node.until_ping(info(2))
    assert ping.updates[0] == Update(info(2), SUSPECT)


def test_a_suspect_that_stays_silent_is_dead():
    node = Node(info(2), info(3))
    node.take(Rumors(info(3), (Update(info(2), SUSPECT),)))
    node.run(2_900)
    assert node.state(info(2)) is SUSPECT
    node.run(200)
    assert node.state(info(2)) is DEAD
    assert MemberChanged(info(2), DEAD, SUSPECT) in node.out


def test_confirmations_by_others_shorten_the_suspicion():
    others = [info(number) for number in range(2, 8)]
    alone, agreed = Node(*others), Node(*others)
    for node in (alone, agreed):
        node.take(Rumors(info(3), (Update(info(2), SUSPECT),)))
    for accuser in (info(4), info(5), info(6)):
        agreed.take(Rumors(accuser, (Update(info(2), SUSPECT),)))
    for node in (alone, agreed):
        node.run(3_100)
    assert agreed.state(info(2)) is DEAD
    assert alone.state(info(2)) is SUSPECT


def test_one_accuser_cannot_confirm_itself():
    node = Node(*(info(number) for number in range(2, 8)))
    for _ in range(10):
        node.take(Rumors(info(3), (Update(info(2), SUSPECT),)))
    node.run(3_100)
    assert node.state(info(2)) is SUSPECT


def test_the_dead_are_approached_now_and_then():
    node = Node(info(2), info(3))
    node.take(Rumors(info(3), (Update(info(2), DEAD),)))
    node.out.clear()
    node.run(10_000)
    joins = node.sent(Join, info(2))
    assert 4 <= len(joins) <= 14
    assert joins[0].updates == (Update(info(2), DEAD),)


def test_the_dead_are_not_probed():
    node = Node(info(2), info(3))
    node.take(Rumors(info(3), (Update(info(2), DEAD),)))
    node.out.clear()
    node.run(10_000)
    assert not node.sent(Ping, info(2))


def test_joins_that_nobody_answers_are_repeated_with_growing_pauses():
    node = Node()
    node.swim.set_join_addresses([("10.9.9.9", 1)])
    times = []
    for _ in range(600):
        node.out.clear()
        node.run(100)
        times += [node.now] * len(node.sent(Join))
    pauses = [after - before for before, after in itertools.pairwise(times)]
    assert len(times) >= 12
    assert max(pauses) <= 6_500
    assert sum(pauses[:2]) < sum(pauses[-2:])


def test_a_newcomer_is_given_the_members_in_a_few_datagrams():
    others = [info(number) for number in range(2, 60)]
    node = Node(*others)
    node.take(Join(info(99)))
    feeds = node.sent(Rumors, info(99))
    assert 2 <= len(feeds) <= 4
    told = [update.info for feed in feeds for update in feed.updates]
    assert len(told) == len(set(told)) >= 20


def test_a_leaver_says_so_and_does_not_refute_it():
    node = Node(info(2), info(3))
    node.out += node.swim.leave()
    assert {update for message in node.sent(Rumors) for update in message.updates} == {Update(info(1), LEFT)}
    node.take(Rumors(info(2), (Update(info(1), LEFT),)))
    assert node.swim.me.incarnation == 1


def test_a_fallen_member_whose_address_was_taken_is_forgotten():
    node = Node(info(2), info(3))
    node.take(Rumors(info(3), (Update(info(2), DEAD),)))
    node.take(Rumors(info(4, host=2)))
    assert node.state(info(2)) is None


def test_a_member_that_falls_after_its_address_was_taken_is_forgotten_and_told_of():
    node = Node(info(2), info(3))
    node.take(Rumors(info(4, 5, host=2)))
    node.take(Rumors(info(3), (Update(info(2), DEAD),)))
    assert node.state(info(2)) is None
    assert node.state(info(4)) is ALIVE
    node.run(1_000)
    assert Update(info(2), DEAD) in {u for message in node.sent(Rumors) for u in message.updates}


def test_a_member_that_falls_is_kept_when_who_was_there_before_still_counts_as_alive():
    node = Node(info(3), info(4, 5, host=2))
    node.take(Rumors(info(2)))
    node.take(Rumors(info(3), (Update(info(4, 5, host=2), DEAD),)))
    assert node.state(info(4)) is DEAD


def test_members_are_bounded_and_the_longest_fallen_make_room():
    node = Node(*(info(number) for number in range(2, 12)), members_max=10)
    node.take(Rumors(info(50)))
    assert node.swim.counters["members_refused"] == 1
    node.take(Rumors(info(3), (Update(info(2), DEAD),)))
    node.take(Rumors(info(50)))
    assert node.state(info(50)) is ALIVE
    assert node.state(info(2)) is None


def test_the_fallen_are_forgotten_after_a_day():
    node = Node(info(2), info(3), forget_ms=5_000)
    node.take(Rumors(info(3), (Update(info(2), LEFT),)))
    node.run(7_000)
    assert node.state(info(2)) is None


def test_its_own_messages_coming_back_change_nothing():
    node = Node()
    node.run(60_000)
    node.take(Rumors(info(1)))
    node.out += node.swim.handle_self_hello(info(1), node.now)
    assert not node.swim.members
    assert node.swim.me.incarnation == 1
    assert not node.conflicts()


def test_a_former_life_whose_clock_was_ahead_is_no_twin():
    node = Node(info(2))
    for incarnation in (500, 501):
        node.take(Rumors(info(2), (Update(info(1, incarnation, host=99), ALIVE),)))
    node.take(Rumors(info(1, 501, host=99)))
    assert node.swim.me.incarnation == 502
    assert not node.conflicts()


def test_what_refutes_our_refutations_is_a_twin():
    node = Node(info(2))
    for _ in range(3):
        node.run(2_000)
        twin = info(1, node.swim.me.incarnation + 1, host=99)
        node.take(Rumors(info(2), (Update(twin, ALIVE),)))
    assert node.conflicts() == [twin]
    assert node.swim.get_twin(node.now) == twin


def test_rare_surprises_are_no_twin():
    node = Node(info(2))
    for _ in range(6):
        node.run(40_000)
        node.take(Rumors(info(2), (Update(info(1, node.swim.me.incarnation + 1, host=99), ALIVE),)))
    assert not node.conflicts()


@pytest.mark.parametrize(
    "twin", [info(1, 1, host=99), info(1, 7), MemberInfo(info(1).site, "other", "10.0.0.1", 7946, 1)]
)
def test_a_message_with_our_site_that_we_never_sent_is_from_a_twin(twin):
    node = Node()
    node.run(9_000)
    node.take(Rumors(twin))
    assert not node.conflicts(), "it may be from the life before this one"
    node.run(2_000)
    node.take(Rumors(twin))
    assert node.conflicts() == [twin]
    assert node.swim.me.incarnation == 1
    assert not node.swim.members


def test_a_stream_from_our_site_is_from_a_twin_at_once():
    node = Node()
    node.out += node.swim.handle_self_hello(info(1), node.now)
    assert not node.conflicts(), "a node may dial itself"
    node.out += node.swim.handle_self_hello(info(1, host=99), node.now)
    assert node.conflicts() == [info(1, host=99)]


def test_a_stream_to_ourselves_from_before_a_refutation_is_no_twin():
    node = Node(info(2))
    node.take(Rumors(info(2), (Update(info(1), SUSPECT),)))
    assert node.swim.me.incarnation == 2
    node.out += node.swim.handle_self_hello(info(1), node.now)
    assert not node.conflicts()


def test_a_twin_is_told_once_a_minute_and_forgotten_when_it_is_gone():
    node = Node()
    for _ in range(130):
        node.run(1_000)
        node.out += node.swim.handle_self_hello(info(1, host=99), node.now)
    assert len(node.conflicts()) == 3
    node.run(290_000)
    assert node.swim.get_twin(node.now) == info(1, host=99)
    node.run(20_000)
    assert node.swim.get_twin(node.now) is None


def test_a_known_twin_is_refuted_once_a_second():
    node = Node(info(2))
    for _ in range(100):
        node.run(100)
        node.take(Rumors(info(2), (Update(info(1, node.swim.me.incarnation + 1, host=99), ALIVE),)))
    assert 10 <= node.swim.counters["refutations"] <= 14


PLACE = Coordinate((3.0, 4.0, 0.0, 0.0), 1.0, 0.2)


def placed(node: Node) -> Node:
    """Let the node learn its own place from many answers of one member."""
    for _ in range(20):
        ping = node.until_ping(info(2))
        node.now = node.swim._probes[ping.number].sent_ms + 20
        node.take(Ack(ping.number, info(2), (), PLACE))
    return node


def test_coordinates_ride_on_probes_and_answers():
    node = Node(info(2))
    ping = node.until_ping(info(2))
    assert ping.coordinate == ORIGIN
    node.take(Ping(7, info(1).site, info(2), (), PLACE))
    (ack,) = node.sent(Ack)
    assert ack.coordinate == ORIGIN
    node = placed(Node(info(2)))
    assert node.until_ping(info(2)).coordinate == node.swim.atlas.place != ORIGIN


def test_the_round_trip_to_a_member_that_was_never_probed_is_estimated():
    node = placed(Node(info(2), info(3)))
    node.swim.members[info(3).site].rtt_ms = None
    assert node.swim.estimate_rtt_ms(info(3).site) is None
    whereabouts = (Whereabouts(info(3).site, PLACE, 5),)
    node.out += node.swim.handle_members(Members((), whereabouts), info(2).site, node.now)
    assert 15 <= node.swim.estimate_rtt_ms(info(3).site) <= 25
    assert node.swim.atlas.estimate_rtt_ms(info(2).site, info(3).site) == 2
    node.swim.members[info(3).site].rtt_ms = 99
    assert node.swim.estimate_rtt_ms(info(3).site) == 99


def test_nobody_is_placed_by_a_node_that_does_not_know_where_it_is():
    node = Node(info(2))
    node.take(Ping(7, info(1).site, info(2), (), PLACE))
    assert node.swim.estimate_rtt_ms(info(2).site) is None


def test_the_newest_word_on_a_place_is_kept():
    node = Node(info(2), info(3))
    node.now = 100_000
    for age_s, east in ((50, 1.0), (90, 2.0), (20, 3.0), (60, 4.0)):
        place = PLACE._replace(vector=(east, 0.0, 0.0, 0.0))
        message = Members((), (Whereabouts(info(3).site, place, age_s),))
        node.out += node.swim.handle_members(message, info(2).site, node.now)
    found = {item.site: item for item in node.swim.export(9, node.now + 500).whereabouts}
    assert found[info(3).site].coordinate.vector[0] == 3.0
    assert found[info(3).site].age_s == 21, "rounded up, or it would get younger as it is passed on"
    assert found[info(1).site].age_s == 0
    assert info(2).site not in found


def test_places_out_of_this_world_and_of_strangers_are_not_kept():
    node = Node(info(2))
    insane = PLACE._replace(vector=(2_000.0, 2_000.0, 0.0, 0.0))
    node.take(Ping(7, info(1).site, info(2), (), insane))
    stranger = (Whereabouts(info(9).site, PLACE, 5),)
    node.out += node.swim.handle_members(Members((), stranger), info(2).site, node.now)
    assert node.swim.counters["coordinates_refused"] == 1
    assert [item.site for item in node.swim.export(9, node.now).whereabouts] == [info(1).site]


def test_the_place_of_a_forgotten_member_is_forgotten():
    node = Node(info(2), info(3), forget_ms=5_000)
    node.take(Ping(7, info(1).site, info(2), (), PLACE))
    node.take(Rumors(info(3), (Update(info(2), LEFT),)))
    node.run(7_000)
    assert info(2).site not in {item.site for item in node.swim.atlas.export([info(2).site], node.now)}


def test_those_who_left_are_soon_off_the_roll_and_the_dead_are_not():
    node = Node(info(2), info(3), info(4))
    node.take(Rumors(info(4), (Update(info(2), LEFT), Update(info(3), DEAD))))
    assert node.swim.compute_roll(node.now) == [info(number).site for number in (2, 3, 4)]
    assert node.swim.compute_roll(node.now + 601_000) == [info(3).site, info(4).site]


def test_a_lost_link_makes_a_member_the_next_to_be_probed():
    node = Node(*(info(number) for number in range(2, 30)))
    node.swim.handle_link_lost(info(17).site)
    node.out.clear()
    node.run(1_300)
    assert node.sent(Ping)[0].target == info(17).site


def test_every_member_is_probed_once_before_any_is_probed_twice():
    order, rng = ProbeOrder(), Random(2)
    sites = [info(number).site for number in range(2, 12)]
    rounds = [order.next(rng, sites, lambda site: True) for _ in range(20)]
    assert sorted(rounds[:10]) == sorted(rounds[10:]) == sites
    assert rounds[:10] != rounds[10:]


def test_local_health_stretches_time_within_bounds():
    health = LocalHealth()
    assert health.scale(100) == 100
    health.worsen(99)
    assert health.scale(100) == 400
    for _ in range(9):
        health.improve()
    assert health.scale(100) == 100


def test_suspicion_grows_with_the_log_of_the_cluster():
    bounds = [compute_suspicion_bounds_ms(n, 1_000, factor=3, patience=2) for n in (1, 10, 100)]
    assert bounds == [(3_000, 6_000), (3_000, 6_000), (6_000, 12_000)]
    assert [compute_confirmations_wanted(n, 3) for n in (2, 4, 5)] == [0, 0, 3]


def test_the_deadline_of_a_suspicion_only_moves_earlier():
    suspicion = Suspicion(0, 3_000, 6_000, 3, {info(2).site})
    deadlines = [suspicion.compute_deadline_ms()]
    assert not suspicion.confirm(info(2).site), "it has accused before"
    for number in range(3, 9):
        suspicion.confirm(info(number).site)
        deadlines.append(suspicion.compute_deadline_ms())
    assert deadlines[0] == 6_000
    assert deadlines[-1] == 3_000
    assert deadlines == sorted(deadlines, reverse=True)


def test_a_rumor_is_told_a_bounded_number_of_times_and_the_newest_first():
    rumors = RumorQueue(factor=4)
    rumors.add(Update(info(2), ALIVE))
    for _ in range(3):
        rumors.take(1_000, 9)
    rumors.add(Update(info(3), ALIVE))
    assert rumors.take(70, 9) == [Update(info(3), ALIVE)]
    for _ in range(10):
        rumors.take(1_000, 9)
    assert len(rumors) == 0


def test_picks_different_items_at_random():
    assert sorted(pick(Random(1), range(10), 99)) == list(range(10))
    assert len(set(pick(Random(1), range(10), 4))) == 4
    assert all(75 <= jitter(Random(seed), 100) <= 125 for seed in range(50))
