"""One node goes mad: what the others then see of each other."""

from dataclasses import replace

import pytest

from replication.core.limits import OriginSettings
from replication.simulator.settings import NodeSettings
from replication.simulator.simulation import Scenario, Simulation

NODES = 6
FLOODER = 5
# More than its uplink takes; and each node that passes it on fills its own.
BYTES_PER_S = 150_000
FLOOD_PER_S = 200
FLOOD_BYTES = 900
LIMITED = OriginSettings(changesets_per_s=10)
UNLIMITED = OriginSettings(0, 0)
QUIET_US, FLOOD_US, WRITE_EVERY_US = 5_000_000, 10_000_000, 500_000


class Flood:
    """A cluster in which one node writes as much as it can, and the others a little."""

    def __init__(self, seed: int, origins: OriginSettings) -> None:
        settings = NodeSettings(seed)
        plumtree = replace(settings.replica.plumtree, recent_max=4_096, cache_bytes_max=1 << 20)
        replica = replace(settings.replica, plumtree=plumtree, log_versions_max=100_000, origins=origins)
        self.simulation = Simulation(
            Scenario(seed=seed, nodes=NODES, seconds=60, faults=()),
            settings=replace(settings, replica=replica),
        )
        self.simulation.conditions.bytes_per_s = BYTES_PER_S
        self.delays_ms: list[int] = []
        self._queue = self.simulation.queue
        self._number = 0
        self._under_way: dict[tuple[bytes, int], int] = {}  # since when each write of the others is known

    def run(self) -> None:
        self.simulation.start_all()
        self._queue.run_until(QUIET_US)
        end_us = QUIET_US + FLOOD_US
        self._queue.after(0, lambda: self._flood(end_us))
        self._queue.after(0, lambda: self._write(end_us))
        while self._queue.now_us < end_us or self._under_way:
            self._queue.run_until(self._queue.now_us + 10_000)
            self._look()
            assert self._queue.now_us < end_us + 120_000_000, "some write never arrived"

    def arrives(self) -> bool:
        """Let time pass until all have all; return whether that comes."""
        site = self.simulation.nodes[FLOODER].store.site
        end_us = self._queue.now_us + 120_000_000
        while self._queue.now_us < end_us:
            heads = {node.replica.head(site) for node in self.simulation.nodes}
            if len(heads) == 1:
                return True
            self._queue.run_until(self._queue.now_us + 100_000)
        return False

    def _execute(self, index: int, size: int) -> None:
        self._number += 1
        tx, node = f"t{self._number}", self.simulation.nodes[index]
        body = self._number.to_bytes(4) * (size // 4)
        node.enter(lambda: node.execute([("INSERT INTO ledger VALUES (?, 0, 1, ?)", (tx, body))], tx, 1))

    def _flood(self, end_us: int) -> None:
        if self._queue.now_us < end_us:
            self._execute(FLOODER, FLOOD_BYTES)
            self._queue.after(1_000_000 // FLOOD_PER_S, lambda: self._flood(end_us))

    def _write(self, end_us: int) -> None:
        if self._queue.now_us < end_us:
            index = self._number % FLOODER
            self._execute(index, 40)
            store = self.simulation.nodes[index].store
            self._under_way[store.site, store.seen()[store.site].last] = self._queue.now_us
            self._queue.after(WRITE_EVERY_US, lambda: self._write(end_us))

    def _look(self) -> None:
        for (site, version), since_us in list(self._under_way.items()):
            calm = [node.replica for node in self.simulation.nodes if node.index != FLOODER]
            if all(replica.head(site) >= version for replica in calm):
                del self._under_way[site, version]
                self.delays_ms.append((self._queue.now_us - since_us) // 1000)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_node_that_floods_delays_what_the_others_write_by_no_more_than_a_bound(seed):
    limited, unlimited = Flood(seed, LIMITED), Flood(seed, UNLIMITED)
    limited.run()
    assert len(limited.delays_ms) == FLOOD_US // WRITE_EVERY_US
    assert max(limited.delays_ms) < 1_500
    assert sum(node.replica.origins.refused.total() for node in limited.simulation.nodes) > 300
    assert limited.arrives(), "what it wrote comes by sync"
    unlimited.run()
    assert max(unlimited.delays_ms) > 3_000, "that is what the limit is for"
