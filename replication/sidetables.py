"""Decide what SQLite holds beside the replicated tables, and bring a file to that.

Per table: a clock record for each row (see core/merge.py), and a pending table in which triggers note the
keys of rows that somebody wrote, with what they held before the first such write. Both live in the same
file and so in the same transactions as the rows. The triggers are plain SQL: any SQLite client runs them.
This module does not read or write either kind of record.

Invariant: a row that differs from what its clock record stands for has an entry in the pending table.

Three rules of SQLite shape the triggers. REPLACE does not run delete triggers for the rows that it removes,
so what is about to be overwritten is noted before. OR clauses of the outer statement override those of
statements in triggers, but not ON CONFLICT DO NOTHING. UPDATE OF column does not fire for SET rowid.
"""

# ruff: noqa: S608  names in the SQL of this file are quoted, values are bound

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from .core.clock import SITE_BYTES
from .errors import SchemaError, StoreError
from .schema import MergeMode, Schema, TableSchema, quote, read_columns

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable, Mapping

STORAGE_FORMAT: Final = 1
_BY_PLAN: Final = "that takes a plan"
# There in a file that was put back from a backup to be the same site again, until it has its own versions.
HELD_TABLE: Final = "_repl_held"
# Names of tables and columns that a plan took away, while it can still be undone; there once it is needed.
GONE_TABLE: Final = "_repl_gone"

# merging is the triggers' guard: set while the agent writes what it merged, within one transaction, so that
# no other connection ever sees it set. The id of a log entry is site << 40 | version: one integer key, and
# the versions of one site lie together.
_COMMON: Final = f"""
CREATE TABLE _repl_state (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    format INTEGER NOT NULL,
    site INTEGER NOT NULL,
    version INTEGER NOT NULL,
    hlc INTEGER NOT NULL,
    seq INTEGER NOT NULL,
    merging INTEGER NOT NULL DEFAULT 0,
    boot TEXT NOT NULL DEFAULT '',
    home TEXT NOT NULL DEFAULT '',
    is_clean INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE _repl_site (
    ordinal INTEGER PRIMARY KEY,
    site BLOB NOT NULL UNIQUE CHECK (length(site) = {SITE_BYTES})
);
CREATE TABLE _repl_seen (site INTEGER PRIMARY KEY, ranges BLOB NOT NULL);
CREATE TABLE _repl_log (id INTEGER PRIMARY KEY, payload BLOB NOT NULL);
CREATE TABLE _repl_parked (
    site INTEGER NOT NULL, version INTEGER NOT NULL, reason TEXT NOT NULL, payload BLOB NOT NULL,
    PRIMARY KEY (site, version)
);
CREATE TABLE _repl_table (name TEXT PRIMARY KEY, mode TEXT NOT NULL) WITHOUT ROWID;
"""
RECORD_COLUMNS: Final = ("hlc", "site", "life_hlc", "life_site", "dead", "cells", "limbo")


def clock_table(name: str) -> str:
    """Return the quoted name of a table's clock records."""
    return quote(f"_repl_clock_{name}")


def pending_table(name: str) -> str:
    """Return the quoted name of the table that triggers note writes in."""
    return quote(f"_repl_pending_{name}")


def staged_table(name: str) -> str:
    """Return the quoted name of the table that notes what is held back of a table (see staging.py)."""
    return quote(f"_repl_staged_{name}")


def key(column: str) -> str:
    """Return the quoted name that a key column has in side tables."""
    return quote(f"k_{column}")


def old(column: str) -> str:
    """Return the quoted name of what a column held before, in the pending table."""
    return quote(f"o_{column}")


def has_common(connection: sqlite3.Connection) -> bool:
    """True when the file is a replica already; raise StoreError for a format that is not ours."""
    found = connection.execute("SELECT 1 FROM sqlite_master WHERE name = '_repl_state'").fetchone()
    if found is None:
        return False
    (number,) = connection.execute("SELECT format FROM _repl_state").fetchone()
    if number != STORAGE_FORMAT:
        raise StoreError(f"the file has storage format {number}, this version reads {STORAGE_FORMAT}")
    return True


def is_held(connection: sqlite3.Connection) -> bool:
    """True when the file was put back from a backup and lacks versions of its own."""
    found = connection.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (HELD_TABLE,)).fetchone()
    return found is not None


def read_collected(connection: sqlite3.Connection) -> int:
    """Return the hybrid time up to which deletions may have been forgotten; 0 when none was."""
    if connection.execute("SELECT 1 FROM sqlite_master WHERE name = '_repl_collected'").fetchone() is None:
        return 0
    hlc: int = connection.execute("SELECT max(hlc) FROM _repl_collected").fetchone()[0]
    return hlc


def write_collected(connection: sqlite3.Connection, hlc: int) -> None:
    """Keep that time. Its table is made when it is first needed: files of earlier versions lack it."""
    connection.execute(
        "CREATE TABLE IF NOT EXISTS _repl_collected "
        "(id INTEGER PRIMARY KEY CHECK (id = 1), hlc INTEGER NOT NULL)"
    )
    connection.execute("INSERT OR REPLACE INTO _repl_collected VALUES (1, ?)", (hlc,))


def read_members(connection: sqlite3.Connection) -> list[tuple[bytes, str, str, int, int]]:
    """Return the members that were known last: site, name, host, port, incarnation."""
    if connection.execute("SELECT 1 FROM sqlite_master WHERE name = '_repl_member'").fetchone() is None:
        return []
    return connection.execute(
        "SELECT site, name, host, port, incarnation FROM _repl_member ORDER BY site"
    ).fetchall()


def write_members(
    connection: sqlite3.Connection, members: Iterable[tuple[bytes, str, str, int, int]]
) -> None:
    """Keep these members and no others, within the caller's transaction."""
    connection.execute(
        "CREATE TABLE IF NOT EXISTS _repl_member (site BLOB PRIMARY KEY, name TEXT NOT NULL, "
        "host TEXT NOT NULL, port INTEGER NOT NULL, incarnation INTEGER NOT NULL) WITHOUT ROWID"
    )
    connection.execute("DELETE FROM _repl_member")
    connection.executemany("INSERT INTO _repl_member VALUES (?, ?, ?, ?, ?)", members)


def read_declared(connection: sqlite3.Connection) -> str:
    """Return the text of the schema file that tables were last made by; empty when none was kept."""
    if connection.execute("SELECT 1 FROM sqlite_master WHERE name = '_repl_declared'").fetchone() is None:
        return ""
    text: str = connection.execute("SELECT max(sql) FROM _repl_declared").fetchone()[0]
    return text


def write_declared(connection: sqlite3.Connection, declared: str) -> None:
    """Keep the text of a schema file. Its table is made when it is first needed."""
    connection.execute(
        "CREATE TABLE IF NOT EXISTS _repl_declared (id INTEGER PRIMARY KEY CHECK (id = 1), sql TEXT NOT NULL)"
    )
    connection.execute("INSERT OR REPLACE INTO _repl_declared VALUES (1, ?)", (declared,))


def create_common(connection: sqlite3.Connection) -> None:
    """Create what every replica has, within the caller's transaction."""
    for statement in _COMMON.split(";\n"):
        if statement.strip():
            connection.execute(statement)


def migrate(connection: sqlite3.Connection, schema: Schema) -> None:
    """Bring tables, side tables, triggers and indexes to the schema, within the caller's transaction.

    Adds tables and columns; rows are not rewritten and nothing is replicated for it. Raises SchemaError for
    what takes a plan (see schema_plan.py): other names, columns removed or changed, another way to merge.
    """
    modes = dict(connection.execute("SELECT name, mode FROM _repl_table"))
    for name, column in schema.dropped:
        if not column and name in modes:
            raise SchemaError(f"table {name} is to be dropped: {_BY_PLAN}")
    for table in schema.tables.values():
        for former in table.former_names:
            if former in modes:
                raise SchemaError(f"table {former} is to be {table.name}: {_BY_PLAN}")
        existing = read_columns(connection, table.name)
        if existing:
            _check_unchanged(table, existing, modes.get(table.name, table.mode.value))
            _add_columns(connection, table, existing)
        else:
            _check_not_gone(connection, table.name, "")
            connection.execute(table.create_sql)
        if table.name not in modes:
            create_side_tables(connection, table)
            if existing:
                _adopt_rows(connection, table)
        create_triggers(connection, table)
    _create_indexes(connection, schema)


def _check_unchanged(table: TableSchema, existing: dict[str, tuple[object, ...]], mode: str) -> None:
    if MergeMode(mode) is not table.mode:
        raise SchemaError(f"table {table.name}: merges by {mode}: {_BY_PLAN}")
    for column, facts in existing.items():
        wanted = table.fingerprint.get(column)
        if wanted is None:
            raise SchemaError(f"table {table.name}: column {column} is not in the schema: {_BY_PLAN}")
        if wanted != facts:
            raise SchemaError(
                f"table {table.name}: {column} was {facts[:4]}, the schema has {wanted[:4]}: {_BY_PLAN}"
            )


def _check_not_gone(connection: sqlite3.Connection, table: str, column: str) -> None:
    """Refuse a name that a plan took away: empty, it would hide what comes back when the plan is undone."""
    if connection.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (GONE_TABLE,)).fetchone() is None:
        return
    found = connection.execute(
        f"SELECT 1 FROM {GONE_TABLE} WHERE name = ? AND part = ?", (table, column)
    ).fetchone()
    if found is not None:
        what = f"table {table}" + (f": column {column}" if column else "")
        raise SchemaError(f"{what} was taken away by a plan; undo the plan, or forget it")


def _add_columns(
    connection: sqlite3.Connection, table: TableSchema, existing: dict[str, tuple[object, ...]]
) -> None:
    for column, (*_, hidden) in table.fingerprint.items():
        if column in existing:
            continue
        _check_not_gone(connection, table.name, column)
        try:
            connection.execute(f"ALTER TABLE {quote(table.name)} ADD COLUMN {table.definitions[column]}")
            for notes in ("pending", "staged"):
                if hidden or not read_columns(connection, f"_repl_{notes}_{table.name}"):
                    continue
                # A note made before the column existed stands for a row that had the default in it.
                default = connection.execute("SELECT quote(?)", (table.defaults[column],)).fetchone()[0]
                connection.execute(
                    f"ALTER TABLE {quote(f'_repl_{notes}_{table.name}')} "
                    f"ADD COLUMN {old(column)} DEFAULT {default}"
                )
        except connection.OperationalError as error:
            raise SchemaError(f"table {table.name}: column {column} cannot be added: {error}") from error


def create_side_tables(connection: sqlite3.Connection, table: TableSchema) -> None:
    """Create the clock records and the pending table of a replicated table, empty."""
    keys = ", ".join(
        f"{key(column)} {declared}" for column, declared in zip(table.pk, table.key_types, strict=True)
    )
    if table.is_rowid_key:
        keys = f"{key(table.pk[0])} INTEGER PRIMARY KEY"
        end = ")"
    else:
        end = f", PRIMARY KEY ({', '.join(map(key, table.pk))})) WITHOUT ROWID"
    connection.execute(f"CREATE TABLE {clock_table(table.name)} ({keys}, {', '.join(RECORD_COLUMNS)}{end}")
    create_notes(connection, table, pending_table(table.name))
    connection.execute("INSERT INTO _repl_table VALUES (?, ?)", (table.name, table.mode.value))


def create_notes(connection: sqlite3.Connection, table: TableSchema, notes: str) -> None:
    """Create a table for keys of rows that were written and what they held before, by its quoted name."""
    bare_keys = ", ".join(map(key, table.pk))
    olds = "".join(f", {old(column)}" for column in table.values)
    connection.execute(
        f"CREATE TABLE IF NOT EXISTS {notes} ({bare_keys}, existed INTEGER NOT NULL{olds}, "
        f"PRIMARY KEY ({bare_keys})) WITHOUT ROWID"
    )


def _adopt_rows(connection: sqlite3.Connection, table: TableSchema) -> None:
    """Note all rows of a table that was there before replication as new."""
    connection.execute(
        f"INSERT INTO {pending_table(table.name)} ({', '.join(map(key, table.pk))}, existed) "
        f"SELECT {', '.join(map(quote, table.pk))}, 0 FROM {quote(table.name)}"
    )


def make_triggers(table: TableSchema) -> dict[str, str]:
    """Return the triggers that note what others write to a table: name to SQL."""
    return make_notes(table, pending_table(table.name), "_repl", "(SELECT merging FROM _repl_state) = 0")


def make_notes(table: TableSchema, pending: str, prefix: str, guard: str) -> dict[str, str]:
    """Return triggers that note in a table what is written while the guard holds: name to SQL."""
    name = quote(table.name)
    keys = ", ".join(map(key, table.pk))
    images = f"{keys}, existed" + "".join(f", {old(column)}" for column in table.values)

    def image(row: str) -> str:
        of_key = ", ".join(row + quote(column) for column in table.pk)
        return f"{of_key}, 1" + "".join(f", {row}{quote(column)}" for column in table.values)

    new_key = ", ".join("NEW." + quote(column) for column in table.pk)
    at_new_key = " AND ".join(f"{quote(column)} = NEW.{quote(column)}" for column in table.pk)
    moved = " OR ".join(f"NEW.{quote(column)} IS NOT OLD.{quote(column)}" for column in table.pk)
    # 1 and 1.0 are equal, and so are words that a collation finds equal; both are changes all the same.
    changed = " OR ".join(
        f"NEW.{column} IS NOT OLD.{column} COLLATE BINARY OR typeof(NEW.{column}) <> typeof(OLD.{column})"
        for column in map(quote, table.stored)
    )
    note_overwritten = (
        f"INSERT INTO {pending} ({images}) SELECT {image('')} FROM {name} WHERE {at_new_key} "
        "ON CONFLICT DO NOTHING;"
    )
    note_new = f"INSERT INTO {pending} ({keys}, existed) VALUES ({new_key}, 0) ON CONFLICT DO NOTHING;"
    note_old = f"INSERT INTO {pending} ({images}) VALUES ({image('OLD.')}) ON CONFLICT DO NOTHING;"
    bodies = {
        "overwrite": ("BEFORE INSERT", "", note_overwritten),
        "insert": ("AFTER INSERT", "", note_new),
        "collide": ("BEFORE UPDATE", f" AND ({moved})", note_overwritten),
        "update": ("AFTER UPDATE", f" AND ({changed})", note_old),
        "move": ("AFTER UPDATE", f" AND ({moved})", note_new),
        "delete": ("AFTER DELETE", "", note_old),
    }
    triggers = {}
    for kind, (event, condition, body) in bodies.items():
        trigger = f"{prefix}_{kind}_{table.name}"
        triggers[trigger] = (
            f"CREATE TRIGGER {quote(trigger)} {event} ON {name} WHEN {guard}{condition} BEGIN {body} END"
        )
    return triggers


def create_triggers(connection: sqlite3.Connection, table: TableSchema) -> None:
    """Create the triggers that note who writes to a table, or bring them to its columns."""
    put_triggers(connection, make_triggers(table))


def put_triggers(connection: sqlite3.Connection, triggers: Mapping[str, str]) -> None:
    """Create triggers that are not there, and those again that are different."""
    for trigger, sql in triggers.items():
        found = connection.execute(
            "SELECT sql FROM sqlite_master WHERE type = 'trigger' AND name = ?", (trigger,)
        ).fetchone()
        if found == (sql,):
            continue
        if found is not None:
            connection.execute(f"DROP TRIGGER {quote(trigger)}")
        connection.execute(sql)


def _create_indexes(connection: sqlite3.Connection, schema: Schema) -> None:
    """Create the schema's indexes; those that somebody else made are left alone."""
    for index, sql in schema.indexes.items():
        found = connection.execute(
            "SELECT sql FROM sqlite_master WHERE type = 'index' AND name = ?", (index,)
        ).fetchone()
        if found == (sql,):
            continue
        if found is not None:
            connection.execute(f"DROP INDEX {quote(index)}")
        connection.execute(sql)


def read_seq(connection: sqlite3.Connection) -> int:
    """Return the sequence number up to which a replica's rows are, as any reader of the file sees it.

    Read in the same transaction as the rows, it says which commits of the change feed they include.
    """
    seq: int = connection.execute("SELECT seq FROM _repl_state").fetchone()[0]
    return seq
