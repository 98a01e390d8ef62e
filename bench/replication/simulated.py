"""`make bench-simulated`: how fast and at what cost changes spread in a large cluster, and how fast it heals.

Decides what is measured and what is printed. Runs the product's replica in the simulator, on loss and real
distances, with the product's bounds. Invariant: a figure follows from its seed; only the CPU time does not.
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from bench.table import Target, describe_machine, print_table, show_number
from replication.core.change import Commit
from replication.core.wire import Beats, Graft, IHave, Large, Message, Prune, Push, get_kind
from replication.replica import ReplicaSettings
from replication.simulator.checkers import Checkers, Id, Subject
from replication.simulator.events import EventQueue
from replication.simulator.settings import NodeSettings
from replication.simulator.simulation import Scenario, Simulation
from replication.simulator.workload import KEYS, TABLES

LOSS = 0.02
# What is sent on streams for the broadcast and for heartbeats; all else belongs to sessions: syncs, the part
# of the member list that goes along, and the comparison of tables.
STREAMED: dict[type[Message], str] = {
    Beats: "beat_bytes",
    **dict.fromkeys((Push, IHave, Graft, Prune, Large), "tree_bytes"),
}
# Links come up and members are measured; then some writes find the tree.
SETTLE_S = 20
FIRST_WRITES = 10
WRITES = 20
WRITE_EVERY_S = 1.5
# After the last write: whoever has not got it by then has lost it, as far as these figures go.
PATIENCE_S = 15
STEP_US = 50_000


@dataclass(frozen=True, slots=True)
class Measure:
    """A line of a table."""

    key: str
    title: str
    unit: str
    limit: float | None = None


SPREAD = (
    Measure("p50", "write to half of all nodes", " ms"),
    Measure("p99", "write to 99 % of all nodes", " ms", 1_000),
    Measure("last", "the last node", " ms", 5_000),
    Measure("copies", "payload copies per node", "", 1.5),
    Measure("synced", "of these brought by syncs", ""),
    Measure("datagrams", "SWIM: datagrams/s per node", ""),
    Measure("datagram_bytes", "SWIM: bytes/s per node", ""),
    Measure("beat_bytes", "heartbeats: bytes/s per node", ""),
    Measure("session_bytes", "syncs, member lists: bytes/s per node", ""),
    Measure("tree_bytes", "broadcast: bytes/s per node", ""),
    Measure("bytes", "all bytes/s per node", ""),
)
HEAL = (
    Measure("p50", "half of all nodes caught up", " s"),
    Measure("last", "the last node caught up", " s", 10),
    Measure("changesets", "changesets that each side had missed", ""),
    Measure("snapshots", "snapshots", ""),
)


class Arrivals(Checkers):
    """Watches when each changeset was written, and when each node had it."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = EventQueue()  # replaced by the simulation's
        self.written_us: dict[Id, int] = {}
        self.arrived_us: dict[Id, dict[int, int]] = {}
        self.streamed: Counter[str] = Counter()  # bytes

    def count_frame(self, frame: bytes) -> None:
        """Note what a frame is for."""
        self.streamed[STREAMED.get(get_kind(frame), "session_bytes")] += len(frame)

    def acknowledge(self, node: int, id_: Id, tx: str, parts: int) -> None:
        """Note when a changeset was written."""
        super().acknowledge(node, id_, tx, parts)
        self.written_us[id_] = self.queue.now_us

    def check_commit(self, subject: Subject, commit: Commit) -> None:
        """Note which node has which changeset from now on."""
        for changeset in commit.changesets:
            id_ = (changeset.site, changeset.version)
            self.arrived_us.setdefault(id_, {}).setdefault(subject.index, self.queue.now_us)


def make_cluster(seed: int, nodes: int, regions: int) -> tuple[Simulation, Arrivals]:
    """Return a cluster that has joined and settled."""
    arrivals = Arrivals()
    scenario = Scenario(seed=seed, nodes=nodes, faults=(), regions=regions, loss=LOSS, joined=True)
    settings = NodeSettings(seed, ReplicaSettings())
    simulation = Simulation(scenario, settings=settings, checkers=arrivals)
    arrivals.queue = simulation.queue
    simulation.network.on_frame = arrivals.count_frame
    simulation.start_all()
    run_for(simulation, SETTLE_S)
    return simulation, arrivals


def run_for(simulation: Simulation, seconds: float) -> None:
    """Let virtual time pass."""
    simulation.queue.run_until(simulation.queue.now_us + int(seconds * 1e6))


def count(simulation: Simulation, arrivals: Arrivals) -> dict[str, int]:
    """Return what was sent so far."""
    return {
        "pushed": sum(node.replica.counters["payloads_pushed"] for node in simulation.nodes),
        "synced": sum(node.replica.sync_counters["changesets_served"] for node in simulation.nodes),
        **{name: simulation.network.counters[name] for name in ("datagrams", "datagram_bytes", "bytes")},
        **{name: arrivals.streamed[name] for name in ("beat_bytes", "session_bytes", "tree_bytes")},
    }


def measure_spread(seed: int, nodes: int, regions: int) -> dict[str, float]:
    """Write here and there, one after another, and see when the others have it."""
    started_s = time.process_time()
    simulation, arrivals = make_cluster(seed, nodes, regions)
    rng = Random(f"{seed}/bench")

    def write(times: int) -> None:
        for _ in range(times):
            simulation.write(rng.randrange(nodes), rng.randrange(KEYS))
            run_for(simulation, WRITE_EVERY_S)

    write(FIRST_WRITES)
    run_for(simulation, WRITE_EVERY_S)
    before, begun_us = count(simulation, arrivals), simulation.queue.now_us
    write(WRITES)
    run_for(simulation, PATIENCE_S)
    sent = {name: value - before[name] for name, value in count(simulation, arrivals).items()}
    took_ms = sorted(compute_latencies_ms(arrivals, nodes, since_us=begun_us))
    copies = WRITES * (nodes - 1)
    node_seconds = nodes * (simulation.queue.now_us - begun_us) / 1e6
    return {
        "p50": took_ms[len(took_ms) // 2],
        "p99": took_ms[len(took_ms) * 99 // 100],
        "last": took_ms[-1],
        **{name: amount / node_seconds for name, amount in sent.items()},
        "copies": (sent["pushed"] + sent["synced"]) / copies,
        "synced": sent["synced"] / copies,
        "cpu_s": time.process_time() - started_s,
    }


def compute_latencies_ms(arrivals: Arrivals, nodes: int, *, since_us: int) -> Iterable[float]:
    """Return how long each changeset took to each node; for ever where it did not come."""
    for id_, written_us in arrivals.written_us.items():
        if written_us >= since_us:
            arrived = arrivals.arrived_us[id_]
            yield from ((us - written_us) / 1000 for node, us in arrived.items() if us > written_us)
            yield from [float("inf")] * (nodes - len(arrived))


def measure_heal(seed: int, nodes: int, regions: int, cut_s: float, write_every_s: float) -> dict[str, float]:
    """Cut a region off while both sides write, mend it, and see when each node has everything."""
    started_s = time.process_time()
    simulation, arrivals = make_cluster(seed, nodes, regions)
    rng = Random(f"{seed}/bench")
    sides = [
        [index for index in range(nodes) if (index % regions == regions - 1) is inside]
        for inside in (True, False)
    ]
    pairs = [pair for a in sides[0] for b in sides[1] for pair in ((a, b), (b, a))]
    simulation.conditions.cuts.update(pairs)
    end_us = simulation.queue.now_us + int(cut_s * 1e6)
    while simulation.queue.now_us < end_us:
        for side in sides:
            simulation.write(side[rng.randrange(len(side))], rng.randrange(KEYS))
        run_for(simulation, write_every_s)
    simulation.conditions.cuts.subtract(pairs)
    healed_s = compute_healed_s(simulation, len(arrivals.written_us))
    arrivals.check_converged(list(simulation.nodes), TABLES)
    return {
        "p50": healed_s[len(healed_s) // 2],
        "last": healed_s[-1],
        "changesets": len(arrivals.written_us) / 2,
        "snapshots": sum(node.replica.sync_counters["snapshots_received"] for node in simulation.nodes),
        "cpu_s": time.process_time() - started_s,
    }


def compute_healed_s(simulation: Simulation, changesets: int) -> list[float]:
    """Return when each node had all changesets; raises TimeoutError when one does not get them."""
    begun_us = simulation.queue.now_us
    healed_s: dict[int, float] = {}
    while len(healed_s) < len(simulation.nodes):
        run_for(simulation, STEP_US / 1e6)
        passed_s = (simulation.queue.now_us - begun_us) / 1e6
        if passed_s > 10 * PATIENCE_S:
            raise TimeoutError(f"{len(simulation.nodes) - len(healed_s)} nodes have not caught up")
        for node in simulation.nodes:
            if sum(ranges.head for ranges in node.replica.seen.values()) == changesets:
                healed_s.setdefault(node.index, passed_s)
    return sorted(healed_s.values())


def print_figures(title: str, measures: Iterable[Measure], runs: Mapping[int, Mapping[str, float]]) -> None:
    """Print a column per seed; the worst of them is what counts."""
    rows = []
    for measure in measures:
        figures = [run[measure.key] for run in runs.values()]
        shown = [f"{show_number(figure)}{measure.unit}" for figure in figures]
        judged = ["", ""]
        if measure.limit is not None:
            target = Target(measure.limit, at_least=False)
            judged = [target.show(measure.unit), target.compare(max(figures))]
        rows.append([measure.title, *shown, *judged])
    print()
    print_table([title, *(f"seed {seed}" for seed in runs), "target", ""], rows)


def run_each(seeds: Iterable[int], measure: Callable[[int], dict[str, float]]) -> dict[int, dict[str, float]]:
    """Measure once per seed, and say so, as it takes minutes."""
    found = {}
    for seed in seeds:
        found[seed] = measure(seed)
        print(f"seed {seed} took {found[seed]['cpu_s']:.0f} CPU seconds", flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="make bench-simulated", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--nodes", type=int, default=1_000)
    parser.add_argument("--cut-s", type=float, default=3_600)
    parser.add_argument("--only", choices=("spread", "heal"))
    options = parser.parse_args(arguments)
    print(f"{describe_machine()}; virtual time, {LOSS:.0%} of packets lost")
    if options.only != "heal":
        runs = run_each(options.seeds, lambda seed: measure_spread(seed, options.nodes, 40))
        print_figures(f"{options.nodes} nodes in 40 regions, {WRITES} writes", SPREAD, runs)
    if options.only != "spread":
        runs = run_each(options.seeds, lambda seed: measure_heal(seed, 90, 3, options.cut_s, 2))
        print_figures(f"30 of 90 nodes cut off for {options.cut_s:g} s", HEAL, runs)


if __name__ == "__main__":
    main()
