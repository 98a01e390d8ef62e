"""Spreading over a formed cluster, in virtual time."""

import pytest

from replication.core.member import MemberState
from tests.simulation.cluster import Cluster


def formed(count: int, seed: int = 1) -> Cluster:
    cluster = Cluster(count, seed=seed)
    cluster.run_until(lambda: cluster.all_see(cluster.nodes, cluster.nodes, MemberState.ALIVE), 20_000)
    cluster.run(1_000)
    return cluster


@pytest.mark.parametrize("count", [2, 3, 8, 30, 50])
def test_a_changeset_reaches_every_node_quickly(count):
    cluster = formed(count)
    id_ = cluster.nodes[count // 2].broadcast()
    assert cluster.run_until(lambda: cluster.all_have(id_), 5_000) < 1_000


@pytest.mark.parametrize("count", [3, 10, 50])
def test_costs_about_one_payload_per_node_once_the_tree_has_formed(count):
    cluster = formed(count)
    for round_ in range(20):
        cluster.nodes[round_ % count].broadcast()
        cluster.run(500)
    before = cluster.counters["pushes"]
    ids = []
    for round_ in range(50):
        ids.append(cluster.nodes[(round_ * 7) % count].broadcast())
        cluster.run(500)
    assert all(cluster.all_have(id_) for id_ in ids)
    per_changeset = (cluster.counters["pushes"] - before) / 50
    assert count - 1 <= per_changeset <= 1.25 * (count - 1)


def test_bursts_from_many_sources_at_once_reach_every_node():
    cluster = formed(20)
    ids = [node.broadcast() for _ in range(10) for node in cluster.nodes]
    cluster.run_until(lambda: all(cluster.all_have(id_) for id_ in ids), 5_000)


def test_the_tree_grows_back_around_crashed_nodes():
    cluster = formed(20, seed=4)
    for round_ in range(20):
        cluster.nodes[round_].broadcast()
        cluster.run(200)
    for node in cluster.nodes[5:10]:
        cluster.crash(node)
    ids = []
    for round_ in range(10):
        ids.append(cluster.nodes[round_ % 5].broadcast())
        cluster.run(1_000)
    cluster.run_until(lambda: all(cluster.all_have(id_) for id_ in ids), 15_000)
    grafts = sum(node.tree.counters["grafts_sent"] for node in cluster.nodes)
    assert grafts > 0


def test_what_was_sent_into_a_partition_is_left_to_sync():
    cluster = formed(6)
    cluster.partition(range(3), range(3, 6))
    id_ = cluster.nodes[0].broadcast()
    cluster.run(5_000)
    assert all(node.has(*id_) for node in cluster.nodes[:3])
    assert not any(node.has(*id_) for node in cluster.nodes[3:])
