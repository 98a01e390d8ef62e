"""Edges that share machines and know each other's load late, in virtual time.

Decides what happens when; whom a request goes to is said by a policy, of which one is the balancer itself.
Invariant: all follows from the seed, and every policy sees the same requests.

Each machine works on as many requests at once as its soft limit, at a rate of its own, and makes the others
wait. What an edge has in flight it knows at once, and of the other edges what was true LATE_S ago.
"""

import heapq
import math
import random
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from routing.balancer import Balancer, Refusal
from routing.table import RoutingTable, Service
from routing.target import Target

EDGES = 20
MACHINES = 100
SLOTS = 20  # the soft limit, and what a machine does at once
UTILISATION = 0.7
SERVICE_S = 0.1  # mean, exponential
LATE_S = 0.5
REPORT_S = 0.1
WARM_UP_S = 15.0  # averages have settled
RUN_S = 25.0
# Loads are averaged over so long: less is noise that no balancer can do anything about.
WINDOW_S = 5.0


NAMES = tuple(f"m{number}" for number in range(MACHINES))


class Edge:
    """One node: a table with all machines, and a balancer over it."""

    def __init__(self, rng: random.Random) -> None:
        self.table = RoutingTable()
        self.table.apply("apps", ("web",), ("web", "default", ""))
        values = ("web", 0, 80, "requests", SLOTS, None, "[]", "", "{}")
        self.table.apply("services", ("web", 0), values)
        for number in range(MACHINES):
            row = (f"m{number}", "web", "n", "ams", f"10.0.0.{number + 1}:80", "started", 0, "")
            self.table.apply("machines", (f"m{number}",), row)
        service = self.table.service("web", 80)
        assert service is not None
        self.service: Service = service
        self.rng = rng
        self.balancer = Balancer(self.table, "ams", rng)
        self.targets = [self._target(number) for number in range(MACHINES)]
        self.turn = rng.randrange(MACHINES)

    def _target(self, number: int) -> Target:
        target = self.table.machine(f"m{number}")
        assert target is not None
        return target


Policy = Callable[[Edge], Target]


def by_balancer(edge: Edge) -> Target:
    """Isthmus."""
    chosen = edge.balancer.choose(edge.service, 0.0)
    assert not isinstance(chosen, Refusal)
    return chosen


def at_random(edge: Edge) -> Target:
    """Any machine."""
    return edge.targets[int(edge.rng.random() * MACHINES)]


def in_turn(edge: Edge) -> Target:
    """One after the other."""
    edge.turn = (edge.turn + 1) % MACHINES
    return edge.targets[edge.turn]


def least_loaded(edge: Edge) -> Target:
    """The one with the least load as the edge knows it, any of these."""
    return min(edge.targets, key=lambda target: (target.load, edge.rng.random()))


POLICIES: dict[str, Policy] = {
    "random": at_random,
    "round robin": in_turn,
    "least loaded": least_loaded,
    "isthmus": by_balancer,
}


@dataclass(slots=True)
class Outcome:
    """What came of one policy."""

    waits_s: list[float] = field(default_factory=list)  # of each request, until its machine took it up
    imbalances: list[float] = field(default_factory=list)  # max/mean of the machines' loads, of each window
    snapshot: list[int] = field(default_factory=list)  # what each machine had at one moment

    @property
    def imbalance(self) -> float:
        return statistics.mean(self.imbalances)


@dataclass(slots=True)
class Machine:
    rate: float
    busy: int = 0
    waiting: deque[tuple[float, int]] = field(default_factory=deque)  # (arrived, edge)
    area: float = 0.0  # load times seconds since the window began
    changed: float = 0.0

    @property
    def load(self) -> int:
        return self.busy + len(self.waiting)

    def account(self, now: float) -> None:
        self.area += self.load * (now - self.changed)
        self.changed = now


class World:
    """Edges, machines and what happens next. `now` is virtual time."""

    def __init__(self, policy: Policy, seed: int, uneven: float) -> None:
        rng = random.Random(seed)
        self.policy = policy
        self.edges = [Edge(random.Random(seed * 1_000 + number)) for number in range(EDGES)]
        self.machines = [Machine(1 + uneven * (2 * rng.random() - 1)) for _ in range(MACHINES)]
        self.requests = random.Random(seed + 1)
        self.outcome = Outcome()
        self.now = 0.0
        self.serial = 0
        self.ends: list[tuple[float, int, int, int]] = []  # (when, serial, machine, edge)
        self.reports: deque[tuple[float, list[list[int]]]] = deque()

    def arrive(self) -> float:
        """Send a request somewhere, and return when the next one comes."""
        edge = int(self.requests.random() * EDGES)
        target = self.policy(self.edges[edge])
        target.in_flight += 1
        number = int(target.id[1:])
        machine = self.machines[number]
        machine.account(self.now)
        if machine.busy < SLOTS:
            machine.busy += 1
            self.begin(number, edge, self.now)
        else:
            machine.waiting.append((self.now, edge))
        return self.now + self.requests.expovariate(MACHINES * SLOTS * UTILISATION / SERVICE_S)

    def begin(self, number: int, edge: int, arrived: float) -> None:
        if arrived >= WARM_UP_S:
            self.outcome.waits_s.append(self.now - arrived)
        self.serial += 1
        took = self.requests.expovariate(self.machines[number].rate / SERVICE_S)
        heapq.heappush(self.ends, (self.now + took, self.serial, number, edge))

    def end(self) -> None:
        """Finish the request that ends next; its machine takes up one that waits."""
        _, _, number, edge = heapq.heappop(self.ends)
        machine = self.machines[number]
        machine.account(self.now)
        self.edges[edge].targets[number].in_flight -= 1
        if machine.waiting:
            arrived, edge = machine.waiting.popleft()
            self.begin(number, edge, arrived)
        else:
            machine.busy -= 1

    def report(self) -> float:
        """Have all edges say what they have, and hear what was said LATE_S ago."""
        self.reports.append(
            (self.now, [[target.in_flight for target in edge.targets] for edge in self.edges])
        )
        while self.reports[0][0] <= self.now - LATE_S:
            _, said = self.reports.popleft()
            totals = [sum(column) for column in zip(*said, strict=True)]
            for edge, own in zip(self.edges, said, strict=True):
                others = [total - count for total, count in zip(totals, own, strict=True)]
                edge.table.set_siblings(zip(NAMES, others, strict=True))
        for edge in self.edges:
            edge.table.follow_loads()
        return self.now + REPORT_S

    def look(self) -> float:
        """Close a window and begin the next."""
        for machine in self.machines:
            machine.account(self.now)
        if self.now > WARM_UP_S:
            loads = [machine.area / WINDOW_S for machine in self.machines]
            self.outcome.imbalances.append(max(loads) / statistics.mean(loads))
            self.outcome.snapshot = [machine.load for machine in self.machines]
        for machine in self.machines:
            machine.area = 0.0
        return self.now + WINDOW_S


def simulate(policy: Policy, seed: int = 1, run_s: float = RUN_S, uneven: float = 0.0) -> Outcome:
    """Run one policy; with `uneven`, machines are faster or slower by up to that share."""
    world = World(policy, seed, uneven)
    arrival, report, look = 0.0, 0.0, WARM_UP_S
    while True:
        end = world.ends[0][0] if world.ends else math.inf
        world.now = min(arrival, end, report, look)
        if world.now > WARM_UP_S + run_s:
            return world.outcome
        if world.now == end:
            world.end()
        elif world.now == arrival:
            arrival = world.arrive()
        elif world.now == report:
            report = world.report()
        else:
            look = world.look()
