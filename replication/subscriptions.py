"""Subscriptions: queries whose rows are streamed, and then what changes in them.

Decides when a query runs again, who shares one, and when one ends. A query runs again when a commit has
touched a table that it reads: at once if it has rested, else when it has (see core/subscription.py).
Everybody who asks for the same SQL with the same parameters follows the same subscription. Who listens holds
no queue, only the number of the last change it has taken: one who falls behind what is kept is told so.

Invariant: a listener gets each change after its starting point once, in order, or an error that says why not.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

import aiosqlite

from replication.core.codec import pack
from replication.core.subscription import (
    Change,
    LiveResult,
    ResumeError,
    compute_identity,
    compute_rest_ms,
)
from replication.database import QueryError
from replication.errors import BusyError, ReplicationError
from replication.identity import read_boot
from replication.subscription_file import Saved, SubscriptionFile
from replication.subscription_query import QueryReader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from replication.core.change import Commit
    from replication.database import Params
    from replication.metrics import Sample
    from replication.schema import Schema
    from replication.subscription_query import Answer

log = logging.getLogger(__name__)

T = TypeVar("T")

METRICS: dict[str, tuple[str, str]] = {
    "isthmus_subscriptions": ("gauge", "Queries that are kept up to date for those who subscribed."),
    "isthmus_subscription_listeners": ("gauge", "Streams that follow a subscription."),
    "isthmus_subscription_events_total": (
        "counter",
        "Subscriptions: made, joined, resumed, ended and why; runs, changes, listeners that came too late.",
    ),
    "isthmus_subscription_query_seconds_total": ("counter", "Time spent in running subscribed queries."),
}
# Changes handed to a listener at a time.
_BATCH: Final = 512
# Between tries when the database was locked.
_RETRY_MS: Final = 100.0


@dataclass(frozen=True, slots=True)
class SubscriptionLimits:
    """What subscriptions may cost. All of them together hold at most `subscriptions_max` times both sizes."""

    # One thread runs all of the queries, so each waits for all others.
    query_ms_max: float = 2_000
    rows_max: int = 20_000
    result_bytes_max: int = 4 * 1024 * 1024
    # What a client that lost its connection, or is slow, may be behind. Corrosion keeps 500 changes.
    log_changes_max: int = 10_000
    log_bytes_max: int = 2 * 1024 * 1024
    subscriptions_max: int = 64
    listeners_max: int = 1_024
    # As long as Corrosion's: a client that is restarted finds its subscription again.
    idle_ms: float = 600_000


class SubscriptionError(ReplicationError):
    """A stream cannot begin or go on; the message is for the one who listens."""


class TooManyError(SubscriptionError):
    """There is no room for another subscription or listener."""


class UnknownSubscriptionError(SubscriptionError):
    """There is no subscription with that id."""


@dataclass(slots=True, eq=False)
class Subscription:
    """One query and its rows. Made by Subscriptions; all of it is for the event loop."""

    id: str
    key: bytes  # of SQL and parameters
    sql: str
    params: Params
    columns: tuple[str, ...]
    live: LiveResult
    tables: frozenset[str]  # that the query read when it ran last
    applied_seq: int  # the commit that the rows include
    wanted_seq: int | None = None  # set by a commit that may change the rows, cleared by the run after it
    ready_at_ms: float = 0.0  # when the query has rested
    took_ms: float = 0.0  # by the last run
    listeners: int = 0
    quiet_since_ms: float = 0.0  # since when there are no listeners, while there are none
    failure: str = ""  # set when it ends before its listeners do
    is_over: bool = False
    moved: asyncio.Event = field(default_factory=asyncio.Event)  # another one after each change

    @property
    def hash(self) -> str:
        """A short name for SQL and parameters, the same on every node."""
        return self.key.hex()[:16]

    def wake(self) -> None:
        """Let listeners look at what there is."""
        self.moved.set()
        self.moved = asyncio.Event()

    def end(self, failure: str) -> None:
        """End it for all who listen."""
        self.failure = failure
        self.is_over = True
        self.wake()


class Listener:
    """One who follows a subscription; a context manager, so that nobody is counted who has gone.

    last_id is the number of the last change taken; who begins without one begins with the rows as of then.
    """

    def __init__(self, owner: Subscriptions, subscription: Subscription, from_id: int | None) -> None:
        self.subscription = subscription
        live = subscription.live
        self.last_id = live.last_id if from_id is None else from_id
        self.rows: list[tuple[int, bytes]] = list(live.rows.items()) if from_id is None else []
        self._owner = owner

    def __enter__(self) -> Self:
        self.subscription.listeners += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._owner.handle_listener_gone(self.subscription)

    async def read(self, timeout_s: float) -> list[Change] | None:
        """Return the next changes; none when none come in time, None when the node stops.

        Raises SubscriptionError when changes are missing, or when the subscription has ended.
        """
        subscription = self.subscription
        changes = self._take()
        if not changes and not subscription.is_over:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await subscription.moved.wait()
            changes = self._take()
        if changes or not subscription.is_over:
            return changes
        if subscription.failure:
            raise SubscriptionError(subscription.failure)
        return None

    def _take(self) -> list[Change]:
        try:
            changes = self.subscription.live.read_since(self.last_id, _BATCH)
        except ResumeError as error:
            self._owner.counters["resume_failed"] += 1
            raise SubscriptionError(str(error)) from error
        if changes:
            self.last_id = changes[-1].id
        return changes


def make_key(sql: str, params: Params) -> bytes:
    """Return what is equal for the same SQL with the same parameters, on every node."""
    values = dict(sorted(params.items())) if isinstance(params, Mapping) else tuple(params)
    try:
        return sha256(pack((sql.strip(), values))).digest()
    except (OverflowError, TypeError, ValueError) as error:
        raise QueryError(f"a parameter cannot be used: {error}") from error


class Subscriptions:
    """All subscriptions of one replica; all methods are for the event loop that started it."""

    def __init__(
        self,
        path: Path,
        schema: Schema,
        limits: SubscriptionLimits | None = None,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        boot: Callable[[], str] = read_boot,
    ) -> None:
        self.counters: Counter[str] = Counter()
        self._path = path
        self._schema = schema
        self._limits = limits or SubscriptionLimits()
        self._monotonic = monotonic
        self._boot = boot
        self._by_id: dict[str, Subscription] = {}
        self._by_key: dict[bytes, Subscription] = {}
        self._making = asyncio.Lock()  # held while a query runs for the first time
        self._kick = asyncio.Event()  # the runner has something to look at
        self._seq = 0  # of the last commit that we were told of
        self._took_ms = 0.0  # by all runs so far
        self._runner: asyncio.Task[None] | None = None
        # Set by start.
        self._connection: aiosqlite.Connection
        self._reader: QueryReader
        self._file: SubscriptionFile

    def extend(self, schema: Schema) -> None:
        """Read the tables of this schema from now on: those that there were, and more."""
        self._schema = schema
        self._reader.extend(schema)

    # --- life -----------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Open the database, which must exist, and take up the subscriptions of an earlier life."""
        uri = f"{self._path.absolute().as_uri()}?mode=ro"
        # Statements are not cached, because only one that is compiled tells what it reads.
        self._connection = await aiosqlite.connect(uri, uri=True, isolation_level=None, cached_statements=0)
        self._file = SubscriptionFile(self._path.with_name(f"{self._path.name}-subscriptions"), self._boot())
        try:
            saved = await self._on_thread(self._open)
        except BaseException:
            await self._connection.close()
            raise
        for item in saved:
            self._restore(item)
        self._runner = asyncio.create_task(self._run(), name="subscriptions")

    def _open(self) -> list[Saved]:
        limits = self._limits
        self._reader = QueryReader(
            self._connection._conn,  # noqa: SLF001 - on its thread, where it may be used
            self._schema,
            timeout_ms=limits.query_ms_max,
            rows_max=limits.rows_max,
            bytes_max=limits.result_bytes_max,
        )
        return self._file.open()

    def _restore(self, saved: Saved) -> None:
        live = self._make_live(saved.identity)
        live.restore(saved.rows, saved.last_row_id, saved.last_id, saved.changes)
        key = make_key(saved.sql, saved.params)
        # Wanted at once: what was written since must become changes.
        self._register(
            Subscription(
                saved.id, key, saved.sql, saved.params, saved.columns, live, frozenset(), -1, wanted_seq=0
            )
        )

    async def stop(self) -> None:
        """End all streams, which can be resumed, and close what is open; does nothing when not started."""
        if self._runner is None:
            return
        self._runner.cancel()
        await asyncio.gather(self._runner, return_exceptions=True)
        self._runner = None
        for subscription in self._by_id.values():
            subscription.end("")
        self._by_id.clear()
        self._by_key.clear()
        try:
            await self._on_thread(self._file.close)
        finally:
            await self._connection.close()

    async def _on_thread(self, act: Callable[[], T]) -> T:
        result: T = await self._connection._execute(act)  # type: ignore[no-untyped-call]  # noqa: SLF001 - as Database
        return result

    # --- who asks -------------------------------------------------------------------------------------

    async def subscribe(self, sql: str, params: Params = ()) -> Subscription:
        """Return the subscription of a query, made if there is none.

        Raises QueryError for what cannot be subscribed to or costs too much, TooManyError, BusyError.
        """
        key = make_key(sql, params)
        async with self._making:
            found = self._by_key.get(key)
            if found is not None:
                self.counters["joined"] += 1
                return found
            if self._runner is None:
                raise SubscriptionError("this node is stopping")
            await self._make_room()
            answer = await self._on_thread(lambda: self._reader.read(sql, params))
            return await self._make(key, sql, params, answer)

    async def _make(self, key: bytes, sql: str, params: Params, answer: Answer) -> Subscription:
        keys = [name for table in answer.tables for name in self._schema.tables[table].pk]
        live = self._make_live(compute_identity(answer.columns, keys))
        live.fill(answer.rows)
        made = Subscription(
            str(uuid.uuid4()), key, sql, params, answer.columns, live, answer.tables, answer.seq
        )
        self._note_run(made, answer)
        if self._seq > answer.seq:
            made.wanted_seq = self._seq  # a commit came between the run and now
        self._register(made)
        self.counters["made"] += 1
        saved = Saved(
            made.id,
            sql,
            params,
            made.columns,
            live.identity,
            live.last_row_id,
            0,
            answer.seq,
            list(live.rows.items()),
            [],
        )
        # The next to use the thread, so in the file before any change is.
        await self._on_thread(lambda: self._file.create(saved))
        return made

    async def _make_room(self) -> None:
        if len(self._by_id) < self._limits.subscriptions_max:
            return
        quiet = [item for item in self._by_id.values() if not item.listeners]
        if not quiet:
            raise TooManyError(f"there are {len(self._by_id)} subscriptions already, with listeners")
        self.counters["ended_for_room"] += 1
        await self._end(min(quiet, key=lambda item: item.quiet_since_ms), "")

    def find(self, sql: str, params: Params = ()) -> Subscription | None:
        """Return the subscription of a query if there is one."""
        return self._by_key.get(make_key(sql, params))

    def get(self, id_: str) -> Subscription:
        """Return a subscription; raises UnknownSubscriptionError."""
        found = self._by_id.get(id_)
        if found is None:
            raise UnknownSubscriptionError(f"could not find subscription with id {id_}")
        return found

    def listen(
        self, subscription: Subscription, *, from_id: int | None = None, skip_rows: bool = False
    ) -> Listener:
        """Return a listener that begins after a change, or with all rows; raises TooManyError."""
        if sum(item.listeners for item in self._by_id.values()) >= self._limits.listeners_max:
            raise TooManyError(f"there are {self._limits.listeners_max} listeners already")
        if from_id is not None:
            self.counters["resumed"] += 1
        elif skip_rows:
            from_id = subscription.live.last_id
        return Listener(self, subscription, from_id)

    def handle_listener_gone(self, subscription: Subscription) -> None:
        """Take note that a listener has gone; after the last one, another is waited for a while."""
        subscription.listeners -= 1
        subscription.quiet_since_ms = self._now_ms()
        self._kick.set()

    # --- what changes ---------------------------------------------------------------------------------

    def handle_commit(self, commit: Commit) -> None:
        """Take note of a commit: queries that read what it changed will run again."""
        touched = {*commit.reload, *(change.table for change in (*commit.changes, *commit.held))}
        if not touched:
            return
        self._seq = commit.seq
        for subscription in self._by_id.values():
            is_read = not subscription.tables or not subscription.tables.isdisjoint(touched)
            if is_read and commit.seq > subscription.applied_seq:
                subscription.wanted_seq = commit.seq
                self._kick.set()

    async def _run(self) -> None:
        while True:
            self._kick.clear()
            now_ms = self._now_ms()
            waiting = [item for item in self._by_id.values() if item.wanted_seq is not None]
            quiet = [item for item in self._by_id.values() if not item.listeners]
            wake_at_ms = min(
                [item.ready_at_ms for item in waiting]
                + [item.quiet_since_ms + self._limits.idle_ms for item in quiet],
                default=float("inf"),
            )
            if wake_at_ms > now_ms:
                timeout_s = None if wake_at_ms == float("inf") else (wake_at_ms - now_ms) / 1000
                # Not wait_for: in Python 3.11 it loses a cancellation that comes with the event.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(timeout_s):
                        await self._kick.wait()
                continue
            for subscription in quiet:
                if subscription.quiet_since_ms + self._limits.idle_ms <= now_ms:
                    self.counters["ended_idle"] += 1
                    await self._end(subscription, "")
            first = min(waiting, key=lambda item: item.ready_at_ms, default=None)
            if first is not None and first.ready_at_ms <= now_ms and not first.is_over:
                await self._refresh(first)

    async def _refresh(self, subscription: Subscription) -> None:
        """Run a query again and tell what has changed; one that fails ends."""
        live = subscription.live

        def act() -> tuple[Answer, list[Change]]:
            answer = self._reader.read(subscription.sql, subscription.params)
            if answer.columns != subscription.columns:
                raise QueryError("the columns of the query have changed; subscribe again")
            changes = live.plan_changes(answer.rows)
            last_row_id = max([live.last_row_id, *(change.row_id for change in changes)])
            self._file.append(
                subscription.id, changes, floor=live.floor, last_row_id=last_row_id, seq=answer.seq
            )
            return answer, changes

        try:
            answer, changes = await self._on_thread(act)
        except BusyError:
            subscription.ready_at_ms = self._now_ms() + _RETRY_MS
            return
        except Exception as error:  # noqa: BLE001 - told to all who listen; others must go on
            self.counters["ended_failed"] += 1
            reason = str(error) if isinstance(error, QueryError) else "the query cannot be run; see the log"
            log.warning("subscription %s ends: %r", subscription.id, error)
            await self._end(subscription, reason)
            return
        live.apply_changes(changes)
        self.counters["changes"] += len(changes)
        self._note_run(subscription, answer)
        if subscription.wanted_seq is not None and subscription.wanted_seq <= answer.seq:
            subscription.wanted_seq = None
        if changes:
            subscription.wake()

    def _note_run(self, subscription: Subscription, answer: Answer) -> None:
        self.counters["runs"] += 1
        self._took_ms += answer.took_ms
        subscription.tables = answer.tables
        subscription.applied_seq = answer.seq
        subscription.took_ms = answer.took_ms
        subscription.ready_at_ms = self._now_ms() + compute_rest_ms(answer.took_ms)

    async def _end(self, subscription: Subscription, failure: str) -> None:
        if self._by_id.pop(subscription.id, None) is None:
            return  # meanwhile somebody else has
        del self._by_key[subscription.key]
        subscription.end(failure)
        await self._on_thread(lambda: self._file.drop(subscription.id))

    def _register(self, subscription: Subscription) -> None:
        subscription.quiet_since_ms = self._now_ms()
        self._by_id[subscription.id] = subscription
        self._by_key[subscription.key] = subscription
        self._kick.set()

    def _make_live(self, identity: tuple[int, ...]) -> LiveResult:
        limits = self._limits
        return LiveResult(identity, changes_max=limits.log_changes_max, bytes_max=limits.log_bytes_max)

    def _now_ms(self) -> float:
        return self._monotonic() * 1000

    # --- views ----------------------------------------------------------------------------------------

    def describe(self) -> list[dict[str, Any]]:
        """Return all subscriptions as an operator wants to see them, fit for JSON."""
        return [
            {
                "id": item.id,
                "sql": item.sql,
                "tables": sorted(item.tables),
                "rows": len(item.live.rows),
                "change_id": item.live.last_id,
                "min_change_id": item.live.floor,
                "listeners": item.listeners,
                "run_ms": round(item.took_ms, 3),
            }
            for item in self._by_id.values()
        ]

    def samples(self) -> Iterator[Sample]:
        """Yield the metrics that METRICS names."""
        yield "isthmus_subscriptions", (), len(self._by_id)
        yield "isthmus_subscription_listeners", (), sum(item.listeners for item in self._by_id.values())
        yield "isthmus_subscription_query_seconds_total", (), self._took_ms / 1000
        for event, count in self.counters.items():
            yield "isthmus_subscription_events_total", (("event", event),), count
