"""Run the statements of those who write, within a transaction of the caller.

Decides what may be run, and whose fault it is when it fails. Knows nothing of what triggers note.

Invariant: of the statements of one caller all take effect, or the transaction is to be undone.
"""

from __future__ import annotations

import re
import sqlite3
from typing import TYPE_CHECKING

from .errors import StatementError, is_trouble

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .core.change import SqlValue

_WRITES = re.compile(
    r"(?:\s+|--[^\n]*\n|/\*.*?\*/)*(INSERT|UPDATE|DELETE|REPLACE|WITH)\b", re.IGNORECASE | re.DOTALL
)
Statement = tuple[str, "Sequence[SqlValue] | Mapping[str, SqlValue]"]


def run_statements(connection: sqlite3.Connection, statements: Sequence[Statement]) -> list[int]:
    """Return rows affected by each; raise StatementError for one that fails, is no write or returns rows."""
    affected: list[int] = []
    cursor = connection.cursor()
    checked = None  # many in a row are the same statement with other values
    for index, (sql, values) in enumerate(statements):
        if sql is not checked and _WRITES.match(sql) is None:
            raise StatementError(index, "only INSERT, UPDATE, DELETE and REPLACE can be executed")
        checked = sql
        try:
            cursor.execute(sql, values)
        except (sqlite3.Error, sqlite3.Warning, OverflowError, UnicodeError) as error:
            if isinstance(error, sqlite3.OperationalError) and is_trouble(error):
                raise
            raise StatementError(index, str(error)) from error
        if cursor.description is not None:
            cursor.close()
            raise StatementError(index, "the statement returns rows; use a query")
        # The driver does not count for a statement that begins with WITH.
        count = cursor.rowcount
        affected.append(count if count >= 0 else connection.execute("SELECT changes()").fetchone()[0])
    return affected


def run_apart(connection: sqlite3.Connection, statements: Sequence[Statement]) -> list[int] | StatementError:
    """Return rows affected by each, or the error with all of them undone.

    Raises StatementError when one has undone the whole transaction.
    """
    outcome: list[int] | StatementError
    connection.execute("SAVEPOINT caller")
    try:
        outcome = run_statements(connection, statements)
    except StatementError as error:
        if not connection.in_transaction:  # OR ROLLBACK: what others wrote is gone with it
            raise
        connection.execute("ROLLBACK TO caller")
        outcome = error
    connection.execute("RELEASE caller")
    return outcome
