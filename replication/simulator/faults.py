"""What goes wrong, when, and for how long.

Decides the faults of a run from the seed, each kind with a stream of its own, so that one kind more does not
change the others. Knows nothing of what the nodes do about them. Invariant: every fault that began ends, at
the latest when `heal` is called.
"""

from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Protocol

from replication.simulator.events import EventQueue
from replication.simulator.machine import Disk, WallClock
from replication.simulator.network import BYTES_PER_S, Conditions
from replication.simulator.node import Node
from replication.simulator.workload import KEYS

# Between the beginnings of two faults of a kind, at most.
INTERVAL_S = (4, 60)

Heal = Callable[[], None]


class Cluster(Protocol):
    """What faults are done to."""

    queue: EventQueue
    nodes: list[Node]
    disks: list[Disk]
    clocks: list[WallClock]
    regions: int  # over which the nodes are dealt out in turn

    @property
    def conditions(self) -> Conditions:
        """The state of the network."""

    def note(self, node: int | None, text: str) -> None:
        """Write to the timeline."""

    def start(self, index: int) -> None:
        """Start a node that is down."""


class Faults:
    """The faults of one run."""

    def __init__(self, cluster: Cluster, seed: int, kinds: tuple[str, ...], duration_us: int) -> None:
        self.fired: Counter[str] = Counter()
        self._cluster = cluster
        self._kinds = kinds
        self._rngs = {kind: Random(f"{seed}/fault/{kind}") for kind in kinds}
        # Each seed has its own mix: with all kinds at full rate none would be seen on its own.
        self._intervals_us = {
            kind: min(duration_us, int(rng.uniform(*INTERVAL_S) * 1e6)) for kind, rng in self._rngs.items()
        }
        self._heals: dict[int, Heal] = {}  # of the faults that are on
        self._number = 0
        self._over = False

    def start(self) -> None:
        """Set the faults going."""
        for kind in self._kinds:
            self._schedule(kind)

    def heal(self) -> None:
        """End all faults and let no more begin."""
        self._over = True
        for number in list(self._heals):
            self._end(number)

    def _schedule(self, kind: str) -> None:
        interval_us = self._intervals_us[kind]
        delay_us = self._rngs[kind].randrange(interval_us // 10, interval_us)
        self._cluster.queue.after(delay_us, lambda: self._begin(kind))

    def _begin(self, kind: str) -> None:
        if self._over:
            return
        rng = self._rngs[kind]
        begun = FAULTS[kind](self._cluster, rng)
        if begun is not None:
            heal, duration_s = begun
            self.fired[kind] += 1
            self._number += 1
            number = self._number
            self._heals[number] = heal
            self._cluster.queue.after(int(duration_s * 1e6), lambda: self._end(number))
        self._schedule(kind)

    def _end(self, number: int) -> None:
        heal = self._heals.pop(number, None)
        if heal is not None:
            heal()


# --- the kinds: each returns how to end it and after how many seconds, or None if it cannot be done now ---

Begun = tuple[Heal, float] | None


def _lose(cluster: Cluster, rng: Random) -> Begun:
    loss = rng.uniform(0.02, 0.3)
    cluster.note(None, f"loses {loss:.0%} of packets")

    def heal() -> None:
        cluster.conditions.loss = cluster.conditions.usual_loss
        cluster.note(None, "loses no more packets than usual")

    cluster.conditions.loss = max(loss, cluster.conditions.usual_loss)
    return heal, rng.uniform(2, 10)


def _duplicate(cluster: Cluster, rng: Random) -> Begun:
    cluster.conditions.duplicate = rng.uniform(0.05, 0.5)
    cluster.note(None, "duplicates datagrams")

    def heal() -> None:
        cluster.conditions.duplicate = 0.0

    return heal, rng.uniform(2, 10)


def _reorder(cluster: Cluster, rng: Random) -> Begun:
    cluster.conditions.reorder_us = rng.randrange(20_000, 500_000)
    cluster.note(None, f"delays datagrams by up to {cluster.conditions.reorder_us // 1000} ms")

    def heal() -> None:
        cluster.conditions.reorder_us = 0

    return heal, rng.uniform(2, 10)


def _slow(cluster: Cluster, rng: Random) -> Begun:
    cluster.conditions.bytes_per_s = rng.randrange(4_000, 100_000)
    cluster.note(None, f"carries {cluster.conditions.bytes_per_s} bytes/s per node")

    def heal() -> None:
        cluster.conditions.bytes_per_s = BYTES_PER_S
        cluster.note(None, "is fast again")

    return heal, rng.uniform(2, 10)


def _cut(cluster: Cluster, pairs: list[tuple[int, int]], text: str) -> Heal:
    cluster.note(None, text)
    cuts = cluster.conditions.cuts
    cuts.update(pairs)

    def heal() -> None:
        cuts.subtract(pairs)
        cluster.note(None, f"no longer {text}")

    return heal


def _partition(cluster: Cluster, rng: Random) -> Begun:
    count = len(cluster.nodes)
    size = rng.randrange(1, max(2, count // 2 + 1))
    inside = sorted(rng.sample(range(count), min(size, count - 1)))
    return _isolate(cluster, inside), rng.uniform(3, 25)


def _region(cluster: Cluster, rng: Random) -> Begun:
    region = rng.randrange(min(cluster.regions, len(cluster.nodes)))
    inside = [index for index in range(len(cluster.nodes)) if index % cluster.regions == region]
    if len(inside) == len(cluster.nodes):
        return None
    return _isolate(cluster, inside), rng.uniform(5, 40)


def _isolate(cluster: Cluster, inside: list[int]) -> Heal:
    outside = [index for index in range(len(cluster.nodes)) if index not in inside]
    pairs = [pair for a in inside for b in outside for pair in ((a, b), (b, a))]
    return _cut(cluster, pairs, f"cuts {inside} off from the others")


def _oneway(cluster: Cluster, rng: Random) -> Begun:
    source = rng.randrange(len(cluster.nodes))
    targets = [index for index in range(len(cluster.nodes)) if index != source and rng.random() < 0.6]
    text = f"carries nothing from node {source} to {targets}"
    return _cut(cluster, [(source, target) for target in targets], text), rng.uniform(3, 15)


def _choose_running(cluster: Cluster, rng: Random) -> Node | None:
    node = cluster.nodes[rng.randrange(len(cluster.nodes))]
    return node if node.running else None


def _restarting(cluster: Cluster, index: int, rng: Random) -> Begun:
    return lambda: cluster.start(index), rng.choice((rng.uniform(0.1, 2), rng.uniform(2, 20)))


def _crash(cluster: Cluster, rng: Random) -> Begun:
    node = _choose_running(cluster, rng)
    if node is None:
        return None
    if rng.random() < 0.7:
        # With the next transaction, at some step of it; or by the restart, if it has none until then.
        node.fail_in_steps = rng.randrange(1, 600)
        node.dies_when_failing = True
        index = node.index

        def heal() -> None:
            if cluster.nodes[index].running:
                cluster.nodes[index].end(power=False)
            cluster.start(index)

        return heal, rng.uniform(1, 15)
    cluster.note(node.index, "is killed")
    node.end(power=False)
    return _restarting(cluster, node.index, rng)


def _power(cluster: Cluster, rng: Random) -> Begun:
    node = _choose_running(cluster, rng)
    if node is None:
        return None
    cluster.note(node.index, "loses power")
    node.end(power=True)
    return _restarting(cluster, node.index, rng)


def _pause(cluster: Cluster, rng: Random) -> Begun:
    node = _choose_running(cluster, rng)
    if node is None:
        return None
    duration_s = rng.choice((rng.uniform(0.05, 1), rng.uniform(1, 10)))
    cluster.note(node.index, f"stands still for {duration_s:.1f} s")
    node.paused_until_us = cluster.queue.now_us + int(duration_s * 1e6)

    def heal() -> None:
        pass  # it goes on by itself

    return heal, duration_s


def _clock(cluster: Cluster, rng: Random) -> Begun:
    index = rng.randrange(len(cluster.clocks))
    clock = cluster.clocks[index]
    jump_ms = rng.choice((rng.randrange(-4_000, 4_000), rng.randrange(-60_000, 20_000)))
    clock.offset_ms += jump_ms
    clock.drift_ppm = rng.randrange(-300, 300)
    cluster.note(index, f"has its clock moved by {jump_ms} ms")

    def heal() -> None:
        clock.offset_ms = 0
        clock.drift_ppm = 0
        cluster.note(index, "has its clock set right")

    return heal, rng.uniform(3, 20)


def _disk(cluster: Cluster, rng: Random) -> Begun:
    index = rng.randrange(len(cluster.disks))
    cluster.disks[index].set_full(is_full=True)
    cluster.note(index, "has a full disk")

    def heal() -> None:
        cluster.disks[index].set_full(is_full=False)
        cluster.note(index, "has room on its disk again")

    return heal, rng.uniform(1, 15)


def _io(cluster: Cluster, rng: Random) -> Begun:
    node = _choose_running(cluster, rng)
    if node is None or node.dies_when_failing:
        return None
    node.fail_in_steps = rng.randrange(1, 600)
    node.failure_lasts = rng.random() < 0.5
    cluster.note(node.index, f"has a disk that fails {node.fail_in_steps} steps into a transaction")

    def heal() -> None:
        pass  # it fails once

    return heal, 0.0


# Of the tables that are fought over: a row of the ledger that changes is torn until it is healed.
_VANDALISMS = (
    ("UPDATE contended SET n = n + 1000 WHERE k >= ?", "{}"),
    ("DELETE FROM contended WHERE k = ?", "{}"),
    ("DELETE FROM _repl_clock_contended WHERE k_k = ?", "{}"),
    ("INSERT OR IGNORE INTO contended VALUES (?, 'vandal', 0)", "{}"),
    ("UPDATE settings SET a = 'vandal' WHERE k >= ?", "s{}"),
    ("DELETE FROM settings WHERE k = ?", "s{}"),
)


def _vandal(cluster: Cluster, rng: Random) -> Begun:
    node = _choose_running(cluster, rng)
    sql, key = rng.choice(_VANDALISMS)
    key = key.format(rng.randrange(KEYS))
    if node is None or not cluster.disks[node.index].write_past_triggers(sql, key):
        return None
    cluster.note(node.index, f"has its tables changed past the triggers: {sql.replace('?', key)}")

    def heal() -> None:
        pass  # that is for the nodes to do

    return heal, 0.0


FAULTS: dict[str, Callable[[Cluster, Random], Begun]] = {
    "loss": _lose,
    "duplicate": _duplicate,
    "reorder": _reorder,
    "slow": _slow,
    "partition": _partition,
    "region": _region,
    "oneway": _oneway,
    "crash": _crash,
    "power": _power,
    "pause": _pause,
    "clock": _clock,
    "disk": _disk,
    "io": _io,
    "vandal": _vandal,
}
# Those of a run for which none are named. A vandal is left out, as tables that differ are a bug without one.
USUAL = tuple(kind for kind in FAULTS if kind != "vandal")
