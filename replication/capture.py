"""Turn what triggers noted since the last look into changes.

A note holds what a row was before; compared with what it is now, that tells whether it was created,
changed or deleted, and whether it changed at all: writing what is there already makes no change, and neither
does a detour that ends where it began. This module does not know peers.

Invariant: after a capture nothing is pending, and each changed row has the clock of this capture.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .core.change import CHANGESET_BYTES_MAX, Changeset, EncodedChangeset, RowChange, TableChange
from .core.clock import Clock
from .core.codec import encode_bounded
from .core.merge import Record
from .schema import MergeMode
from .sidetables import RECORD_COLUMNS

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Mapping, Sequence

    from .changelog import ChangeLog
    from .core.change import Key, Row
    from .core.clock import HybridClock
    from .ledger import Ledger
    from .tables import Sites, Table


class Capture:
    """Makes changesets of what was noted in the tables of one replica."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        tables: Mapping[str, Table],
        sites: Sites,
        clock: HybridClock,
        ledger: Ledger,
        log: ChangeLog,
    ) -> None:
        self._connection = connection
        self._tables = tables
        self._sites = sites
        self._clock = clock
        self._ledger = ledger
        self._log = log
        checks = ", ".join(table.has_pending for table in tables.values())
        self._has_pending = f"SELECT {checks}" if checks else ""

    def find_noted(self, but: frozenset[str] = frozenset()) -> list[Table]:
        """Return the tables, but for those named, of which something was noted."""
        if not self._has_pending:
            return []
        flags = self._connection.execute(self._has_pending).fetchone()
        noted = [table for table, is_noted in zip(self._tables.values(), flags, strict=True) if is_noted]
        return [table for table in noted if table.schema.name not in but]

    def run(
        self, wall_ms: int, but: frozenset[str] = frozenset()
    ) -> tuple[list[RowChange], list[EncodedChangeset]]:
        """Make one changeset of what was noted, log it and count it as seen; none when no value changed.

        What was noted in tables that `but` names stays. What somebody else wrote cannot be refused: more than
        a changeset may hold becomes several, and while no version may be given out, it stays noted and only
        gets its time, so that it wins against what is older and merged before it can leave.
        """
        noted = self.find_noted(but)
        if not noted:
            return [], []
        ledger = self._ledger
        if ledger.has_beaten:
            ledger.promise(wall_ms)  # so that a node that writes need not do so for its beats
        hlc = self._clock.tick(wall_ms)
        rows: list[RowChange] = []
        changes: list[TableChange] = []
        for table in noted:
            gathered = TableCapture(table, self._sites, Clock(hlc, ledger.site))
            changes += gathered.run(keep_notes=ledger.is_held)
            rows += gathered.rows
        if not changes or ledger.is_held:
            return [], []
        payloads = encode_bounded(Changeset(hlc, tuple(changes)), CHANGESET_BYTES_MAX)
        own = [
            EncodedChangeset(ledger.site, version, payload)
            for version, payload in enumerate(payloads, ledger.version + 1)
        ]
        self._log.append(own)
        ledger.mark(ledger.site, own[0].version, own[-1].version)
        return rows, own


class TableCapture:
    """What is gathered from one table; made for one capture."""

    def __init__(self, table: Table, sites: Sites, clock: Clock) -> None:
        self._table = table
        self._sites = sites
        self._clock = clock
        self._created_record = (*sites.encode(Record(clock, False, clock)), None)
        self._deleted_record: tuple[Any, ...] = ()  # made with the first deletion
        self._records: list[tuple[Any, ...]] = []
        self._deleted: list[Key] = []
        # Rows by the columns that travel; a table that merges by row has one group.
        self._groups: dict[tuple[str, ...], tuple[list[Row], list[Clock | None]]] = {}
        self.rows: list[RowChange] = []

    def run(self, *, keep_notes: bool) -> list[TableChange]:
        """Gather, write the new clock records, forget the notes; return the changes, in groups of columns."""
        width = self._table.key_width
        olds = width + 2 + len(RECORD_COLUMNS)
        news = olds + len(self._table.schema.values)
        for noted in self._table.read_pending():
            pk = noted[:width]
            existed, exists = noted[width], noted[width + 1]
            fields = noted[width + 2 : olds]
            if exists:
                old, new = noted[olds:news] if existed else None, noted[news:]
                if old is not None and is_same(old, new) and not self._is_dead(fields):
                    continue
                self._note_row(pk, fields, old, new)
            elif existed or self._is_dead(fields) is False:
                self._note_deleted(pk)
        if not keep_notes:
            self._table.clear_pending()
        self._table.write_records(self._records)
        return self._make_changes()

    def _is_dead(self, fields: Sequence[Any]) -> bool | None:
        """Return what the record says, which is ahead of notes that were kept; None without a record."""
        if fields[0] is None and fields[2] is None:
            return None
        return self._sites.decode(fields[:-1]).dead

    def _note_row(self, pk: Key, fields: Sequence[Any], old: Row | None, new: Row) -> None:
        schema = self._table.schema
        row = pk + new
        # Without a record, or with one that says dead, the row is new.
        known = None
        if fields[0] is not None or fields[2] is not None:
            known = self._sites.decode(fields[:-1])
        if known is None or known.dead:
            self._records.append(pk + self._created_record)
            self._add(schema.stored, row, None)
        elif schema.mode is MergeMode.ROW:
            self._records.append((*pk, *self._sites.encode(Record(known.life, False, self._clock)), None))
            self._add(schema.stored, row, known.life)
        else:
            changed = [
                index
                for index, value in enumerate(new)
                if old is None or not is_same((old[index],), (value,))
            ]
            columns = tuple(schema.values[index] for index in changed)
            cells = {**known.cells, **dict.fromkeys(columns, self._clock)}
            record = Record(known.life, False, known.base, cells)
            self._records.append((*pk, *self._sites.encode(record), None))
            self._add(schema.pk + columns, pk + tuple(new[index] for index in changed), known.life)
        self.rows.append(RowChange(schema.name, pk, schema.to_row(row)))

    def _note_deleted(self, pk: Key) -> None:
        if not self._deleted:
            self._deleted_record = (*self._sites.encode(Record(self._clock, True, None)), None)
        self._deleted.append(pk)
        self._records.append(pk + self._deleted_record)
        self.rows.append(RowChange(self._table.schema.name, pk, None))

    def _add(self, columns: tuple[str, ...], row: Row, created: Clock | None) -> None:
        group = self._groups.get(columns)
        if group is None:
            group = self._groups[columns] = ([], [])
        group[0].append(row)
        group[1].append(created)

    def _make_changes(self) -> list[TableChange]:
        schema = self._table.schema
        by_column = schema.mode is MergeMode.COLUMN
        changes = [
            TableChange(schema.name, by_column, schema.pk, columns, tuple(rows), tuple(created), ())
            for columns, (rows, created) in self._groups.items()
        ]
        if self._deleted:
            changes.append(
                TableChange(schema.name, by_column, schema.pk, schema.pk, (), (), tuple(self._deleted))
            )
        return changes


def is_same(old: Sequence[object], new: Sequence[object]) -> bool:
    """True when values are equal and of equal types: 1 and 1.0 are not the same."""
    return old == new and all(type(a) is type(b) for a, b in zip(old, new, strict=True))
