"""Errors of the replicated store, split by whose fault they are."""

from __future__ import annotations

import contextlib
import sqlite3
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

# What a changeset's own content can make SQLite say; anything else is trouble with the file.
POISON: Final = (
    sqlite3.IntegrityError,
    sqlite3.DataError,
    sqlite3.InterfaceError,
    sqlite3.ProgrammingError,
    OverflowError,
    ValueError,
)
_BUSY_CODES: Final = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
# The disk is full, fails, or was made read-only: what is there can still be read, and it may pass.
_READ_ONLY_CODES: Final = (
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
)


class ReplicationError(Exception):
    """Base of all that this package raises on purpose."""


class SchemaError(ReplicationError):
    """The schema file asks for what cannot be replicated, or cannot become of the tables that exist."""


class StatementError(ReplicationError):
    """A statement of the caller failed; the transaction was rolled back as a whole."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(reason)
        self.index = index  # of the statement in the caller's list


class BusyError(ReplicationError):
    """Another process held the write lock for too long, or too many ask at once; try again."""


class StoreError(ReplicationError):
    """The database file cannot be used: not ours, damaged, or full."""


class InUseError(StoreError):
    """Another agent has the database open."""


class ReadOnlyError(StoreError):
    """The disk is full or fails: nothing can be written until that is over; reads go on."""


class ReplacedError(StoreError):
    """The file is not what this replica left in it, or its site is another's too.

    Nothing is written to it any more; only opening it afresh, as another site, helps.
    """


class RateLimitedError(ReplicationError):
    """More is written than the settings allow; nothing was changed."""

    def __init__(self, reason: str, retry_after_ms: float) -> None:
        super().__init__(reason)
        self.retry_after_ms = retry_after_ms


class BehindError(ReplicationError):
    """A write that was waited for has not arrived in time; nothing says that it will not."""


class ParkedError(ReplicationError):
    """A write that was waited for is here and could not be applied."""


class SnapshotError(ReplicationError):
    """A snapshot is truncated, malformed or from too far in the future; nothing of it was applied."""


def is_trouble(error: sqlite3.Error) -> bool:
    """True when the file, not the statement, is what failed."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    return code not in (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH)


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Raise this package's errors for SQLite's."""
    try:
        yield
    except POISON:
        raise
    except sqlite3.Error as error:
        raise translate(error) from error


def translate(error: sqlite3.Error) -> ReplicationError:
    """Return this package's error for one of SQLite's that is not POISON."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    if code in _BUSY_CODES:
        return BusyError("another process is writing to the database file")
    if code in _READ_ONLY_CODES:
        return ReadOnlyError(str(error))
    return StoreError(str(error))
