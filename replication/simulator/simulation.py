"""One run: a cluster lives with faults for a while, then everything heals and it must converge.

Decides the course of a run and what is reported of it. Knows nothing of how nodes work inside. Invariant: a
run is a function of its Scenario: the same one gives the same trace, byte for byte.
"""

from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import BinaryIO

from replication.core.member import Address
from replication.simulator.checkers import Checkers, InvariantError
from replication.simulator.events import EventQueue
from replication.simulator.faults import FAULTS, USUAL, Faults
from replication.simulator.machine import Disk, WallClock
from replication.simulator.network import Conditions, Network
from replication.simulator.node import Node, World
from replication.simulator.planted import Build
from replication.simulator.regions import REGIONS
from replication.simulator.settings import NodeSettings
from replication.simulator.trace import Trace
from replication.simulator.workload import TABLES, Workload, make_schema

PORT = 7946
# Clocks that were ahead are waited for, dead peers are found again, quiet syncs go around: all of it fits.
CONVERGE_WITHIN_S = 180.0
STEP_US = 100_000
# Finds what each commit's own check cannot: an effect that went away later.
CHECK_EVERY_US = 5_000_000
TIMELINE_LINES = 60


@dataclass(frozen=True, slots=True)
class Scenario:
    """What a run is a function of."""

    seed: int = 1
    nodes: int = 5
    seconds: float = 30  # of virtual time under faults and writes; healing comes on top
    faults: tuple[str, ...] = USUAL
    writes_per_s: float = 4  # of the whole cluster
    converge_s: float = CONVERGE_WITHIN_S  # after everything has healed
    regions: int = 10
    loss: float = 0.0  # of packets, all the time
    joined: bool = False  # whether everybody knows everybody from the beginning

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        unknown = [kind for kind in self.faults if kind not in FAULTS]
        if unknown:
            raise ValueError(f"unknown faults: {', '.join(unknown)}; there are {', '.join(FAULTS)}")
        if not 2 <= self.nodes <= 1_000 or not 0 < self.seconds <= 86_400 or self.writes_per_s <= 0:
            raise ValueError("2 to 1000 nodes, up to 86400 seconds, and some writes")
        if not 1 <= self.regions <= len(REGIONS) or not 0 <= self.loss < 1:
            raise ValueError(f"1 to {len(REGIONS)} regions, and a loss below 1")


@dataclass(slots=True)
class Report:
    """What came of a run."""

    scenario: Scenario
    failure: InvariantError | None = None
    timeline: list[str] = field(default_factory=list)  # of a failure
    converged_ms: int | None = None  # after everything had healed
    writes: int = 0
    durable: int = 0
    payloads_per_node: float = 0.0  # copies of a changeset that were sent, by node that needed one
    counters: Counter[str] = field(default_factory=Counter)
    checks: Counter[str] = field(default_factory=Counter)
    fired: Counter[str] = field(default_factory=Counter)
    trace_lines: int = 0
    trace_hash: str = ""


class Simulation:
    """A cluster in virtual time."""

    def __init__(
        self,
        scenario: Scenario,
        *,
        build: Build | None = None,
        trace: BinaryIO | None = None,
        settings: NodeSettings | None = None,
        checkers: Checkers | None = None,
    ) -> None:
        seed = scenario.seed
        build = build if build is not None else Build()
        settings = settings if settings is not None else NodeSettings(seed)
        self.queue = EventQueue()
        self.nodes: list[Node] = []  # by index; of one that is down its last life
        self.clocks = [WallClock() for _ in range(scenario.nodes)]
        self.regions = scenario.regions
        schema = make_schema()
        self.disks = [
            Disk(
                seed,
                index,
                schema,
                store_class=build.store_class,
                renews=build.renews_identity,
                keeps_synced="power" in scenario.faults,
            )
            for index in range(scenario.nodes)
        ]
        self._scenario = scenario
        self._trace = Trace(trace)
        self.network = Network(self.queue, self._trace, seed, regions=scenario.regions, loss=scenario.loss)
        self._checkers = checkers if checkers is not None else Checkers()
        self._world = World(self.queue, self._trace, self.network, self._checkers, settings, build)
        self._workload = Workload(seed)
        self._faults = Faults(self, seed, scenario.faults, int(scenario.seconds * 1e6))
        self._lives: Counter[int] = Counter()
        self._sites: dict[int, bytes] = {}  # who each node last was
        self._is_over = False  # set when the writing ends

    @property
    def conditions(self) -> Conditions:
        """The state of the network."""
        return self.network.conditions

    def note(self, node: int | None, text: str) -> None:
        """Write to the timeline."""
        self._trace.note(self.queue.now_us, node, text)

    def start(self, index: int) -> None:
        """Start a node that is down."""
        if index < len(self.nodes) and self.nodes[index].running:
            return
        self._make(index).start(JOIN)

    def start_all(self) -> None:
        """Start a new cluster."""
        nodes = [self._make(index) for index in range(self._scenario.nodes)]
        known = [node.info for node in nodes] if self._scenario.joined else []
        for node in nodes:
            node.start(JOIN, known)

    def _make(self, index: int) -> Node:
        """Open what the last life of a node left."""
        self._lives[index] += 1
        address = _address(index)
        node = Node(
            self._world, index, self._lives[index], address, disk=self.disks[index], clock=self.clocks[index]
        )
        if index < len(self.nodes):
            self.nodes[index] = node
        else:
            self.nodes.append(node)
        if index in self._sites and node.store.site != self._sites[index]:
            node.count("identities_renewed")
        self._sites[index] = node.store.site
        self.network.attach(address, node)
        return node

    def run(self) -> Report:
        """Run to the end, or to the first failure."""
        report = Report(self._scenario)
        try:
            report.converged_ms = self._run()
        except InvariantError as error:
            report.failure = error
            self.note(None, f"CHECK FAILED: {error}")
            report.timeline = self._trace.timeline(error.nodes or None, TIMELINE_LINES)
        report.writes = len(self._checkers.writes)
        report.durable = self._checkers.durable
        report.counters = self.network.counters
        for node in self.nodes:
            if node.running:
                report.counters.update(node.counters())
        report.checks = self._checkers.counts
        report.fired = self._faults.fired
        payloads = report.counters["payloads_pushed"] + report.counters["payloads_synced"]
        report.payloads_per_node = payloads / max(1, report.writes * (self._scenario.nodes - 1))
        report.trace_lines = self._trace.lines
        report.trace_hash = self._trace.digest()
        return report

    def _run(self) -> int:
        self.start_all()
        self._faults.start()
        self.queue.after(self._workload.next_in_us(self._scenario.writes_per_s), self._write)
        self.queue.after(CHECK_EVERY_US, self._check)
        self.queue.run_until(int(self._scenario.seconds * 1e6))
        self._is_over = True
        self._faults.heal()
        self.note(None, "everything is healed; the cluster must converge")
        healed_us = self.queue.now_us
        while not self._has_converged():
            if self.queue.now_us - healed_us > self._scenario.converge_s * 1e6:
                raise InvariantError("convergence", *self._describe_difference())
            self.queue.run_until(self.queue.now_us + STEP_US)
        self._checkers.check_converged(list(self.nodes), TABLES)
        return (self.queue.now_us - healed_us) // 1000

    def _write(self) -> None:
        if self._is_over:
            return
        key = self._workload.choose_key()
        for index in self._workload.choose_writers(len(self.nodes)):
            self.write(index, key)
        self.queue.after(self._workload.next_in_us(self._scenario.writes_per_s), self._write)

    def write(self, index: int, key: int) -> None:
        """Let a node write a transaction, if it can."""
        tx, parts, statements = self._workload.make_transaction(index, key)
        node = self.nodes[index]
        if node.running and self.queue.now_us >= node.paused_until_us:
            node.enter(partial(node.execute, statements, tx, parts))

    def _check(self) -> None:
        for node in self.nodes:
            if node.running:
                self._checkers.check_effects(node)
                self._checkers.check_bounds(node)
        self.queue.after(CHECK_EVERY_US, self._check)

    def _has_converged(self) -> bool:
        if not all(node.running and node.is_idle for node in self.nodes):
            return False
        first = self.nodes[0].store.seen()
        if not all(node.store.seen() == first for node in self.nodes[1:]):
            return False
        # Whoever has seen the same must be equal at once, unless what was done to one has yet to be found.
        vandalised = TABLES if self._faults.fired["vandal"] else []
        return all(len({node.store.digest(table) for node in self.nodes}) == 1 for table in vandalised)

    def _describe_difference(self) -> tuple[str, frozenset[int]]:
        """Return who lacks what somebody has."""
        for node in self.nodes:
            if not node.running:
                return f"node {node.index} is down", frozenset((node.index,))
            if not node.is_idle:
                return f"node {node.index} holds what it cannot apply", frozenset((node.index,))
        for node in self.nodes:
            mine = node.store.seen()
            for other in self.nodes:
                for site, ranges in other.store.seen().items():
                    missing = [
                        pair
                        for pair in (mine[site].missing(ranges.last) if site in mine else [(1, ranges.last)])
                        if any(ranges.contains(version) for version in range(pair[0], pair[1] + 1))
                    ]
                    if missing:
                        found = (
                            f"node {node.index} still lacks {site.hex()[:8]}/{missing} of node {other.index}"
                        )
                        return found, frozenset((node.index, other.index))
        return "tables differ though all have seen the same", frozenset(range(len(self.nodes)))


def _address(index: int) -> Address:
    return (f"10.0.{index // 250}.{index % 250 + 1}", PORT)


JOIN = (_address(0), _address(1))


def run(scenario: Scenario, *, build: Build | None = None, trace: BinaryIO | None = None) -> Report:
    """Run one scenario."""
    return Simulation(scenario, build=build, trace=trace).run()
