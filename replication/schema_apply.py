"""Carry out a plan for the schema of a file, and undo it.

A table that has to be written anew is set aside, whole, with its clock records, in the same file (the attic),
and a new one is filled from it. Nothing is replicated for that: every node does the same with the same rows
when its turn comes. The attic stays until it is forgotten. Nobody else may have the file open as a replica:
who calls this holds the agent's lock, and has gathered what was noted. See schema_plan.py for what a plan is.

Invariant: all of a plan, or of its undoing, is one transaction.
"""

# ruff: noqa: S608  names in the SQL of this file are quoted, values are bound

from __future__ import annotations

import contextlib
import sqlite3
from typing import TYPE_CHECKING, NamedTuple

from .core.codec import pack, unpack
from .core.merge import Record
from .errors import SchemaError
from .names import rename_cells
from .schema import MergeMode, Schema, TableSchema, quote
from .schema_plan import Plan, TablePlan, compute_id, make_insert, read_schema
from .sidetables import (
    GONE_TABLE,
    RECORD_COLUMNS,
    clock_table,
    create_side_tables,
    create_triggers,
    key,
    migrate,
    pending_table,
    read_declared,
    write_declared,
)
from .tables import Sites, Table

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

# tables is what the plan did to each; seen is what the replica had seen then, to tell what came since;
# declared is the text of the schema file before.
_ATTIC = """
CREATE TABLE IF NOT EXISTS _repl_attic (id INTEGER PRIMARY KEY, plan TEXT NOT NULL, seen, tables, declared)
"""
_GONE = (
    f"CREATE TABLE IF NOT EXISTS {GONE_TABLE} (name TEXT NOT NULL, part TEXT NOT NULL, plan INTEGER NOT NULL)"
)


class Shelf(NamedTuple):
    """What the attic keeps of one table; ddl are the statements that made its indexes and triggers."""

    was: str
    now: str | None
    sql: str
    mode: str
    columns: Mapping[str, str]  # that stayed: old name to new
    ddl: tuple[str, ...]
    is_kept: bool  # rows and clock records are in the attic

    def parse(self) -> TableSchema:
        """Return the table as it was."""
        return Schema.parse(f"-- merge: {self.mode}\n{self.sql};").tables[self.was]


def attic_rows(number: int, table: str) -> str:
    """Return the quoted name under which rows are kept."""
    return quote(f"_repl_attic_{number}_{table}")


def attic_clocks(number: int, table: str) -> str:
    """Return the quoted name under which clock records are kept."""
    return quote(f"_repl_attic_clock_{number}_{table}")


class Past(NamedTuple):
    """A plan that can be undone."""

    number: int
    plan: str
    seen: dict[int, bytes]  # ranges by number of site
    shelves: list[Shelf]
    declared: str


def apply_plan(connection: sqlite3.Connection, plan: Plan, declared: str | None = None) -> None:
    """Bring a file to the schema of a plan. Raises SchemaError, with nothing changed, when it cannot.

    The file must still have the schema that the plan was made for, and no value may stand in the way.
    declared is the text of a schema file, kept in the file for who opens it next (see read_declared).
    """
    with alone(connection):
        current = read_schema(connection)
        if compute_id(current, plan.schema) != plan.id:
            raise SchemaError("the schema of the file has changed since; make a new plan")
        check_gathered(connection, current)
        for step in plan.steps:
            if step.refused:
                raise SchemaError(f"{step.text}: {step.refused}")
        number = _open_attic(connection)
        shelves = [_rewrite(connection, number, table) for table in plan.tables]
        migrate(connection, plan.schema)
        connection.executemany(
            f"INSERT INTO {GONE_TABLE} VALUES (?, ?, ?)",
            [(*gone, number) for table in plan.tables for gone in table.list_gone()],
        )
        for table, shelf in zip(plan.tables, shelves, strict=True):
            if table.now is not None:
                restore_ddl(connection, shelf.ddl)
                if table.now.mode is MergeMode.ROW and table.was.mode is MergeMode.COLUMN:
                    # A row is one value from now on, wherever its columns came from: the one that we have.
                    note_rows(connection, table.now)
        seen = connection.execute("SELECT site, ranges FROM _repl_seen").fetchall()
        connection.execute(
            "INSERT INTO _repl_attic VALUES (?, ?, ?, ?, ?)",
            (number, plan.id, pack(seen), pack(shelves), read_declared(connection)),
        )
        if declared is not None:
            write_declared(connection, declared)


def forget(connection: sqlite3.Connection) -> int:
    """Drop what is kept for undoing plans; return of how many."""
    with alone(connection):
        pasts = read_attic(connection)
        for past in pasts:
            for shelf in past.shelves:
                if shelf.is_kept:
                    connection.execute(f"DROP TABLE {attic_rows(past.number, shelf.was)}")
                    connection.execute(f"DROP TABLE {attic_clocks(past.number, shelf.was)}")
        connection.execute("DROP TABLE IF EXISTS _repl_attic")
        connection.execute(f"DROP TABLE IF EXISTS {GONE_TABLE}")
        return len(pasts)


def read_attic(connection: sqlite3.Connection) -> list[Past]:
    """Return the plans that can be undone, the latest first."""
    if not _exists(connection, "_repl_attic"):
        return []
    rows = connection.execute("SELECT id, plan, seen, tables, declared FROM _repl_attic ORDER BY id DESC")
    return [
        Past(number, plan, dict(unpack(seen)), [Shelf(*fields) for fields in unpack(tables)], declared)
        for number, plan, seen, tables, declared in rows.fetchall()
    ]


@contextlib.contextmanager
def alone(connection: sqlite3.Connection) -> Iterator[None]:
    """Do everything or nothing, with SQLite leaving views and triggers alone when a table is renamed."""
    (legacy,) = connection.execute("PRAGMA legacy_alter_table").fetchone()
    connection.execute("PRAGMA legacy_alter_table = ON")
    try:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("COMMIT")
    except BaseException as error:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        if isinstance(error, sqlite3.IntegrityError):
            raise SchemaError(f"a row does not fit: {error}") from error
        raise
    finally:
        connection.execute(f"PRAGMA legacy_alter_table = {legacy}")


def check_gathered(connection: sqlite3.Connection, schema: Schema) -> None:
    """Raise SchemaError when there are writes that no changeset stands for yet."""
    for name in schema.tables:
        if connection.execute(f"SELECT EXISTS (SELECT 1 FROM {pending_table(name)})").fetchone()[0]:
            raise SchemaError(f"table {name}: somebody wrote to it, and no agent has gathered that yet")


def _open_attic(connection: sqlite3.Connection) -> int:
    connection.execute(_ATTIC)
    connection.execute(_GONE)
    number: int = connection.execute("SELECT coalesce(max(id), 0) + 1 FROM _repl_attic").fetchone()[0]
    return number


def _exists(connection: sqlite3.Connection, name: str) -> bool:
    return connection.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (name,)).fetchone() is not None


def _rewrite(connection: sqlite3.Connection, number: int, plan: TablePlan) -> Shelf:
    was, now = plan.was, plan.now
    ddl = read_ddl(connection, was.name)
    if plan.is_rewritten:
        rows, clocks = attic_rows(number, was.name), attic_clocks(number, was.name)
        set_aside(connection, was.name, rows, clocks)
        if now is not None:
            fill(connection, plan, rows, clocks)
    return Shelf(
        was.name,
        None if now is None else now.name,
        was.create_sql,
        was.mode.value,
        plan.columns,
        ddl,
        plan.is_rewritten,
    )


def read_ddl(connection: sqlite3.Connection, table: str) -> tuple[str, ...]:
    """Return the statements that made a table's indexes and triggers, without those of replication."""
    rows = connection.execute(
        "SELECT sql FROM sqlite_master WHERE tbl_name = ? AND type IN ('index', 'trigger') "
        r"AND sql IS NOT NULL AND name NOT LIKE '\_repl\_%' ESCAPE '\'",
        (table,),
    )
    return tuple(sql for (sql,) in rows)


def restore_ddl(connection: sqlite3.Connection, ddl: tuple[str, ...]) -> None:
    """Make indexes and triggers again, where they are not there and what they need is."""
    for sql in ddl:
        with contextlib.suppress(sqlite3.OperationalError):
            connection.execute(sql)


def set_aside(connection: sqlite3.Connection, name: str, rows: str, clocks: str) -> None:
    """Take a table out of replication, under another name; nothing may be noted of it."""
    for kind, other in connection.execute(
        "SELECT type, name FROM sqlite_master "
        "WHERE tbl_name = ? AND type IN ('index', 'trigger') AND sql IS NOT NULL",
        (name,),
    ).fetchall():
        connection.execute(f"DROP {kind} {quote(other)}")
    connection.execute(f"ALTER TABLE {quote(name)} RENAME TO {rows}")
    connection.execute(f"ALTER TABLE {clock_table(name)} RENAME TO {clocks}")
    connection.execute(f"DROP TABLE {pending_table(name)}")
    connection.execute("DELETE FROM _repl_table WHERE name = ?", (name,))


def put_back(connection: sqlite3.Connection, table: TableSchema, rows: str, clocks: str) -> None:
    """Take a table that was set aside into replication again, as it was."""
    connection.execute(f"ALTER TABLE {rows} RENAME TO {quote(table.name)}")
    create_side_tables(connection, table)
    connection.execute(f"DROP TABLE {clock_table(table.name)}")
    connection.execute(f"ALTER TABLE {clocks} RENAME TO {clock_table(table.name)}")
    create_triggers(connection, table)


def fill(connection: sqlite3.Connection, plan: TablePlan, rows: str, clocks: str) -> None:
    """Make the new table from the old one's rows and clock records."""
    was, now = plan.was, plan.now
    assert now is not None  # who calls has something to fill
    connection.execute(now.create_sql)
    create_side_tables(connection, now)
    insert, added = make_insert(plan)
    into = insert[: insert.rindex("VALUES")]
    taken = ", ".join([*map(quote, plan.columns), *("?" for _ in added)])
    connection.execute(f"{into} SELECT {taken} FROM {rows}", added)
    fields = ", ".join(RECORD_COLUMNS)
    connection.execute(
        f"INSERT INTO {clock_table(now.name)} ({', '.join(map(key, now.pk))}, {fields}) "
        f"SELECT {', '.join(map(key, was.pk))}, {fields} FROM {clocks}"
    )
    _convert_records(connection, plan)


def _convert_records(connection: sqlite3.Connection, plan: TablePlan) -> None:
    """Bring what clock records say of single columns to the new names and the new way to merge."""
    assert plan.now is not None  # who calls has a table
    table, sites = Table(connection, plan.now), Sites(connection)
    width = table.key_width
    changed = []
    for found in connection.execute(
        f"SELECT * FROM {clock_table(plan.now.name)} WHERE cells IS NOT NULL OR limbo IS NOT NULL"
    ).fetchall():
        record = convert_record(sites.decode(found[width:-1]), plan.renamed, plan.now.mode)
        limbo = found[-1]
        if limbo is not None:
            kept = {
                plan.columns[name]: value for name, value in unpack(limbo).items() if name in plan.columns
            }
            limbo = pack(kept) if record.base is not None or record.cells else None
        changed.append((*found[:width], *sites.encode(record), limbo))
    table.write_records(changed)


def convert_record(record: Record, renamed: Mapping[str, str | None], mode: MergeMode) -> Record:
    """Return what a record says under other names and another way to merge."""
    record = rename_cells(record, renamed)
    if mode is MergeMode.ROW and record.cells:
        latest = max(record.cells.values())
        base = latest if record.base is None else max(record.base, latest)
        return Record(record.life, record.dead, base)
    return record


def note_rows(connection: sqlite3.Connection, table: TableSchema) -> None:
    """Have all rows of a table gathered as written now."""
    connection.execute(
        f"INSERT INTO {pending_table(table.name)} ({', '.join(map(key, table.pk))}, existed) "
        f"SELECT {', '.join(map(quote, table.pk))}, 0 FROM {quote(table.name)} WHERE true "
        "ON CONFLICT DO NOTHING"
    )
