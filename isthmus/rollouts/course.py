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


class End(NamedTuple):
    """Write what became of a rollout."""

    rollout: Rollout
    status: Status
    reason: str = ""


Action = Take | Undo | End


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
    """Return the rollout that is under way; of those that were begun on both sides of a cut, the first."""
    running = [one for one in rollouts if one.status is Status.RUNNING]
    return min(running, key=lambda rollout: rollout.order, default=None)


def _find_overtaken(rollouts: Collection[Rollout], first: Rollout) -> End | None:
    """Return the end of one that makes no sense beside what was begun beyond a cut.

    Nodes that have tried one must not lay another over it, which would then be taken back with it.
    """
    for one in sorted(rollouts, key=lambda one: one.order):
        if one.status is Status.RUNNING and one is not first:
            return End(one, Status.BACK, f"rollout {first.id} was begun before it, beyond a cut")
    latest = find_latest(rollouts, first.kind)
    if latest is not None and latest.order > first.order:
        return End(first, Status.BACK, f"rollout {latest.id} was begun after it, beyond a cut, and is done")
    return None


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
    over: set[Kind] = set()  # of which something is here that lies over what came before
    is_trying = False
    for rollout in sorted(rollouts, key=lambda one: one.order, reverse=True):
        own = reports.get(rollout.id, {}).get(node)
        if own is not None and own.state in {State.TRYING, State.GOOD} and rollout.kind not in over:
            if rollout.status is Status.BACK:
                return Undo(rollout)
            over.add(rollout.kind)
            is_trying |= own.state is State.TRYING
    running = find_running(rollouts)
    if running is not None:
        overtaken = _find_overtaken(rollouts, running)
        if overtaken is not None:
            return overtaken if node == min(present) else None
        said = reports.get(running.id, {})
        action = _plan_running(running, said, node, present, waits)
        return None if is_trying and isinstance(action, Take) else action
    for kind in Kind:
        latest = find_latest(rollouts, kind)
        own = None if latest is None else reports.get(latest.id, {}).get(node)
        # Of two nodes that end one at once the later word counts, and some may have gone back by then.
        if latest is not None and not is_trying and (own is None or own.state is State.BACK):
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


def _find_lost(rollout: Rollout, waits: Mapping[str, Wait]) -> End | None:
    # What a node reports stays its own word: it may be well, beyond a cut, and has to go back as others do.
    for name, wait in sorted(waits.items()):
        if wait.gone_ms >= SILENT_MS:
            return End(rollout, Status.BACK, f"{name}: it is gone since it has begun to try")
        if wait.trying_ms >= rollout.bake_ms + LATE_MS:
            return End(rollout, Status.BACK, f"{name}: it does not say how it goes")
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
