"""A node that was away for longer than others remember it, and what they have deleted."""

from dataclasses import replace

import pytest

from replication.core.swim import SwimSettings
from replication.simulator.node import Node
from replication.simulator.settings import NodeSettings
from replication.simulator.simulation import Scenario, Simulation
from replication.simulator.workload import TABLES

A, B, AWAY = range(3)
SECOND_US = 1_000_000


class Cluster:
    """Three nodes; those that stay forget the dead, and what was deleted, within seconds."""

    def __init__(self, seed: int) -> None:
        usual = NodeSettings(seed).replica
        quick = replace(
            usual, swim=SwimSettings(forget_ms=3_000), tombstone_keep_ms=1_000, maintenance_ms=1_000
        )
        scenario = Scenario(seed=seed, nodes=3, faults=(), joined=True)
        self.simulation = Simulation(scenario, settings=NodeSettings(seed, quick))
        self.simulation.start_all()
        self._count = 0

    def __getitem__(self, index: int) -> Node:
        return self.simulation.nodes[index]

    def write(self, index: int, *statements: str) -> None:
        self._count += 1
        tx = f"tx{self._count}"
        ledger = ("INSERT INTO ledger (tx, part, parts) VALUES (?, 0, 1)", (tx,))
        assert self[index].execute([ledger, *((sql, ()) for sql in statements)], tx, 1)

    def pass_s(self, seconds: float) -> None:
        queue = self.simulation.queue
        queue.run_until(queue.now_us + int(seconds * SECOND_US))

    def cut(self, *, by: int) -> None:
        for other in (A, B):
            for pair in ((AWAY, other), (other, AWAY)):
                self.simulation.conditions.cuts[pair] += by

    def read(self, index: int) -> dict[int, str]:
        return dict(self[index].store.connection.execute("SELECT k, v FROM contended"))

    def are_equal(self) -> bool:
        nodes = self.simulation.nodes
        return all(len({node.store.digest(table) for node in nodes}) == 1 for table in TABLES)

    def settle(self) -> None:
        for _ in range(240):
            self.pass_s(1)
            if self.are_equal():
                return
        assert self.are_equal()


@pytest.fixture(params=range(1, 6), ids=lambda seed: f"seed {seed}")
def cluster(request: pytest.FixtureRequest) -> Cluster:
    return Cluster(request.param)


@pytest.mark.parametrize("is_killed", [True, False], ids=["killed", "cut off"])
@pytest.mark.parametrize("missed", [1, 40], ids=["in the log", "beyond the log"])
def test_who_was_away_when_deletions_were_forgotten_takes_what_it_missed_and_keeps_its_writes(
    cluster: Cluster, missed: int, *, is_killed: bool
) -> None:
    for key in range(6):
        cluster.write(A, f"INSERT INTO contended (k, v) VALUES ({key}, 'first')")
    cluster.settle()
    assert len(cluster.read(AWAY)) == 6

    cluster.cut(by=1)
    cluster.write(AWAY, "INSERT INTO contended (k, v) VALUES (100, 'unsent')")
    cluster.write(AWAY, "UPDATE contended SET v = 'unsent' WHERE k = 4")
    cluster.write(AWAY, "UPDATE contended SET v = 'of what was deleted' WHERE k = 3")
    # One that runs alone for so long forgets its own deletions too; a snapshot brings those rows back.
    is_deletion_kept = is_killed or missed == 1
    if is_deletion_kept:
        cluster.write(AWAY, "DELETE FROM contended WHERE k = 5")
    else:
        cluster.write(AWAY, "UPDATE contended SET v = 'unsent' WHERE k = 5")
    if is_killed:
        cluster[AWAY].end(power=False)
    cluster.pass_s(0.5)
    cluster.write(A, "DELETE FROM contended WHERE k IN (0, 1)")
    cluster.write(B, "DELETE FROM contended WHERE k IN (2, 3)")
    cluster.pass_s(30)
    for number in range(missed):
        cluster.write(A, f"INSERT INTO contended (k, v) VALUES ({200 + number}, 'missed')")
    cluster.pass_s(10)
    for index in (A, B):
        assert cluster[AWAY].info.site not in cluster[index].replica.swim.members
        assert cluster[index].replica.counters["tombstones_collected"] >= 4
        assert cluster[index].store.collected_hlc

    cluster.cut(by=-1)
    if is_killed:
        cluster.simulation.start(AWAY)
    cluster.settle()
    cluster.pass_s(60)
    assert cluster.are_equal()
    expected = {
        4: "unsent",
        **({} if is_deletion_kept else {5: "unsent"}),
        100: "unsent",
        **{200 + number: "missed" for number in range(missed)},
    }
    assert cluster.read(A) == cluster.read(B) == cluster.read(AWAY)
    # To a node that has forgotten a deletion, an update of the row that did not know of it is a new row; to
    # one that has just heard of it, it is not. Whom the others follow depends on who forgets first.
    assert {key: value for key, value in cluster.read(A).items() if key != 3} == expected
