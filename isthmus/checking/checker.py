"""Run the checks of the machines that this node watches, and write what changes into the table.

Decides when a probe is made and when its result is written. Refuses to know routing and membership: it reads
the table of machines and is told who is there. Invariant: a row is written only when a status changes or
what happened does, so that a steady fleet makes no traffic; many at once share a transaction.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from isthmus.checking.definition import Definition, read_definitions
from isthmus.checking.timetable import Timetable, compute_delay_s, compute_first_delay_s
from isthmus.checking.verdict import Verdict
from routing.peering import Way
from routing.types import CheckRow, CheckStatus, MachineState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from isthmus.checking.probe import Outcome, Prober
    from isthmus.checking.watchers import Presence
    from isthmus.registry import Database, Statement
    from replication.core.change import Commit
    from replication.metrics import Sample
    from routing.balancer import Rng
    from routing.table import RoutingTable
    from routing.target import Target

log = logging.getLogger(__name__)

METRICS: Final[Mapping[str, tuple[str, str]]] = {
    "isthmus_checks_total": ("counter", "Probes of machines by result"),
    "isthmus_checks_running": ("gauge", "Checks that this node runs, by status"),
    "isthmus_checks_written_total": ("counter", "Results of checks that were written into the table"),
    "isthmus_checks_adopted": ("gauge", "Checks that this node runs in place of a node that is gone"),
}

# How precisely probes begin; each look costs some microseconds, and there are none while nothing is checked.
TICK_S: Final = 0.025
# Each takes a file, and they are short: a fleet that refuses connections never has so many.
PROBES_MAX: Final = 512
# Results wait so long for others, to be written together.
WRITE_DELAY_S: Final = 0.05
ROWS_A_WRITE: Final = 500
# After the database refused.
RETRY_S: Final = 1.0
# Who is there is asked so often.
PRESENCE_S: Final = 2.0
# Machines looked at before other things get their turn.
MACHINES_A_TURN: Final = 2_000

# A draining machine still serves, and a deploy wants to know how it does.
_PROBED: Final = frozenset((MachineState.STARTED, MachineState.DRAINING))

_PUT: Final = (
    "INSERT INTO checks (machine, name, node, status, output, updated_ms, since_ms)"
    " VALUES (?, ?, ?, ?, ?, ?, ?)"
    " ON CONFLICT DO UPDATE SET node = excluded.node, status = excluded.status, output = excluded.output,"
    " updated_ms = excluded.updated_ms, since_ms = excluded.since_ms"
)
_DROP: Final = "DELETE FROM checks WHERE machine = ? AND name = ?"

Key = tuple[str, str]


class LastProbe(NamedTuple):
    """What the last probe of a check was."""

    at_ms: int
    output: str


class _Running:
    """One check that runs. `task` is set while a probe is under way, `last` after the first one."""

    def __init__(self, definition: Definition) -> None:
        check = definition.check
        self.definition = definition
        self.verdict = Verdict(check.failures, check.successes, check.interval_ms / 1000)
        self.written: tuple[CheckStatus, str] | None = None  # status and summary, as in the table
        self.since_ms = 0  # of the status
        self.task: asyncio.Task[None] | None = None
        self.last: LastProbe | None = None


class Checker:
    """Runs the checks of one node. `clock_ms` is the time that rows show."""

    def __init__(
        self,
        table: RoutingTable,
        database: Database,
        prober: Prober,
        presence: Presence,
        members: Callable[[], Mapping[str, str]],
        *,
        node: str,
        rng: Rng,
        clock_ms: Callable[[], int],
    ) -> None:
        self._table = table
        self._database = database
        self._prober = prober
        self._presence = presence
        self._members = members
        self._node = node
        self._rng = rng
        self._clock_ms = clock_ms
        self._running: dict[Key, _Running] = {}
        self._names: dict[str, list[str]] = {}  # of the checks that run, by machine
        self._timetable: Timetable[Key] = Timetable()
        self._probing = 0
        self._timer: asyncio.TimerHandle | None = None  # set while something is due some time
        self._to_write: dict[Key, Statement] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._reviewing: asyncio.Task[None] | None = None
        self._results: Counter[str] = Counter()
        self._written = 0
        self._stopped = True

    async def start(self) -> None:
        """Begin to probe."""
        self._stopped = False
        self._spawn(self._follow_members())
        self._review_all()

    async def stop(self) -> None:
        """Stop probing and wait until nothing runs."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # What is to be probed

    def handle_commit(self, commit: Commit) -> None:
        """Look again at the machines that a commit, which the table has taken up already, is about."""
        if self._stopped:
            return
        if commit.reload:
            self._review_all()
            return
        machines: dict[str, None] = {}
        for change in commit.changes:
            if change.table == "machines":
                machines[str(change.pk[0])] = None
            elif change.table == "services":
                app = self._table.app(str(change.pk[0]))
                machines.update(
                    dict.fromkeys(target.id for target in app.targets()) if app is not None else {}
                )
            elif change.table == "checks" and change.row is not None and change.row[2] != self._node:
                self._insist((str(change.pk[0]), str(change.pk[1])))
        new = [definition for machine in machines for definition in self._review(machine)]
        self._begin(new)

    def _insist(self, key: Key) -> None:
        """Write our own result over that of a node that had judged our machine while we were away."""
        running, target = self._running.get(key), self._table.machine(key[0])
        if (
            running is not None
            and target is not None
            and target.node == self._node
            and running.last is not None
        ):
            self._write(running, running.last)

    def _review_all(self) -> None:
        if self._reviewing is not None:
            self._reviewing.cancel()
        self._reviewing = self._spawn(self._review_in_turns())

    async def _review_in_turns(self) -> None:
        """Look at every machine, with pauses in which other things get their turn."""
        machines = {target.id: None for target in self._table.targets()} | dict.fromkeys(self._names)
        new: list[Definition] = []
        for i, machine in enumerate(machines, 1):
            new += self._review(machine)
            if not i % MACHINES_A_TURN:
                await asyncio.sleep(0)
        self._begin(new)
        # What an earlier life left: an old result must not stand for ever.
        for row in list(self._table.rows("checks").values()):
            if isinstance(row, CheckRow) and self._is_left_over(row):
                self._enqueue((row.machine, row.name), (_DROP, (row.machine, row.name)))

    def _is_left_over(self, row: CheckRow) -> bool:
        if (row.machine, row.name) in self._running:
            return False
        target = self._table.machine(row.machine)
        return row.node == self._node if target is None else self._watches(target)

    def _watches(self, target: Target) -> bool:
        if self._table.ways.find(target, None) is Way.NODE:
            return False  # what answers at that address here is another machine
        return self._presence.find_watcher(target.id, target.node, target.region) == self._node

    def _review(self, machine: str) -> list[Definition]:
        """Stop the checks of a machine that are not wanted any more; return those that are to begin."""
        target = self._table.machine(machine)
        watched = target is not None and self._watches(target)
        wanted = self._read(target) if watched and target is not None and target.state in _PROBED else {}
        for name in self._names.get(machine, ()):
            if name in wanted and self._running[machine, name].definition == wanted[name]:
                del wanted[name]
                continue
            self._end((machine, name))
            # The row of a machine that another node watches from now on is that node's to write.
            if name not in wanted and (watched or target is None):
                self._enqueue((machine, name), (_DROP, (machine, name)))
        return list(wanted.values())

    def _read(self, target: Target) -> dict[str, Definition]:
        try:
            return {definition.name: definition for definition in read_definitions(self._table, target)}
        except ValueError as error:  # msgspec's are such
            shown = {"machine": target.id, "error": str(error)[:200]}
            log.warning("a check cannot be read", extra=shown)
            return {}

    def _begin(self, new: list[Definition]) -> None:
        now = asyncio.get_running_loop().time()
        for definition in new:
            key, check = definition.key, definition.check
            running = self._running[key] = _Running(definition)
            self._names.setdefault(definition.machine, []).append(definition.name)
            row = self._table.rows("checks").get(key)
            if isinstance(row, CheckRow) and row.node == self._node:
                running.written = (row.status, row.output.partition(": ")[0])
                running.since_ms = row.since_ms
            delay_s = compute_first_delay_s(check.interval_ms / 1000, len(new), self._rng)
            self._timetable.put(key, now + check.grace_ms / 1000 + delay_s)
        self._arm()

    def _end(self, key: Key) -> None:
        running = self._running.pop(key)
        if running.task is not None:
            running.task.cancel()
        self._timetable.drop(key)
        self._to_write.pop(key, None)
        names = self._names[key[0]] = [name for name in self._names[key[0]] if name != key[1]]
        if not names:
            del self._names[key[0]]

    async def _follow_members(self) -> None:
        while True:
            now = asyncio.get_running_loop().time()
            if self._presence.set_members(self._members(), now):
                self._review_all()
            await asyncio.sleep(PRESENCE_S)

    # Probing

    def _arm(self) -> None:
        if self._timer is None and len(self._timetable) and not self._stopped:
            self._timer = asyncio.get_running_loop().call_later(TICK_S, self._tick)

    def _tick(self) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time()
        while self._probing < PROBES_MAX:
            key = self._timetable.pop_due(now)
            if key is None:
                break
            running = self._running[key]
            self._probing += 1
            running.task = self._spawn(self._run(running))
        self._arm()

    async def _run(self, running: _Running) -> None:
        try:
            outcome = await self._prober.probe(running.definition)
        finally:
            self._probing -= 1
            running.task = None
        self._results["passing" if outcome.passed else "critical"] += 1
        now = asyncio.get_running_loop().time()
        verdict, check = running.verdict, running.definition.check
        changed = verdict.handle_result(passed=outcome.passed, now=now)
        delay_s = compute_delay_s(check.interval_ms / 1000, self._rng, in_doubt=verdict.is_in_doubt)
        self._timetable.put(running.definition.key, now + delay_s)
        self._arm()
        self._note(running, outcome, changed=changed)

    def _note(self, running: _Running, outcome: Outcome, *, changed: bool) -> None:
        """Take down the outcome of a probe, and write it if it says something new."""
        status = running.verdict.status
        assert status is not None, "a result was taken"
        output = outcome.output
        if running.verdict.is_flapping() and status is CheckStatus.CRITICAL:
            output += f"; flapping, passes after {running.verdict.successes_needed()} successes in a row"
        running.last = LastProbe(self._clock_ms(), output)
        # Neither a failure that is not enough to fail nor a success that is not enough to pass is told.
        told = outcome.passed is (status is not CheckStatus.CRITICAL)
        new = (status, outcome.summary.partition(": ")[0])
        if changed and (running.written is None or running.written[0] is not status):
            running.since_ms = running.last.at_ms
            shown = {"status": status.value, "output": output}
            log.info("check changed", extra={**_shown(running.definition), **shown})
        if new != running.written and (told or changed):
            running.written = new
            self._write(running, running.last)

    # Writing

    def _write(self, running: _Running, last: LastProbe) -> None:
        status = running.verdict.status
        assert status is not None, "nothing is written before the first result"
        key = running.definition.key
        row = (*key, self._node, status.value, last.output, last.at_ms, running.since_ms)
        self._enqueue(key, (_PUT, row))

    def _enqueue(self, key: Key, statement: Statement) -> None:
        if not self._to_write:
            self._spawn(self._flush())
        self._to_write[key] = statement

    async def _flush(self) -> None:
        """Write what waits, until nothing does."""
        await asyncio.sleep(WRITE_DELAY_S)
        while self._to_write:
            batch = dict(list(self._to_write.items())[:ROWS_A_WRITE])
            try:
                await self._database.execute(list(batch.values()))
            except Exception:
                log.exception("results of checks could not be written; trying again")
                await asyncio.sleep(RETRY_S)
                continue
            self._written += len(batch)
            for key, statement in batch.items():
                if self._to_write.get(key) is statement:
                    del self._to_write[key]

    # For people

    def last_probes(self) -> Mapping[Key, LastProbe]:
        """Return the last probe of each check that this node runs and has made one of."""
        return {key: running.last for key, running in self._running.items() if running.last is not None}

    def samples(self) -> Iterator[Sample]:
        """Yield the metrics of the checks."""
        statuses = Counter(
            "unknown" if running.verdict.status is None else running.verdict.status.value
            for running in self._running.values()
        )
        for status in ("unknown", *(status.value for status in CheckStatus)):
            yield "isthmus_checks_running", (("status", status),), float(statuses[status])
        for result, count in self._results.items():
            yield "isthmus_checks_total", (("status", result),), float(count)
        yield "isthmus_checks_written_total", (), float(self._written)
        yield "isthmus_checks_adopted", (), float(sum(self._is_adopted(key[0]) for key in self._running))

    def _is_adopted(self, machine: str) -> bool:
        target = self._table.machine(machine)
        return target is not None and target.node != self._node


def _shown(definition: Definition) -> dict[str, Any]:
    return {"machine": definition.machine, "check": definition.name}
