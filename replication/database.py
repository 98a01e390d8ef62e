"""The store on a thread of its own, and a second, read-only connection for queries.

Decides what a query may do and how long, which writes share a transaction, and when the node is read-only.
Knows nothing of peers. Invariant: commits are handed out on the event loop in the order in which they were
made, also when whoever asked for one has gone away.
"""

import asyncio
import fcntl
import logging
import os
import sqlite3
import tempfile
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import aiosqlite

from replication.core.change import Commit, SqlValue
from replication.errors import (
    BusyError,
    InUseError,
    ReadOnlyError,
    ReplacedError,
    ReplicationError,
    StoreError,
)
from replication.schema import Schema
from replication.store import Store, Synchronous
from replication.tables import read_lossy

log = logging.getLogger(__name__)

T = TypeVar("T")
Params = Sequence[SqlValue] | Mapping[str, SqlValue]
Statement = tuple[str, Params]

# What shares a transaction. Beyond some dozens there is little left to share; the time is for slow
# statements, as the first caller's answer waits for the last one.
BATCH_CALLS = 128
BATCH_S = 0.01
# How soon a read-only node is writable again after its disk is, and how much room there must be: with less,
# it would be full again after a few writes.
PROBE_S = 1.0
PROBE_BYTES = 1 << 20
# How often SQLite asks whether a query has had its time: every 1000 steps costs under a percent.
_PROGRESS_STEPS = 1_000

# What a query needs and nothing that reaches beyond the database or changes it.
_READ_ACTIONS = frozenset(
    {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
)


class QueryError(ReplicationError):
    """A query that is not a read, does not parse, or asks for too much."""


@dataclass(frozen=True, slots=True)
class QueryResult:
    """What a query found."""

    columns: list[str]
    rows: list[tuple[SqlValue, ...]]


@dataclass(frozen=True, slots=True)
class Written:
    """Rows affected by each statement, and the version of the changeset that holds what they changed.

    The version is None when nothing changed; it may be that of others who wrote at the same time.
    """

    rows_affected: list[int]
    version: int | None


@dataclass(frozen=True, slots=True)
class _Call:
    """Somebody who waits for a write."""

    statements: Sequence[Statement]
    wall_ms: int
    done: asyncio.Future[Written]


# What became of the first calls, as far as the time went; the version that holds them; the commit.
_Batch = tuple[Sequence[list[int] | Exception], int | None, Commit | None]


class _StoreConnection(aiosqlite.Connection):
    """aiosqlite's thread with a store on it: whatever touches the store runs there, one after another."""

    def __init__(self, open_store: Callable[[], Store]) -> None:
        self.store: Store | None = None  # set when the connection opens, on its thread

        def connect() -> sqlite3.Connection:
            self.store = open_store()
            return self.store.connection

        super().__init__(connect, iter_chunk_size=64)

    async def open(self) -> None:
        """Start the thread and open the store; raises what opening raises."""
        try:
            await self
        except Exception:
            # aiosqlite ends the thread without waiting; it must not speak to a loop that is closed by then.
            self._thread.join()
            raise

    async def run(self, act: Callable[[Store], T]) -> T:
        """Return what `act` returns, run on the thread."""
        assert self.store is not None, "the connection is open"
        result: T = await self._execute(act, self.store)  # type: ignore[no-untyped-call]  # aiosqlite's own
        return result

    def submit(self, act: Callable[[Store], None]) -> None:
        """Have the thread run something that raises nothing and answers by itself."""
        assert self.store is not None, "the connection is open"
        self._tx.put_nowait((None, partial(act, self.store)))

    async def shut(self) -> None:
        """Close the store, then end the thread."""
        try:
            await self.run(Store.close)
        finally:
            await self.close()


class Database:
    """One replica's file, open for an agent."""

    def __init__(
        self,
        writer: _StoreConnection,
        reader: aiosqlite.Connection,
        lock: int,
        folder: Path,
        publish: Callable[[Commit], None],
        on_lost: Callable[[ReplacedError], None],
        *,
        rows_max: int,
        timeout_ms: float,
    ) -> None:
        # Why nothing can be written, and since when: set by a call that failed, cleared by a probe.
        self.trouble: str | None = None
        self.lost: ReplacedError | None = None  # why nothing will be written any more
        self._writer = writer
        self._reader = reader
        self._lock = lock  # file descriptor, held until close
        self._folder = folder
        self._publish = publish
        self._on_lost = on_lost
        self._rows_max = rows_max
        self._timeout_s = timeout_ms / 1000
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[_Call] = deque()
        self._is_writing = False  # from the first call that waits until none does
        self._is_closing = False
        self._probing: asyncio.Task[None] | None = None  # from the first trouble on

    @classmethod
    async def open(
        cls,
        path: Path,
        schema: Schema,
        publish: Callable[[Commit], None],
        *,
        rows_max: int,
        timeout_ms: float,
        synchronous: Synchronous = "normal",
        staged: Collection[str] | None = None,
        on_lost: Callable[[ReplacedError], None] = lambda _: None,
    ) -> "Database":
        """Open or create the file; raises StoreError, SchemaError.

        `publish` is called on the event loop; so is `on_lost`, once, when nothing may be written any more.
        """
        lock = lock_file(path)
        writer = _StoreConnection(lambda: Store.open(path, schema, synchronous=synchronous, staged=staged))
        try:
            await writer.open()
            try:
                reader = await aiosqlite.connect(_read_only_uri(path), uri=True)
                await reader.set_authorizer(_authorize)
                reader.text_factory = read_lossy  # one text that is not UTF-8 must not hide all other rows
            except BaseException:
                await writer.shut()
                raise
        except BaseException as error:
            os.close(lock)
            if isinstance(error, sqlite3.Error):
                raise StoreError(f"{path}: {error}") from error
            raise
        return cls(
            writer, reader, lock, path.parent, publish, on_lost, rows_max=rows_max, timeout_ms=timeout_ms
        )

    async def close(self) -> None:
        """Finish what was begun, then close both connections."""
        self._is_closing = True
        while self._is_writing:
            await self._writer.run(lambda _: None)
        if self._probing is not None:
            self._probing.cancel()
        try:
            await self._reader.close()
        finally:
            try:
                await self._writer.shut()
            finally:
                os.close(self._lock)

    async def run(self, act: Callable[[Store], T]) -> T:
        """Run something that makes no commit."""
        if self.lost is not None:
            raise ReplacedError(str(self.lost))
        try:
            return await self._writer.run(act)
        except (ReadOnlyError, ReplacedError) as error:
            self._note_trouble(error)
            raise

    async def commit(self, act: Callable[[Store], T], commits_of: Callable[[T], Sequence[Commit]]) -> T:
        """Run something that may commit, and publish the commit from the thread that made it."""

        def run(store: Store) -> T:
            result = act(store)
            for commit in commits_of(result):
                # From here: the task that waits for it may be cancelled.
                self._loop.call_soon_threadsafe(self._publish, commit)
            return result

        return await self.run(run)

    # --- writes ---------------------------------------------------------------------------------------

    async def execute(self, statements: Sequence[Statement], wall_ms: int) -> Written:
        """Run statements that write: all take effect or none, in a transaction that others may share.

        Raises StatementError, BusyError, StoreError; ReadOnlyError without a try while there is trouble.
        """
        if self.lost is not None:
            raise ReplacedError(str(self.lost))
        if self.trouble is not None:
            raise ReadOnlyError(self.trouble)
        if self._is_closing:
            raise StoreError("the database is closed")
        call = _Call(statements, wall_ms, self._loop.create_future())
        self._waiting.append(call)
        if not self._is_writing:
            self._is_writing = True
            self._loop.call_soon(self._write_waiting)  # not at once: others may come in this turn of the loop
        return await call.done

    def _write_waiting(self) -> None:
        """Hand to the thread what has come while it was busy."""
        calls = [self._waiting.popleft() for _ in range(min(len(self._waiting), BATCH_CALLS))]
        self._is_writing = bool(calls)
        if calls:
            self._writer.submit(partial(self._write, calls))

    def _write(self, calls: Sequence[_Call], store: Store) -> None:
        """Write as many calls as there is time for in one transaction; on the thread."""
        batch: _Batch | Exception
        try:
            batch = _execute(calls, store)
        except Exception as error:  # noqa: BLE001 - it is the callers'
            if len(calls) > 1 and not isinstance(error, BusyError | ReadOnlyError | ReplacedError):
                # One of them has failed for all, by OR ROLLBACK or in what became of its rows.
                for call in calls:
                    self._write([call], store)
                return
            batch = error
        # All that there is to tell at once: each time that the loop wakes up meanwhile, it takes the
        # interpreter from the transaction.
        self._loop.call_soon_threadsafe(self._handle_written, calls, batch)

    def _handle_written(self, calls: Sequence[_Call], batch: _Batch | Exception) -> None:
        outcomes: Sequence[list[int] | Exception]
        version = commit = None
        if isinstance(batch, Exception):
            outcomes = [batch] * len(calls)
            if isinstance(batch, ReadOnlyError | ReplacedError):
                self._note_trouble(batch)
        else:
            outcomes, version, commit = batch
        for call, outcome in zip(calls, outcomes, strict=False):
            if call.done.cancelled():
                continue
            if isinstance(outcome, Exception):
                call.done.set_exception(outcome)
            else:
                call.done.set_result(Written(outcome, version))
        self._waiting.extendleft(reversed(calls[len(outcomes) :]))
        self._write_waiting()
        if commit is not None:
            self._publish(commit)  # before any of the callers goes on

    # --- trouble --------------------------------------------------------------------------------------

    def _note_trouble(self, error: ReadOnlyError | ReplacedError) -> None:
        if isinstance(error, ReplacedError):
            if self.lost is None and not self._is_closing:
                self.lost = error
                log.error("the database is given up: %s", error)
                self._on_lost(error)
        elif self.trouble is None and not self._is_closing:
            self.trouble = f"{error}, since {datetime.now(UTC).isoformat(timespec='seconds')}"
            log.error("the database takes no writes, reads go on: %s", error)
            self._probing = asyncio.create_task(self._probe())

    async def _probe(self) -> None:
        """Try until the disk takes writes."""
        while self.trouble is not None:
            await asyncio.sleep(PROBE_S)
            try:
                await self._writer.run(self._probe_once)
            except Exception as error:  # noqa: BLE001 - whatever it is, the next try may succeed
                log.debug("the database takes no writes yet: %s", error)
            else:
                self.trouble = None
                log.warning("the database takes writes again")

    def _probe_once(self, store: Store) -> None:
        # A page may fit where more would not.
        with tempfile.TemporaryFile(dir=self._folder) as file:
            file.write(bytes(PROBE_BYTES))
        store.probe()

    # --- queries --------------------------------------------------------------------------------------

    async def query(self, sql: str, params: Params = ()) -> QueryResult:
        """Return the rows that a read-only statement finds; raises QueryError."""
        # aiosqlite's own cursor would cost a change of thread for every step of this.
        result: QueryResult = await self._reader._execute(self._query, sql, params)  # type: ignore[no-untyped-call]  # noqa: SLF001
        return result

    def _query(self, sql: str, params: Params) -> QueryResult:
        connection = self._reader._conn  # noqa: SLF001 - on its thread, where it may be used
        deadline = time.monotonic() + self._timeout_s
        connection.set_progress_handler(lambda: time.monotonic() > deadline, _PROGRESS_STEPS)
        try:
            cursor = connection.execute(sql, params)
            try:
                rows = cursor.fetchmany(self._rows_max + 1)
                columns = [column[0] for column in cursor.description or ()]
            finally:
                cursor.close()
        except (sqlite3.Error, sqlite3.Warning, OverflowError, ValueError) as error:
            raise QueryError(self._describe(error)) from error
        finally:
            connection.set_progress_handler(None, 0)
        if len(rows) > self._rows_max:
            raise QueryError(f"more than {self._rows_max} rows; ask for fewer with LIMIT")
        return QueryResult(columns, rows)

    def _describe(self, error: Exception) -> str:
        """Return what went wrong with a query in words for whoever sent it."""
        code = getattr(error, "sqlite_errorcode", None)
        if code == sqlite3.SQLITE_INTERRUPT:
            return f"the query took longer than {self._timeout_s:g} s; ask for less, or with an index"
        if code == sqlite3.SQLITE_AUTH:
            return "a query only reads, and only this database"
        return str(error)


def _execute(calls: Sequence[_Call], store: Store) -> _Batch:
    outcomes: Sequence[list[int] | Exception]
    if len(calls) == 1:
        affected, commit = store.execute(calls[0].statements, calls[0].wall_ms)
        outcomes = [affected]
    else:
        outcomes, commit = store.execute_many(_take_in_time(calls), calls[0].wall_ms)
    own = [item.version for item in commit.changesets if item.site == store.site] if commit else []
    return outcomes, own[-1] if own else None, commit


def _take_in_time(calls: Sequence[_Call]) -> Iterator[Sequence[Statement]]:
    deadline = time.monotonic() + BATCH_S
    for call in calls:
        yield call.statements
        if time.monotonic() > deadline:
            return


def is_transient(error: BaseException) -> bool:
    """Return whether the same call may succeed later: the lock or the disk may be free then.

    Neither is news: a disk that takes no writes was logged when it began.
    """
    return isinstance(error, BusyError | ReadOnlyError) or (
        isinstance(error, sqlite3.OperationalError) and "locked" in str(error)
    )


def _authorize(action: int, _first: Any, second: Any, _database: Any, _trigger: Any) -> int:
    if action not in _READ_ACTIONS or (action == sqlite3.SQLITE_FUNCTION and second == "load_extension"):
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK


def _read_only_uri(path: Path) -> str:
    return f"{path.absolute().as_uri()}?mode=ro"


def lock_file(path: Path) -> int:
    """Hold a lock beside the database for as long as the process lives.

    Two agents on one file would give out the same versions.
    """
    try:
        lock = os.open(f"{path}-agent", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StoreError(f"{path}: cannot create the lock beside it: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise InUseError(f"{path}: another agent has it open") from error
    return lock
