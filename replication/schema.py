"""Decide which tables are replicated, and refuse those that cannot be.

The schema is a file of plain CREATE TABLE and CREATE INDEX statements. SQLite itself parses it, in an empty
database in memory; what it says there is what counts. A comment `-- merge: column` directly before a
table makes its columns merge one by one; otherwise a row is one value. `-- renamed from: NAME` before a
table or a column, and `-- dropped: TABLE` or `-- dropped: TABLE.COLUMN`, say what older files and older
nodes have. This module does not know the database file, nor what the tables are for.

Invariant: a Schema holds only tables on which any order of changes can be merged: no constraint spans rows.
"""

# ruff: noqa: S608  names in the SQL of this file are quoted, values are bound

from __future__ import annotations

import re
import sqlite3
from dataclasses import dataclass
from enum import Enum
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final

from .errors import SchemaError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .core.change import Row, SqlValue

RESERVED: Final = ("_repl_", "sqlite_")
_DIRECTIVE = re.compile(r"^\s*--\s*merge:\s*(\S+)\s*$", re.MULTILINE)
_RENAMED = re.compile(r"^\s*--\s*renamed\s+from:\s*(\S.*?)\s*$", re.MULTILINE)
_DROPPED = re.compile(r"^\s*--\s*dropped:\s*(\S.*?)\s*$", re.MULTILINE)
_LEADING = re.compile(r"(?:\s+|--[^\n]*(?:\n|$)|/\*.*?(?:\*/|$))*", re.DOTALL)
_STATEMENT = re.compile(r"CREATE\s+(TABLE|INDEX)\b", re.IGNORECASE)
# What SQL has by way of tokens, as far as it takes to find the commas between column definitions.
_TOKEN = re.compile(
    r"""'(?:[^']|'')*' | "(?:[^"]|"")*" | `(?:[^`]|``)*` | \[[^\]]*\] | --[^\n]* | /\*.*?\*/ | .""",
    re.VERBOSE | re.DOTALL,
)
# A default whose value depends on when or where it is evaluated.
_VOLATILE = re.compile(r"[^'\"]*(\(|current_)", re.IGNORECASE)


class MergeMode(Enum):
    """What one clock stands for."""

    ROW = "row"
    COLUMN = "column"


def quote(name: str) -> str:
    """Return a name as SQL, whatever it holds."""
    return '"' + name.replace('"', '""') + '"'


@dataclass(frozen=True, slots=True)
class TableSchema:
    """One replicated table.

    columns are in the order of the schema file, without generated ones. stored is the order in which rows
    travel: key columns first. definitions has the text of each column as it was declared, constraints has
    those of the table; defaults has the value of each column where nothing is given, as it would be stored.
    former_names are what the table was called before, former_columns what its columns were: old to new.
    """

    name: str
    columns: tuple[str, ...]
    pk: tuple[str, ...]
    mode: MergeMode
    create_sql: str
    stored: tuple[str, ...]
    definitions: dict[str, str]
    constraints: tuple[str, ...]
    former_names: tuple[str, ...]
    former_columns: dict[str, str]
    defaults: dict[str, SqlValue]
    key_types: tuple[str, ...]
    is_rowid_key: bool
    fingerprint: dict[str, tuple[Any, ...]]
    to_row: Callable[[Row], Row]  # from the stored order to that of columns
    to_stored: Callable[[Row], Row]

    @property
    def values(self) -> tuple[str, ...]:
        """The columns that are no part of the key."""
        return self.stored[len(self.pk) :]


@dataclass(frozen=True, slots=True)
class Schema:
    """All replicated tables, the indexes on them, and what was dropped: (table, column), or (table, "")."""

    tables: dict[str, TableSchema]
    indexes: dict[str, str]
    dropped: frozenset[tuple[str, str]] = frozenset()

    @classmethod
    def parse(cls, sql: str) -> Schema:
        """Return the schema that the text of a schema file declares.

        Raises SchemaError, with the line or the table, for anything that SQLite or replication refuses.
        """
        scratch = sqlite3.connect(":memory:", isolation_level=None)
        try:
            scratch.execute("PRAGMA ignore_check_constraints = ON")
            heads: dict[str, tuple[MergeMode, tuple[str, ...]]] = {}
            dropped: set[tuple[str, str]] = set()
            for line, head, statement in _split(sql):
                known = _table_names(scratch)
                _create(scratch, line, statement)
                for name in _table_names(scratch) - known:
                    heads[name] = (_read_mode(head, line), tuple(_RENAMED.findall(head)))
                dropped.update(_read_dropped(head))
            tables = {
                name: _introspect(scratch, name, create_sql, *heads[name])
                for name, create_sql in scratch.execute(
                    "SELECT name, sql FROM sqlite_master WHERE type = 'table' ORDER BY rowid"
                ).fetchall()
            }
            indexes = dict(
                scratch.execute(
                    "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL"
                )
            )
        finally:
            scratch.close()
        _check_names(tables, dropped)
        return cls(tables, indexes, frozenset(dropped))


def _split(sql: str) -> Iterator[tuple[int, str, str]]:
    """Yield the line, the comments before, and the text of each statement."""
    sql += "\n;"  # the last statement may lack its own; an empty one is no matter
    start = 0
    for match in re.finditer(";", sql):
        chunk = sql[start : match.end()]
        if sqlite3.complete_statement(chunk):
            head = _LEADING.match(chunk)
            assert head is not None  # the pattern matches the empty string
            line = sql.count("\n", 0, start + head.end()) + 1
            yield line, head.group(), chunk[head.end() :]
            start = match.end()
    rest = _LEADING.sub("", sql[start:], count=1)
    if rest.strip():
        line = sql.count("\n", 0, len(sql) - len(rest)) + 1
        raise SchemaError(f"line {line}: statement without an end: {_shorten(rest)}")


def _shorten(statement: str) -> str:
    return " ".join(statement.split())[:60]


def _table_names(scratch: sqlite3.Connection) -> set[str]:
    return {name for (name,) in scratch.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def _create(scratch: sqlite3.Connection, line: int, statement: str) -> None:
    if statement == ";":
        return
    if _STATEMENT.match(statement) is None:
        raise SchemaError(f"line {line}: only CREATE TABLE and CREATE INDEX, not: {_shorten(statement)}")
    try:
        scratch.execute(statement)
    except (sqlite3.Error, sqlite3.Warning) as error:
        raise SchemaError(f"line {line}: {error}: {_shorten(statement)}") from error


def _read_mode(head: str, line: int) -> MergeMode:
    directives = _DIRECTIVE.findall(head)
    if not directives:
        return MergeMode.ROW
    try:
        return MergeMode(directives[-1])
    except ValueError:
        raise SchemaError(f"line {line}: merge is row or column, not {directives[-1]!r}") from None


def _read_dropped(head: str) -> Iterator[tuple[str, str]]:
    for name in _DROPPED.findall(head):
        table, _, column = name.partition(".")
        yield table, column


def _check_names(tables: dict[str, TableSchema], dropped: set[tuple[str, str]]) -> None:
    """Refuse a name that would stand for two things: what comes from older nodes must have one meaning."""
    meanings: dict[tuple[str, str], str] = {}

    def claim(table: str, column: str, meaning: str) -> None:
        other = meanings.setdefault((table, column), meaning)
        if other != meaning:
            name = f"{table}.{column}" if column else table
            raise SchemaError(f"{name} is {other} and {meaning}")

    for table in tables.values():
        claim(table.name, "", "a table")
        for column in table.columns:
            claim(table.name, column, "a column")
    for table in tables.values():
        for name in table.former_names:
            claim(name, "", f"a former name of {table.name}")
        for was, now in table.former_columns.items():
            claim(table.name, was, f"a former name of {table.name}.{now}")
    for name, column in dropped:
        claim(name, column, "dropped")


def read_columns(connection: sqlite3.Connection, table: str) -> dict[str, tuple[Any, ...]]:
    """Return what SQLite says of each column: type, NOT NULL, default, place in the key, kind."""
    rows = connection.execute(f"PRAGMA table_xinfo({quote(table)})").fetchall()
    return {row[1]: row[2:] for row in rows}


def _introspect(
    scratch: sqlite3.Connection, name: str, create_sql: str, mode: MergeMode, former_names: tuple[str, ...]
) -> TableSchema:
    info = read_columns(scratch, name)
    columns = tuple(column for column, (*_, hidden) in info.items() if hidden == 0)
    by_place = sorted((place, column) for column, (_, _, _, place, _) in info.items() if place)
    pk = tuple(column for _, column in by_place)
    stored = pk + tuple(column for column in columns if column not in pk)
    texts, formers = _split_definitions(name, create_sql)
    is_rowid_key = _check_keys(scratch, name, info, pk)
    _check_values(name, create_sql, info, pk, mode)
    return TableSchema(
        name=name,
        columns=columns,
        pk=pk,
        mode=mode,
        create_sql=create_sql,
        stored=stored,
        definitions=dict(zip(info, texts, strict=False)),
        constraints=tuple(texts[len(info) :]),
        former_names=former_names,
        former_columns={was: column for column, names in zip(info, formers, strict=False) for was in names},
        defaults=_read_defaults(scratch, name, info, pk),
        key_types=tuple(info[column][0] for column in pk),
        is_rowid_key=is_rowid_key,
        fingerprint=info,
        to_row=_permutation(stored, columns),
        to_stored=_permutation(columns, stored),
    )


def _permutation(source: tuple[str, ...], target: tuple[str, ...]) -> Callable[[Row], Row]:
    if source == target:
        return tuple
    # A table of one column has one order only, so itemgetter always gets several items and returns a tuple.
    return itemgetter(*(source.index(column) for column in target))


def _check_keys(
    scratch: sqlite3.Connection, name: str, info: dict[str, tuple[Any, ...]], pk: tuple[str, ...]
) -> bool:
    """Refuse keys that replicas could not agree on; return whether the key is the rowid itself."""
    if name.lower().startswith(RESERVED):
        raise SchemaError(f"table {name}: names that begin with {RESERVED[0]} are reserved")
    if not pk:
        raise SchemaError(f"table {name}: a replicated table needs a primary key")
    indexes = scratch.execute(f"PRAGMA index_list({quote(name)})").fetchall()
    if any(unique and origin != "pk" for _, _, unique, origin, _ in indexes):
        raise SchemaError(f"table {name}: UNIQUE besides the primary key cannot be kept by replicas apart")
    if scratch.execute(f"PRAGMA foreign_key_list({quote(name)})").fetchone():
        raise SchemaError(f"table {name}: foreign keys cannot be kept by replicas apart")
    key_indexes = [index for _, index, _, origin, _ in indexes if origin == "pk"]
    without_rowid = scratch.execute(
        "SELECT wr FROM pragma_table_list WHERE schema = 'main' AND name = ?", (name,)
    ).fetchone()[0]
    is_rowid_key = not key_indexes
    for column in pk:
        declared, not_null, _, _, hidden = info[column]
        if hidden:
            raise SchemaError(f"table {name}: key column {column} is generated")
        if declared.upper() in ("", "ANY"):
            raise SchemaError(f"table {name}: key column {column} needs a type, or 1 and 1.0 are one key")
        if not (not_null or without_rowid or is_rowid_key):
            raise SchemaError(f"table {name}: key column {column} needs NOT NULL")
    for index in key_indexes:
        for _, _, column, _, collation, is_key in scratch.execute(f"PRAGMA index_xinfo({quote(index)})"):
            if is_key and collation != "BINARY":
                raise SchemaError(f"table {name}: key column {column} has collation {collation}")
    return is_rowid_key


def _check_values(
    name: str, create_sql: str, info: dict[str, tuple[Any, ...]], pk: tuple[str, ...], mode: MergeMode
) -> None:
    # Text inside of quotes and comments may say AUTOINCREMENT without meaning it.
    bare = "".join(token for token in _TOKEN.findall(create_sql) if len(token) == 1)
    if re.search(r"\bAUTOINCREMENT\b", bare, re.IGNORECASE):
        raise SchemaError(f"table {name}: AUTOINCREMENT counts on one replica only")
    for column, (_, not_null, default, _, hidden) in info.items():
        if column in pk or hidden or not not_null or mode is MergeMode.ROW:
            continue
        if default is None or default.upper() == "NULL":
            # A column may arrive before the rest of its row does.
            raise SchemaError(
                f"table {name}: column {column} is NOT NULL and merges alone: it needs a DEFAULT"
            )


def _split_definitions(name: str, create_sql: str) -> tuple[list[str], list[list[str]]]:
    """Return the texts between the commas of CREATE TABLE: the columns, then the table's constraints.

    With them, the former names that a comment on a line before each says.
    """
    parts: list[str] = []
    formers: list[list[str]] = []
    current: list[str] = []
    depth = 0
    for token in _TOKEN.findall(create_sql):
        depth += (token == "(") - (token == ")")  # noqa: S105  # a token of SQL, not of access
        if depth == 0 and parts:
            break
        if depth == 1 and token in ("(", ","):
            parts.append("")
            formers.append([])
            current = []
            continue
        if parts and (renamed := _RENAMED.match(token)) is not None:
            if parts[-1] or "\n" not in current:
                raise SchemaError(
                    f"table {name}: {token.strip()!r} goes on a line of its own, before a column"
                )
            formers[-1].append(renamed[1])
        elif depth >= 1 and parts and not token.startswith(("--", "/*")):
            current.append(token)
            parts[-1] = "".join(current).strip()
    return parts, formers


def _read_defaults(
    scratch: sqlite3.Connection, name: str, info: dict[str, tuple[Any, ...]], pk: tuple[str, ...]
) -> dict[str, SqlValue]:
    """Return each column's default as the column stores it; None for one that is not constant."""
    given = {
        column: _dummy(declared)
        for column, (declared, not_null, default, _, hidden) in info.items()
        if not hidden and (column in pk or (not_null and default is None))
    }
    names = ", ".join(map(quote, given))
    marks = ", ".join("?" * len(given))
    try:
        scratch.execute(f"INSERT INTO {quote(name)} ({names}) VALUES ({marks})", tuple(given.values()))
    except sqlite3.Error as error:
        raise SchemaError(f"table {name}: no row can be made of its defaults: {error}") from error
    readable = [column for column, (*_, hidden) in info.items() if not hidden]
    row = scratch.execute(f"SELECT {', '.join(map(quote, readable))} FROM {quote(name)}").fetchone()
    scratch.execute(f"DELETE FROM {quote(name)}")
    return {
        column: None if column in given or _VOLATILE.match(info[column][2] or "") else value
        for column, value in zip(readable, row, strict=True)
    }


def _dummy(declared: str) -> SqlValue:
    """Return a value that a column of this type takes, strict or not (SQLite's rules of affinity)."""
    kind = declared.upper()
    if "INT" in kind:
        return 0
    if "CHAR" in kind or "CLOB" in kind or "TEXT" in kind:
        return ""
    if "BLOB" in kind:
        return b""
    return 0.0
