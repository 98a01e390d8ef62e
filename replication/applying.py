"""Merge what comes from peers into the tables, within a transaction of the caller.

Decides what can be merged here, by schema and by clock, and isolates what cannot. Knows nothing of versions,
of the log, or of what becomes of a changeset that is refused.

Invariant: of one changeset all is merged or nothing, and triggers note nothing of it.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from .core.clock import Clock, Hlc, compute_ms
from .core.codec import CodecError, decode_changeset
from .errors import POISON
from .merging import TableMerge, check_change, offer_change
from .names import Names
from .snapshot import compute_latest

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterator, Mapping, Sequence

    from .core.change import Changeset, EncodedChangeset, RowChange
    from .core.clock import HybridClock
    from .schema import Schema
    from .snapshot import TableStates
    from .tables import Sites, Table

# Rows that changed, and the changesets that could not be merged with the reasons.
Applied = tuple["list[RowChange]", "list[tuple[EncodedChangeset, str]]"]


class Applier:
    """Merges into the tables that one schema has."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        schema: Schema,
        tables: Mapping[str, Table],
        sites: Sites,
        clock: HybridClock,
    ) -> None:
        self._connection = connection
        self._names = Names.of_schema(schema)
        self._tables = tables
        self._sites = sites
        self._clock = clock

    def apply(self, changesets: Sequence[EncodedChangeset], wall_ms: int) -> Applied:
        """Merge what can be merged; return the rows that changed, and the others with the reason."""
        sound, parked = self.check(changesets, wall_ms)
        rows, poison = self.merge(sound)
        return rows, parked + poison

    def check(
        self, changesets: Sequence[EncodedChangeset], wall_ms: int
    ) -> tuple[list[tuple[EncodedChangeset, Changeset]], list[tuple[EncodedChangeset, str]]]:
        """Return those that fit the schema and the clock, and the others with the reason."""
        parked: list[tuple[EncodedChangeset, str]] = []
        sound: list[tuple[EncodedChangeset, Changeset]] = []
        for encoded in changesets:
            try:
                sound.append((encoded, self._check(encoded, wall_ms)))
            except CodecError as error:
                parked.append((encoded, str(error)))
        return sound, parked

    def merge(self, sound: Sequence[tuple[EncodedChangeset, Changeset]]) -> Applied:
        """Merge what was checked; return the rows that changed, and what SQLite refuses with the reason."""
        if not sound:
            return [], []
        try:
            return self.merge_at_once(sound), []
        except POISON as error:
            if len(sound) == 1:
                return [], [(sound[0][0], str(error))]
        # Something in the batch cannot be stored. One by one, the culprit harms nobody else.
        rows: list[RowChange] = []
        parked: list[tuple[EncodedChangeset, str]] = []
        for entry in sound:
            try:
                rows += self.merge_at_once([entry])
            except POISON as error:
                parked.append((entry[0], str(error)))
        return rows, parked

    def _check(self, encoded: EncodedChangeset, wall_ms: int) -> Changeset:
        changeset = self._names.translate(decode_changeset(encoded.payload))
        self.check_ahead(changeset.hlc, wall_ms)
        for change in changeset.changes:
            check_change(self._tables.get(change.table), change)
        return changeset

    def merge_at_once(self, changesets: Sequence[tuple[EncodedChangeset, Changeset]]) -> list[RowChange]:
        """Merge all, which must have been checked, or, if SQLite refuses a value, nothing."""
        with self.unnoticed():
            merges: dict[str, TableMerge] = {}
            for encoded, changeset in changesets:
                clock = Clock(changeset.hlc, encoded.site)
                for change in changeset.changes:
                    table = self._tables[change.table]
                    merge = merges.get(change.table)
                    if merge is None:
                        merge = merges[change.table] = TableMerge(table, self._sites)
                    offer_change(merge, table, change, clock)
            rows: list[RowChange] = []
            for merge in merges.values():
                merge.flush()
                rows += merge.rows
        for _, changeset in changesets:
            self._clock.observe(changeset.hlc)
        return rows

    def admit_states(self, part: TableStates, wall_ms: int) -> tuple[Table, TableStates] | None:
        """Return the table and the states as it has them; None when it was dropped here.

        Raises CodecError for one that is unknown and for times too far ahead.
        """
        latest = max((compute_latest(state.record) for state in part.states), default=Hlc(0))
        self.check_ahead(latest, wall_ms)
        renamed = self._names.translate_states(part)
        if renamed is None:
            return None
        table = self._tables.get(renamed.table)
        if table is None:
            raise CodecError(f"unknown table {part.table}")
        self._clock.observe(latest)
        return table, renamed

    def check_ahead(self, hlc: Hlc, wall_ms: int) -> None:
        """Raise CodecError for a time that is too far in the future."""
        if self._clock.is_too_far_ahead(hlc, wall_ms):
            raise CodecError(f"its clock is {compute_ms(hlc) - wall_ms} ms ahead")

    @contextlib.contextmanager
    def unnoticed(self) -> Iterator[None]:
        """Keep triggers from noting what is written from here on; undo it all when SQLite refuses a value.

        They note again when the ledger is written, at the end of the transaction.
        """
        self._connection.execute("SAVEPOINT merging")
        try:
            self._connection.execute("UPDATE _repl_state SET merging = 1")
            yield
        except POISON:
            self._connection.execute("ROLLBACK TO merging")
            self._sites.reload()
            raise
        finally:
            if self._connection.in_transaction:
                self._connection.execute("RELEASE merging")
