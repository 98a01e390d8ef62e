"""Decide what it takes to bring a file from the schema that it has to another, and what that would lose.

A table, column or index more is a step that rewrites nothing. Whatever else differs (a name, a type, a
constraint, the way to merge, something dropped) makes the table be written anew. A schema file says what it
means by a difference: a column that is missing in it without a word is refused, not dropped. This module
changes nothing; see schema_apply.py.

Invariant: the id of a plan stands for one pair of schemas, the one in the file and the one that is wanted.
"""

# ruff: noqa: S608  names in the SQL of this file are quoted, values are bound

from __future__ import annotations

import hashlib
import re
import sqlite3
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from .capture import is_same
from .errors import SchemaError
from .schema import MergeMode, Schema, TableSchema, quote
from .sidetables import has_common
from .tables import read_lossy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .core.change import SqlValue

EXAMPLES: Final = 3
_DIRECTIVE = re.compile(r"--(?=\s*renamed\s+from:)")
_WORD = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|\S+|\s+")


@dataclass(frozen=True, slots=True)
class Step:
    """One difference. lost says what is no longer there afterwards, refused which values stand in the way."""

    text: str
    is_online: bool
    lost: str = ""
    note: str = ""
    refused: str = ""


@dataclass(frozen=True, slots=True)
class TablePlan:
    """A table that both schemas have, or one that goes. columns are those that stay: old name to new."""

    was: TableSchema
    now: TableSchema | None
    columns: dict[str, str]
    is_rewritten: bool

    @property
    def renamed(self) -> dict[str, str | None]:
        """What each old column is called now; None for those that are dropped."""
        return {column: self.columns.get(column) for column in self.was.columns}

    def list_gone(self) -> list[tuple[str, str]]:
        """Return the names that stand for nothing any more: a table and "", or a table and a column."""
        was, now = self.was, self.now
        if now is None:
            return [(was.name, "")]
        table = [] if was.name == now.name else [(was.name, "")]
        return table + [(now.name, old) for old in was.columns if old not in now.columns]


@dataclass(frozen=True, slots=True)
class Plan:
    """The way from the schema of a file to another."""

    id: str
    schema: Schema
    steps: tuple[Step, ...]
    tables: tuple[TablePlan, ...]

    @property
    def only_adds(self) -> bool:
        """True when an open replica can take it up."""
        return not any(table.is_rewritten for table in self.tables)


def read_schema(connection: sqlite3.Connection) -> Schema:
    """Return the schema of the replicated tables in a file."""
    if not has_common(connection):
        raise SchemaError("the file is no replica")
    rows = connection.execute(
        "SELECT m.sql, t.mode FROM sqlite_master AS m JOIN _repl_table AS t ON t.name = m.name "
        "WHERE m.type = 'table' ORDER BY m.name"
    )
    # What was renamed before is of no interest any more, and may be at odds with what came later.
    return Schema.parse(
        "\n".join(f"-- merge: {mode}\n{_DIRECTIVE.sub('--was ', sql)};" for sql, mode in rows)
    )


def compute_id(current: Schema, wanted: Schema) -> str:
    """Return what names the plan from one schema to the other."""
    told = [
        (
            [(table.name, table.mode.value, table.create_sql, table.former_names)
             for _, table in sorted(schema.tables.items())],
            sorted(schema.indexes.items()),
            sorted(schema.dropped),
        )
        for schema in (current, wanted)
    ]  # fmt: skip
    return hashlib.sha256(repr(told).encode()).hexdigest()[:12]


def plan_schema(connection: sqlite3.Connection, schema: Schema) -> Plan:
    """Return the steps from the schema that a file has to the wanted one.

    Reads whole tables where values are lost or converted. Raises SchemaError for what no plan can do.
    """
    current = read_schema(connection)
    steps: list[Step] = []
    tables: list[TablePlan] = []
    for name in current.tables:
        formers = {former for table in schema.tables.values() for former in table.former_names}
        if name not in schema.tables and name not in formers and (name, "") not in schema.dropped:
            raise SchemaError(
                f"table {name} is not in the schema; say what became of it: `-- renamed from: {name}` before "
                f"a table, or `-- dropped: {name}`"
            )
    for table in schema.tables.values():
        was = _find_old(current, table)
        if was is None:
            steps.append(Step(f"add table {table.name}", is_online=True))
            continue
        plan = _pair(was, table, schema)
        found = list(_plan_table(connection, plan))
        if found:
            steps += found
            tables.append(plan)
    for name, column in sorted(schema.dropped):
        if not column and (gone := current.tables.get(name)) is not None:
            (count,) = connection.execute(f"SELECT count(*) FROM {quote(name)}").fetchone()
            steps.append(Step(f"drop table {name}", is_online=True, lost=_count(count, "row")))
            tables.append(TablePlan(gone, None, {}, is_rewritten=True))
    for index, sql in schema.indexes.items():
        found_sql = connection.execute(
            "SELECT sql FROM sqlite_master WHERE type = 'index' AND name = ?", (index,)
        ).fetchone()
        if found_sql != (sql,):
            verb = "add" if found_sql is None else "replace"
            steps.append(Step(f"{verb} index {index}", is_online=True))
    return Plan(compute_id(current, schema), schema, tuple(steps), tuple(tables))


def _find_old(current: Schema, table: TableSchema) -> TableSchema | None:
    found = [name for name in (table.name, *table.former_names) if name in current.tables]
    if len(found) > 1:
        raise SchemaError(f"table {table.name}: the file has it under two names: {', '.join(found)}")
    return current.tables[found[0]] if found else None


def _pair(was: TableSchema, now: TableSchema, schema: Schema) -> TablePlan:
    """Return which column is which; refuse what the schema does not explain, and another key."""
    columns: dict[str, str] = {}
    for column in was.columns:
        new = column if column in now.columns else now.former_columns.get(column)
        if new is not None:
            if new in columns.values():
                raise SchemaError(f"table {now.name}: column {new} is there under two names")
            columns[column] = new
        elif (now.name, column) not in schema.dropped and (was.name, column) not in schema.dropped:
            raise SchemaError(
                f"table {now.name}: column {column} is not in the schema; say what became of it: "
                f"`-- renamed from: {column}` before a column, or `-- dropped: {now.name}.{column}`"
            )
    if tuple(columns.get(column) for column in was.pk) != now.pk or was.key_types != now.key_types:
        raise SchemaError(f"table {now.name}: its key cannot be changed; make a new table and copy the rows")
    same_columns = all(
        old == new and _normalise(was.definitions[old]) == _normalise(now.definitions[new])
        for old, new in columns.items()
    )
    is_rewritten = not (
        was.name == now.name
        and was.mode is now.mode
        and len(columns) == len(was.columns)
        and same_columns
        and _constraints(was) == _constraints(now)
    )
    return TablePlan(was, now, columns, is_rewritten)


def _normalise(definition: str) -> str:
    """Return a definition without what does not matter: blanks, and the case of words that are not quoted."""
    words = _WORD.findall(definition)
    return "".join(" " if word.isspace() else word if word[0] in "'\"" else word.upper() for word in words)


def _constraints(table: TableSchema) -> set[str]:
    """Return what holds for the table as a whole, generated columns among it."""
    generated = {table.definitions[column] for column in table.definitions if column not in table.columns}
    end = table.create_sql.rpartition(")")[2]
    return {*map(_normalise, (*table.constraints, *generated)), _normalise(end).strip()}


def _plan_table(connection: sqlite3.Connection, plan: TablePlan) -> Iterator[Step]:
    was, now = plan.was, plan.now
    assert now is not None  # a table that goes has no steps for its parts
    if was.name != now.name:
        yield Step(f"rename table {was.name} to {now.name}", is_online=False)
    if was.mode is not now.mode:
        note = ""
        if now.mode is MergeMode.ROW:
            note = "every row is written again, and replicated"
        yield Step(f"merge table {now.name} by {now.mode.value}", is_online=False, note=note)
    for column in was.columns:
        if column not in plan.columns:
            (count,) = connection.execute(
                f"SELECT count(*) FROM {quote(was.name)} WHERE {quote(column)} IS NOT ?",
                (was.defaults[column],),
            ).fetchone()
            yield Step(f"drop column {now.name}.{column}", is_online=False, lost=_count(count, "value"))
    for old, new in plan.columns.items():
        if old != new:
            yield Step(f"rename column {now.name}.{old} to {new}", is_online=False)
    for new in now.columns:
        if new not in plan.columns.values():
            yield Step(f"add column {now.name}.{new}", is_online=not plan.is_rewritten)
    changed = [
        (old, new)
        for old, new in plan.columns.items()
        if _normalise(was.definitions[old].replace(old, new, 1)) != _normalise(now.definitions[new])
    ]
    if changed or _constraints(was) != _constraints(now):
        yield from _plan_values(connection, plan, changed)


def _plan_values(
    connection: sqlite3.Connection, plan: TablePlan, changed: list[tuple[str, str]]
) -> Iterator[Step]:
    """Try all rows in an empty table of the new kind, and say what becomes of them."""
    was, now = plan.was, plan.now
    assert now is not None  # see _plan_table
    trial = _Trial(plan)
    try:
        trial.run(connection)
    finally:
        trial.close()
    for old, new in changed:
        yield Step(
            f"change column {now.name}.{new}: {was.definitions[old]} becomes {now.definitions[new]}",
            is_online=False,
            lost=_tell(trial.converted[old], "value is converted", "values are converted"),
            note=_tell(trial.kept[old], "text stays a text", "texts stay texts"),
        )
    if not changed or trial.refused:
        yield Step(
            f"change constraints of table {now.name}",
            is_online=False,
            refused=_tell(trial.refused, "row does not fit", "rows do not fit"),
        )


class _Trial:
    """What becomes of each row in the new table; by old name of the column, examples of values."""

    def __init__(self, plan: TablePlan) -> None:
        assert plan.now is not None  # there is no new table otherwise
        self.plan = plan
        self.now = plan.now
        self.converted: dict[str, list[str]] = {column: [] for column in plan.columns}
        self.kept: dict[str, list[str]] = {column: [] for column in plan.columns}
        self.refused: list[str] = []
        self._scratch = sqlite3.connect(":memory:", isolation_level=None)
        self._scratch.execute(self.now.create_sql)
        self._insert, self._added = make_insert(plan)
        names = ", ".join(map(quote, plan.columns.values()))
        self._select = f"SELECT {names} FROM {quote(self.now.name)}"

    def run(self, connection: sqlite3.Connection) -> None:
        """Read all rows."""
        names = ", ".join(map(quote, self.plan.columns))
        lossless = connection.text_factory
        connection.text_factory = read_lossy  # a text that is not UTF-8 is copied all the same
        try:
            for row in connection.execute(f"SELECT {names} FROM {quote(self.plan.was.name)}"):
                self._try(row)
        finally:
            connection.text_factory = lossless

    def close(self) -> None:
        """Give the memory back."""
        self._scratch.close()

    def _try(self, row: tuple[SqlValue, ...]) -> None:
        try:
            self._scratch.execute(self._insert, (*row, *self._added))
        except sqlite3.IntegrityError as error:
            width = len(self.plan.was.pk)
            pk = tuple(row[list(self.plan.columns).index(column)] for column in self.plan.was.pk[:width])
            self.refused.append(f"{', '.join(map(repr, pk))}: {error}")
            return
        found = self._scratch.execute(self._select).fetchone()
        self._scratch.execute(f"DELETE FROM {quote(self.now.name)}")
        for (old, new), before, after in zip(self.plan.columns.items(), row, found, strict=True):
            if not is_same((before,), (after,)):
                self.converted[old].append(f"{before!r} to {after!r}")
            elif isinstance(after, str) and _is_numeric(self.now.fingerprint[new][0]):
                self.kept[old].append(repr(after))


def _is_numeric(declared: str) -> bool:
    kind = declared.upper()
    is_text = any(word in kind for word in ("CHAR", "CLOB", "TEXT"))
    return "INT" in kind or not (is_text or "BLOB" in kind or kind in ("", "ANY"))


def make_insert(plan: TablePlan) -> tuple[str, tuple[SqlValue, ...]]:
    """Return what puts a row of the old table into the new one, and the values of columns that it lacks.

    These are given, not left to SQLite: a default that is the current time would differ between nodes.
    """
    now = plan.now
    assert now is not None  # there is nothing to insert into otherwise
    added = [column for column in now.columns if column not in plan.columns.values()]
    names = [*plan.columns.values(), *added]
    marks = ", ".join("?" * len(names))
    sql = f"INSERT INTO {quote(now.name)} ({', '.join(map(quote, names))}) VALUES ({marks})"
    return sql, tuple(now.defaults[column] for column in added)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}" if number else ""


def _tell(examples: list[str], one: str, many: str) -> str:
    if not examples:
        return ""
    more = ", …" if len(examples) > EXAMPLES else ""
    shown = [example if len(example) <= 60 else f"{example[:60]}…" for example in examples[:EXAMPLES]]
    return f"{len(examples)} {one if len(examples) == 1 else many}: {', '.join(shown)}{more}"
