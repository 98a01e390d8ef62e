"""Undo the last plan for the schema of a file: what was dropped, renamed or converted comes back.

Tables are put back as they were before the plan. Then what came since is merged into them again from the log,
as a node without the plan would have done, and after that what the log does not hold any more. What other
nodes without the plan cannot have (a row written under a new name, or without a column that is back) is
noted as written now, so that all nodes agree. This module does not know who asks for it.

Invariant: when nothing was written since the plan, rows and clock records are what they were before it.
"""

# ruff: noqa: S608  names in the SQL of this file are quoted, values are bound

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING, Any

from .changelog import VERSION_BITS
from .core.clock import Clock
from .core.codec import CodecError, decode_changeset, unpack
from .core.versions import VersionRanges
from .errors import SchemaError
from .merging import TableMerge, check_change, offer_change, offer_states
from .names import Names
from .schema import MergeMode, Schema, TableSchema, quote
from .schema_apply import (
    Past,
    Shelf,
    alone,
    attic_clocks,
    attic_rows,
    check_gathered,
    convert_record,
    fill,
    put_back,
    read_attic,
    restore_ddl,
    set_aside,
)
from .schema_plan import TablePlan, read_schema
from .sidetables import (
    GONE_TABLE,
    RECORD_COLUMNS,
    clock_table,
    create_triggers,
    key,
    pending_table,
    write_declared,
)
from .snapshot import RowState, TableStates, read_states
from .tables import Sites, Table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .core.change import Changeset, Key, Row, TableChange

_BATCH = 1_000


def rollback(connection: sqlite3.Connection) -> str:
    """Undo the last plan that was applied, and return its id. Raises SchemaError when there is none.

    Rows written since keep what was written. A column or table that the plan added goes with its values;
    an added table stays where it is.
    """
    with alone(connection):
        pasts = read_attic(connection)
        if not pasts:
            raise SchemaError("there is no plan to undo")
        _undo(connection, pasts[0])
        return pasts[0].plan


def _undo(connection: sqlite3.Connection, past: Past) -> None:
    current = read_schema(connection)
    check_gathered(connection, current)
    undos = [_Undo(connection, past.number, shelf, current) for shelf in past.shelves]
    for undo in undos:
        undo.restore()
    connection.execute("UPDATE _repl_state SET merging = 1")
    _replay(connection, past, undos)
    for undo in undos:
        undo.merge_rest()
    connection.execute("UPDATE _repl_state SET merging = 0")
    for undo in undos:
        undo.note()
    connection.execute("DELETE FROM _repl_attic WHERE id = ?", (past.number,))
    connection.execute(f"DELETE FROM {GONE_TABLE} WHERE plan = ?", (past.number,))
    write_declared(connection, past.declared)


class _Undo:
    """One table on its way back.

    Attributes: rest, the states that were changed since, under the old names; lost, for each of them the
    values of dropped columns; foreign, when a row was written in ways that nodes without the plan do not
    understand, or without a column that is back.
    """

    def __init__(self, connection: sqlite3.Connection, number: int, shelf: Shelf, current: Schema) -> None:
        self.connection = connection
        self.shelf = shelf
        self.was = shelf.parse()
        self.now = None if shelf.now is None else current.tables.get(shelf.now)
        if shelf.now is not None and self.now is None:
            raise SchemaError(f"table {shelf.now} is not there any more")
        self.rest: list[RowState] = []
        self.lost: dict[Key, tuple[Any, ...]] = {}
        self.foreign: dict[Key, set[Clock]] = {}
        self.names = self._make_names()
        self.dropped = [column for column in self.was.values if column not in shelf.columns]
        self._rows = attic_rows(number, shelf.was)
        self._clocks = attic_clocks(number, shelf.was)
        self._at_row = " AND ".join(f"{quote(column)} = ?" for column in self.was.pk)
        self._at_record = " AND ".join(f"{key(column)} = ?" for column in self.was.pk)
        self._sites = Sites(connection)
        self.table: Table  # set by restore

    def _make_names(self) -> Names:
        """Return what names of the plan meant before it."""
        if self.now is None:
            return Names({}, {})
        back: dict[str, str | None] = {new: was for was, new in self.shelf.columns.items()}
        renamed = {column: back.get(column) for column in self.now.columns if back.get(column) != column}
        # A name that the plan gave to another column stands for that one, here as everywhere.
        tables: dict[str, str | None] = {}
        if self.now.name != self.was.name:
            tables[self.now.name] = self.was.name
        return Names(tables, {self.was.name: renamed} if renamed else {})

    def restore(self) -> None:
        """Put the table in place as it was before the plan."""
        if self.now is not None and not self.shelf.is_kept:
            self._drop_added()
        elif self.shelf.is_kept:
            if self.now is not None:
                self._read_rest(self.now)
                self._delete_collected(self.now)
                for name in (quote(self.now.name), clock_table(self.now.name), pending_table(self.now.name)):
                    self._execute(f"DROP TABLE {name}")
                self._execute("DELETE FROM _repl_table WHERE name = ?", (self.now.name,))
            put_back(self.connection, self.was, self._rows, self._clocks)
        restore_ddl(self.connection, self.shelf.ddl)
        self.table = Table(self.connection, self.was)

    def _drop_added(self) -> None:
        """Take away the columns that the plan added."""
        assert self.now is not None  # who calls has looked
        back = {column: column for column in self.was.columns}
        rows, clocks = quote("_repl_undone"), quote("_repl_undone_clock")
        if len(self.now.columns) > len(back):
            set_aside(self.connection, self.now.name, rows, clocks)
            fill(self.connection, TablePlan(self.now, self.was, back, is_rewritten=True), rows, clocks)
            create_triggers(self.connection, self.was)
            self._execute(f"DROP TABLE {rows}")
            self._execute(f"DROP TABLE {clocks}")

    def _read_rest(self, now: TableSchema) -> None:
        """Read what is not as the plan made it: rows that were written since."""
        renamed = {column: self.shelf.columns.get(column) for column in self.was.columns}
        states = []
        for state in read_states(Table(self.connection, now), self._sites):
            fields = self._execute(
                f"SELECT {', '.join(RECORD_COLUMNS[:-1])} FROM {self._clocks} WHERE {self._at_record}",
                state.pk,
            ).fetchone()
            if fields is not None:
                before = convert_record(self._sites.decode(fields), renamed, now.mode)
                if before == state.record:
                    continue
                if before.life == state.record.life:  # otherwise it is another row, with the same key
                    self.lost[state.pk] = self._read_lost(state.pk)
            states.append(state)
        part = TableStates(now.name, now.mode is MergeMode.COLUMN, now.pk, now.values, states)
        translated = self.names.translate_states(part)
        assert translated is not None  # no name of a table means nothing here
        self.rest = [
            state._replace(record=convert_record(state.record, {}, self.was.mode))
            for state in translated.states
        ]
        self._rest_columns = translated.columns

    def _read_lost(self, pk: Key) -> tuple[Any, ...]:
        if not self.dropped:
            return ()
        found = self._execute(
            f"SELECT {', '.join(map(quote, self.dropped))} FROM {self._rows} WHERE {self._at_row}", pk
        ).fetchone()
        return () if found is None else tuple(found)

    def _delete_collected(self, now: TableSchema) -> None:
        """Forget rows whose very deletion has been forgotten since."""
        keys = ", ".join(map(key, self.was.pk))
        gone = (
            f"SELECT {keys} FROM {self._clocks} EXCEPT SELECT {', '.join(map(key, now.pk))} FROM "
            + clock_table(now.name)
        )
        names = ", ".join(map(quote, self.was.pk))
        self._execute(f"DELETE FROM {self._rows} WHERE ({names}) IN ({gone})")
        self._execute(f"DELETE FROM {self._clocks} WHERE ({keys}) IN ({gone})")

    def replay(self, change: TableChange, is_renamed: bool, clock: Clock) -> None:
        """Merge what a changeset that came since says of this table, if it is not in there anyway."""
        check_change(self.table, change)
        if self.shelf.is_kept:
            merge = TableMerge(self.table, self._sites)
            offer_change(merge, self.table, change, clock)
            merge.flush()
        lacks = not change.by_column and not set(self.dropped) <= set(change.columns)
        if is_renamed or lacks:
            order = [change.columns.index(column) for column in self.was.pk] if change.rows else []
            for row in change.rows:
                self.foreign.setdefault(tuple(row[index] for index in order), set()).add(clock)
        if is_renamed:
            for pk in change.deleted:
                self.foreign.setdefault(pk, set()).add(clock)

    def merge_rest(self) -> None:
        """Merge what is known of rows beyond what the log had."""
        for start in range(0, len(self.rest), _BATCH):
            batch = self.rest[start : start + _BATCH]
            is_by_column = self.was.mode is MergeMode.COLUMN
            merge = TableMerge(self.table, self._sites)
            columns = self._rest_columns
            offer_states(
                merge, self.table, TableStates(self.was.name, is_by_column, self.was.pk, columns, batch)
            )
            merge.flush()
            changed = {change.pk for change in merge.rows}
            for state in batch:
                if state.pk in changed:
                    clock = state.record.base or state.record.life
                    self.foreign.setdefault(state.pk, set()).add(clock)

    def note(self) -> None:
        """Have those rows gathered as written now that other nodes cannot have; give back what they lack."""
        width = self.table.key_width
        for found in list(self.table.lookup(list(self.foreign))):
            pk, record = found[:width], self._sites.decode(found[width:-1])
            clocks = self.foreign[pk]
            if clocks.isdisjoint((record.life, record.base, *record.cells.values())):
                continue  # somebody wrote later, in a way that everybody understands
            if self.was.mode is MergeMode.COLUMN and not record.dead and record.life in clocks:
                # Others do not have the row at all, so it is made again, as a whole.
                self._execute(f"DELETE FROM {clock_table(self.was.name)} WHERE {self._at_record}", pk)
            self._execute(
                f"INSERT INTO {pending_table(self.was.name)} ({', '.join(map(key, self.was.pk))}, existed) "
                f"VALUES ({', '.join('?' * (width + 1))}) ON CONFLICT DO NOTHING",
                (*pk, 1 if record.dead else 0),
            )
            values = self.lost.get(pk)
            if values and not record.dead and record.base in clocks:
                sets = ", ".join(f"{quote(column)} = ?" for column in self.dropped)
                self._execute(
                    f"UPDATE {quote(self.was.name)} SET {sets} WHERE {self._at_row}", (*values, *pk)
                )

    def _execute(self, sql: str, values: Row = ()) -> sqlite3.Cursor:
        return self.connection.execute(sql, values)


def _replay(connection: sqlite3.Connection, past: Past, undos: list[_Undo]) -> None:
    """Merge what came since the plan into the tables that are back, one changeset after another."""
    seen = {ordinal: VersionRanges.decode(unpack(ranges)) for ordinal, ranges in past.seen.items()}
    sites = Sites(connection)
    parked = set(connection.execute("SELECT site, version FROM _repl_parked").fetchall())
    largest = (1 << VERSION_BITS) - 1
    for (number,) in connection.execute("SELECT id FROM _repl_log ORDER BY id").fetchall():
        ordinal, version = number >> VERSION_BITS, number & largest
        if (ordinal, version) in parked or seen.get(ordinal, VersionRanges()).contains(version):
            continue
        (payload,) = connection.execute("SELECT payload FROM _repl_log WHERE id = ?", (number,)).fetchone()
        changeset = decode_changeset(payload)
        clock = Clock(changeset.hlc, sites.get_site(ordinal))
        for undo, change, is_renamed in _find_changes(changeset, undos):
            connection.execute("SAVEPOINT replay")
            try:
                undo.replay(change, is_renamed, clock)
            except (CodecError, sqlite3.IntegrityError):
                # Here it would have been parked; what the row is now is merged in the end.
                connection.execute("ROLLBACK TO replay")
            connection.execute("RELEASE replay")


def _find_changes(changeset: Changeset, undos: list[_Undo]) -> Iterator[tuple[_Undo, TableChange, bool]]:
    for change in changeset.changes:
        for undo in undos:
            translated = undo.names.translate_change(change)
            if translated is not None and translated.table == undo.was.name:
                yield undo, translated, translated is not change
