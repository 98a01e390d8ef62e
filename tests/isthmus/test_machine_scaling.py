"""Which machines of a region are started and stopped by themselves."""

from __future__ import annotations

from typing import Any

import pytest

from isthmus.machines.scaling import RECENT_S, Candidate, find_turn, plan_start, plan_stop
from routing.types import MachineState

STATES = {state.value[:3]: state for state in MachineState} | {"asl": MachineState.STOPPED}


def machines(*described: str, **usual: Any) -> list[Candidate]:
    """Machines m0, m1, … from `state load`: `sta 3`, `asl`, `sus`, `dra 1`; `starting` in full."""
    made = []
    for i, text in enumerate(described):
        name, _, load = text.partition(" ")
        state = MachineState.STARTING if name == "starting" else STATES[name]
        if name == "sta":
            state = MachineState.STARTED
        values = {"idle_s": 1_000.0, "in_state_s": 1_000.0, "is_healthy": True, "has_driver": True, **usual}
        made.append(Candidate(f"m{i}", "n1", state, int(load or 0), **values))
    return made


def stop(candidates: list[Candidate], least: int = 0, idle_s: float = 300.0, turn: str = "n1") -> str | None:
    return plan_stop(candidates, "n1", soft_limit=10, least=least, idle_s=idle_s, turn=turn)


def start(candidates: list[Candidate], least: int = 0, present: tuple[str, ...] = ("n1",)) -> str | None:
    return plan_start(candidates, present, soft_limit=10, least=least)


@pytest.mark.parametrize(
    ("described", "least", "stopped"),
    [
        (["sta"], 0, "m0"),  # the last one, with nothing to do
        (["sta 1"], 0, None),
        (["sta"], 1, None),
        (["sta 5", "sta"], 0, "m1"),
        (["sta 10", "sta"], 0, None),  # the other is at its soft limit: this one is needed
        (["sta 10", "sta 2", "sta"], 0, "m2"),
        (["sta 10", "sta 10", "sta"], 0, None),
        (["sta 5", "sta"], 2, None),
        (["sta 5", "sta", "asl"], 1, "m1"),
        (["sta", "sta", "sta"], 0, "m2"),  # one at a time
        (["sta 3", "sta 4"], 0, None),  # both have something to do
        (["dra", "sta"], 1, None),  # one that drains does not count
        ([], 0, None),
    ],
)
def test_one_that_is_too_many_and_has_nothing_to_do_is_stopped(
    described: list[str], least: int, stopped: str | None
) -> None:
    assert stop(machines(*described), least) == stopped


def test_only_who_has_its_turn_and_only_what_is_idle_for_long_and_its_own_is_stopped() -> None:
    assert stop(machines("sta 1", "sta"), turn="n2") is None
    assert stop(machines("sta 1", "sta", idle_s=299.0)) is None
    assert stop([c._replace(node="n2") for c in machines("sta")]) is None
    assert stop(machines("sta", has_driver=False)) is None
    idle = machines("sta", "sta", "sta")
    idle[1] = idle[1]._replace(idle_s=2_000.0)
    assert stop(idle) == "m1"


def test_one_that_fails_its_checks_does_not_carry_the_load_of_others() -> None:
    mixed = machines("sta 1", "sta")
    assert stop(mixed, least=1) == "m1"
    mixed[0] = mixed[0]._replace(is_healthy=False)
    assert stop(mixed, least=1) is None


def test_every_owner_has_its_turn_and_all_agree_on_whose_it_is() -> None:
    turns = [find_turn(["b", "a", "c", "a"], "web", "ams", number) for number in range(6)]
    assert turns[:3] == turns[3:]
    assert set(turns) == {"a", "b", "c"}
    assert find_turn(["c", "a", "b"], "web", "ams", 4) == turns[4]
    assert find_turn([], "web", "ams", 0) == ""


@pytest.mark.parametrize(
    ("described", "least", "started"),
    [
        (["sta 10", "asl", "asl"], 0, "m1"),
        (["sta 12", "sus"], 0, "m1"),
        (["sta 9", "asl"], 0, None),
        (["sta 10", "sta 2", "asl"], 0, None),
        (["sta 10", "sta 10"], 0, None),
        (["sta 10", "starting", "asl"], 0, None),  # one is on its way
        (["asl", "asl"], 0, None),  # from nothing, requests start them
        (["asl", "asl"], 1, "m0"),
        (["sta", "asl"], 2, "m1"),
        (["sta", "dra"], 2, None),
    ],
)
def test_one_is_started_where_all_have_enough_or_there_are_too_few(
    described: list[str], least: int, started: str | None
) -> None:
    assert start(machines(*described), least) == started


def test_one_that_has_just_come_is_given_time_to_take_its_share() -> None:
    busy = machines("sta 10", "sta 10", "asl")
    busy[1] = busy[1]._replace(in_state_s=RECENT_S - 1)
    assert start(busy) is None
    busy[1] = busy[1]._replace(in_state_s=RECENT_S)
    assert start(busy) == "m2"


def test_unhealthy_ones_do_not_count_as_room() -> None:
    sick = machines("sta 10", "sta", "asl")
    sick[1] = sick[1]._replace(is_healthy=False)
    assert start(sick) == "m2"


def test_those_with_a_fault_come_last_those_of_nodes_that_are_gone_never() -> None:
    rest = machines("sta 10", "asl", "asl")
    rest[1] = rest[1]._replace(has_problem=True)
    assert start(rest) == "m2"
    assert start(rest, present=("n2",)) is None
    rest[2] = rest[2]._replace(has_driver=False)
    assert start(rest) == "m1"


def test_what_a_person_has_stopped_is_not_started_for_the_minimum_but_for_load() -> None:
    assert start(machines("asl", is_wanted_down=True), least=1) is None
    assert start(machines("sta 10", "asl", is_wanted_down=True)) == "m1"
