"""What becomes of a machine, step by step: pure, as tables."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.machines.life import (
    DRAIN_MIN_S,
    RETRY_S_MAX,
    Step,
    compute_retry_s,
    is_drained,
    plan_step,
)
from routing.types import MachineState

STARTED, STOPPED, SUSPENDED = MachineState.STARTED, MachineState.STOPPED, MachineState.SUSPENDED
DRAINING, STARTING = MachineState.DRAINING, MachineState.STARTING


def step(
    goal: MachineState, state: MachineState, in_state_s: float = 5.0, load: int = 0, drain_s: float = 10.0
) -> Step:
    return plan_step(goal, state, in_state_s, load, drain_s=drain_s, ready_s=60.0)


@pytest.mark.parametrize(
    ("goal", "steps"),
    [
        # In the order: started, starting, draining, stopped, suspended.
        (STARTED, [Step.WAIT, Step.LOOK, Step.SERVE, Step.START, Step.START]),
        (STOPPED, [Step.DRAIN, Step.STOP, Step.STOP, Step.WAIT, Step.STOP]),
        (SUSPENDED, [Step.DRAIN, Step.SUSPEND, Step.SUSPEND, Step.WAIT, Step.WAIT]),
        (DRAINING, [Step.DRAIN, Step.STOP, Step.WAIT, Step.WAIT, Step.WAIT]),
    ],
)
def test_next_step_to_each_goal(goal: MachineState, steps: list[Step]) -> None:
    assert [step(goal, state) for state in (STARTED, STARTING, DRAINING, STOPPED, SUSPENDED)] == steps


@pytest.mark.parametrize(
    ("in_state_s", "load", "drain_s", "drained"),
    [
        (0.0, 0, 10.0, False),
        (DRAIN_MIN_S, 0, 10.0, True),
        (9.9, 1, 10.0, False),
        (10.0, 1, 10.0, True),
        (0.2, 0, 0.2, True),
        (0.0, 5, 0.0, True),
    ],
)
def test_drained_when_nothing_is_left_or_its_time_is_up(
    in_state_s: float, load: int, drain_s: float, drained: bool
) -> None:
    assert is_drained(in_state_s, load, drain_s) is drained
    assert step(STOPPED, DRAINING, in_state_s, load, drain_s) is (Step.STOP if drained else Step.WAIT)


def test_one_that_does_not_answer_in_time_is_given_up() -> None:
    assert step(STARTED, STARTING, 59.9) is Step.LOOK
    assert step(STARTED, STARTING, 60.0) is Step.GIVE_UP


def test_pauses_after_failures_double_up_to_a_minute() -> None:
    assert [compute_retry_s(failures) for failures in (1, 2, 3, 7, 100)] == [1.0, 2.0, 4.0, 60.0, 60.0]
    assert compute_retry_s(0) <= RETRY_S_MAX


AFTER = {
    Step.START: STARTING,
    Step.LOOK: STARTED,
    Step.GIVE_UP: STOPPED,
    Step.SERVE: STARTED,
    Step.DRAIN: DRAINING,
    Step.STOP: STOPPED,
    Step.SUSPEND: SUSPENDED,
}
ENDS = {
    STARTED: {STARTED},
    STOPPED: {STOPPED},
    SUSPENDED: {SUSPENDED, STOPPED},
    DRAINING: {DRAINING, STOPPED, SUSPENDED},
}


@given(
    st.sampled_from([STARTED, STOPPED, SUSPENDED, DRAINING]), st.sampled_from(MachineState), st.integers(0, 3)
)
def test_every_state_comes_to_its_goal_and_none_that_serves_is_stopped_undrained(
    goal: MachineState, state: MachineState, load: int
) -> None:
    for _ in range(6):
        taken = step(goal, state, in_state_s=30.0, load=load)
        if taken in {Step.STOP, Step.SUSPEND}:
            assert state is not STARTED
        if taken is Step.WAIT:
            break
        state = AFTER[taken]
    assert state in ENDS[goal]
