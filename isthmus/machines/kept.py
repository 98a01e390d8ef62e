"""One machine that the keeper of its node looks after: what is known of it, and the steps of its life.

Decides what a step does with the driver and what is then true. Refuses to know rows: it says what they should
be. Invariant: one step at a time; after a failure there is a problem to be read, and a pause.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from isthmus.machines.driver import Driver, DriverError, Machine
from isthmus.machines.life import Step, compute_retry_s
from routing.types import MachineState

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Callable

    from isthmus.checking.probe import Outcome

log = logging.getLogger(__name__)

PROBLEM_CHARS_MAX = 300
# A machine that has served for so long, and then ends, has not failed again but anew.
STABLE_S = 60.0
# Much more often than checks: somebody waits for it.
LOOK_S = 0.1


class Kept:
    """A machine with a driver that this node owns. Times are those of the event loop.

    `task` is set while a step is under way, `found` once the driver was asked what is true.
    """

    def __init__(
        self, machine: Machine, driver: Driver, state: MachineState, now: float, version: int = 0
    ) -> None:
        self.machine = machine
        self.driver = driver
        self.state = state
        self.since = now  # of the state
        self.problem = ""
        self.version = version  # of the release that it was last started with
        self.found = False
        self.task: asyncio.Task[None] | None = None
        self.busy_at = now  # when it last had something in flight
        self.failures = 0  # in a row
        self.not_before = now  # after a failure
        self.next_poll = now
        self.written: tuple[MachineState, str, int] | None = None
        self.wants_down = False  # it has ended, and is not to be started again
        self.is_changed = False  # its command is another one since it was started; until it is stopped

    @property
    def says(self) -> tuple[MachineState, str, int]:
        """What its row should say."""
        return self.state, self.problem, self.version

    def come(self, state: MachineState, now: float, problem: str = "") -> None:
        """Be in a state."""
        if state is not self.state or problem:
            shown = {"machine": self.machine.id, "state": state.value, "was": self.state.value}
            log.info("machine", extra={**shown, **({"problem": problem} if problem else {})})
        if state is not self.state:
            self.since = self.busy_at = now
        self.state = state
        self.problem = problem[:PROBLEM_CHARS_MAX]

    def fail(self, state: MachineState, now: float, problem: str) -> None:
        """Be in a state by a failure: the next step has to wait."""
        if self.state is MachineState.STARTED and now - self.since > STABLE_S:
            self.failures = 0
        self.failures += 1
        self.not_before = now + compute_retry_s(self.failures)
        self.come(state, now, problem)

    async def find(self, clock: Callable[[], float]) -> None:
        """Ask the driver what is true of a machine of which only the row is known."""
        running = await self.driver.is_running(self.machine)
        serving = {MachineState.STARTED, MachineState.DRAINING, MachineState.STARTING}
        if running and self.state not in serving:
            self.come(MachineState.STARTING, clock())
        elif running is False and self.state in serving:
            self.come(MachineState.STOPPED, clock())
        self.found = True

    async def poll(self, clock: Callable[[], float]) -> None:
        """Look whether it runs as it should."""
        self.next_poll = clock() + self.driver.poll_s
        running = await self.driver.is_running(self.machine)
        rests = self.state in {MachineState.STOPPED, MachineState.SUSPENDED}
        if running and rests:
            self.come(MachineState.STARTING, clock())  # by somebody else
        elif running is False and not rests:
            why, again = self.driver.explain_end(self.machine)
            self.wants_down = not again
            self.fail(MachineState.STOPPED, clock(), why)

    async def step(
        self, step: Step, look: Callable[[Kept], Awaitable[Outcome]], clock: Callable[[], float]
    ) -> None:
        """Carry a step out. Raises DriverError."""
        match step:
            case Step.START:
                self.come(MachineState.STARTING, clock())
                await self._start(clock)
            case Step.LOOK:
                outcome = await look(self)
                self.not_before = clock() + LOOK_S
                if outcome.passed:
                    self.failures = 0
                    self.come(MachineState.STARTED, clock())
                else:
                    self.problem = outcome.summary[:PROBLEM_CHARS_MAX]
            case Step.GIVE_UP:
                problem = f"does not answer in time: {self.problem}"
                await self.driver.stop(self.machine)
                self.fail(MachineState.STOPPED, clock(), problem)
            case Step.SERVE:
                self.come(MachineState.STARTED, clock())
            case Step.DRAIN:
                self.come(MachineState.DRAINING, clock())
            case Step.STOP:
                await self.driver.stop(self.machine)
                self.come(MachineState.STOPPED, clock())
            case Step.SUSPEND:
                asleep = await self.driver.suspend(self.machine)
                self.come(MachineState.SUSPENDED if asleep else MachineState.STOPPED, clock())
            case Step.WAIT:
                pass

    async def _start(self, clock: Callable[[], float]) -> None:
        try:
            await self.driver.start(self.machine)
        except DriverError as error:
            self.fail(MachineState.STOPPED, clock(), str(error))
            raise
        self.next_poll = clock() + self.driver.poll_s
