"""The owner of machines: brings each that has a driver to its goal.

Decides when to look and what to write. Refuses to know what drivers do, and who wants what. Invariant: only
the owner of a machine calls its driver and writes its state; anybody may write its goal.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from isthmus.checking.definition import Definition, read_definitions
from isthmus.checking.probe import Outcome, Prober
from isthmus.config_machines import PROCESS, SHUT_DOWN_DRAIN_S, CheckConfig
from isthmus.machines.driver import Driver, DriverError, Machine
from isthmus.machines.kept import Kept
from isthmus.machines.life import Step, plan_step
from routing.types import MachineState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from isthmus.config_machines import MachinesConfig
    from isthmus.machines.goals import Goals
    from isthmus.registry import Database, Statement
    from replication.core.change import Commit
    from replication.metrics import Sample
    from routing.table import RoutingTable
    from routing.target import Target

log = logging.getLogger(__name__)

METRICS: Final[Mapping[str, tuple[str, str]]] = {
    "isthmus_machines_owned": ("gauge", "Machines of this node that have a driver, by state"),
    "isthmus_machine_steps_total": ("counter", "What was done with machines that have a driver, by result"),
}

TICK_S: Final = 0.1
RETRY_WRITE_S: Final = 1.0

_WRITE: Final = (
    "UPDATE machines SET state = ?, since_ms = ?, problem = ?, version = ? WHERE id = ? AND node = ?"
)
_RESTING: Final = frozenset((MachineState.STOPPED, MachineState.SUSPENDED))


class Keeper:
    """Looks after the machines of one node. `drivers` are by the name that rows have."""

    def __init__(
        self,
        table: RoutingTable,
        database: Database,
        prober: Prober,
        drivers: Mapping[str, Driver],
        goals: Goals,
        *,
        node: str,
        settings: MachinesConfig,
        clock_ms: Callable[[], int],
    ) -> None:
        self._table = table
        self._database = database
        self._prober = prober
        self._drivers = drivers
        self._goals = goals
        self._node = node
        self._settings = settings
        self._clock_ms = clock_ms
        self._kept: dict[str, Kept] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._running: asyncio.Task[None] | None = None
        self._writing: asyncio.Task[None] | None = None
        self._wakes = asyncio.Event()  # set when one of its machines has another goal
        self._steps: Counter[tuple[str, str]] = Counter()

    async def start(self) -> None:
        """Begin to look after them."""
        self._review(target.id for target in self._table.targets())
        self._running = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Do nothing more; machines stay as they are."""
        for task in (self._running, self._writing, *self._tasks):
            if task is not None:
                task.cancel()
        tasks = [task for task in (self._running, self._writing, *self._tasks) if task is not None]
        await asyncio.gather(*tasks, return_exceptions=True)
        self._running = None

    async def shut_down(self, *, alone: bool) -> None:
        """Stop looking after machines, and end the processes of this node.

        Unless it is alone, others are told first, and may finish what they have there.
        """
        await self.stop()
        ending = [kept for kept in self._kept.values() if kept.driver is self._drivers.get(PROCESS)]
        if not ending:
            return
        now = self._now()
        for kept in ending:
            if kept.state is MachineState.STARTED:
                kept.come(MachineState.DRAINING, now)
        await self._write_states()
        if not alone:
            await asyncio.sleep(min(self._settings.drain_ms / 1000, SHUT_DOWN_DRAIN_S))
        results = await asyncio.gather(
            *(kept.driver.stop(kept.machine) for kept in ending), return_exceptions=True
        )
        for kept, result in zip(ending, results, strict=True):
            problem = str(result) if isinstance(result, BaseException) else ""
            kept.come(MachineState.STOPPED, self._now(), problem)
        await self._write_states()

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    # Which machines

    def handle_commit(self, commit: Commit) -> None:
        """Look again at the machines that a commit, which the table has taken up already, is about."""
        if self._running is None:
            return
        if commit.reload:
            self._review([*(target.id for target in self._table.targets()), *self._kept])
        else:
            self._review(str(change.pk[0]) for change in commit.changes if change.table == "machines")
            if any(change.table == "goals" and change.pk[0] in self._kept for change in commit.changes):
                self._wakes.set()

    def _review(self, machines: Iterable[str]) -> None:
        for machine in machines:
            target = self._table.machine(machine)
            driver = self._drivers.get(target.driver) if target is not None else None
            kept = self._kept.get(machine)
            if target is None or driver is None or target.node != self._node:
                if kept is not None:
                    self._leave(self._kept.pop(machine))
            elif kept is None or kept.driver is not driver:
                described = _describe(self._table, target)
                self._kept[machine] = Kept(described, driver, target.state, self._now(), target.version)
            else:
                release = kept.machine.release
                kept.machine = _describe(self._table, target)._replace(release=release)
                if (target.state, target.problem, target.version) != kept.written:
                    kept.written = None  # somebody else has written the row: it is put right

    def _leave(self, kept: Kept) -> None:
        """Let go of a machine that is ours no more; a process of ours goes with its row."""
        if kept.task is not None:
            kept.task.cancel()
        if kept.driver is self._drivers.get(PROCESS):
            self._spawn(self._stop_quietly(kept))

    async def _stop_quietly(self, kept: Kept) -> None:
        try:
            await kept.driver.stop(kept.machine)
        except DriverError as error:
            log.warning(
                "a machine cannot be stopped", extra={"machine": kept.machine.id, "error": str(error)}
            )

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def restart(self, machines: Iterable[str]) -> None:
        """Have machines end whose command is another one now, as one that is to run another release does."""
        for machine in machines:
            kept = self._kept.get(machine)
            if kept is not None:
                kept.is_changed = True
                kept.failures, kept.not_before = 0, self._now()  # those were of the command before

    # Steps

    async def _run(self) -> None:
        while True:
            try:
                self._tick()
            except Exception:
                log.exception("machines are not looked after")
            self._wakes.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self._wakes.wait()

    def _tick(self) -> None:
        now = self._now()
        for kept in self._kept.values():
            if self._load(kept):
                kept.busy_at = now
            # What its last start failed with says nothing of another release.
            is_due = now >= kept.not_before or (
                kept.state is MachineState.STOPPED and self._is_outdated(kept)
            )
            if kept.task is None and is_due:
                self._advance(kept, now)
        self._write_changed()

    def _advance(self, kept: Kept, now: float) -> None:
        if not kept.found:
            kept.task = self._spawn(self._do(kept, None))
            return
        if kept.wants_down:
            kept.wants_down = False
            if self._goal(kept) is MachineState.STARTED:
                self._goals.put(kept.machine.id, MachineState.STOPPED, "ended")
            return
        if kept.state is MachineState.STOPPED:
            kept.is_changed = False
            self._take_release(kept)
        settings = self._settings
        step = plan_step(
            self._goal(kept),
            kept.state,
            now - kept.since,
            self._load(kept),
            drain_s=settings.drain_ms / 1000,
            ready_s=settings.ready_timeout_ms / 1000,
        )
        if step in {Step.WAIT, Step.LOOK} and now >= kept.next_poll:
            kept.task = self._spawn(self._do(kept, Step.WAIT))
        elif step is not Step.WAIT:
            kept.task = self._spawn(self._do(kept, step))

    async def _do(self, kept: Kept, step: Step | None) -> None:
        """Carry out one step; None finds out what is true, and WAIT looks whether it still is."""
        name = "find" if step is None else step.value
        try:
            if step is None:
                await kept.find(self._now)
            elif step is Step.WAIT:
                await kept.poll(self._now)
            else:
                await kept.step(step, self._look, self._now)
            result = "done"
        except DriverError as error:
            result = "failed"
            if step is not Step.START:  # which has said so already
                kept.fail(kept.state, self._now(), str(error))
        except Exception as error:
            log.exception("a step of a machine failed", extra={"machine": kept.machine.id, "step": name})
            result = "failed"
            kept.fail(kept.state, self._now(), repr(error))
        finally:
            kept.task = None
        if step not in {None, Step.WAIT, Step.LOOK}:
            self._steps[name, result] += 1
        self._write_changed()  # other nodes send requests by what they know of it

    async def _look(self, kept: Kept) -> Outcome:
        """Probe a machine that was started: all its checks must pass, or its port must be open."""
        target = self._table.machine(kept.machine.id)
        if target is None:
            return Outcome(False, "its row is gone")
        outcome = Outcome(True, "it has no port to look at")
        for definition in tuple(read_definitions(self._table, target)) or _open_port(kept.machine):
            outcome = await self._prober.probe(definition)
            if not outcome.passed:
                break
        return outcome

    def _goal(self, kept: Kept) -> MachineState:
        """Return what it is to be; a machine without a goal is to stay as it is."""
        goal = self._goals.find(kept.machine.id)
        if self._is_outdated(kept):
            return MachineState.STOPPED  # first of all, whatever it is to be then
        if goal is not None:
            return goal.state
        return MachineState.STARTED if kept.state is MachineState.STARTING else kept.state

    def _is_outdated(self, kept: Kept) -> bool:
        """True when it is to run another release or command than it does."""
        goal = self._goals.find(kept.machine.id)
        return kept.is_changed or (goal is not None and goal.version not in {None, kept.version})

    def _take_release(self, kept: Kept) -> None:
        """Have its next start be that of the release which it is to run; what failed was another one."""
        goal = self._goals.find(kept.machine.id)
        if goal is None or goal.version is None:
            return
        if goal.version != kept.version:
            kept.version, kept.failures, kept.problem, kept.not_before = goal.version, 0, "", self._now()
        kept.machine = kept.machine._replace(release=goal.release)

    def _load(self, kept: Kept) -> int:
        target = self._table.machine(kept.machine.id)
        return 0 if target is None else target.load

    # Writing

    def _write_changed(self) -> None:
        if self._writing is None and any(kept.written != kept.says for kept in self._kept.values()):
            self._writing = self._spawn(self._write_states())

    async def _write_states(self) -> None:
        try:
            now, now_ms = self._now(), self._clock_ms()
            statements: list[Statement] = []
            writing = [kept for kept in self._kept.values() if kept.written != kept.says]
            says = [(kept, kept.says) for kept in writing]
            for kept in writing:
                since_ms = now_ms - int((now - kept.since) * 1000)
                says_now = (kept.state.value, since_ms, kept.problem, kept.version)
                statements.append((_WRITE, (*says_now, kept.machine.id, self._node)))
            if statements:
                await self._database.execute(statements)
            for kept, said in says:
                kept.written = said
        except Exception:
            log.exception("states of machines could not be written; trying again")
            await asyncio.sleep(RETRY_WRITE_S)
        finally:
            self._writing = None

    # For others

    def groups(self) -> dict[tuple[str, str], None]:
        """Return the apps and regions that this node has machines in that it can start and stop."""
        return {(kept.machine.app, kept.machine.region): None for kept in self._kept.values()}

    def owns(self, machine: str) -> bool:
        """True for a machine that this node can start and stop."""
        return machine in self._kept

    def idle_s(self, machine: str) -> float:
        """Return how long one of its machines has had nothing in flight; 0 for one of others."""
        kept = self._kept.get(machine)
        return 0.0 if kept is None else self._now() - kept.busy_at

    def samples(self) -> Iterator[Sample]:
        """Yield the metrics of machines."""
        states = Counter(kept.state for kept in self._kept.values())
        for state in MachineState:
            yield "isthmus_machines_owned", (("state", state.value),), float(states[state])
        for (step, result), count in self._steps.items():
            yield "isthmus_machine_steps_total", (("step", step), ("result", result)), float(count)


def _open_port(machine: Machine) -> tuple[Definition, ...]:
    """Return what an app without checks is asked for: a connection."""
    if machine.port is None:
        return ()
    check = CheckConfig(type="tcp")
    return (Definition(machine.id, "port", machine.host, machine.port, None, b"", check),)


def _describe(table: RoutingTable, target: Target) -> Machine:
    app = table.app(target.app)
    ports = [service.internal_port for service in app.services.values()] if app is not None else []
    port = target.port or next((port for port in ports if port is not None), None)
    return Machine(target.id, target.app, target.region, target.host, port)
