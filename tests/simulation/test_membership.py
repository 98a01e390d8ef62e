"""Membership over a faulty network, in virtual time."""

import hashlib

import pytest

from replication.core.member import MemberState
from tests.simulation.cluster import Cluster

ALIVE, DEAD, LEFT = MemberState.ALIVE, MemberState.DEAD, MemberState.LEFT


def formed(count: int, **options: float) -> Cluster:
    cluster = Cluster(count, **options)
    cluster.run_until(lambda: cluster.all_see(cluster.nodes, cluster.nodes, ALIVE), 20_000)
    return cluster


@pytest.mark.parametrize("count", [2, 3, 10, 50])
def test_nodes_that_know_two_addresses_find_all_others(count):
    cluster = Cluster(count)
    took = cluster.run_until(lambda: cluster.all_see(cluster.nodes, cluster.nodes, ALIVE), 10_000)
    assert took < 5_000


def test_finds_all_others_when_a_third_of_the_datagrams_is_lost():
    cluster = formed(20, loss=0.3)
    assert cluster.counters["lost"] > 30


def test_nobody_is_declared_dead_over_five_minutes_of_ten_percent_loss():
    cluster = formed(15, loss=0.1, seed=3)
    cluster.run(300_000)
    assert not [event for node in cluster.nodes for event in node.events if event[2] is DEAD]
    assert cluster.counters["lost"] > 1_000
    assert sum(node.swim.counters["probes_saved_by_stream"] for node in cluster.nodes) > 0


def test_a_member_whose_datagrams_are_all_lost_lives_on_by_its_streams():
    cluster = formed(3)
    cluster.datagrams_blocked = {2}
    cluster.run(60_000)
    assert cluster.counters["blocked"] > 50
    assert cluster.counters["stream_acks"] > 10
    assert not [event for node in cluster.nodes[:2] for event in node.events if event[2] is DEAD]


@pytest.mark.parametrize(("count", "within_ms"), [(2, 9_000), (3, 8_000), (10, 8_000), (50, 12_000)])
def test_a_crashed_member_is_dead_for_all_within_seconds(count, within_ms):
    cluster = formed(count)
    victim = cluster.nodes[-1]
    cluster.crash(victim)
    others = cluster.nodes[:-1]
    took = cluster.run_until(lambda: cluster.all_see(others, [victim], DEAD), within_ms)
    assert took > 2_000, "declared dead without a chance to refute"


def test_a_restarted_member_is_alive_again_in_its_new_incarnation():
    cluster = formed(5)
    cluster.crash(cluster.nodes[4])
    cluster.run_until(lambda: cluster.all_see(cluster.nodes[:4], cluster.nodes[4:], DEAD), 10_000)
    cluster.start(4)
    took = cluster.run_until(lambda: cluster.all_see(cluster.nodes, cluster.nodes, ALIVE), 10_000)
    assert took < 3_000


@pytest.mark.parametrize("split", [1, 3, 10])
def test_both_sides_of_a_partition_live_on_and_find_each_other_when_it_heals(split):
    cluster = formed(20, seed=split)
    cluster.partition(range(split), range(split, 20))
    left, right = cluster.nodes[:split], cluster.nodes[split:]
    cluster.run(60_000)
    # Those who are alone doubt themselves first (local health), so they are slower to condemn.
    assert all(DEAD in [event[2] for event in node.events] for node in left)
    assert cluster.all_see(right, left, DEAD)
    assert cluster.all_see(left, left, ALIVE)
    assert cluster.all_see(right, right, ALIVE)
    assert cluster.counters["cut"] > 10
    cluster.heal()
    took = cluster.run_until(lambda: cluster.all_see(cluster.nodes, cluster.nodes, ALIVE), 15_000)
    assert took < 6_000


def test_a_leaver_is_not_suspected_first():
    cluster = formed(5)
    leaver = cluster.nodes[4]
    leaver.run_swim(leaver.swim.leave())
    cluster.run(20)
    cluster.crash(leaver)
    cluster.run_until(lambda: cluster.all_see(cluster.nodes[:4], [leaver], LEFT), 2_000)
    cluster.run(10_000)
    states = [event[2] for node in cluster.nodes[:4] for event in node.events if event[1] == leaver.site]
    assert states == [ALIVE, LEFT] * 4


def test_the_same_seed_makes_the_same_run():
    def run(seed: int) -> str:
        cluster = Cluster(10, seed=seed, loss=0.1)
        cluster.run(10_000)
        return hashlib.sha256(repr(cluster.trace).encode()).hexdigest()

    assert run(5) == run(5)
    assert run(5) != run(6)
