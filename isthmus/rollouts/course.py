"""What a node does about the rollouts that all nodes see.

Decides from the rows of rollouts and of what nodes report, by names alone, so that all nodes come to the same
without anybody who conducts them: whose turn it is, when a rollout is done, and when it goes back. Refuses to
know what is rolled out, and what time it is.

Invariant: no node of a later step begins before all nodes of the steps before it, as far as they are there,
have taken it up and lived with it; and a rollout that one node could not take goes back on all.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from isthmus.staging.rings import RINGS, find_ring, order_regions

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

# A node that is restarted, or whose agent takes up other tables, is back by then.
SILENT_MS: Final = 30_000.0
# Beyond its bake time, what a node may take before it says how it goes.
LATE_MS: Final = 180_000.0


class Kind(Enum):
    """What is rolled out."""

    CONFIG = "config"
    SCHEMA = "schema"


class Status(Enum):
    """How far a rollout is."""

    RUNNING = "running"
    DONE = "done"
    BACK = "back"


class State(Enum):
    """What a node says of a rollout."""

    TRYING = "trying"
    GOOD = "good"
    FAILED = "failed"  # and it has what it had before
    BACK = "back"


class Rollout(msgspec.Struct, frozen=True):
    """A row of `rollouts`. `steps` are names of nodes; those that are in none follow when it is done."""

    id: str
    kind: Kind
    body: str
    steps: tuple[tuple[str, ...], ...]
    bake_ms: int
    status: Status
    reason: str
    node: str  # where it was begun
    created_by: str
    created_ms: int
    finished_ms: int

    @property
    def order(self) -> tuple[int, str]:
        """The place of this rollout among all."""
        return self.created_ms, self.id


class Report(NamedTuple):
    """What one node says of a rollout."""

    state: State
    detail: str = ""
    at_ms: int = 0


class Wait(NamedTuple):
    """How long another node has been trying, as this one has seen it, and how long it has been gone for."""

    trying_ms: float
    gone_ms: float = 0.0


class Take(NamedTuple):
    """Take it up, live with it for so long, and say how it went."""

    rollout: Rollout
    bake_ms: int


class Undo(NamedTuple):
    """Go back to what was before it."""

    rollout: Rollout


class Blame(NamedTuple):
    """Write for a node that does not say so itself that it failed."""

    rollout: Rollout
    node: str
    why: str


class End(NamedTuple):
    """Write what became of a rollout."""

    rollout: Rollout
    status: Status
    reason: str = ""


Action = Take | Undo | Blame | End


def plan_steps(
    nodes: Mapping[str, str], regions: Sequence[str], canaries: Sequence[str] = ()
) -> tuple[tuple[str, ...], ...]:
    """Return who takes a rollout up with whom, in turn; nodes are names with their regions.

    `canaries` are first, if there are any; else one node of the region that gets changes first. Then come
    the others of that region, those of the second, and all others.
    """
    order = order_regions(regions, nodes.values())
    rings: list[list[str]] = [[] for _ in RINGS]
    for node in sorted(nodes):
        if node not in canaries:
            rings[find_ring(order, nodes[node])].append(node)
    first = [*canaries]
    if not first:
        ring = next(ring for ring in rings if ring)
        first.append(ring.pop(0))
    return tuple(tuple(step) for step in (first, *rings) if step)


def find_latest(rollouts: Iterable[Rollout], kind: Kind) -> Rollout | None:
    """Return what all nodes are to have."""
    done = [one for one in rollouts if one.kind is kind and one.status is Status.DONE]
    return max(done, key=lambda rollout: rollout.order, default=None)


def find_running(rollouts: Iterable[Rollout]) -> Rollout | None:
    """Return the rollout that is under way; begun on both sides of a cut, one waits for the other."""
    running = [one for one in rollouts if one.status is Status.RUNNING]
    return min(running, key=lambda rollout: rollout.order, default=None)


def plan_node(
    rollouts: Collection[Rollout],
    reports: Mapping[str, Mapping[str, Report]],
    *,
    node: str,
    present: Collection[str],
    waits: Mapping[str, Wait],
) -> Action | None:
    """Return what this node does next. reports are by rollout, then by node; waits by node that is trying.

    `present` are the nodes that take part, with this one.
    """
    for rollout in sorted(rollouts, key=lambda one: one.order):
        own = reports.get(rollout.id, {}).get(node)
        if rollout.status is Status.BACK and own is not None and own.state in {State.TRYING, State.GOOD}:
            return Undo(rollout)
    running = find_running(rollouts)
    if running is not None:
        said = reports.get(running.id, {})
        return _plan_running(running, said, node, present, waits)
    for kind in Kind:
        latest = find_latest(rollouts, kind)
        if latest is not None and node not in reports.get(latest.id, {}):
            return Take(latest, 0)
    return None


def _plan_running(
    rollout: Rollout,
    said: Mapping[str, Report],
    node: str,
    present: Collection[str],
    waits: Mapping[str, Wait],
) -> Action | None:
    leads = node == min(present)
    failed = sorted(name for name, report in said.items() if report.state is State.FAILED)
    if failed:
        return End(rollout, Status.BACK, f"{failed[0]}: {said[failed[0]].detail}") if leads else None
    if node not in said and _is_turn(rollout, said, node, present):
        return Take(rollout, rollout.bake_ms)
    if not leads:
        return None
    everybody = [name for step in rollout.steps for name in step]
    if said and all(_is_past(name, said, present) for name in everybody):
        return End(rollout, Status.DONE)
    return _find_lost(rollout, waits)


def _find_lost(rollout: Rollout, waits: Mapping[str, Wait]) -> Blame | None:
    for name, wait in sorted(waits.items()):
        if wait.gone_ms >= SILENT_MS:
            return Blame(rollout, name, "it is gone since it has begun to try")
        if wait.trying_ms >= rollout.bake_ms + LATE_MS:
            return Blame(rollout, name, "it does not say how it goes")
    return None


def _is_turn(rollout: Rollout, said: Mapping[str, Report], node: str, present: Collection[str]) -> bool:
    for step in rollout.steps:
        if node in step:
            return True
        if not all(_is_past(name, said, present) for name in step):
            return False
    return False  # it came later, and follows when all is done


def _is_past(name: str, said: Mapping[str, Report], present: Collection[str]) -> bool:
    """True when nobody waits for a node: it has passed, or it is not there and has not begun."""
    if name in said:
        return said[name].state is State.GOOD
    return name not in present
