"""The store on a thread of its own, and a second, read-only connection for queries.

Decides what a query may do and how long. Knows nothing of peers. Invariant: commits are handed out on
the event loop in the order in which they were made, also when whoever asked for one has gone away.
"""

import asyncio
import fcntl
import os
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import aiosqlite

from replication.core.change import Commit, SqlValue
from replication.errors import BusyError, ReplicationError, StoreError
from replication.schema import Schema
from replication.store import Store
from replication.tables import read_lossy

T = TypeVar("T")
Params = Sequence[SqlValue] | Mapping[str, SqlValue]
Statement = tuple[str, Params]

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
        publish: Callable[[Commit], None],
        *,
        rows_max: int,
        timeout_ms: float,
    ) -> None:
        self._writer = writer
        self._reader = reader
        self._lock = lock  # file descriptor, held until close
        self._publish = publish
        self._rows_max = rows_max
        self._timeout_s = timeout_ms / 1000
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def open(
        cls,
        path: Path,
        schema: Schema,
        publish: Callable[[Commit], None],
        *,
        rows_max: int,
        timeout_ms: float,
    ) -> "Database":
        """Open or create the file; raises StoreError, SchemaError. `publish` is called on the event loop."""
        lock = lock_file(path)
        writer = _StoreConnection(lambda: Store.open(path, schema))
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
        return cls(writer, reader, lock, publish, rows_max=rows_max, timeout_ms=timeout_ms)

    async def close(self) -> None:
        """Finish what was begun, then close both connections."""
        try:
            await self._reader.close()
        finally:
            try:
                await self._writer.shut()
            finally:
                os.close(self._lock)

    async def run(self, act: Callable[[Store], T]) -> T:
        """Run something that makes no commit."""
        return await self._writer.run(act)

    async def commit(self, act: Callable[[Store], T], commit_of: Callable[[T], Commit | None]) -> T:
        """Run something that may commit, and publish the commit from the thread that made it."""

        def run(store: Store) -> T:
            result = act(store)
            commit = commit_of(result)
            if commit is not None:
                # Not in a callback of the awaiting task: that may have been cancelled meanwhile.
                self._loop.call_soon_threadsafe(self._publish, commit)
            return result

        return await self._writer.run(run)

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


def is_transient(error: BaseException) -> bool:
    """Return whether the same call may succeed a moment later: somebody else holds the write lock."""
    return isinstance(error, BusyError) or (
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
        raise StoreError(f"{path}: another agent has it open") from error
    return lock
