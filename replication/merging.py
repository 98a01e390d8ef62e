"""Apply what others know of rows to the tables of this replica.

States come in (a key, a record, values); each is joined with what is known here, in memory, and what came
out different is written in bulk at the end. Who wins is decided in core/merge.py. This module does not know
versions, the log, or where states come from: changesets and snapshots are the same to it.

Invariant: after flush, each row that was offered is what its record says, and equal on all replicas that were
offered the same states.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from .core.change import RowChange, TableChange
from .core.codec import CodecError, pack, unpack
from .core.merge import NO_CELLS, Record, Take, is_theirs, join, plan_values
from .schema import MergeMode

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .core.change import Key, Row
    from .core.clock import Clock
    from .snapshot import TableStates
    from .tables import RecordFields, Sites, Table


class _State:
    """One row while a batch is merged. Attributes: before, as stored; record and values, as they will be."""

    __slots__ = ("before", "limbo", "record", "values")

    def __init__(self, before: Record | None, limbo: bytes | None) -> None:
        self.before = before
        self.limbo = limbo
        self.record = before
        self.values: list[Any] | Row | None = None  # without the key; None while those in the file stand


class _Plan(NamedTuple):
    """What becomes of a row; rows of one transaction that meet rows of another share it."""

    mine: Record
    theirs: Record
    joined: Record
    take: Take
    taken: tuple[tuple[int, int], ...]  # where SOME values go, and where they come from


class TableMerge:
    """Merges states into one table; made for one batch."""

    def __init__(self, table: Table, sites: Sites) -> None:
        self._table = table
        self._sites = sites
        self._states: dict[Key, _State] = {}
        self._known: dict[tuple[Any, ...], Record] = {}  # by what the file has; many rows have the same
        self._plan: _Plan | None = None  # the latest: what follows it is often alike
        self.rows: list[RowChange] = []

    def prepare(self, keys: Sequence[Key]) -> None:
        """Read the records of keys that states will be offered for."""
        states = self._states
        unknown = list(dict.fromkeys(pk for pk in keys if pk not in states))
        width = self._table.key_width
        for found in self._table.lookup(unknown):
            fields = found[width:-1]
            record = self._known.get(fields)
            if record is None:
                record = self._known[fields] = self._sites.decode(fields)
            states[found[:width]] = _State(record, found[-1])

    def offer(self, pk: Key, theirs: Record, values: Row, columns: Sequence[str] | None = None) -> None:
        """Join one state; its key must have been prepared.

        values belong to columns, or to all value columns of the table when columns is None.
        """
        state = self._states.get(pk)
        if state is None:
            state = self._states[pk] = _State(None, None)
        mine = state.record
        if mine is None:
            state.record = theirs
            if theirs.base is not None and columns is None:
                state.values = values
            elif theirs.base is not None or theirs.cells:
                state.values = self._overlay(self._defaults(), values, columns, theirs)
            return
        plan = self._plan
        if plan is None or plan.mine is not mine or plan.theirs is not theirs:
            plan = self._plan = self._make_plan(mine, theirs, columns)
        if plan.take is Take.NONE:
            return
        if plan.take is Take.ALL:
            state.values = values
        elif plan.take is Take.SOME:
            merged = list(self._load(pk, state))
            for target, source in plan.taken:
                merged[target] = values[source]
            state.values = merged
        if plan.joined.dead:
            state.values = self._keep_limbo(pk, state, plan.joined)
        state.record = plan.joined

    def _make_plan(self, mine: Record, theirs: Record, columns: Sequence[str] | None) -> _Plan:
        """Decide, column by column where it takes that, whose values a joined row has."""
        joined = join(mine, theirs)
        take = plan_values(mine, theirs, joined)
        if take is Take.NONE or take is Take.CLOCKS or (take is Take.ALL and columns is None):
            return _Plan(mine, theirs, joined, take, ())
        names = self._table.schema.values
        taken = tuple(
            (names.index(name), source)
            for source, name in enumerate(names if columns is None else columns)
            if is_theirs(mine, theirs, name)
        )
        if not taken:
            take = Take.CLOCKS
        elif taken == tuple((index, index) for index in range(len(names))):
            take = Take.ALL
        else:
            take = Take.SOME
        return _Plan(mine, theirs, joined, take, taken)

    def _keep_limbo(self, pk: Key, state: _State, record: Record) -> Row | list[Any]:
        """Return what remains of a dead row's values: those later than its deletion."""
        if record.base is not None:
            return self._load(pk, state)
        kept = self._defaults()
        if record.cells:
            values = self._load(pk, state)
            for index, name in enumerate(self._table.schema.values):
                if name in record.cells:
                    kept[index] = values[index]
        return kept

    def _defaults(self) -> list[Any]:
        return [self._table.schema.defaults[column] for column in self._table.schema.values]

    def _overlay(
        self, target: list[Any], values: Row, columns: Sequence[str] | None, theirs: Record
    ) -> list[Any]:
        names = self._table.schema.values
        for name, value in zip(names if columns is None else columns, values, strict=True):
            if theirs.base is not None or name in theirs.cells:
                target[names.index(name)] = value
        return target

    def _load(self, pk: Key, state: _State) -> Row | list[Any]:
        """Return the values that a state has now, from where they are."""
        if state.values is not None:
            return state.values
        values = self._defaults()
        if state.before is not None and not state.before.dead:
            row = self._table.read_row(pk)
            if row is not None:
                return row[self._table.key_width :]
        elif state.limbo is not None:
            for name, value in unpack(state.limbo).items():
                values[self._table.schema.values.index(name)] = value
        return values

    def flush(self) -> None:
        """Write what came out different."""
        schema = self._table.schema
        rows: list[Row] = []
        gone: list[Key] = []
        records: list[tuple[Any, ...]] = []
        latest: Record | None = None  # which fields stand for; rows that share a plan share it
        fields: RecordFields | None = None
        for pk, state in self._states.items():
            record, before = state.record, state.before
            if record is None or record == before:
                continue
            # A row may be there without a record: somebody took that away behind our back.
            was_alive = not before.dead if before is not None else self._is_leftover(pk, record)
            limbo = None
            if not record.dead:
                if state.values is not None or not was_alive:
                    row = pk + tuple(self._load(pk, state))
                    rows.append(row)
                    self.rows.append(RowChange(schema.name, pk, schema.to_row(row)))
            else:
                limbo = self._pack_limbo(pk, state, record)
                if was_alive:
                    gone.append(pk)
                    self.rows.append(RowChange(schema.name, pk, None))
            if fields is None or record is not latest:
                latest, fields = record, self._sites.encode(record)
            records.append((*pk, *fields, limbo))
        self._table.delete_rows(gone)
        self._table.write_rows(rows)
        self._table.write_records(records)

    def _is_leftover(self, pk: Key, record: Record) -> bool:
        return record.dead and self._table.read_row(pk) is not None

    def _pack_limbo(self, pk: Key, state: _State, record: Record) -> bytes | None:
        if record.base is None and not record.cells:
            return None
        names = self._table.schema.values
        values = self._load(pk, state)
        return pack(
            {
                name: value
                for name, value in zip(names, values, strict=True)
                if record.base is not None or name in record.cells
            }
        )


def check_change(table: Table | None, change: TableChange) -> Table:
    """Return the table; raise CodecError, with what is wrong, when the change does not fit its schema."""
    if table is None:
        raise CodecError(f"unknown table {change.table}")
    schema = table.schema
    if change.by_column and schema.mode is MergeMode.ROW:
        # The other way round is sound: a whole row is a value for each of its columns.
        raise CodecError(f"table {change.table} merges by row here, by column there")
    if change.key_columns != schema.pk:
        raise CodecError(f"table {change.table} has key {schema.pk} here, {change.key_columns} there")
    for column in change.columns:
        if column not in schema.defaults:
            raise CodecError(f"unknown column {change.table}.{column}")
    return table


def offer_change(merge: TableMerge, table: Table, change: TableChange, clock: Clock) -> None:
    """Offer all states that a change of a table stands for; it must have been checked."""
    schema = table.schema
    width = table.key_width
    if change.deleted:
        merge.prepare(change.deleted)
        dead = Record(clock, True, None)
        for pk in change.deleted:
            merge.offer(pk, dead, (), ())
    if not change.rows:
        return
    rows, columns = _arrange(table, change)
    merge.prepare([row[:width] for row in rows])
    created_now = Record(clock, False, clock)
    cells: Mapping[str, Clock] = NO_CELLS
    base: Clock | None = clock
    if change.by_column:
        base = None
        cells = dict.fromkeys(columns, clock)
    is_full = len(columns) == len(schema.values)
    known = created_now  # the record of the row before, the same one where rows were created together
    for row, created in zip(rows, change.created, strict=True):
        values = row[width:]
        if created is not None:
            if known is created_now or known.life != created:
                known = Record(created, False, base, cells)
            merge.offer(row[:width], known, values, None if is_full else columns)
        elif is_full:
            merge.offer(row[:width], created_now, values)
        else:
            merge.offer(row[:width], created_now, _complete(table, values, columns))


def _arrange(table: Table, change: TableChange) -> tuple[Sequence[Row], tuple[str, ...]]:
    """Return rows in the stored order of this schema, and the value columns that they have.

    A table that merges by row takes whole rows: columns that the sender does not have get their defaults, so
    that the row is the same wherever, and in whatever order, it is merged.
    """
    schema = table.schema
    if change.columns == schema.stored:
        return change.rows, schema.values
    columns = tuple(column for column in schema.values if column in change.columns)
    order = [change.columns.index(column) for column in schema.pk + columns]
    rows: list[Row] = [tuple(row[index] for index in order) for row in change.rows]
    if not change.by_column and len(columns) != len(schema.values):
        width = table.key_width
        rows = [row[:width] + _complete(table, row[width:], columns) for row in rows]
        columns = schema.values
    return rows, columns


def _complete(table: Table, values: Row, columns: Sequence[str]) -> Row:
    """Return values of all columns, with the defaults of those that are missing."""
    given = dict(zip(columns, values, strict=True))
    defaults = table.schema.defaults
    return tuple(given.get(column, defaults[column]) for column in table.schema.values)


def check_states(table: Table, part: TableStates) -> None:
    """Raise CodecError, with what is wrong, when states do not fit the table's schema."""
    columns = part.key_columns + part.columns
    check_change(table, TableChange(part.table, part.by_column, part.key_columns, columns, (), (), ()))


def offer_states(merge: TableMerge, table: Table, part: TableStates) -> None:
    """Offer the states of a snapshot; raise CodecError when they do not fit the table's schema."""
    check_states(table, part)
    schema = table.schema
    is_same_shape = part.columns == schema.values
    merge.prepare([state.pk for state in part.states])
    for pk, record, values in part.states:
        if values is None:
            merge.offer(pk, record, (), ())
        elif is_same_shape:
            merge.offer(pk, record, values)
        else:
            # A column that the sender does not have is at its default since the row was last whole.
            merge.offer(pk, record, _complete(table, values, part.columns))
