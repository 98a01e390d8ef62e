"""When a changeset that is held back is tried on a worker, released to all, or blamed for what it did.

Decides from what the file holds back, from what workers do on trial, and from what other nodes say. Refuses
to know rows, sockets, tables and what time it is. On a trial, one worker gets changesets before the others of
its node. If it dies of them, fails or falls silent, that is a strike against each of them; from then on they
are tried one at a time. Too many strikes are a quarantine, which only a person ends.

Invariant: nothing is released here that was not tried here and survived, except on a node that is fresh and
has no last good state to lose; and nothing that another node accuses.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from replication.core.clock import Clock

# One death may be chance, as when a machine runs out of memory; two with the same changeset alone are not.
STRIKES_MAX: Final = 2
# Longer than a worker may stand still before the supervisor ends it, and than it takes to load a large table.
STALL_MS: Final = 15_000.0
# How long a worker lives with it before the others get it: what it does is done at once, or by its first use.
SETTLE_MS_MAX: Final = 2_000.0
# What is tried together, as long as nothing happens; with a strike, each takes a trial of its own.
TOGETHER_MAX: Final = 64


class Status(Enum):
    """What a node says of a changeset to all others."""

    SUSPECT = "suspect"
    QUARANTINED = "quarantined"


class Try(NamedTuple):
    """Count a strike on disk against each, then give the worker what they changed."""

    worker: str
    token: int
    strikes: Mapping[Clock, int]


class Strikes(NamedTuple):
    """Put these counts on disk."""

    strikes: Mapping[Clock, int]


class Release(NamedTuple):
    """Show them to all workers of this node; `worker` has them already."""

    clocks: tuple[Clock, ...]
    worker: str = ""


class Revert(NamedTuple):
    """Have a worker read the table again, without what it was given to try."""

    worker: str


class Accuse(NamedTuple):
    """Tell all nodes."""

    clock: Clock
    status: Status
    reason: str
    strikes: int


class Absolve(NamedTuple):
    """Take back what this node has told of it."""

    clock: Clock


Action = Try | Strikes | Release | Revert | Accuse | Absolve


class Entry:
    """One changeset that is held back here."""

    __slots__ = ("accused", "arrived_ms", "clock", "is_told", "others", "reason", "strikes")

    def __init__(self, clock: Clock, arrived_ms: float, strikes: int) -> None:
        self.clock = clock
        self.arrived_ms = arrived_ms  # also: when the last accusation by others ended
        self.strikes = strikes
        self.reason = "a process ended while it was tried" if strikes else ""
        self.accused: Status | None = None  # what we have told
        self.is_told = False  # set when that was seen where all nodes see it; if it is gone then, somebody
        # has released the changeset
        self.others: Collection[Status] = ()  # what other nodes say

    @property
    def verdict(self) -> Status | None:
        """What this node makes of it by itself."""
        if self.strikes >= STRIKES_MAX:
            return Status.QUARANTINED
        return Status.SUSPECT if self.strikes else None

    @property
    def is_barred(self) -> bool:
        """True when it must not be tried now. Who has had a strike finds out; the others wait for that."""
        if Status.QUARANTINED in (self.verdict, *self.others):
            return True
        return bool(self.others) and not self.strikes


class _Trial:
    """What one worker has been given. `acked_ms` is set when it says that it has applied it."""

    __slots__ = ("acked_ms", "begun_ms", "clocks", "token", "worker")

    def __init__(self, worker: str, token: int, clocks: tuple[Clock, ...], begun_ms: float) -> None:
        self.worker = worker
        self.token = token
        self.clocks = clocks
        self.begun_ms = begun_ms
        self.acked_ms: float | None = None


class Stage:
    """What one node holds back. `entries` are in order of arrival; times are milliseconds of one clock.

    `fresh_until_ms` is later than now while the node has no last good state.
    """

    def __init__(self, node: str, bake_ms: float) -> None:
        self.entries: dict[Clock, Entry] = {}
        self.strikes = 0  # all that were counted since the start
        self.fresh_until_ms = 0.0
        self._node = node
        self._settle_ms = min(bake_ms / 4, SETTLE_MS_MAX)
        self._workers: dict[str, bool] = {}  # those that follow; true for one that does not answer
        self._trial: _Trial | None = None
        self._tokens = 0
        self._ours: set[Clock] = set()  # what all nodes see that this one has told

    @property
    def on_trial(self) -> tuple[Clock, ...]:
        """What a worker has been given and the others have not."""
        return () if self._trial is None else self._trial.clocks

    @property
    def is_waiting(self) -> bool:
        """True while time alone may bring something to do."""
        return self._trial is not None or any(not entry.is_barred for entry in self.entries.values())

    # What the file says

    def handle_held(self, held: Collection[Clock], strikes: Mapping[Clock, int], now_ms: float) -> None:
        """Take note of all changesets that are held back, and of the strikes that are on disk."""
        entries = {clock: entry for clock, entry in self.entries.items() if clock in held}
        for clock in held:
            if clock not in entries:
                entries[clock] = Entry(clock, now_ms, strikes.get(clock, 0))
        self.entries = entries

    def handle_told(self, told: Mapping[Clock, Mapping[str, Status]], now_ms: float) -> list[Action]:
        """Take note of what nodes say: by changeset, by node."""
        self._ours = {clock for clock, by_node in told.items() if self._node in by_node}
        forgiven: dict[Clock, int] = {}
        for clock, entry in self.entries.items():
            by_node = told.get(clock, {})
            others = [status for node, status in by_node.items() if node != self._node]
            if entry.others and not others:
                entry.arrived_ms = now_ms
            entry.others = others
            if self._node in by_node:
                entry.accused, entry.is_told = by_node[self._node], True
            elif entry.is_told:
                entry.accused, entry.is_told = None, False
                if entry.strikes and clock not in self.on_trial:
                    entry.strikes, entry.arrived_ms = 0, now_ms
                    forgiven[clock] = 0
        return [Strikes(forgiven)] if forgiven else []

    # What workers do

    def handle_worker(self, worker: str) -> None:
        """A worker follows."""
        self._workers[worker] = False

    def handle_gone(self, worker: str, *, is_death: bool) -> list[Action]:
        """A worker follows no more; it has died unless it took its leave."""
        self._workers.pop(worker, None)
        if self._trial is None or self._trial.worker != worker:
            return []
        return self._fail("a worker died of it") if is_death else self.cancel()

    def handle_tried(self, worker: str, token: int, problem: str, now_ms: float) -> list[Action]:
        """A worker has applied what it was given, or could not."""
        self._workers[worker] = False
        trial = self._trial
        if trial is None or (trial.worker, trial.token) != (worker, token):
            return []
        if problem:
            return [*self._fail(f"a worker could not apply it: {problem}"), Revert(worker)]
        trial.acked_ms = now_ms
        return []

    def cancel(self) -> list[Action]:
        """End a trial that says nothing of what was tried."""
        trial, self._trial = self._trial, None
        if trial is None:
            return []
        return [Strikes(self._count(trial.clocks))]

    def _fail(self, reason: str) -> list[Action]:
        """Blame what is on trial. On disk that was done when the trial began."""
        for clock in self.on_trial:
            entry = self.entries.get(clock)
            if entry is not None:
                entry.strikes += 1
                entry.reason = reason
        self.strikes += 1
        gone = [clock for clock in self.on_trial if clock not in self.entries]
        self._trial = None
        return [Strikes(dict.fromkeys(gone, 0))] if gone else []

    def _count(self, clocks: Iterable[Clock]) -> dict[Clock, int]:
        return {clock: entry.strikes if (entry := self.entries.get(clock)) else 0 for clock in clocks}

    # What is to be done

    def plan(self, now_ms: float, delay_ms: float) -> list[Action]:
        """Return what is to be done now; delay_ms is how long this node's region waits for others."""
        actions: list[Action] = [Absolve(clock) for clock in self._ours if clock not in self.entries]
        actions += self._review(now_ms)
        if now_ms < self.fresh_until_ms:
            sound = (c for c, entry in self.entries.items() if not entry.is_barred and not entry.strikes)
            actions += self._release(tuple(sound))
        elif self._trial is None:
            actions += self._begin(now_ms, delay_ms)
        for clock, entry in self.entries.items():
            if entry.verdict is not None and entry.verdict is not entry.accused:
                actions.append(Accuse(clock, entry.verdict, entry.reason, entry.strikes))
        return actions

    def note_accused(self, clock: Clock, status: Status) -> None:
        """Take note that all nodes were told."""
        if clock in self.entries:
            self.entries[clock].accused = status

    def _review(self, now_ms: float) -> list[Action]:
        trial = self._trial
        if trial is None:
            return []
        if trial.acked_ms is None:
            if now_ms - trial.begun_ms < STALL_MS:
                return []
            if trial.worker in self._workers:
                self._workers[trial.worker] = True
            return [*self._fail(f"a worker did not answer for {STALL_MS / 1000:g} s"), Revert(trial.worker)]
        if now_ms - trial.acked_ms < self._settle_ms:
            return []
        self._trial = None
        passed = [c for c in trial.clocks if c in self.entries and not self.entries[c].is_barred]
        kept = [clock for clock in trial.clocks if clock not in passed]
        if not kept:
            return self._release(tuple(passed), trial.worker)
        return [Strikes(self._count(kept)), *self._release(tuple(passed)), Revert(trial.worker)]

    def _release(self, clocks: tuple[Clock, ...], worker: str = "") -> list[Action]:
        for clock in clocks:
            del self.entries[clock]
        return [Release(clocks, worker)] if clocks else []

    def _begin(self, now_ms: float, delay_ms: float) -> list[Action]:
        """Begin a trial, if something is due and somebody there to try it."""
        worker = min((name for name, is_stuck in self._workers.items() if not is_stuck), default=None)
        if worker is None:
            return []
        due = [
            entry
            for entry in self.entries.values()
            if not entry.is_barred and (entry.strikes or now_ms - entry.arrived_ms >= delay_ms)
        ]
        suspects = [entry for entry in due if entry.strikes]
        chosen = suspects[:1] or due[:TOGETHER_MAX]
        if not chosen:
            return []
        self._tokens += 1
        clocks = tuple(entry.clock for entry in chosen)
        self._trial = _Trial(worker, self._tokens, clocks, now_ms)
        return [Try(worker, self._tokens, {entry.clock: entry.strikes + 1 for entry in chosen})]
