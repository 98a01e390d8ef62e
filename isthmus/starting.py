"""A worker has machines started: it asks its agent, which sets their goal.

Decides how often one machine is asked for. Refuses to know what becomes of it: the table tells, or the time
of who waits is up. Invariant: whatever number of requests waits, a machine is asked for once in ASK_S.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from routing.types import MachineState

if TYPE_CHECKING:
    from collections.abc import Callable

    from routing.target import Target

# A message that is lost with its agent is sent again so soon.
ASK_S: Final = 1.0
# Machines remembered as asked for; beyond it they are forgotten, and asked for again.
ASKED_MAX: Final = 4_096


class MachineStarter:
    """`ask` sends the agent a message, and says whether it is there."""

    def __init__(self, ask: Callable[[list[Any]], bool], clock: Callable[[], float]) -> None:
        self._ask = ask
        self._clock = clock
        self._asked: dict[str, float] = {}  # when each may be asked for again

    def start(self, machine: Target) -> bool:
        """Ask its owner to start a machine, however often; False when nobody can be asked."""
        if machine.state is MachineState.STARTING:
            return True
        now = self._clock()
        if self._asked.get(machine.id, now) > now:
            return True
        if not self._ask(["start", machine.id]):
            return False
        if len(self._asked) >= ASKED_MAX:
            self._asked.clear()
        self._asked[machine.id] = now + ASK_S
        return True
