"""Sets the goals of machines that nobody has asked for: for requests that wait, for load, for idleness.

Decides when to look. Refuses to know drivers; what is to be done is said by `scaling`. Invariant: for a
request any node may set a goal, for load and idleness only the owner of the machine.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from isthmus.machines.scaling import Candidate, find_turn, plan_start, plan_stop
from routing.scaling import USUAL, Scaling
from routing.table import ANY_PORT
from routing.types import MachineState

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from isthmus.machines.goals import Goals
    from isthmus.machines.keeper import Keeper
    from routing.table import RoutingTable, Service
    from routing.target import Target

log = logging.getLogger(__name__)

# How often loads are looked at to start more machines.
LOOK_S: Final = 1.0
# How often a machine of a region is stopped: four times in the idle time, and at least so often.
STOP_S_MAX: Final = 30.0

_RESTING: Final = frozenset((MachineState.STOPPED, MachineState.SUSPENDED))


class Scaler:
    """Looks after the number of machines that run. `present` has the nodes that are there."""

    def __init__(
        self,
        table: RoutingTable,
        keeper: Keeper,
        goals: Goals,
        present: Callable[[], Collection[str]],
        *,
        node: str,
        idle_s: float,
        clock_ms: Callable[[], int],
    ) -> None:
        self._table = table
        self._keeper = keeper
        self._goals = goals
        self._get_present = present
        self._node = node
        self._idle_s = idle_s
        self._clock_ms = clock_ms
        self._stop_s = min(STOP_S_MAX, idle_s / 4)
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to look."""
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(self._repeat(LOOK_S, self.scale_up)),
            loop.create_task(self._repeat(self._stop_s, self.scale_down)),
        ]

    async def stop(self) -> None:
        """Look no more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _repeat(self, interval_s: float, look: Callable[[], None]) -> None:
        while True:
            await asyncio.sleep(interval_s)
            try:
                look()
            except Exception:
                log.exception("the number of machines is not looked after")

    @property
    def _present(self) -> Collection[str]:
        return self._get_present()

    def start_for_request(self, machine: str) -> None:
        """A worker has requests that only this machine could take; one of a node that is gone is replaced."""
        target = self._table.machine(machine)
        if target is not None and target.node not in self._present:
            target = self._find_other(target)
        if target is None or target.state is MachineState.STARTED or target.cordoned:
            return
        goal = self._goals.find(target.id)
        if goal is None or goal.state in _RESTING:
            self._goals.put(target.id, MachineState.STARTED, "request")

    def _find_other(self, gone: Target) -> Target | None:
        app, present = self._table.app(gone.app), self._present
        others = [
            target
            for bucket in (app.buckets.values() if app is not None else ())
            for target in bucket.asleep
            if target.node in present
        ]
        return min(others, key=lambda target: (target.region != gone.region, target.id), default=None)

    def scale_up(self) -> None:
        """Start a machine of ours where those that serve have too much to do, or are too few."""
        for app, region in self._keeper.groups():
            service, scaling = self._scaling(app)
            if service is None or not scaling.autostart:
                continue
            least = _least(scaling, region)
            candidates = self._candidates(app, region)
            chosen = plan_start(candidates, self._present, soft_limit=service.soft_limit, least=least)
            if chosen is not None and self._keeper.owns(chosen):
                serving = sum(candidate.state is MachineState.STARTED for candidate in candidates)
                self._goals.put(chosen, MachineState.STARTED, "minimum" if serving < least else "load")

    def scale_down(self) -> None:
        """Stop a machine of ours in each region where one has nothing to do, if it is our turn there."""
        number = int(self._clock_ms() / 1000 / self._stop_s)
        present = self._present
        for app, region in self._keeper.groups():
            service, scaling = self._scaling(app)
            if service is None or scaling.autostop == "off":
                continue
            candidates = self._candidates(app, region)
            serving = [c for c in candidates if c.has_driver and c.state is MachineState.STARTED]
            owners = [candidate.node for candidate in serving if candidate.node in present]
            chosen = plan_stop(
                candidates,
                self._node,
                soft_limit=service.soft_limit,
                least=_least(scaling, region),
                idle_s=self._idle_s,
                turn=find_turn(owners, app, region, number),
            )
            if chosen is not None:
                rest = MachineState.SUSPENDED if scaling.autostop == "suspend" else MachineState.STOPPED
                self._goals.put(chosen, rest, "idle")

    def _scaling(self, app: str) -> tuple[Service | None, Scaling]:
        """Return the service whose limit counts: that of any port, else that of the lowest."""
        found = self._table.app(app)
        if found is None or not found.services:
            return None, USUAL
        service = found.services.get(ANY_PORT) or found.services[min(found.services)]
        return service, USUAL if service.options is None else service.options.scaling

    def _candidates(self, app: str, region: str) -> list[Candidate]:
        found = self._table.app(app)
        bucket = found.buckets.get(region) if found is not None else None
        targets = [] if bucket is None else list(bucket.targets())
        now_ms = self._clock_ms()
        return [self._describe(target, now_ms) for target in targets if not target.cordoned]

    def _describe(self, target: Target, now_ms: int) -> Candidate:
        """Return a machine as the plans see it: its goal counts as soon as it is known."""
        goal = self._goals.find(target.id) if target.driver else None
        state = target.state
        if goal is not None and state is MachineState.STARTED and goal.state is not state:
            state = MachineState.DRAINING
        elif goal is not None and state in _RESTING and goal.state is MachineState.STARTED:
            state = state if target.problem else MachineState.STARTING
        return Candidate(
            target.id,
            target.node,
            state,
            target.load,
            idle_s=self._keeper.idle_s(target.id),
            in_state_s=(now_ms - target.since_ms) / 1000,
            is_healthy=target.healthy,
            has_driver=bool(target.driver),
            has_problem=bool(target.problem),
            is_wanted_down=goal is not None and goal.reason == "command" and goal.state in _RESTING,
        )


def _least(scaling: Scaling, region: str) -> int:
    return scaling.min_running if region == scaling.primary_region else 0
