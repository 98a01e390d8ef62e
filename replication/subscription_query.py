"""Run the query of a subscription: read-only, bounded, and knowing which tables it depends on.

Decides what may be subscribed to. SQLite itself tells which tables a statement reads, those of subqueries and
views included, since it asks an authorizer about each when it compiles the statement. This module does not
know what was the answer before. Synchronous; for one thread.

Invariant: an answer comes with the seq of a commit, and is what the query finds after that commit or a later
one; a change of its rows by any commit after that one is a change of one of `tables`.
"""

from __future__ import annotations

import sqlite3
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from replication.core.subscription import pack_cells
from replication.database import QueryError
from replication.errors import BusyError
from replication.sidetables import read_seq
from replication.tables import read_lossy

if TYPE_CHECKING:
    from collections.abc import Callable

    from replication.database import Params
    from replication.schema import Schema

# As for queries: a clock is read every thousand steps, which costs under a percent.
_PROGRESS_STEPS: Final = 1_000
_FETCHED: Final = 512
_READ_ACTIONS: Final = frozenset(
    {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
)
# Tables that are functions of their arguments.
_COMPUTED: Final = frozenset({"json_each", "json_tree"})
# Each run would give another answer, though nothing has changed.
_UNSTEADY: Final = frozenset({"random", "randomblob", "changes", "total_changes", "last_insert_rowid"})


@dataclass(frozen=True, slots=True)
class Answer:
    """What a query found: rows packed, in the query's order."""

    columns: tuple[str, ...]
    rows: list[bytes]
    tables: frozenset[str]
    seq: int
    took_ms: float


class QueryReader:
    """A read-only connection for subscriptions."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        schema: Schema,
        *,
        timeout_ms: float,
        rows_max: int,
        bytes_max: int,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connection = connection
        self._tables = frozenset(schema.tables)
        self._timeout_ms = timeout_ms
        self._rows_max = rows_max
        self._bytes_max = bytes_max
        self._monotonic = monotonic
        # Set while a subscriber's statement is compiled and run: the tables read, and why it is refused.
        self._reads: set[str] | None = None
        self._refused = ""
        # SQLite notes a computed table in its schema on first use; to the authorizer that is a write.
        for name in _COMPUTED:
            connection.execute(f"SELECT 1 FROM {name}('[]')").fetchall()  # noqa: S608 - names of this file
        connection.text_factory = read_lossy
        connection.set_authorizer(self._authorize)

    def extend(self, schema: Schema) -> None:
        """Let the tables of this schema be read from now on; another thread may be reading."""
        self._tables = frozenset(schema.tables)

    def read(self, sql: str, params: Params) -> Answer:
        """Run a query; raises QueryError for one that is not allowed, or costs too much, BusyError."""
        began = self._monotonic()
        deadline = began + self._timeout_ms / 1000
        self._connection.set_progress_handler(lambda: self._monotonic() > deadline, _PROGRESS_STEPS)
        try:
            self._connection.execute("BEGIN")
            seq = read_seq(self._connection)
            columns, rows, reads = self._run(sql, params)
            tables = self._resolve(reads)
        except sqlite3.OperationalError as error:
            raise self._explain(error) from error
        finally:
            self._connection.set_progress_handler(None, 0)
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
        return Answer(columns, rows, tables, seq, (self._monotonic() - began) * 1000)

    def _run(self, sql: str, params: Params) -> tuple[tuple[str, ...], list[bytes], set[str]]:
        reads = self._reads = set()
        self._refused = ""
        try:
            cursor = self._connection.execute(sql, params)
            try:
                columns = tuple(column[0] for column in cursor.description or ())
                if not columns:
                    raise QueryError("not a query: it has no columns")
                rows = self._fetch(cursor)
            finally:
                cursor.close()
        except sqlite3.OperationalError:
            raise
        except (sqlite3.Error, sqlite3.Warning, OverflowError, ValueError) as error:
            raise QueryError(self._refused or str(error)) from error
        finally:
            self._reads = None
        return columns, rows, reads

    def _fetch(self, cursor: sqlite3.Cursor) -> list[bytes]:
        rows: list[bytes] = []
        size = 0
        while found := cursor.fetchmany(_FETCHED):
            packed = [pack_cells(row) for row in found]
            size += sum(map(len, packed))
            rows += packed
            if len(rows) > self._rows_max:
                raise QueryError(f"the query has more than {self._rows_max} rows")
            if size > self._bytes_max:
                raise QueryError(f"the query's rows have more than {self._bytes_max} bytes")
        return rows

    def _resolve(self, reads: set[str]) -> frozenset[str]:
        """Return the replicated tables among what was read; the others must be views."""
        others = reads - self._tables - _COMPUTED
        if others:
            views = self._connection.execute("SELECT name FROM sqlite_master WHERE type = 'view'").fetchall()
            others -= {name for (name,) in views}
        if others:
            raise QueryError(f"`{min(others)}` is no replicated table, so its changes are not known")
        tables = reads & self._tables
        if not tables:
            raise QueryError("the query reads no replicated table, so it never changes")
        return frozenset(tables)

    def _explain(self, error: sqlite3.OperationalError) -> Exception:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        if code == sqlite3.SQLITE_INTERRUPT:
            return QueryError(f"the query took longer than {self._timeout_ms:g} ms")
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return BusyError(str(error))
        return QueryError(self._refused or str(error))

    def _authorize(self, action: int, first: Any, second: Any, _database: Any, _source: Any) -> int:
        if self._reads is None:
            return sqlite3.SQLITE_OK  # a statement of ours
        if action == sqlite3.SQLITE_READ:
            self._reads.add(first)
        elif action not in _READ_ACTIONS:
            self._refused = "only a query can be subscribed to"
        elif action == sqlite3.SQLITE_FUNCTION and second in _UNSTEADY:
            self._refused = f"{second}() gives another answer each time"
        elif action == sqlite3.SQLITE_FUNCTION and second == "load_extension":
            self._refused = "load_extension() is no part of a query"
        return sqlite3.SQLITE_DENY if self._refused else sqlite3.SQLITE_OK
