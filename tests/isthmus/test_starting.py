from __future__ import annotations

from typing import TYPE_CHECKING, Any

from isthmus.starting import ASK_S, ASKED_MAX, MachineStarter
from tests.routing.rows import row, table_with

if TYPE_CHECKING:
    from routing.target import Target


class Agent:
    """Records what it is asked."""

    def __init__(self) -> None:
        self.asked: list[list[Any]] = []
        self.is_there = True
        self.now = 100.0
        self.starter = MachineStarter(self._ask, lambda: self.now)

    def _ask(self, message: list[Any]) -> bool:
        if self.is_there:
            self.asked.append(message)
        return self.is_there


def machine(name: str = "m1", state: str = "stopped") -> Target:
    target = table_with(row("machines", id=name, state=state, driver="process")).machine(name)
    assert target is not None
    return target


def test_a_machine_is_asked_for_once_in_a_while_however_many_wait() -> None:
    agent = Agent()
    assert [agent.starter.start(machine()) for _ in range(50)] == [True] * 50
    assert agent.asked == [["start", "m1"]]
    agent.starter.start(machine("m2"))
    agent.now += ASK_S
    agent.starter.start(machine())
    assert agent.asked == [["start", "m1"], ["start", "m2"], ["start", "m1"]]


def test_nobody_is_asked_for_one_that_is_on_its_way() -> None:
    agent = Agent()
    assert agent.starter.start(machine(state="starting"))
    assert agent.asked == []


def test_without_an_agent_nothing_is_waited_for_until_it_is_back() -> None:
    agent = Agent()
    agent.is_there = False
    assert not agent.starter.start(machine())
    assert not agent.starter.start(machine())
    agent.is_there = True
    assert agent.starter.start(machine())
    assert agent.asked == [["start", "m1"]]


def test_what_is_remembered_is_bounded() -> None:
    agent = Agent()
    target = machine()
    for i in range(ASKED_MAX + 10):
        target.id = f"m{i}"
        agent.starter.start(target)
    assert len(agent.starter._asked) <= ASKED_MAX
    assert len(agent.asked) == ASKED_MAX + 10
