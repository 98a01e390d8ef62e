"""The replicated tables of one node: those of isthmus itself, and those that its operator declared.

Decides where the latter are kept: in the database itself, where `isthmus db schema apply` puts them in the
transaction that makes them. Knows nothing of plans. Invariant: a schema that is returned has all of isthmus's
tables, as routing and isthmus read them.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import os
import sqlite3
import time
from contextlib import closing
from typing import TYPE_CHECKING

from replication.database import lock_file
from replication.errors import SchemaError, StoreError
from replication.schema import Schema
from replication.schema_plan import plan_schema, read_schema
from replication.sidetables import read_declared
from replication.store import Store
from routing.catalog import load_schema_sql

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from replication.schema_plan import Plan

BUSY_TIMEOUT_S = 10.0


def combine_schema(declared: str) -> Schema:
    """Return isthmus's tables and those of a schema file. Raises SchemaError, with the line of the file."""
    own = Schema.parse(declared)
    built_in = Schema.parse(load_built_in_sql())
    taken = built_in.tables.keys() & (own.tables.keys() | {name for name, _ in own.dropped})
    for table in own.tables.values():
        taken |= built_in.tables.keys() & set(table.former_names)
    if taken:
        raise SchemaError(f"table {min(taken)} is one of isthmus's own")
    return Schema.parse(f"{load_built_in_sql()}\n;\n{declared}")


def load_built_in_sql() -> str:
    """Return the text of the tables that every node has: routing's, and those that isthmus adds."""
    own = importlib.resources.files("isthmus").joinpath("schema.sql").read_text(encoding="utf-8")
    return f"{load_schema_sql()}\n{own}"


def load_schema(database: Path) -> Schema:
    """Return the schema that a node opens its database with; that of a new one is isthmus's. Blocks."""
    if not database.exists():
        return combine_schema("")
    uri = f"{database.absolute().as_uri()}?mode=ro"
    try:
        with closing(sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT_S)) as connection:
            return combine_schema(read_declared(connection))
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return combine_schema("")  # what becomes of such a file is decided where it is opened to be used
        raise StoreError(f"{database}: {error}") from error


def make_plan(connection: sqlite3.Connection, declared: str | None) -> tuple[Plan, str]:
    """Return what it takes to bring a file to a schema file, and the text of that; None: the one that it has.

    Raises SchemaError.
    """
    text = read_declared(connection) if declared is None else declared
    return plan_schema(connection, combine_schema(text)), text


def read_plan(database: Path, declared: str | None) -> tuple[Plan, str]:
    """Return the same of a file that others may have open. Blocks; raises SchemaError and sqlite3.Error."""
    with closing(sqlite3.connect(database, isolation_level=None, timeout=BUSY_TIMEOUT_S)) as connection:
        connection.execute("PRAGMA query_only = ON")
        return make_plan(connection, declared)


@contextlib.contextmanager
def open_alone(database: Path) -> Iterator[sqlite3.Connection]:
    """Provide the file of a node without an agent, with all gathered that was written to it.

    Blocks; raises StoreError when an agent has it.
    """
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, lock_file(database))
        with closing(sqlite3.connect(database)) as connection:
            current = read_schema(connection)
        store = Store.open(database, current)
        undo.callback(store.close)
        store.capture(time.time_ns() // 1_000_000)
        yield store.connection
