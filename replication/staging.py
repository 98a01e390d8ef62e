"""Keep what was written to some tables from those who follow them, until it is released.

Decides how that lies in the file: triggers note what a row was before somebody wrote it. Merging, and what is
passed on to peers, know nothing of it; only followers, and readers who ask for the tables as they are shown,
see what was. When something is released, and why, is decided elsewhere. Beside it lie strikes: how often a
changeset that is held back has done harm. All runs within transactions of the caller.

Invariant: a row is shown as it was before the first write that is not released; with no note, as it is.
"""

# ruff: noqa: S608  names in the SQL of this file are quoted, values are bound

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from .capture import is_same
from .core.change import RowChange
from .core.clock import NEVER, SITE_BYTES, Clock, SiteId
from .schema import quote
from .sidetables import (
    RECORD_COLUMNS,
    create_notes,
    key,
    make_notes,
    old,
    pending_table,
    put_triggers,
    staged_table,
)
from .tables import fetch_all, select_noted

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from .core.change import Key, Row
    from .schema import Schema, TableSchema
    from .tables import Sites

_STRIKES = "_repl_staged"  # a name that no table of notes has, as they go on with an underscore
_TRIGGERS = "_repl_stage"
# Stands for the clock of a row that was deleted so long ago that nobody remembers when.
_FORGOTTEN: Final = Clock(NEVER, SiteId(bytes(SITE_BYTES)))


class StagedRow(NamedTuple):
    """A row that is held back: as it is shown and as it is, in the order of the schema, and who wrote it."""

    table: str
    pk: Key
    shown: Row | None
    row: Row | None
    clock: Clock


class Staged(NamedTuple):
    """All that is held back, and the strikes of changesets by their clock."""

    rows: list[StagedRow]
    strikes: dict[Clock, int]


def prepare_staging(connection: sqlite3.Connection, schema: Schema, names: Collection[str]) -> None:
    """Hold these tables back from now on, and no others: what was held back of others is released."""
    for (name,) in connection.execute(
        "SELECT name FROM sqlite_master WHERE type = 'table' AND name LIKE '~_repl~_staged~_%' ESCAPE '~'"
    ).fetchall():
        table = name.removeprefix("_repl_staged_")
        if table not in names:
            _drop(connection, schema.tables.get(table), name)
    if not names:
        connection.execute(f"DROP TABLE IF EXISTS {_STRIKES}")
        return
    connection.execute(
        f"CREATE TABLE IF NOT EXISTS {_STRIKES} (site BLOB NOT NULL, hlc INTEGER NOT NULL, "
        "strikes INTEGER NOT NULL, PRIMARY KEY (site, hlc)) WITHOUT ROWID"
    )
    for table in names:
        create_notes(connection, schema.tables[table], staged_table(table))
        put_triggers(connection, _make_triggers(schema.tables[table]))


def _make_triggers(table: TableSchema) -> dict[str, str]:
    # Merging is no exception here: most of what is held back comes by it.
    return make_notes(table, staged_table(table.name), _TRIGGERS, "1")


def _drop(connection: sqlite3.Connection, table: TableSchema | None, notes: str) -> None:
    for trigger in () if table is None else _make_triggers(table):
        connection.execute(f"DROP TRIGGER IF EXISTS {quote(trigger)}")
    connection.execute(f"DROP TABLE {quote(notes)}")


def select_shown(connection: sqlite3.Connection, table: TableSchema) -> str:
    """Return SQL that reads a table as it is shown, its columns in the order of the schema."""
    plain = f"SELECT {', '.join(map(quote, table.columns))} FROM {quote(table.name)} AS t"
    notes = staged_table(table.name)
    found = connection.execute(
        "SELECT 1 FROM sqlite_master WHERE name = ?", (f"_repl_staged_{table.name}",)
    ).fetchone()
    if found is None or connection.execute(f"SELECT 1 FROM {notes} LIMIT 1").fetchone() is None:
        return plain
    # The plus takes the type from the comparison: keys in notes have none, and their index needs it so.
    is_noted = " AND ".join(f"s.{key(column)} = +t.{quote(column)}" for column in table.pk)
    were = ", ".join(key(column) if column in table.pk else old(column) for column in table.columns)
    return (
        f"{plain} WHERE NOT EXISTS (SELECT 1 FROM {notes} AS s WHERE {is_noted}) "
        f"UNION ALL SELECT {were} FROM {notes} WHERE existed"
    )


class Staging:
    """What one replica holds back; with no tables, nothing."""

    def __init__(
        self, connection: sqlite3.Connection, schemas: Mapping[str, TableSchema], sites: Sites
    ) -> None:
        self._connection = connection
        self._schemas = schemas
        self._sites = sites

    def split(self, rows: Sequence[RowChange]) -> tuple[list[RowChange], list[RowChange]]:
        """Return the changes that followers may see, and those that are held back."""
        held = [change for change in rows if change.table in self._schemas]
        if not held:
            return list(rows), held
        return [change for change in rows if change.table not in self._schemas], held

    def read(self) -> Staged:
        """Return all that is held back; forget notes of rows that are again what they were."""
        rows: list[StagedRow] = []
        for schema in self._schemas.values():
            unchanged = []
            for staged in self._read_table(schema):
                if staged.shown is staged.row is None or (
                    staged.shown is not None and staged.row is not None and is_same(staged.shown, staged.row)
                ):
                    unchanged.append(staged.pk)
                else:
                    rows.append(staged)
            self._forget(schema, unchanged)
        strikes = (
            {
                Clock(hlc, site): count
                for site, hlc, count in self._connection.execute(f"SELECT site, hlc, strikes FROM {_STRIKES}")
            }
            if self._schemas
            else {}
        )
        return Staged(rows, strikes)

    def _read_table(self, schema: TableSchema) -> Iterator[StagedRow]:
        width = len(schema.pk)
        olds = width + 2 + len(RECORD_COLUMNS)
        news = olds + len(schema.values)
        noted = fetch_all(self._connection, select_noted(schema, staged_table(schema.name)))
        if not noted:
            return
        keys = ", ".join(map(key, schema.pk))
        # What is not captured yet has the clock of what was there before: it is looked at after that.
        pending = set(fetch_all(self._connection, f"SELECT {keys} FROM {pending_table(schema.name)}"))
        for found in noted:
            pk, existed, exists, fields = (
                found[:width],
                found[width],
                found[width + 1],
                found[width + 2 : olds],
            )
            if pk in pending:
                continue
            shown = schema.to_row(pk + found[olds:news]) if existed else None
            row = schema.to_row(pk + found[news:]) if exists else None
            yield StagedRow(schema.name, pk, shown, row, self._read_clock(fields))

    def _read_clock(self, fields: Sequence[Any]) -> Clock:
        """Return when a row was last written or deleted."""
        if fields[0] is None and fields[2] is None:
            return _FORGOTTEN
        life, is_dead, base, _ = self._sites.decode(fields[:-1])
        return life if is_dead or base is None else max(life, base)

    def release(self, clocks: Collection[Clock]) -> list[RowChange]:
        """Show the rows that were last written by these changesets; return them, and forget the strikes."""
        changes: list[RowChange] = []
        released: dict[str, list[Key]] = {}
        for staged in self.read().rows:
            if staged.clock in clocks:
                changes.append(RowChange(staged.table, staged.pk, staged.row))
                released.setdefault(staged.table, []).append(staged.pk)
        for table, keys in released.items():
            self._forget(self._schemas[table], keys)
        self.put_strikes(dict.fromkeys(clocks, 0))
        return changes

    def put_strikes(self, strikes: Mapping[Clock, int]) -> None:
        """Keep how often changesets have done harm; 0 is not kept."""
        keys = [(clock.site, clock.hlc) for clock in strikes]
        self._connection.executemany(f"DELETE FROM {_STRIKES} WHERE site = ? AND hlc = ?", keys)
        kept = [(clock.site, clock.hlc, count) for clock, count in strikes.items() if count]
        self._connection.executemany(f"INSERT INTO {_STRIKES} VALUES (?, ?, ?)", kept)

    def _forget(self, schema: TableSchema, keys: Iterable[Key]) -> None:
        matches = " AND ".join(f"{key(column)} = ?" for column in schema.pk)
        self._connection.executemany(f"DELETE FROM {staged_table(schema.name)} WHERE {matches}", keys)
