"""A database with the tables of isthmus that is replicated nowhere, and records what is asked of it."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING, Any, NamedTuple

from isthmus.declared import load_built_in_sql

if TYPE_CHECKING:
    from collections.abc import Sequence

    from isthmus.registry import Statement, Value


class Answer(NamedTuple):
    """What a query found."""

    columns: list[str]
    rows: list[tuple[Any, ...]]


class FakeDatabase:
    """Real SQLite in memory. `failures` are raised by the next calls, one each."""

    def __init__(self) -> None:
        self.connection = sqlite3.connect(":memory:", isolation_level=None)
        self.connection.executescript(load_built_in_sql())
        self.transactions: list[list[Statement]] = []
        self.queries: list[str] = []
        self.failures: list[Exception] = []

    async def execute(self, statements: Sequence[Statement]) -> None:
        self.transactions.append(list(statements))
        self._fail()
        self.connection.execute("BEGIN")
        try:
            for sql, values in statements:
                self.connection.execute(sql, values)
        except sqlite3.Error:
            self.connection.execute("ROLLBACK")
            raise
        self.connection.execute("COMMIT")

    async def query(self, sql: str, params: Sequence[Value] = ()) -> Answer:
        self.queries.append(sql)
        self._fail()
        cursor = self.connection.execute(sql, params)
        return Answer([column[0] for column in cursor.description], cursor.fetchall())

    def rows(self, sql: str, *params: Value) -> list[tuple[Any, ...]]:
        """What is there, unrecorded."""
        return self.connection.execute(sql, params).fetchall()

    def put(self, table: str, **columns: Value) -> None:
        """Insert or replace a row, unrecorded."""
        marks = ", ".join("?" * len(columns))
        sql = f"INSERT OR REPLACE INTO {table} ({', '.join(columns)}) VALUES ({marks})"
        self.connection.execute(sql, tuple(columns.values()))

    def close(self) -> None:
        self.connection.close()

    def _fail(self) -> None:
        if self.failures:
            raise self.failures.pop(0)
