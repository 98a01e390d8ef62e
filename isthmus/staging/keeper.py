"""Carries out what `stage` decides: reads what the file holds back, feeds it to one worker, tells all nodes.

Decides which tables are staged, and what it takes to release or drop a changeset by hand. Refuses to know why
something is tried or blamed. Invariant: a strike is on disk before a worker gets what may kill it, for it may
take this process along.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import orjson

from isthmus.route_feed import routing_schema
from isthmus.staging.rings import RINGS, find_ring, order_regions
from isthmus.staging.stage import STALL_MS, Absolve, Accuse, Release, Revert, Stage, Status, Strikes, Try
from replication.core.clock import Clock, Hlc, SiteId, compute_ms
from replication.errors import ReplicationError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    from isthmus.config import StagingConfig
    from isthmus.registry import Statement
    from isthmus.staging.stage import Action
    from replication.core.change import Commit
    from replication.metrics import Sample
    from replication.staging import Staged, StagedRow

log = logging.getLogger(__name__)

# What the fleet is built of. It changes rarely and may take its time; what must not (machines, checks, loads)
# is fed to all at once.
STAGED: Final = frozenset({"apps", "hostnames", "services", "regions"})
_TOLD: Final = "quarantines"

METRICS: Mapping[str, tuple[str, str]] = {
    "isthmus_staged_changesets": ("gauge", "Changesets held back from workers of this node, by state"),
    "isthmus_staged_strikes_total": ("counter", "Workers that died or stalled of what they were to try"),
}

# How late, at most, something is done whose time has come.
TICK_S = 0.05
# Of a store that is read so often, this share of the time.
LOOK_SHARE = 0.1
AFTER_ERROR_S = 1.0
# A message of the feed is read whole.
ROWS_A_MESSAGE = 1_000
# Of a large changeset, what all nodes keep the names of.
ROWS_TOLD_MAX = 100

COLUMNS: Final = {name: table for name, table in routing_schema().tables.items() if name in STAGED}

_SELECT_TOLD = "SELECT site, hlc, node, status, reason, deaths, since_ms, what FROM quarantines"
_PUT_TOLD = (
    "INSERT INTO quarantines (site, hlc, node, status, reason, deaths, since_ms, what)"
    " VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET status = excluded.status,"
    " reason = excluded.reason, deaths = excluded.deaths, what = excluded.what"
)
_TAKE_BACK = "DELETE FROM quarantines WHERE site = ? AND hlc = ?"
_TAKE_ALL_BACK = "DELETE FROM quarantines WHERE node = ?"


class StagingError(Exception):
    """What is asked for cannot be done; `found` is false when there is no such changeset."""

    def __init__(self, message: str, *, found: bool = True) -> None:
        super().__init__(message)
        self.found = found


class Replica(Protocol):
    """What is needed of the replication agent."""

    async def read_staged(self) -> Staged:
        """Return what is held back, with strikes."""

    async def release_staged(self, clocks: Collection[Clock]) -> None:
        """Show it."""

    async def put_strikes(self, strikes: Mapping[Clock, int]) -> None:
        """Keep strikes."""

    async def execute(self, statements: Sequence[Statement]) -> Any:
        """Write in one transaction."""

    async def query(self, sql: str) -> Any:
        """Read; the answer has `rows`."""


class Feed(Protocol):
    """The way to the workers."""

    def send(self, message: list[Any], worker: str | None = None) -> None:
        """Send a message to one worker, or to all."""


class _Told(NamedTuple):
    """What one node says of a changeset."""

    node: str
    status: Status
    reason: str
    deaths: int
    since_ms: int
    what: Any


class Keeper:
    """What one node holds back, and what it does about it. `regions` has all that have nodes."""

    def __init__(
        self,
        replica: Replica,
        config: StagingConfig,
        regions: Callable[[], Iterable[str]],
        *,
        node: str,
        region: str,
        now_ms: Callable[[], float] = lambda: time.monotonic() * 1000,
        wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._replica = replica
        self._config = config
        self._regions = regions
        self._node = node
        self._region = region
        self._now_ms = now_ms
        self._wall_ms = wall_ms
        self._rows: dict[Clock, list[StagedRow]] = {}
        self._told: dict[Clock, list[_Told]] = {}
        self._todo: list[Action] = []  # what was decided and is not done yet
        self._is_stale = True  # what was read last may have changed since
        self._look_at_ms = 0.0  # the next time that the file may be read
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._stage = Stage(node, config.bake_ms)
        self._feed: Feed  # set by `prepare`

    @property
    def ring(self) -> int:
        """The index in RINGS of this node's region."""
        return find_ring(order_regions(self._config.regions, self._regions()), self._region)

    # Life

    def prepare(self, feed: Feed, *, is_empty: bool) -> None:
        """Make ready for workers; is_empty says that this node has nothing yet that it could go on with."""
        self._feed = feed
        if is_empty:
            self._stage.fresh_until_ms = self._now_ms() + self._config.bake_ms

    async def start(self) -> None:
        """Begin. A node that holds nothing back accuses nobody."""
        if not self._config.bake_ms:
            await self._replica.execute([(_TAKE_ALL_BACK, (self._node,))])
            return
        if self._config.bake_ms < STALL_MS:
            log.warning(
                "staging.bake_ms is short: a change that stalls workers is in the next regions before the "
                "first one knows of it",
                extra={"bake_ms": self._config.bake_ms, "least_ms": int(STALL_MS)},
            )
        await self.step()
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """End; what is on trial is not to blame for it."""
        if self._task is None:
            return
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._task = None
        self._todo += self._stage.cancel()
        with contextlib.suppress(ReplicationError, sqlite3.Error):
            await self._do_all()

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            try:
                await self.step()
            except Exception as error:  # noqa: BLE001 - what is held back must not be so for ever
                log.warning("changes that are held back have to wait", extra={"error": repr(error)})
                await asyncio.sleep(AFTER_ERROR_S)
                continue
            timeout_s = TICK_S if self._stage.is_waiting or self._is_stale else None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._wake.wait()
            if self._wake.is_set():
                await asyncio.sleep(0)  # what comes together is looked at together

    async def step(self) -> None:
        """Do all that is to be done now."""
        await self._do_all()
        if self._is_stale and self._now_ms() >= self._look_at_ms:
            await self._look()
        self._todo += self._stage.plan(self._now_ms(), self.ring * self._config.bake_ms)
        await self._do_all()

    async def _do_all(self) -> None:
        """Do what was decided, in order. What the disk does not take now is done later."""
        while self._todo:
            action = self._todo.pop(0)
            try:
                await self._do(action)
            except BaseException as error:
                self._is_stale = True
                if isinstance(error, (ReplicationError, sqlite3.Error)) and not isinstance(action, Try):
                    self._todo.insert(0, action)
                raise

    async def _look(self) -> None:
        """Read what is held back, and what nodes say of it."""
        began_ms = self._now_ms()
        self._is_stale = False
        try:
            staged = await self._replica.read_staged()
            told = (await self._replica.query(_SELECT_TOLD)).rows
        except BaseException:
            self._is_stale = True
            raise
        now_ms = self._now_ms()
        self._look_at_ms = now_ms + (now_ms - began_ms) / LOOK_SHARE
        self._rows = {}
        for row in staged.rows:
            self._rows.setdefault(row.clock, []).append(row)
        self._told = {}
        for site, hlc, *rest in told:
            clock = parse_id(f"{site}:{hlc}")
            if clock is not None:
                self._told.setdefault(clock, []).append(_read_told(rest))
        self._stage.handle_held(self._rows, staged.strikes, now_ms)
        by_node = {clock: {one.node: one.status for one in many} for clock, many in self._told.items()}
        self._todo += self._stage.handle_told(by_node, now_ms)
        orphans = {clock: 0 for clock in staged.strikes if clock not in self._rows}
        if orphans:
            self._todo.append(Strikes(orphans))

    async def _do(self, action: Action) -> None:
        match action:
            case Try(worker, token, strikes):
                await self._try(worker, token, strikes)
            case Strikes(strikes):
                await self._replica.put_strikes(strikes)
            case Release(clocks, worker):
                await self._replica.release_staged(clocks)
                for clock in clocks:
                    self._rows.pop(clock, None)
                if worker:
                    self._feed.send(["settled"], worker)
            case Revert(worker):
                self._feed.send(["reload"], worker)
            case Accuse(clock, status, reason, strikes):
                await self._accuse(clock, status, reason, strikes)
            case Absolve(clock):
                sql = f"{_TAKE_BACK} AND node = ?"
                await self._replica.execute([(sql, (clock.site.hex(), clock.hlc, self._node))])

    async def _try(self, worker: str, token: int, strikes: Mapping[Clock, int]) -> None:
        rows = [(row.table, row.pk, row.row) for clock in strikes for row in self._rows.get(clock, ())]
        try:
            await self._replica.put_strikes(strikes)
        except BaseException:
            self._stage.cancel()
            raise
        for start in range(0, len(rows), ROWS_A_MESSAGE):
            is_last = start + ROWS_A_MESSAGE >= len(rows)
            self._feed.send(["try", token if is_last else 0, rows[start : start + ROWS_A_MESSAGE]], worker)

    async def _accuse(self, clock: Clock, status: Status, reason: str, strikes: int) -> None:
        what = [[row.table, *map(_readable, row.pk)] for row in self._rows.get(clock, ())]
        log.error(
            "a change is held back: workers do not survive it",
            extra={"change": make_id(clock), "rows": what[:5], "status": status.value, "reason": reason},
        )
        shown = orjson.dumps(what[:ROWS_TOLD_MAX]).decode()
        values = (clock.site.hex(), clock.hlc, self._node, status.value, reason, strikes)
        await self._replica.execute([(_PUT_TOLD, (*values, self._wall_ms(), shown))])
        self._stage.note_accused(clock, status)

    # What others do

    def handle_commit(self, commit: Commit) -> None:
        """Look again, if a commit is about what is held back, or what nodes say of it."""
        if commit.held or commit.reload or any(change.table == _TOLD for change in commit.changes):
            self._is_stale = True
            self._wake.set()

    def handle_worker(self, worker: str) -> None:
        """A worker follows."""
        self._stage.handle_worker(worker)
        self._wake.set()

    def handle_gone(self, worker: str, *, is_death: bool) -> None:
        """A worker follows no more."""
        self._todo += self._stage.handle_gone(worker, is_death=is_death)
        self._wake.set()

    def handle_tried(self, worker: str, token: int, problem: str) -> None:
        """A worker has applied what it was to try, or says why it could not."""
        self._todo += self._stage.handle_tried(worker, token, problem, self._now_ms())
        self._wake.set()

    # By hand

    async def release(self, id_: str) -> None:
        """Take back what all nodes say of a changeset: each tries it again. Raises StagingError."""
        clock = self._find(id_)
        if clock not in self._told:
            raise StagingError("nothing is said against it: it is let through in its time")
        await self._replica.execute([(_TAKE_BACK, (clock.site.hex(), clock.hlc))])

    async def drop(self, id_: str) -> int:
        """Write back what this node shows instead; return how many rows. Raises StagingError."""
        clock = self._find(id_)
        rows = self._rows.get(clock)
        if not rows:
            raise StagingError(
                "this node holds nothing of it back; ask one that does, or write the rows anew"
            )
        statements = [_restore(row) for row in rows]
        await self._replica.execute([*statements, (_TAKE_BACK, (clock.site.hex(), clock.hlc))])
        return len(rows)

    def _find(self, id_: str) -> Clock:
        clock = parse_id(id_)
        if clock is None or (clock not in self._rows and clock not in self._told):
            raise StagingError(f"no change `{id_}` is held back", found=False)
        return clock

    def describe(self) -> dict[str, Any]:
        """Return what is held back and what nodes say of it, fit for JSON."""
        ring = self.ring
        return {
            "bake_ms": self._config.bake_ms,
            "order": list(order_regions(self._config.regions, self._regions())),
            "ring": RINGS[ring],
            "changes": [
                self._describe(clock, ring * self._config.bake_ms)
                for clock in sorted(self._rows.keys() | self._told.keys())
            ],
        }

    def _describe(self, clock: Clock, delay_ms: float) -> dict[str, Any]:
        entry = self._stage.entries.get(clock)
        due_in_ms = None
        if entry is not None and not entry.is_barred:
            due_in_ms = max(0, round(entry.arrived_ms + delay_ms - self._now_ms()))
        rows = [
            [row.table, [_readable(part) for part in row.pk], _name_change(row)]
            for row in self._rows.get(clock, ())
        ]
        return {
            "id": make_id(clock),
            "site": clock.site.hex(),
            "written_ms": compute_ms(clock.hlc),
            "state": self._name_state(clock),
            "due_in_ms": due_in_ms,
            "strikes": 0 if entry is None else entry.strikes,
            "rows": [{"table": table, "key": key, "change": change} for table, key, change in rows],
            "accusers": [one._asdict() | {"status": one.status.value} for one in self._told.get(clock, ())],
        }

    def _name_state(self, clock: Clock) -> str:
        """Return what becomes of a changeset here, in a word."""
        entry = self._stage.entries.get(clock)
        statuses = {one.status for one in self._told.get(clock, ())}
        if entry is not None and entry.verdict is not None:
            statuses.add(entry.verdict)
        if Status.QUARANTINED in statuses:
            return "quarantined"
        if statuses:
            return "suspect"
        return "trying" if clock in self._stage.on_trial else "waiting"

    def count(self) -> dict[str, int]:
        """Return how many changesets are held back here, by state."""
        states = Counter(self._name_state(clock) for clock in self._rows)
        return {state: states[state] for state in ("waiting", "trying", "suspect", "quarantined")}

    def samples(self) -> Iterator[Sample]:
        """Yield the metrics that METRICS names."""
        for state, count in self.count().items():
            yield "isthmus_staged_changesets", (("state", state),), float(count)
        yield "isthmus_staged_strikes_total", (), float(self._stage.strikes)


def make_id(clock: Clock) -> str:
    """Return what people call a changeset by."""
    return f"{clock.site.hex()}:{clock.hlc}"


def parse_id(text: str) -> Clock | None:
    """Return the changeset that a text names; None when it names none."""
    site, _, hlc = text.partition(":")
    try:
        return Clock(Hlc(int(hlc)), SiteId(bytes.fromhex(site)))
    except ValueError:
        return None


def _read_told(values: Sequence[Any]) -> _Told:
    node, status, reason, deaths, since_ms, what = values
    try:
        said = Status(status)
    except ValueError:
        said = Status.QUARANTINED  # of a newer version, which has its reasons
    try:
        rows = orjson.loads(what)
    except orjson.JSONDecodeError:
        rows = []
    return _Told(str(node), said, str(reason), deaths, since_ms, rows)


def _restore(row: StagedRow) -> Statement:
    """Return what writes back a row as it is shown."""
    spec = COLUMNS[row.table]
    if row.shown is None:
        matches = " AND ".join(f"{column} = ?" for column in spec.pk)
        return f"DELETE FROM {row.table} WHERE {matches}", row.pk  # noqa: S608 - our own schema's names
    columns = ", ".join(spec.columns)
    marks = ", ".join("?" * len(spec.columns))
    return f"INSERT OR REPLACE INTO {row.table} ({columns}) VALUES ({marks})", row.shown  # noqa: S608 - as above


def _name_change(row: StagedRow) -> str:
    if row.shown is None:
        return "insert"
    return "delete" if row.row is None else "update"


def _readable(value: object) -> object:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
