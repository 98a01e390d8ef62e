"""How the machines of a deploy are: what the table says of them, as a course wants to see it.

Decides when a machine is ready, and in which words it is not. Refuses to know what follows from that.
Invariant: a machine counts as ready only when everything that is to be checked was, and passes.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from isthmus.checking.definition import Definition, read_definitions
from isthmus.config_machines import CheckConfig
from isthmus.deploys.course import Sight
from routing.types import CheckRow, CheckStatus, GoalRow, MachineState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from isthmus.checking.probe import Prober
    from routing.table import RoutingTable
    from routing.target import Target

_RESTING: Final = frozenset((MachineState.STOPPED, MachineState.SUSPENDED))
# Why the scaler has a machine rest.
_IDLE: Final = "idle"
# Of machines that have neither a driver nor checks, the port is tried so often.
TRY_S: Final = 0.5


class Sights:
    """Looks at the machines of one deploy. `is_there(node)`: whether a node can be reached."""

    def __init__(self, table: RoutingTable, prober: Prober, is_there: Callable[[str], bool]) -> None:
        self._table = table
        self._prober = prober
        self._is_there = is_there
        self._tried: dict[str, tuple[float, str]] = {}  # when a port was tried, and what was wrong

    async def look(self, machines: Iterable[str], *, is_waiting: bool) -> dict[str, Sight]:
        """Return how these machines are, without those that are gone. Ports are tried while `is_waiting`."""
        targets = [t for machine in machines if (t := self._table.machine(machine)) is not None]
        troubles = await asyncio.gather(*(self._judge(target, is_waiting=is_waiting) for target in targets))
        pairs = zip(targets, troubles, strict=True)
        return {target.id: self._describe(target, trouble) for target, trouble in pairs}

    async def _judge(self, target: Target, *, is_waiting: bool) -> str:
        trouble = self._find_trouble(target)
        if trouble or not is_waiting or target.driver or self.has_checks(target.app):
            return trouble
        return await self._try_port(target)

    def has_checks(self, app: str) -> bool:
        """True when any service of an app has checks."""
        found = self._table.app(app)
        return found is not None and any(service.checks != "[]" for service in found.services.values())

    def rests(self, target: Target) -> bool:
        """True for a machine that is stopped because nobody needs it at the moment."""
        goal = self._goal(target)
        return target.state in _RESTING and goal is not None and goal.state in _RESTING

    def _goal(self, target: Target) -> GoalRow | None:
        goal = self._table.rows("goals").get((target.id,))
        return goal if isinstance(goal, GoalRow) else None

    def _describe(self, target: Target, trouble: str) -> Sight:
        goal = self._goal(target)
        is_lost = bool(target.driver) and not self._is_there(target.node)
        return Sight(
            target.state,
            target.version,
            bool(target.driver),
            not trouble,
            f"its node {target.node} is gone" if is_lost else trouble,
            target.problem,
            target.since_ms,
            target.load,
            goal is not None and goal.state in _RESTING and (goal.reason == _IDLE or self.rests(target)),
            None if goal is None else goal.version,
            target.cordoned,
        )

    def _find_trouble(self, target: Target) -> str:
        if target.state is not MachineState.STARTED:
            return f"{target.state.value}{': ' if target.problem else ''}{target.problem}"
        try:
            names = [definition.name for definition in read_definitions(self._table, target)]
        except ValueError as error:
            return f"a check cannot be read: {error}"
        for name in names:
            check = self._table.rows("checks").get((target.id, name))
            if not isinstance(check, CheckRow):
                # Its driver has seen all of them pass before it said that it is started.
                if not target.driver:
                    return f"check {name} has no result yet"
            elif check.status is CheckStatus.CRITICAL:
                return f"check {name} is critical: {check.output}"
        return ""

    async def _try_port(self, target: Target) -> str:
        now = asyncio.get_running_loop().time()
        at, trouble = self._tried.get(target.id, (0.0, ""))
        if now - at >= TRY_S:
            trouble = await self._probe(target)
            self._tried[target.id] = (now, trouble)
        return trouble

    async def _probe(self, target: Target) -> str:
        app = self._table.app(target.app)
        services = app.services.values() if app is not None else ()
        port = next(
            (p for service in services if (p := service.upstream_port(target)) is not None), target.port
        )
        if port is None:
            return "it has no port to look at"
        check = CheckConfig(type="tcp")
        outcome = await self._prober.probe(Definition(target.id, "port", target.host, port, None, b"", check))
        return "" if outcome.passed else outcome.summary
