"""Name what changes: rows for those who look on, changesets for those who replicate.

A changeset is all that one transaction changed, and is atomic everywhere. It travels and is kept
in encoded form, so that who passes it on need not understand it. This module does not know how a
changeset is encoded, merged or stored.

Invariant: a site and a version name one changeset, for ever.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .clock import Clock, Hlc, SiteId

SqlValue: TypeAlias = int | float | str | bytes | None
Row: TypeAlias = tuple[SqlValue, ...]
Key: TypeAlias = tuple[SqlValue, ...]


class RowChange(NamedTuple):
    """A row as it is now, in the order of the schema's columns; None when it is gone."""

    table: str
    pk: Key
    row: Row | None


@dataclass(frozen=True, slots=True)
class EncodedChangeset:
    """A changeset as it travels and as the log keeps it."""

    site: SiteId
    version: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Commit:
    """What one transaction of the store did.

    seq grows by one with each commit that changed rows and is persisted; a commit without changes (all
    changesets had lost, or were parked) repeats the last one. changesets are those that this replica did
    not have before: to be passed on. reload names tables of which so many rows changed, in a snapshot, that
    changes leaves out most of them: who follows these tables reads them again. held are rows that followers
    are not shown yet.
    """

    seq: int
    changes: tuple[RowChange, ...]
    changesets: tuple[EncodedChangeset, ...]
    reload: tuple[str, ...] = ()
    held: tuple[RowChange, ...] = ()


def some(commit: Commit | None) -> tuple[Commit, ...]:
    """Return the commits that there are."""
    return () if commit is None else (commit,)


# Above this a payload is not pushed but named, and pulled in parts: it would hold up all else on its link.
PUSH_BYTES_MAX: Final = 256 * 1024
# A payload is decoded and applied as one, so it has to fit into memory a few times.
CHANGESET_BYTES_MAX: Final = 256 * 1024 * 1024
# What a peer is believed to send: a single row can be larger than that, up to what SQLite stores as one.
PAYLOAD_BYTES_MAX: Final = 2**30


class TableChange(NamedTuple):
    """What a changeset does to one table.

    columns name the values of each row, key columns among them. created has one entry per row: the clock
    of the row's creation, or None when this changeset created it; such a row is complete, and columns that
    it does not name have their defaults. deleted are keys.
    """

    table: str
    by_column: bool
    key_columns: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    created: tuple[Clock | None, ...]
    deleted: tuple[Key, ...]


def split_changes(changes: Sequence[TableChange]) -> tuple[tuple[TableChange, ...], tuple[TableChange, ...]]:
    """Return two halves, by rows, of changes that have more than one."""
    if len(changes) > 1:
        middle = len(changes) // 2
        return tuple(changes[:middle]), tuple(changes[middle:])
    (change,) = changes
    rows, gone = (len(change.rows) + 1) // 2, len(change.deleted) // 2
    return (
        (
            change._replace(
                rows=change.rows[:rows], created=change.created[:rows], deleted=change.deleted[:gone]
            ),
        ),
        (
            change._replace(
                rows=change.rows[rows:], created=change.created[rows:], deleted=change.deleted[gone:]
            ),
        ),
    )


class Changeset(NamedTuple):
    """A decoded changeset: one time for all that it changes."""

    hlc: Hlc
    changes: tuple[TableChange, ...]
