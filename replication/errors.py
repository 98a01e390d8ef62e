"""Errors of the replicated store, split by whose fault they are."""

from __future__ import annotations


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
    """Another process held the write lock for longer than the busy timeout; try again."""


class StoreError(ReplicationError):
    """The database file cannot be used: not ours, damaged, or full."""


class SnapshotError(ReplicationError):
    """A snapshot is truncated, malformed or from too far in the future; nothing of it was applied."""
