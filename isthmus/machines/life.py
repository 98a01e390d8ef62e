"""What is to be done next with one machine, to bring it from the state it is in to its goal.

Decides one step at a time, and after a failure how long to wait. Refuses to know drivers and clocks.
Invariant: a machine that serves is drained before it is stopped or suspended, for `drain_s` at most.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from routing.types import MachineState

STARTED: Final = MachineState.STARTED
STOPPED: Final = MachineState.STOPPED
SUSPENDED: Final = MachineState.SUSPENDED
DRAINING: Final = MachineState.DRAINING
STARTING: Final = MachineState.STARTING

# Until all nodes know that a machine drains, and have told what they have there.
DRAIN_MIN_S: Final = 1.0
RETRY_S_FIRST: Final = 1.0
RETRY_S_MAX: Final = 60.0


class Step(Enum):
    """What the owner of a machine does next."""

    WAIT = "wait"
    START = "start"
    LOOK = "look"  # whether a machine that was started answers
    GIVE_UP = "give up"  # it has not answered in time: stop it, and start it again later
    SERVE = "serve"  # again, after it had begun to drain
    DRAIN = "drain"
    STOP = "stop"
    SUSPEND = "suspend"


def plan_step(
    goal: MachineState, state: MachineState, in_state_s: float, load: int, *, drain_s: float, ready_s: float
) -> Step:
    """Return the next step for a machine that is in a state for so long, with so much in flight."""
    step = Step.WAIT
    if goal is STARTED:
        if state is STARTING:
            step = Step.GIVE_UP if in_state_s >= ready_s else Step.LOOK
        else:
            step = _TO_START.get(state, Step.WAIT)
    elif state is STARTED:
        step = Step.DRAIN
    elif goal is not DRAINING:  # nothing more is to be done to drain: what rests has nothing to finish
        end = Step.STOP if goal is STOPPED else Step.SUSPEND
        drained = state is DRAINING and is_drained(in_state_s, load, drain_s)
        if drained or state is STARTING or (state is SUSPENDED and goal is STOPPED):
            step = end
    elif state is STARTING:
        step = Step.STOP
    return step


_TO_START: Final = {STOPPED: Step.START, SUSPENDED: Step.START, DRAINING: Step.SERVE}


def is_drained(in_state_s: float, load: int, drain_s: float) -> bool:
    """True when a machine that drains has nothing left to do, or has had its time."""
    return in_state_s >= drain_s or (not load and in_state_s >= min(DRAIN_MIN_S, drain_s))


def compute_retry_s(failures: int) -> float:
    """Return RETRY_S_FIRST * 2 ** (failures - 1), at most RETRY_S_MAX."""
    return min(RETRY_S_FIRST * 2.0 ** min(max(0, failures - 1), 16), RETRY_S_MAX)
