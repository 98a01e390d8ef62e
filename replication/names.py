"""Decide what the names in a change from elsewhere mean here, while nodes have different schemas.

A schema says what its tables and columns were called before and what was dropped. A node that has no such
schema yet goes on with the old names; its changes are read as if they had the new ones, and what they say of
dropped columns and tables is left out. This module does not know where changes come from, nor whether they
fit.

Invariant: a change that names nothing old is returned as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .core.change import Changeset, TableChange
from .core.merge import NO_CELLS, Record
from .snapshot import RowState, TableStates

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .core.change import Row
    from .schema import Schema


class Names:
    """What old names mean: the new ones, or None for what is gone."""

    def __init__(
        self, tables: Mapping[str, str | None], columns: Mapping[str, Mapping[str, str | None]]
    ) -> None:
        """Take names of tables, and by a table's present name those of its columns."""
        self._tables = tables
        self._columns = columns

    @classmethod
    def of_schema(cls, schema: Schema) -> Names:
        """Return what the schema itself says of former names."""
        tables: dict[str, str | None] = {}
        columns: dict[str, dict[str, str | None]] = {}
        for table in schema.tables.values():
            tables.update(dict.fromkeys(table.former_names, table.name))
            if table.former_columns:
                columns[table.name] = dict(table.former_columns)
        for name, column in schema.dropped:
            if column:
                columns.setdefault(tables.get(name) or name, {})[column] = None
            else:
                tables[name] = None
        return cls(tables, columns)

    def translate(self, changeset: Changeset) -> Changeset:
        """Return a changeset with the names of this schema, without what is gone."""
        if not self._tables and not self._columns:
            return changeset
        changes = [self.translate_change(change) for change in changeset.changes]
        return Changeset(changeset.hlc, tuple(change for change in changes if change is not None))

    def translate_change(self, change: TableChange) -> TableChange | None:
        """Return a change with the names of this schema; None for one of a table that is gone."""
        table = self._tables.get(change.table, change.table)
        if table is None:
            return None
        renamed = self._columns.get(table)
        if renamed is None or not renamed.keys() & {*change.columns, *change.key_columns}:
            return change if table == change.table else change._replace(table=table)
        kept, columns = _plan_columns(change.columns, renamed)
        keys = tuple(renamed.get(column, column) or column for column in change.key_columns)
        rows = tuple(tuple(row[index] for index in kept) for row in change.rows)
        return change._replace(table=table, key_columns=keys, columns=columns, rows=rows)

    def translate_states(self, part: TableStates) -> TableStates | None:
        """Return states with the names of this schema; None for those of a table that is gone."""
        table = self._tables.get(part.table, part.table)
        if table is None:
            return None
        renamed = self._columns.get(table)
        if renamed is None:
            return part if table == part.table else part._replace(table=table)
        kept, columns = _plan_columns(part.columns, renamed)

        def pick(values: Row) -> Row:
            return tuple(values[index] for index in kept)

        return part._replace(
            table=table,
            key_columns=tuple(renamed.get(column, column) or column for column in part.key_columns),
            columns=columns,
            states=[
                RowState(pk, rename_cells(record, renamed), None if values is None else pick(values))
                for pk, record, values in part.states
            ],
        )


def _plan_columns(
    columns: Sequence[str], renamed: Mapping[str, str | None]
) -> tuple[list[int], tuple[str, ...]]:
    """Return which columns stay, and what they are called."""
    named = [(index, renamed.get(column, column)) for index, column in enumerate(columns)]
    kept = [(index, column) for index, column in named if column is not None]
    return [index for index, _ in kept], tuple(column for _, column in kept)


def rename_cells(record: Record, renamed: Mapping[str, str | None]) -> Record:
    """Return a record with the names of this schema, without the cells of columns that are gone."""
    if not record.cells:
        return record
    cells = {renamed.get(name, name): clock for name, clock in record.cells.items()}
    kept = {name: clock for name, clock in cells.items() if name is not None}
    return record._replace(cells=kept or NO_CELLS)
