"""What `make bench-simulated` measures, in a size that takes seconds: no figure gets worse unseen."""

from bench.replication.simulated import make_cluster, measure_heal, measure_spread
from replication.replica import MEMBERS_EXCHANGED_SOON


def test_a_change_reaches_all_regions_within_a_second_and_costs_little_more_than_a_payload_per_node():
    found = measure_spread(1, 60, 40)
    assert found["p99"] < 1_000
    assert found["last"] < 2_000
    assert 1 <= found["copies"] < 1.25


def test_all_have_caught_up_soon_after_a_cut_without_waiting_for_their_quiet_syncs():
    found = measure_heal(1, 45, 3, 20, 1)
    assert found["changesets"] == 20
    assert found["last"] < 5


def test_sessions_that_follow_closely_carry_few_members():
    simulation, _ = make_cluster(1, 20, 3)
    replica = simulation.nodes[0].replica
    simulation.queue.run_until(simulation.queue.now_us + 6_000_000)
    sizes = [len(replica._export_members().updates) for _ in range(2)]
    assert sizes[1] == MEMBERS_EXCHANGED_SOON


def test_a_cluster_that_begins_joined_knows_everybody_and_is_linked_within_a_second():
    simulation, _ = make_cluster(2, 30, 10)
    assert all(len(node.replica.swim.reachable) == 29 for node in simulation.nodes)
    assert all(len(node.replica.tree.eager) >= 2 for node in simulation.nodes)
