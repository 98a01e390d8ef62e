"""The course of one deploy: what comes next, when something is wrong, and the way back.

Decides from what is seen of the machines and of the time; returns one action at a time, which the shell makes
one transaction of. Refuses to know rows, drivers and clocks. Invariant: the action and the position that it
leads to are written together, so whoever goes on after a crash does so where the last one was; and every step
may be taken twice.

Each batch is prepared (its new machines run, without requests), gets the requests of the old ones in one
transaction, is watched, and then the old ones are retired. The way back is the same with old and new machines
exchanged, from the batch that failed to the first one.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from isthmus.deploys.plan import Batch
from isthmus.machines.life import is_drained
from routing.types import MachineState

if TYPE_CHECKING:
    from collections.abc import Mapping

_RESTING: Final = frozenset((MachineState.STOPPED, MachineState.SUSPENDED))
# How long old machines with a driver may take to stop beyond their drain. The new ones serve by then, so it
# is told, and goes on.
STOP_S: Final = 60.0
# What somebody else has written over at the same moment is written again after so long.
INSIST_S: Final = 2.0


class Settings(msgspec.Struct, frozen=True):
    """How long things may take, in seconds."""

    ready_s: float = 300.0  # until new machines pass their checks
    settle_s: float = 10.0  # until all nodes have heard of a change
    watch_s: float = 2.0  # with requests, before the old ones go
    first_watch_s: float = 2.0  # the same for the first batch
    drain_s: float = 10.0  # what old machines without a driver may have in flight for


class Stage(Enum):
    """What is to be done with a batch, or waited for."""

    PREPARE = "prepare"
    READY = "ready"
    KNOWN = "known"
    WATCH = "watch"
    DRAIN = "drain"
    OVER = "over"


class Status(Enum):
    """What became of a release."""

    RUNNING = "running"
    ROLLING_BACK = "rolling back"
    COMPLETE = "complete"
    ROLLED_BACK = "rolled back"
    FAILED = "failed"  # and could not be rolled back as a whole
    ABANDONED = "abandoned"  # another deploy took over


class Position(msgspec.Struct, frozen=True):
    """How far it is.

    `failed` is the batch that failed, `flipped` whether it had got requests by then, and `left` why some
    could not be rolled back.
    """

    index: int = 0
    stage: Stage = Stage.PREPARE
    failed: int | None = None
    flipped: bool = False
    left: tuple[str, ...] = ()

    @property
    def is_back(self) -> bool:
        """True on the way back."""
        return self.failed is not None


class Sight(NamedTuple):
    """A machine as it is seen now."""

    state: MachineState
    version: int
    has_driver: bool
    is_ready: bool  # it runs and all its checks pass
    trouble: str  # why it is not ready
    problem: str  # what its driver says is wrong
    since_ms: int  # when it came into its state
    load: int
    rests_by_itself: bool = False  # nobody needs it at the moment
    wanted: int | None = None  # the version that its goal says
    cordoned: bool = False


class Kind(Enum):
    """What the shell has to do."""

    PREPARE = "prepare"
    FLIP = "flip"
    RETIRE = "retire"
    REST = "rest"  # nothing is in flight at the old ones any more
    NEXT = "next"  # nothing but to go on
    TURN_BACK = "turn back"
    FINISH = "finish"


class Action(NamedTuple):
    """One transaction, and the position that it leads to. `batch` is as it is on this way, `told` a line."""

    kind: Kind
    batch: Batch
    then: Position
    told: str
    status: Status = Status.RUNNING
    problem: str = ""


class Course:
    """One deploy. `version` is what machines with a driver are to run, `before` the same on the way back.

    `lines` are what is to be told and has no action; whoever reads them empties them. `problem` is why it
    went back, or is about to.
    """

    def __init__(
        self,
        batches: tuple[Batch, ...],
        settings: Settings,
        *,
        version: int,
        before: int,
        position: Position | None = None,
        problem: str = "",
    ) -> None:
        self.position = position or Position()
        self.problem = problem
        self.lines: list[str] = []
        self._batches = batches
        self._settings = settings
        self._version = version
        self._before = before
        self._since: float | None = None  # when it came to its position; None until it is looked at there
        self._insisted = 0.0
        self._seen: dict[str, tuple[int, str]] = {}  # of machines, as they were when they were prepared

    @property
    def version(self) -> int:
        """What machines with a driver are to run on this way."""
        return self._before if self.position.is_back else self._version

    def way(self) -> tuple[Batch, ...]:
        """Return the batches of this way, in its order."""
        failed = self.position.failed
        if failed is None:
            return self._batches
        return tuple(Batch(batch.new, batch.old) for batch in reversed(self._batches[: failed + 1]))

    def arrive(self, action: Action) -> None:
        """An action was carried out."""
        if action.then != self.position:
            self._since = None
        self.position = action.then
        self.problem = action.problem or self.problem

    def cancel(self, problem: str) -> Action | None:
        """Return what turns it back, unless it goes back already or is over."""
        position = self.position
        return None if position.is_back or position.stage is Stage.OVER else self._fail(problem)

    def step(self, now: float, sights: Mapping[str, Sight], *, is_known: bool) -> Action | None:
        """Return what is to be done now. `is_known`: all nodes have heard of what was last written."""
        position = self.position
        way = self.way()
        if position.stage is Stage.OVER:
            return None
        if position.index >= len(way):
            return self._finish()
        if self._since is None:
            self._since = self._insisted = now
        batch, waited = way[position.index], now - self._since
        action: Action | None
        match position.stage:
            case Stage.PREPARE:
                action = self._prepare(batch, sights)
            case Stage.READY:
                action = self._await_ready(batch, sights, now, waited)
            case Stage.KNOWN | Stage.WATCH if self._lost_flip(batch, sights):
                action = self._insist(Kind.FLIP, batch, now)
            case Stage.KNOWN:
                action = self._await_known(batch, sights, waited, is_known=is_known)
            case Stage.WATCH:
                action = self._watch(batch, sights, waited)
            case _:
                action = self._await_drained(batch, sights, waited)
        return action

    # Stages

    def _prepare(self, batch: Batch, sights: Mapping[str, Sight]) -> Action:
        position = self.position
        if position.is_back and position.index == 0 and not position.flipped and not batch.in_place:
            # The old ones never lost a request: only what was new has to go.
            return self._retire(batch)
        self._seen = {
            machine: (sight.since_ms, sight.problem)
            for machine in batch.new
            if (sight := sights.get(machine)) is not None
        }
        count = f"{position.index + 1}/{len(self.way())}"
        what = "restarting" if batch.in_place else "starting"
        return self._act(Kind.PREPARE, batch, Stage.READY, f"{count}: {what} {_names(batch.new)}")

    def _await_ready(
        self, batch: Batch, sights: Mapping[str, Sight], now: float, waited: float
    ) -> Action | None:
        waiting: list[str] = []
        for machine in batch.new:
            sight = sights.get(machine)
            if sight is None:
                return self._give_up(batch, f"{machine} is gone")
            if self._has_failed(machine, sight):
                return self._give_up(batch, f"{machine}: {sight.problem}")
            if not self._is_done(sight, batch):
                waiting.append(f"{machine}: {sight.trouble or 'does not run this release yet'}")
        if not waiting:
            told = "ready" if batch.in_place else "ready, and get requests from now on"
            return self._act(Kind.FLIP, batch, Stage.KNOWN, f"{told}: {_names(batch.new)}")
        if waited >= self._settings.ready_s:
            problem = f"not ready after {self._settings.ready_s:g} s: {'; '.join(waiting)}"
            return self._give_up(batch, problem)
        return self._insist(Kind.PREPARE, batch, now) if self._lost_goals(batch, sights) else None

    def _await_known(
        self, batch: Batch, sights: Mapping[str, Sight], waited: float, *, is_known: bool
    ) -> Action | None:
        trouble = self._find_trouble(sights)
        if trouble:
            return self._fail(trouble)
        if not is_known and waited < self._settings.settle_s and not batch.in_place:
            return None
        if not is_known and not batch.in_place:
            within = f"within {self._settings.settle_s:g} s"
            self.lines.append(f"not all nodes have confirmed that they know {within}; going on")
        self.position = msgspec.structs.replace(self.position, stage=Stage.WATCH)
        self._since = None
        return None

    def _watch(self, batch: Batch, sights: Mapping[str, Sight], waited: float) -> Action | None:
        trouble = self._find_trouble(sights)
        if trouble:
            return self._fail(trouble)
        settings = self._settings
        watch_s = settings.watch_s if self.position.index else settings.first_watch_s
        if not self.position.is_back and waited < watch_s:
            return None
        if batch.in_place or not batch.old:
            return self._next(Kind.NEXT, batch, f"done: {_names(batch.new)}")
        return self._retire(batch)

    def _await_drained(self, batch: Batch, sights: Mapping[str, Sight], waited: float) -> Action | None:
        busy = []
        for machine in batch.old:
            sight = sights.get(machine)
            if sight is None or sight.state in _RESTING:
                continue
            limit_s = self._settings.drain_s + (STOP_S if sight.has_driver else 0.0)
            if waited < limit_s and (
                sight.has_driver or not is_drained(waited, sight.load, self._settings.drain_s)
            ):
                return None
            if sight.load or sight.has_driver:
                busy.append(f"{machine} is {sight.state.value} with {sight.load} in flight")
        if busy:
            self.lines.append(f"{'; '.join(busy)}; going on")
        return self._next(Kind.REST, batch, f"stopped: {_names(batch.old)}")

    # What is seen

    def _is_done(self, sight: Sight, batch: Batch) -> bool:
        if sight.has_driver and sight.version != self.version:
            return False
        return sight.is_ready or (batch.in_place and sight.rests_by_itself)

    def _has_failed(self, machine: str, sight: Sight) -> bool:
        """True when a driver has tried this release, and it has ended."""
        return (
            sight.has_driver
            and sight.state is MachineState.STOPPED
            and bool(sight.problem)
            and sight.version == self.version
            and self._seen.get(machine) != (sight.since_ms, sight.problem)
        )

    def _insist(self, kind: Kind, batch: Batch, now: float) -> Action | None:
        """Do again what the owner of a row has written over, which it did without knowing of it."""
        if now - self._insisted < INSIST_S:
            return None
        self._insisted = now
        return Action(kind, batch, self.position, "", self._status, self.problem)

    def _lost_flip(self, batch: Batch, sights: Mapping[str, Sight]) -> bool:
        if batch.in_place:
            return False
        new = [sights[machine].cordoned for machine in batch.new if machine in sights]
        old = [sights[machine].cordoned for machine in batch.old if machine in sights]
        return any(new) or not all(old)

    def _lost_goals(self, batch: Batch, sights: Mapping[str, Sight]) -> bool:
        return any(
            sight.has_driver and sight.wanted != self.version
            for machine in batch.new
            if (sight := sights.get(machine)) is not None
        )

    def _find_trouble(self, sights: Mapping[str, Sight]) -> str:
        """Return what is wrong with machines that have come so far."""
        if self.position.is_back:
            return ""
        for batch in self._batches[: self.position.index + 1]:
            for machine in batch.new:
                sight = sights.get(machine)
                if sight is None:
                    return f"{machine} is gone"
                if not sight.is_ready and not sight.rests_by_itself:
                    return f"{machine}, which had got requests: {sight.trouble}"
        return ""

    # What follows

    @property
    def _status(self) -> Status:
        return Status.ROLLING_BACK if self.position.is_back else Status.RUNNING

    def _act(self, kind: Kind, batch: Batch, stage: Stage, told: str) -> Action:
        then = msgspec.structs.replace(self.position, stage=stage)
        return Action(kind, batch, then, told, self._status, self.problem)

    def _next(self, kind: Kind, batch: Batch, told: str) -> Action:
        then = msgspec.structs.replace(self.position, index=self.position.index + 1, stage=Stage.PREPARE)
        return Action(kind, batch, then, told, self._status, self.problem)

    def _retire(self, batch: Batch) -> Action:
        return self._act(Kind.RETIRE, batch, Stage.DRAIN, f"finish what they have: {_names(batch.old)}")

    def _give_up(self, batch: Batch, problem: str) -> Action:
        """A batch does not get ready: all goes back; on the way back, it is left and the next one follows."""
        if not self.position.is_back:
            return self._fail(problem)
        action = self._next(Kind.NEXT, batch, f"{problem}; left as it is")
        then = msgspec.structs.replace(action.then, left=(*self.position.left, problem))
        return action._replace(then=then)

    def _fail(self, problem: str) -> Action:
        index, stage = self.position.index, self.position.stage
        flipped = stage in {Stage.KNOWN, Stage.WATCH, Stage.DRAIN}
        if index >= len(self._batches) or (stage is Stage.PREPARE and index):
            index, flipped = index - 1, True  # nothing was done with this one yet
        then = Position(0, Stage.PREPARE, index, flipped)
        told = f"{problem}; going back"
        return Action(Kind.TURN_BACK, self._batches[index], then, told, Status.ROLLING_BACK, problem)

    def _finish(self) -> Action:
        then = msgspec.structs.replace(self.position, stage=Stage.OVER)
        problem = "; not rolled back: ".join((self.problem, *self.position.left))
        status, told = Status.COMPLETE, "complete"
        if self.position.is_back:
            status = Status.FAILED if self.position.left else Status.ROLLED_BACK
            told = f"{status.value}: {problem}"
        return Action(Kind.FINISH, Batch((), ()), then, told, status, problem)


def _names(machines: tuple[str, ...]) -> str:
    return ", ".join(machines) or "nobody"
