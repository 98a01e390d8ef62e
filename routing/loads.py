"""How much is in flight at a machine: what a worker tells its node, and a node the others.

Decides what is worth telling and to whom; refuses to know sockets, rows and time. What others have is known
late and roughly: that is what it costs to ask nobody before a request is sent. Invariant: a count that was
told and is no longer true is corrected, or belongs to a worker or node that is gone and does not count.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .target import Target

# A node tells the others of a machine when what it has there differs from what it told by this share of the
# soft limit, and by one request at least.
STEP_SHARE: Final = 1 / 20
# A difference as large as this is no noise: it is told as it is. Smaller ones are smoothed first.
JUMP_SHARE: Final = 1 / 4
# Weight of the newest of ten looks a second: three tenths of a second to follow a change.
SMOOTHING: Final = 0.3
# What all nodes together may write; what differs most goes first. A node takes in far more in a second
# than that.
ROWS_PER_S_MAX: Final = 5_000
# How long a row that says zero is kept, as a machine that was busy will be busy again.
IDLE_MS: Final = 600_000

Counts = list[tuple[str, int]]


class Busy:
    """The machines at which a worker has, or has just had, something in flight."""

    __slots__ = ("_told", "_watched")

    def __init__(self) -> None:
        self._watched: list[Target] = []
        self._told: dict[str, int] = {}  # what the agent has for us; never zero

    def enter(self, target: Target) -> None:
        """Count one more at a machine. Who leaves it subtracts from `in_flight`."""
        target.in_flight += 1
        if not target.watched:
            target.watched = True
            self._watched.append(target)

    def forget_told(self) -> None:
        """The next agent knows of nothing."""
        self._told.clear()

    def collect(self) -> Counts:
        """Return what has changed since the last call."""
        changed: Counts = []
        still: list[Target] = []
        told = self._told
        for target in self._watched:
            count = target.in_flight
            if count:
                still.append(target)
            else:
                target.watched = False
            if count != told.get(target.id, 0):
                changed.append((target.id, count))
                if count:
                    told[target.id] = count
                else:
                    del told[target.id]
        self._watched = still
        return changed


class NodeLoads:
    """What all workers of a node have in flight, in its agent."""

    def __init__(self) -> None:
        self.totals: dict[str, int] = {}  # of all workers; never zero
        self._workers: dict[str, dict[str, int]] = {}  # what each has; never zero
        self._said: dict[str, dict[str, int]] = {}  # what each was told that the others have; never zero
        self._changed: dict[str, None] = {}  # machines whose total changed since `plan_shares`
        self._smooth: dict[str, float] = {}  # totals as the others are to know them
        self._written: dict[str, tuple[int, int]] = {}  # in the rows: count, and when it was written

    def add_worker(self, worker: str) -> None:
        """A worker follows: it has nothing yet, and has been told nothing."""
        self._workers[worker] = {}
        self._said[worker] = {}
        self._changed.update(dict.fromkeys(self.totals))

    def drop_worker(self, worker: str) -> None:
        """A worker is gone, and with it what it had."""
        had = self._workers.pop(worker, {})
        self._said.pop(worker, None)
        for machine, count in had.items():
            self._add(machine, -count)

    def handle_counts(self, worker: str, counts: Iterable[tuple[str, int]]) -> None:
        """Take what a worker has now at these machines."""
        own = self._workers[worker]
        for machine, count in counts:
            self._add(machine, count - own.get(machine, 0))
            _put(own, machine, count)

    def _add(self, machine: str, difference: int) -> None:
        _put(self.totals, machine, self.totals.get(machine, 0) + difference)
        self._changed[machine] = None

    def plan_shares(self) -> tuple[dict[str, Counts], Counts]:
        """Return what each worker has to be told of the others, and all totals that changed."""
        changed = [(machine, self.totals.get(machine, 0)) for machine in self._changed]
        self._changed = {}
        shares: dict[str, Counts] = {}
        for worker, own in self._workers.items():
            said = self._said[worker]
            share = [(machine, total - own.get(machine, 0)) for machine, total in changed]
            share = [(machine, others) for machine, others in share if others != said.get(machine, 0)]
            for machine, others in share:
                _put(said, machine, others)
            if share:
                shares[worker] = share
        return shares, changed

    def smooth(self, soft_limit: Callable[[str], int]) -> None:
        """Follow the totals. Call it ten times a second."""
        for machine in self._smooth.keys() | self.totals.keys():
            total, before = self.totals.get(machine, 0), self._smooth.get(machine, 0.0)
            if abs(total - before) >= soft_limit(machine) * JUMP_SHARE:
                now = float(total)
            else:
                now = before + (total - before) * SMOOTHING
            if total or now > 0.01:
                self._smooth[machine] = now
            else:
                del self._smooth[machine]

    def plan_writes(
        self, now_ms: int, soft_limit: Callable[[str], int], rows_max: int
    ) -> tuple[Counts, list[str]]:
        """Return which rows to write, those that differ most first, and which to remove.

        Call `confirm` when that is done.
        """
        differing: list[tuple[float, str]] = []
        for machine in self._smooth.keys() | self._written.keys():
            written = self._written.get(machine, (0, 0))[0]
            load, limit = self._smooth.get(machine, 0.0), soft_limit(machine)
            off = abs(load - written)
            # A little less than a whole one, or a load of nearly one would be none.
            if off >= max(0.75, limit * STEP_SHARE) or (load < 0.5 and written):
                differing.append((-off / limit, machine))
        differing.sort()
        writes = [(machine, round(self._smooth.get(machine, 0.0))) for _, machine in differing[:rows_max]]
        busy = {machine for machine, count in writes if count}
        idle = [
            machine
            for machine, (count, at_ms) in self._written.items()
            if not count and at_ms <= now_ms - IDLE_MS and machine not in busy
        ]
        return writes, idle

    def confirm(self, now_ms: int, writes: Counts, removed: Iterable[str]) -> None:
        """The rows say this now."""
        self._written.update({machine: (count, now_ms) for machine, count in writes})
        for machine in removed:
            del self._written[machine]


def compute_rows_max(nodes: int, interval_s: float) -> int:
    """Return how many rows one of these nodes may write in an interval."""
    return max(1, int(ROWS_PER_S_MAX * interval_s / max(1, nodes)))


def _put(counts: dict[str, int], machine: str, count: int) -> None:
    if count:
        counts[machine] = count
    else:
        counts.pop(machine, None)
