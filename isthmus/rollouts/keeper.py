"""What one node does about rollouts: takes them up when it is its turn, watches itself, and tells all nodes.

Decides how settings and tables get into use here, and how they get out again. Refuses to know whose turn it
is (`course`) and what counts as bad (`watch`). Invariant: all nodes know that this one tries something before
it does, and what it had before is on disk until that has passed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import sqlite3
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NamedTuple

import msgspec
from msgspec import Meta

from isthmus.config import ConfigError
from isthmus.config_values import ValueOfKeyError
from isthmus.declared import read_plan
from isthmus.registry import RegistryError
from isthmus.rollouts.course import (
    End,
    Kind,
    Rollout,
    State,
    Status,
    Take,
    Undo,
    Wait,
    find_latest,
    find_running,
    plan_node,
    plan_steps,
)
from isthmus.rollouts.errand import DIED, Errand, Errands, Stage
from isthmus.rollouts.overlay import Overlay
from isthmus.rollouts.rows import (
    TABLES,
    Reports,
    end_rollout,
    forget_oldest,
    forgive,
    put_report,
    put_rollout,
    read_rollouts,
)
from isthmus.rollouts.settings import check_settings, list_own
from replication.errors import SchemaError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from isthmus.config import Config
    from isthmus.registry import Database, Statement
    from isthmus.role import Control
    from isthmus.rollouts.course import Action
    from isthmus.rollouts.watch import Watch
    from replication.core.change import Commit
    from replication.metrics import Sample
    from replication.schema_plan import Plan

log = logging.getLogger(__name__)

METRICS: Final[Mapping[str, tuple[str, str]]] = {
    "isthmus_rollouts_running": ("gauge", "1 while settings or tables are rolled out to the nodes"),
    "isthmus_rollout_failed": ("gauge", "1 when this node could not take up what all others have"),
}

TICK_S: Final = 0.1
AFTER_ERROR_S: Final = 1.0
BODY_MAX: Final = 262_144


class Order(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What somebody wants all nodes to take up: settings as TOML, or a schema file."""

    kind: Literal["config", "schema"]
    body: Annotated[str, Meta(max_length=BODY_MAX)]
    bake_s: Annotated[float, Meta(ge=0, le=86_400)] = 30.0
    canaries: tuple[str, ...] = ()
    by: Annotated[str, Meta(max_length=128)] = ""
    dry_run: bool = False

    def __post_init__(self) -> None:
        if not (self.by.isascii() and (self.by.isprintable())):
            raise ValueOfKeyError("by", "who asks is told in printable ASCII")


class _Trial(NamedTuple):
    """What this node has taken up and lives with."""

    rollout: Rollout
    ends_ms: float
    watch: Watch


class Keeper:
    """The rollouts of one node. `present` are the nodes that take part, with their regions.

    `restart` has another agent started in place of this one, which carries out an errand first.
    """

    def __init__(
        self,
        database: Database,
        control: Control,
        config: Callable[[], Config],
        *,
        present: Callable[[], Mapping[str, str]],
        watch: Callable[[], Watch],
        restart: Callable[[], None],
        now_ms: Callable[[], float] = lambda: time.monotonic() * 1000,
        wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._database = database
        self._control = control
        self._config = config
        self._others = present
        self._watch = watch
        self._restart = restart
        self._now_ms = now_ms
        self._wall_ms = wall_ms
        self._node = config().node
        data = Path(config().data)
        self._overlay = Overlay(data)
        self._errands = Errands(data, config().database)
        self._rollouts: list[Rollout] = []
        self._reports: Reports = {}
        self._trial: _Trial | None = None
        self._is_settled = False  # set when it is clear what became of what an earlier agent tried
        self._seen: dict[tuple[str, str], tuple[float, float | None]] = {}  # by rollout and node that tries:
        # since when, and since when it is gone
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    # Life

    async def start(self) -> None:
        """Begin."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """End. What is on trial has failed then."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def handle_commit(self, commit: Commit) -> None:
        """Look again, if a commit is about rollouts."""
        if commit.reload or any(change.table in TABLES for change in commit.changes):
            self._wake.set()

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            try:
                is_over = not await self.step()
            except Exception as error:
                # A full disk, a locked file: the next time may be better.
                log.warning("a rollout has to wait", exc_info=error)
                await asyncio.sleep(AFTER_ERROR_S)
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if is_over else TICK_S):
                    await self._wake.wait()

    async def step(self) -> bool:
        """Do what is due; return whether time alone may bring something more to do."""
        self._rollouts, self._reports = await read_rollouts(self._database)
        if not self._is_settled or self._is_adrift():
            await self._settle()
            self._is_settled = True
            return True
        if self._trial is not None:
            await self._review(self._trial)
        await self._find_lost_settings()
        present = {*self._others(), self._node}
        action = plan_node(
            self._rollouts, self._reports, node=self._node, present=present, waits=self._wait(present)
        )
        if action is not None:
            await self._do(action)
        return action is not None or self._trial is not None or find_running(self._rollouts) is not None

    def _is_adrift(self) -> bool:
        """True when all nodes wait for what this one no longer tries: something went wrong on the way."""
        said = [nodes[self._node].state for nodes in self._reports.values() if self._node in nodes]
        return self._trial is None and State.TRYING in said

    async def _find_lost_settings(self) -> None:
        """Take up anew what this node says that it has, where its files were lost since."""
        latest = find_latest(self._rollouts, Kind.CONFIG)
        if latest is None or self._trial is not None or find_running(self._rollouts) is not None:
            return
        said = self._reports.get(latest.id, {})
        has_it = self._node in said and said[self._node].state is State.GOOD
        if has_it and await asyncio.to_thread(self._overlay.read) != latest.body:
            del said[self._node]

    def _wait(self, present: set[str]) -> dict[str, Wait]:
        """Return how long others have been trying, as far as this node has seen it."""
        running = find_running(self._rollouts)
        said = self._reports.get(running.id, {}) if running is not None else {}
        seen, waits = {}, {}
        now_ms = self._now_ms()
        for node, report in said.items():
            if running is None or report.state is not State.TRYING or node == self._node:
                continue
            since_ms, gone_ms = self._seen.get((running.id, node), (now_ms, None))
            gone_ms = None if node in present else gone_ms or now_ms
            seen[running.id, node] = since_ms, gone_ms
            waits[node] = Wait(now_ms - since_ms, 0.0 if gone_ms is None else now_ms - gone_ms)
        self._seen = seen
        return waits

    # What an earlier agent has left

    async def _settle(self) -> None:
        """Find out what became of what an earlier agent tried, and tell all nodes."""
        if await asyncio.to_thread(self._overlay.put_back):
            await self._control.reload()
        errand = await asyncio.to_thread(self._errands.read)
        for rollout in self._rollouts:
            own = self._reports.get(rollout.id, {}).get(self._node)
            ours = errand if errand is not None and errand.rollout == rollout.id else None
            if own is not None and own.state in {State.TRYING, State.GOOD}:
                await self._settle_one(rollout, own.state, ours)
        if self._trial is None and errand is not None and errand.stage is not Stage.KEPT:
            await self._drop(errand)

    async def _drop(self, errand: Errand) -> None:
        """Have nothing of a change of tables that nobody waits for."""
        if errand.plan and errand.stage not in {Stage.UNDONE, Stage.FAILED}:
            await self._ask_to_undo(errand)
        await asyncio.to_thread(self._errands.forget)

    async def _settle_one(self, rollout: Rollout, said: State, errand: Errand | None) -> None:
        stage = None if errand is None else errand.stage
        if said is State.TRYING and stage is Stage.TAKEN:
            self._begin_trial(rollout)
        elif said is State.TRYING and (stage is Stage.KEPT or await self._has_settings(rollout)):
            await self._report(rollout, State.GOOD)  # it had passed, and there was no time to say so
        elif errand is not None and stage is Stage.FAILED:
            await self._tell_failure(rollout, errand.problem)
        elif errand is not None and stage is Stage.UNDONE and rollout.status is Status.BACK:
            await self._report(rollout, State.BACK)
        elif said is State.TRYING:
            await self._tell_failure(rollout, DIED)

    async def _has_settings(self, rollout: Rollout) -> bool:
        is_config = rollout.kind is Kind.CONFIG
        return is_config and await asyncio.to_thread(self._overlay.read) == rollout.body

    # What is to be done

    async def _do(self, action: Action) -> None:
        match action:
            case Take(rollout):
                await self._take(rollout)
            case Undo(rollout):
                await self._undo(rollout)
            case End(rollout, status, reason):
                told = {"rollout": rollout.id, "status": status.value, "why": reason}
                log.info("a rollout is over", extra=told)
                await self._database.execute([end_rollout(rollout, status, reason, self._wall_ms())])

    async def _take(self, rollout: Rollout) -> None:
        log.info("taking up what is rolled out", extra={"rollout": rollout.id, "kind": rollout.kind.value})
        await self._report(rollout, State.TRYING)
        if rollout.kind is Kind.CONFIG:
            await self._take_settings(rollout)
            return
        try:
            plan, _ = await asyncio.to_thread(read_plan, self._config().database, rollout.body)
        except (SchemaError, sqlite3.Error) as error:
            await self._tell_failure(rollout, str(error))
            return
        if not plan.steps:
            self._begin_trial(rollout)
            return
        await asyncio.to_thread(self._errands.put, Errand(rollout.id, rollout.body))
        await self._go_on_as_another()

    async def _take_settings(self, rollout: Rollout) -> None:
        try:
            # The row may be of a newer version, or of somebody who wrote it by hand.
            check_settings(rollout.body)
        except ConfigError as error:
            await self._tell_failure(rollout, str(error))
            return
        watch = self._watch()
        await asyncio.to_thread(self._overlay.put_on_trial, rollout.body)
        lifecycle = await self._control.reload()
        self._begin_trial(rollout, watch)
        if problem := lifecycle.reload_problem or lifecycle.kept:
            await self._fail(rollout, problem)

    async def _undo(self, rollout: Rollout) -> None:
        log.info("taking back what was rolled out", extra={"rollout": rollout.id, "why": rollout.reason})
        self._trial = None
        if rollout.kind is Kind.CONFIG:
            latest = find_latest(self._rollouts, Kind.CONFIG)
            await self._go_back("" if latest is None else latest.body)
        else:
            await self._undo_tables(rollout)
        await self._report(rollout, State.BACK)

    async def _go_back(self, settings: str) -> None:
        """Have settings that all nodes have, in place of what was tried."""
        await asyncio.to_thread(self._overlay.put, settings)
        await self._control.reload()

    async def _undo_tables(self, rollout: Rollout) -> None:
        errand = await asyncio.to_thread(self._errands.read)
        if errand is not None and errand.rollout == rollout.id and errand.plan:
            await self._ask_to_undo(errand)

    async def _ask_to_undo(self, errand: Errand) -> None:
        await asyncio.to_thread(self._errands.put, msgspec.structs.replace(errand, stage=Stage.TO_UNDO))
        await self._go_on_as_another()

    async def _go_on_as_another(self) -> None:
        """Have the next agent started, and never return."""
        self._restart()
        await asyncio.Event().wait()

    # Trials

    def _begin_trial(self, rollout: Rollout, watch: Watch | None = None) -> None:
        # What all others have already is not watched.
        bake_ms = rollout.bake_ms if rollout.status is Status.RUNNING else 0
        self._trial = _Trial(rollout, self._now_ms() + bake_ms, watch or self._watch())

    async def _review(self, trial: _Trial) -> None:
        rollout = next((one for one in self._rollouts if one.id == trial.rollout.id), None)
        if rollout is None or rollout.status is Status.BACK:
            return  # `course` has it undone
        problem = trial.watch.find_problem()
        if problem:
            await self._fail(rollout, problem)
        elif self._now_ms() >= trial.ends_ms:
            await asyncio.to_thread(self._keep, rollout)
            self._trial = None
            await self._report(rollout, State.GOOD, self._describe(trial))

    def _keep(self, rollout: Rollout) -> None:
        if rollout.kind is Kind.CONFIG:
            self._overlay.settle()
            return
        errand = self._errands.read()
        if errand is not None and errand.rollout == rollout.id:
            self._errands.put(msgspec.structs.replace(errand, stage=Stage.KEPT))

    def _describe(self, trial: _Trial) -> str:
        told = [trial.watch.describe()] if trial.rollout.status is Status.RUNNING else []
        if trial.rollout.kind is Kind.CONFIG:
            own = list_own(trial.rollout.body, self._config())
            told += [f"keeps its own {', '.join(own)}"] if own else []
        return "; ".join(told)

    async def _fail(self, rollout: Rollout, problem: str) -> None:
        """Tell all nodes, and go back."""
        log.error("what is rolled out does harm here", extra={"rollout": rollout.id, "problem": problem})
        self._trial = None
        await self._tell_failure(rollout, problem)
        if rollout.kind is Kind.CONFIG:
            if await asyncio.to_thread(self._overlay.put_back):
                await self._control.reload()
        else:
            await self._undo_tables(rollout)

    async def _tell_failure(self, rollout: Rollout, problem: str) -> None:
        now_ms = self._wall_ms()
        statements = [
            put_report(rollout, self._node, State.FAILED, problem, now_ms),
            end_rollout(rollout, Status.BACK, f"{self._node}: {problem}", now_ms),
        ]
        await self._database.execute(statements)

    async def _report(self, rollout: Rollout, state: State, detail: str = "") -> None:
        now_ms = self._wall_ms()
        await self._database.execute([put_report(rollout, self._node, state, detail, now_ms)])

    # By hand

    async def begin(self, order: Order) -> dict[str, Any]:
        """Begin a rollout, or say what would be done; raises RegistryError."""
        kind = Kind(order.kind)
        rollouts, _ = await read_rollouts(self._database)
        plan = await self._check(kind, order.body)
        nodes = {**self._others(), self._node: self._config().region}
        unknown = [node for node in order.canaries if node not in nodes]
        if unknown:
            raise RegistryError(f"no node `{unknown[0]}` takes part; there are {', '.join(sorted(nodes))}")
        running = find_running(rollouts)
        if running is not None:
            raise RegistryError(f"rollout {running.id} is running; wait for it, or cancel it")
        rollout = Rollout(
            secrets.token_hex(4),
            kind,
            order.body,
            plan_steps(nodes, self._config().staging.regions, order.canaries),
            round(order.bake_s * 1000),
            Status.RUNNING,
            "",
            self._node,
            order.by,
            # A clock that is behind must not put it before what is done already.
            max([self._wall_ms(), *(one.created_ms + 1 for one in rollouts)]),
            0,
        )
        if not order.dry_run:
            await self._database.execute([put_rollout(rollout), *forget_oldest()])
        shown = self._show(rollout, {})
        return shown if plan is None else {**shown, "plan": [step.text for step in plan.steps]}

    async def _check(self, kind: Kind, body: str) -> Plan | None:
        """Refuse what makes no sense; return what tables take on this node."""
        try:
            if kind is Kind.CONFIG:
                check_settings(body)
                return None
            plan, _ = await asyncio.to_thread(read_plan, self._config().database, body)
        except (ConfigError, SchemaError, sqlite3.Error) as error:
            raise RegistryError(str(error)) from None
        refused = [f"{step.text}: {step.refused}" for step in plan.steps if step.refused]
        if refused:
            raise RegistryError("; ".join(refused))
        return plan

    async def cancel(self, id_: str, by: str) -> dict[str, Any]:
        """Have a rollout go back; raises RegistryError."""
        rollout = await self._find(id_)
        if rollout.status is not Status.RUNNING:
            raise RegistryError(f"rollout {id_} is over")
        reason = f"cancelled by {by}" if by else "cancelled"
        return await self._change(id_, end_rollout(rollout, Status.BACK, reason, self._wall_ms()))

    async def retry(self, id_: str) -> dict[str, Any]:
        """Have nodes that could not take up what all others have try once more; raises RegistryError."""
        rollout = await self._find(id_)
        if rollout.status is not Status.DONE:
            raise RegistryError(f"rollout {id_} is not done; begin another")
        return await self._change(id_, forgive(rollout))

    async def _change(self, id_: str, statement: Statement) -> dict[str, Any]:
        await self._database.execute([statement])
        return await self.show(id_)

    async def _find(self, id_: str) -> Rollout:
        rollouts, _ = await read_rollouts(self._database)
        for rollout in rollouts:
            if rollout.id == id_:
                return rollout
        raise RegistryError(f"there is no rollout `{id_}`", found=False)

    async def show(self, id_: str) -> dict[str, Any]:
        """Return a rollout with its body, fit for JSON; raises RegistryError."""
        rollout = await self._find(id_)
        _, reports = await read_rollouts(self._database)
        return {**self._show(rollout, reports), "body": rollout.body}

    async def list(self) -> list[dict[str, Any]]:
        """Return all rollouts, the newest first, fit for JSON."""
        rollouts, reports = await read_rollouts(self._database)
        return [self._show(rollout, reports) for rollout in rollouts]

    def _show(self, rollout: Rollout, reports: Reports) -> dict[str, Any]:
        shown: dict[str, Any] = msgspec.to_builtins(rollout)
        del shown["body"]
        said = reports.get(rollout.id, {})
        nodes = [
            {"node": node, "state": report.state.value, "detail": report.detail, "at_ms": report.at_ms}
            for node, report in sorted(said.items())
        ]
        return {**shown, "nodes": nodes}

    def describe(self) -> dict[str, Any]:
        """Return the rollout that is under way, and who could not take up what all are to have, as last seen.

        `failed` are those that this node could not, and `behind` all nodes that could not one.
        """
        running = find_running(self._rollouts)
        latest = [one for kind in Kind if (one := find_latest(self._rollouts, kind)) is not None]
        behind = [
            {"id": one.id, "kind": one.kind.value, "node": node, "detail": report.detail}
            for one in latest
            for node, report in sorted(self._reports.get(one.id, {}).items())
            if report.state is State.FAILED
        ]
        return {
            "running": None if running is None else self._show(running, self._reports),
            "failed": [one["id"] for one in behind if one["node"] == self._node],
            "behind": behind,
        }

    def samples(self) -> Iterator[Sample]:
        """Yield the metrics that METRICS names."""
        shown = self.describe()
        yield "isthmus_rollouts_running", (), float(shown["running"] is not None)
        yield "isthmus_rollout_failed", (), float(bool(shown["failed"]))
