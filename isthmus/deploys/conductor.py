"""The deploys that this node conducts: from an order to its end, whoever looks on.

Decides which machines an order is about, and when a course is looked at. Refuses to know what comes next
(`course`) and the SQL of it (`releases`). Invariant: one deploy of an app at a time; what was begun goes on
after a restart of the agent, until another node has taken over.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from isthmus.config_machines import PROCESS
from isthmus.deploys.course import Action, Kind, Stage, Status
from isthmus.deploys.plan import Strategy, mix_regions, plan_batches
from isthmus.deploys.releases import (
    OWNER,
    Order,
    Release,
    Saved,
    abandon,
    cordon,
    find_current,
    plan_cleaning,
    plan_writes,
    put_release,
    read_releases,
)
from isthmus.deploys.sight import Sights
from isthmus.registry import RegistryError
from isthmus.wording import count_of
from replication.errors import StatementError
from routing.types import MachineState

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from isthmus.checking.probe import Prober
    from isthmus.registry import Database, Registry, Statement
    from replication.metrics import Sample
    from routing.table import RoutingTable
    from routing.target import Target

log = logging.getLogger(__name__)

METRICS: Final[Mapping[str, tuple[str, str]]] = {
    "isthmus_deploys_running": ("gauge", "Deploys that this node conducts"),
    "isthmus_deploys_total": ("counter", "Deploys that this node has conducted to their end, by status"),
}

TICK_S: Final = 0.1
RETRY_S: Final = 1.0
# A deploy that two nodes have begun at the same moment has one row, and so one conductor, once both know of
# it. Goals that both had set by then could not be told apart, as the version is the same.
SETTLE_S: Final = 2.0
LINES_MAX: Final = 1_000
# What was told of the last deploys can still be read.
JOURNALS_MAX: Final = 32


class Line(NamedTuple):
    """Something that was done, for people."""

    number: int
    at_ms: int
    text: str


class _Journal:
    """What was told of one deploy. Numbers go on after those of an earlier agent: they follow the clock."""

    def __init__(self) -> None:
        self.lines: deque[Line] = deque(maxlen=LINES_MAX)
        self._number = 0

    def tell(self, at_ms: int, text: str) -> None:
        self._number = max(self._number + 1, at_ms)
        self.lines.append(Line(self._number, at_ms, text))


class _Conducted:
    """A deploy that is under way. `cancelled` is set when somebody wants it to go back."""

    def __init__(self, release: Release, sights: Sights) -> None:
        self.release = release
        self.sights = sights
        self.course = release.make_course()
        self.written_ms = 0
        self.cancelled = ""
        self.task: asyncio.Task[None] | None = None


class Conductor:
    """Conducts the deploys of one node. `is_known(since_ms)`: all nodes have what was written by then."""

    def __init__(
        self,
        table: RoutingTable,
        database: Database,
        prober: Prober,
        is_known: Callable[[int], bool],
        present: Callable[[], Collection[str]],
        *,
        node: str,
        clock_ms: Callable[[], int],
    ) -> None:
        self._table = table
        self._database = database
        self._prober = prober
        self._is_known = is_known
        self._present = present
        self._node = node
        self._clock_ms = clock_ms
        self._running: dict[str, _Conducted] = {}  # by app
        self._journals: dict[tuple[str, int], _Journal] = {}
        self._beginning = asyncio.Lock()
        self._ended: Counter[str] = Counter()

    async def start(self) -> None:
        """Go on with what an earlier agent has begun."""
        for release in await read_releases(self._database, node=self._node):
            if release.is_running and release.app not in self._running:
                self._tell(release, "the agent has started again; going on")
                self._conduct(release)

    async def stop(self) -> None:
        """Do nothing more; the next agent goes on."""
        tasks = [conducted.task for conducted in self._running.values() if conducted.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def begin(self, order: Order, registry: Registry) -> Release:
        """Begin a deploy, or a rollback; raises RegistryError."""
        async with self._beginning:
            releases = await read_releases(self._database, order.app)
            statements = self._refuse_running(releases)
            current = find_current(releases)
            if order.to is not None:
                order, new = self._plan_rollback(order, releases, current)
            else:
                new, added = await self._find_new(order, registry)
                statements += added
            release = self._plan(order, new, releases, current)
            coming = [m for batch in release.course.batches if not batch.in_place for m in batch.new]
            statements += [*cordon(coming, cordoned=True), put_release(release)]
            try:
                await self._database.execute(statements)
            except StatementError:
                self._refuse_running(await read_releases(self._database, order.app))
                raise  # it was not that another node has begun at the same moment
        self._tell(release, self._announce(release))
        self._conduct(release, since_ms=self._clock_ms())
        return release

    async def cancel(self, app: str, by: str) -> Release:
        """Have the running deploy of an app go back; raises RegistryError."""
        conducted = self._running.get(app)
        if conducted is not None:
            conducted.cancelled = f"cancelled by {by}" if by else "cancelled"
            return conducted.release
        for release in await read_releases(self._database, app):
            if release.is_running:
                ask = (
                    "ask it" if self._is_there(release.node) else "it is gone, and another deploy takes over"
                )
                raise RegistryError(f"node `{release.node}` conducts the deploy of `{app}`: {ask}")
        raise RegistryError(f"no deploy of `{app}` is running")

    async def follow(self, app: str, version: int, after: int) -> dict[str, Any]:
        """Return a release and what was told of it after a line. Version 0 is the last one."""
        for release in await read_releases(self._database, app):
            if release.version == version or not version:
                journal = self._journals.get((app, release.version))
                lines = [line._asdict() for line in (journal.lines if journal else ()) if line.number > after]
                return {**release.describe(), "lines": lines}
        raise RegistryError(f"app `{app}` has no release {version or 'yet'}", found=False)

    def samples(self) -> Iterator[Sample]:
        """Yield how many run and have ended."""
        yield "isthmus_deploys_running", (), float(len(self._running))
        for status, count in (+self._ended).items():
            yield "isthmus_deploys_total", (("status", status),), float(count)

    # What an order means

    def _refuse_running(self, releases: Sequence[Release]) -> list[Statement]:
        """Refuse while a deploy of the app runs; one whose node is gone is given up."""
        statements = []
        for release in releases:
            if release.is_running:
                if self._is_there(release.node):
                    raise RegistryError(
                        f"release {release.version} of `{release.app}` is {release.status.value}"
                        f" on node `{release.node}`"
                    )
                why = f"its node {release.node} is gone, and another deploy was begun on {self._node}"
                statements.append(abandon(release, why, self._clock_ms()))
        return statements

    def _serving(self, app: str) -> list[Target]:
        """Return the machines of an app that serve, or would if they were needed, regions mixed."""
        found = self._table.app(app)
        serving = {
            target.id: target
            for target in (found.targets() if found is not None else ())
            if not target.cordoned and (target.driver or target.state is MachineState.STARTED)
        }
        return [serving[id_] for id_ in mix_regions((t.region, t.id) for t in serving.values())]

    async def _find_new(self, order: Order, registry: Registry) -> tuple[list[str], list[Statement]]:
        """Return the machines that are to serve once it is complete, and what adds them."""
        ids, statements = await registry.plan_machines(order.app, order.machines, OWNER)
        if ids:
            return ids, statements
        serving = self._serving(order.app)
        if order.strategy == Strategy.BLUEGREEN.value:
            return self._find_spares(order.app, serving), []
        stuck = [target.id for target in serving if not target.driver]
        if not serving:
            raise RegistryError(f"app `{order.app}` has no machine that serves; --machine gives it some")
        if stuck:
            raise RegistryError(
                f"{', '.join(stuck)}: no driver, so nothing here can start it with another release; "
                "start the release beside it and give its addresses with --machine"
            )
        if not order.release:
            raise RegistryError(
                "which release? without --machine, what its machines are to run has to be said"
            )
        return [target.id for target in serving], []

    def _find_spares(self, app: str, serving: Sequence[Target]) -> list[str]:
        """Return cordoned machines with a driver, as many in each region as serve there."""
        found = self._table.app(app)
        cordoned = [t for t in (found.targets() if found is not None else ()) if t.cordoned and t.driver]
        spares = [target for target in cordoned if self._is_there(target.node)]
        chosen: list[str] = []
        for region, count in sorted(Counter(target.region for target in serving).items()):
            there = sorted(target.id for target in spares if target.region == region)
            if len(there) < count:
                raise RegistryError(
                    f"blue-green needs {count} cordoned machines with a driver in {region} beside those that "
                    f"serve, and there are {len(there)}: declare more, or give addresses with --machine"
                )
            chosen += there[:count]
        if not chosen:
            raise RegistryError(f"app `{app}` has no machine that serves; --machine gives it some")
        return chosen

    def _plan_rollback(
        self, order: Order, releases: Sequence[Release], current: Release | None
    ) -> tuple[Order, list[str]]:
        """Return the order that brings an earlier release back, and its machines."""
        complete = [r for r in releases if r.status is Status.COMPLETE and r is not current]
        wanted = [release for release in complete if release.version == order.to or not order.to]
        if not wanted:
            what = f"complete release {order.to}" if order.to else "earlier release that was complete"
            raise RegistryError(f"app `{order.app}` has no {what}")
        target = max(wanted, key=lambda release: release.version)
        machines, serving = list(target.machines), self._serving(order.app)
        if any(served.driver and served.id in machines for served in serving):
            # They go back in place, all that serve: how many there are was changed since by somebody else.
            machines = [served.id for served in serving]
        gone = [machine for machine in machines if self._table.machine(machine) is None]
        if gone:
            raise RegistryError(f"release {target.version} had machines that are gone: {', '.join(gone)}")
        settled = msgspec.structs.replace(order, release=target.release, to=None)
        return settled, machines

    def _plan(
        self, order: Order, new: Sequence[str], releases: Sequence[Release], current: Release | None
    ) -> Release:
        serving = [target.id for target in self._serving(order.app)]
        in_place = set(serving) == set(new)
        new = serving if in_place else new
        come, go = list(new), list(serving)
        if in_place and not all(self._has_driver(machine) for machine in new):
            raise RegistryError(
                f"these machines of `{order.app}` serve already, and nothing can restart them"
            )
        if not in_place:
            come = [machine for machine in new if machine not in serving]
            go = [machine for machine in serving if machine not in new]
        self._refuse_unable(come, order.release)
        strategy = Strategy(order.strategy)
        if in_place and strategy is Strategy.BLUEGREEN:
            strategy = Strategy.ROLLING
        batches = plan_batches(strategy, go, come, order.max_unavailable)
        before = current.version if current is not None else 0
        return Release(
            order.app,
            max((release.version for release in releases), default=0) + 1,
            self._clock_ms(),
            order.by,
            self._node,
            order.release,
            strategy.value,
            Status.RUNNING,
            "",
            0,
            tuple(new),
            Saved(batches, order.settings, before, current.release if current is not None else ""),
        )

    def _refuse_unable(self, machines: Sequence[str], release: str) -> None:
        """Refuse what is known to fail before any machine is taken out of service for it."""
        targets = [t for m in machines if (t := self._table.machine(m)) is not None and t.driver]
        if "/" in release and any(target.driver == PROCESS for target in targets):
            raise RegistryError(f"`{release}` is no release for processes of a node: it has a /")
        gone = [target for target in targets if not self._is_there(target.node)]
        if gone:
            nodes = ", ".join(sorted({target.node for target in gone}))
            raise RegistryError(
                f"node {nodes} is gone, and nobody else starts {', '.join(target.id for target in gone)}: "
                "start it again, or `isthmus machine cordon` these to deploy without them"
            )

    def _is_there(self, node: str) -> bool:
        return node == self._node or node in self._present()

    def _has_driver(self, machine: str) -> bool:
        target = self._table.machine(machine)
        return target is not None and bool(target.driver)

    def _announce(self, release: Release) -> str:
        batches = release.course.batches
        what = f" {release.release}" if release.release else ""
        checked = (
            "" if self._make_sights().has_checks(release.app) else "; it has no checks: an open port will do"
        )
        return (
            f"release {release.version}{what} of {release.app}: {release.strategy}, "
            f"{count_of(len(release.machines), 'machine')} in {count_of(len(batches), 'step')}{checked}"
        )

    # Conducting

    def _make_sights(self) -> Sights:
        return Sights(self._table, self._prober, self._is_there)

    def _conduct(self, release: Release, since_ms: int = 0) -> None:
        """Go on with a release; what was written at `since_ms` has to be known first."""
        conducted = self._running[release.app] = _Conducted(release, self._make_sights())
        conducted.written_ms = since_ms
        conducted.task = asyncio.get_running_loop().create_task(self._run(conducted))

    async def _run(self, conducted: _Conducted) -> None:
        app = conducted.release.app
        try:
            for _ in range(int(SETTLE_S / TICK_S)):
                if self._is_known(conducted.written_ms):
                    break
                await asyncio.sleep(TICK_S)
            while conducted.course.position.stage is not Stage.OVER:
                await asyncio.sleep(TICK_S)
                try:
                    if not await self._step(conducted):
                        return
                except Exception:
                    log.exception("a step of a deploy failed; trying again", extra={"app": app})
                    await asyncio.sleep(RETRY_S)
        finally:
            # Whoever reads that it is over may begin the next one at once.
            if self._running.get(app) is conducted:
                del self._running[app]

    async def _step(self, conducted: _Conducted) -> bool:
        """Look at the machines and do what is due; False when another node has taken over."""
        course, release = conducted.course, conducted.release
        machines = [m for batch in release.course.batches for m in (*batch.old, *batch.new)]
        sights = await conducted.sights.look(machines, is_waiting=course.position.stage is Stage.READY)
        action = None
        if conducted.cancelled:
            action = course.cancel(conducted.cancelled)
            conducted.cancelled = ""
        if action is None:
            now = asyncio.get_running_loop().time()
            action = course.step(now, sights, is_known=self._is_known(conducted.written_ms))
        for line in course.lines:
            self._tell(release, line)
        course.lines.clear()
        return action is None or await self._carry_out(conducted, action)

    async def _carry_out(self, conducted: _Conducted, action: Action) -> bool:
        release, now_ms = conducted.release, self._clock_ms()
        sql = "SELECT 1 FROM releases WHERE app = ? AND version = ? AND node = ? AND finished_ms = 0"
        ours = await self._database.query(sql, (release.app, release.version, self._node))
        if not ours.rows:
            self._tell(release, "another node has taken over")
            return False
        statements = plan_writes(release, action, self._node, now_ms, self._resting(release, action))
        if action.kind is Kind.FINISH:
            statements += await self._plan_end(release, action)
        await self._database.execute(statements)
        self._ended[action.status.value] += action.kind is Kind.FINISH
        conducted.course.arrive(action)
        conducted.written_ms = self._clock_ms()
        if action.told:
            self._tell(release, action.told)
        return True

    async def _plan_end(self, release: Release, action: Action) -> list[Statement]:
        """Return what is cleaned up behind a release that is complete."""
        if action.status is not Status.COMPLETE:
            return []
        before = find_current(await read_releases(self._database, release.app))
        keep = {*release.machines, *(before.machines if before is not None else ())}
        return plan_cleaning(release.app, sorted(keep), release.version)

    def _resting(self, release: Release, action: Action) -> set[str]:
        """Return machines that nobody needs at the moment; one of an app where all rest is started anyway."""
        if action.kind is not Kind.PREPARE or not action.batch.in_place:
            return set()
        serving = self._serving(release.app)
        resting = {target.id for target in serving if self._make_sights().rests(target)}
        return resting - {serving[0].id} if len(resting) == len(serving) else resting

    def _tell(self, release: Release, text: str) -> None:
        key = (release.app, release.version)
        journal = self._journals.setdefault(key, _Journal())
        while len(self._journals) > JOURNALS_MAX:
            del self._journals[next(iter(self._journals))]
        journal.tell(self._clock_ms(), text)
        log.info("deploy", extra={"app": release.app, "release": release.version, "told": text})
