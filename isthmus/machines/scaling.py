"""Which machines of an app are started and stopped by themselves.

Decides for one region at a time, from what all nodes know of it, so that they come to the same decision; the
owner of the machine that is named carries it out. Refuses to know clocks, rows and drivers. Invariant: never
more than one machine of a region at a time, and none that the minimum needs.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final, NamedTuple

from routing.types import MachineState

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# As on Fly: a machine that was started so lately may not have its share of the load yet.
RECENT_S: Final = 20.0


class Candidate(NamedTuple):
    """A machine as the plans see it."""

    id: str
    node: str
    state: MachineState
    load: int
    idle_s: float  # as its owner knows it; 0 for those of others
    in_state_s: float
    is_healthy: bool
    has_driver: bool
    has_problem: bool = False
    is_wanted_down: bool = False  # a person has stopped it


def plan_stop(
    machines: Iterable[Candidate], node: str, *, soft_limit: int, least: int, idle_s: float, turn: str
) -> str | None:
    """Return the machine of this node to stop in a region now, or None.

    `turn` is the node whose turn it is. As on Fly, of n machines that serve, n - (those at or over the soft
    limit + 1) are too many; one is stopped while there is any, and the last one only when it has nothing to
    do. In contrast to Fly only a machine that has had nothing to do for a while is stopped.
    """
    serving = [
        machine for machine in machines if machine.state is MachineState.STARTED and machine.is_healthy
    ]
    if node != turn or len(serving) <= least:
        return None
    over = sum(machine.load >= soft_limit for machine in serving)
    if len(serving) > 1 and len(serving) - (over + 1) < 1:
        return None
    idle = [
        machine
        for machine in serving
        if machine.node == node and machine.has_driver and not machine.load and machine.idle_s >= idle_s
    ]
    return max(idle, key=lambda machine: (machine.idle_s, machine.id)).id if idle else None


def find_turn(owners: Sequence[str], app: str, region: str, number: int) -> str:
    """Return which of the nodes may stop a machine in this pass; all of them come, one after another."""
    names = sorted(set(owners))
    digest = hashlib.blake2b(f"{app} {region}".encode(), digest_size=4).digest()
    return names[(int.from_bytes(digest, "big") + number) % len(names)] if names else ""


def plan_start(
    machines: Iterable[Candidate], present: Iterable[str], *, soft_limit: int, least: int
) -> str | None:
    """Return the machine to start in a region because those that serve have too much to do, or are too few.

    None while one is on its way, or has just come. From nothing at all machines are started by requests.
    """
    everybody = list(machines)
    serving = [m for m in everybody if m.state is MachineState.STARTED]
    if any(m.state is MachineState.STARTING for m in everybody):
        return None
    too_few = len(serving) < least
    able = [m for m in serving if m.is_healthy and m.load < soft_limit]
    too_busy = bool(serving) and not able and all(m.in_state_s >= RECENT_S for m in serving)
    if not (too_few or too_busy):
        return None
    there = frozenset(present)
    asleep = [
        m
        for m in everybody
        if m.has_driver
        and m.node in there
        and m.state in {MachineState.STOPPED, MachineState.SUSPENDED}
        and not (m.is_wanted_down and not too_busy)
    ]
    return min(asleep, key=lambda m: (m.has_problem, m.id)).id if asleep else None
