"""Read and write one replicated table: its rows, their clock records and what is pending.

Everything here runs within a transaction of the caller, in bulk where SQLite allows it. This module decides
nothing about who wins; it knows how records and values lie in the file.

Invariant: what is read as captured never contains a write that no changeset stands for yet.
"""

# ruff: noqa: S608  names in the SQL of this file are quoted, values are bound

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING, Any, Final

from .core.clock import Clock, Hlc, SiteId
from .core.codec import pack, unpack
from .core.merge import NO_CELLS, Record
from .schema import TableSchema, quote
from .sidetables import RECORD_COLUMNS, clock_table, key, old, pending_table

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from .core.change import Key, Row, SqlValue

# Keys looked up by one statement. Few different sizes, so that statements stay in the connection's cache.
LOOKUP_SIZES: Final = (256, 32, 1)
# Rows read at once where a whole table is gone through: what is held in memory.
PAGE_ROWS: Final = 512

RecordFields = tuple[int | None, int | None, int | None, int | None, int | None, bytes | None]


class Sites:
    """Sites by the small number that stands for them in this file, and the other way round."""

    __slots__ = ("_by_ordinal", "_by_site", "_connection")

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._by_ordinal: dict[int, SiteId] = {}
        self._by_site: dict[SiteId, int] = {}
        self.reload()

    def reload(self) -> None:
        """Read the file's numbers again, after a rollback."""
        rows = self._connection.execute("SELECT ordinal, site FROM _repl_site").fetchall()
        self._by_ordinal = {ordinal: SiteId(site) for ordinal, site in rows}
        self._by_site = {site: ordinal for ordinal, site in self._by_ordinal.items()}

    def get_site(self, ordinal: int) -> SiteId:
        """Return the site of a number found in the file."""
        return self._by_ordinal[ordinal]

    def find(self, site: SiteId) -> int | None:
        """Return the number of a site, None when it has none yet."""
        return self._by_site.get(site)

    def get_ordinal(self, site: SiteId) -> int:
        """Return the number of a site; give it one, in the caller's transaction, if it has none."""
        ordinal = self._by_site.get(site)
        if ordinal is None:
            ordinal = len(self._by_ordinal)
            self._connection.execute("INSERT INTO _repl_site VALUES (?, ?)", (ordinal, site))
            self._by_ordinal[ordinal] = site
            self._by_site[site] = ordinal
        return ordinal

    def encode(self, record: Record) -> RecordFields:
        """Return a record as the clock table has it; a life that is the base is left out."""
        life, dead, base, cells = record
        hlc = site = life_hlc = life_site = blob = None
        if base is not None:
            hlc = base.hlc
            site = self.get_ordinal(base.site)
        if life != base:
            life_hlc = life.hlc
            life_site = self.get_ordinal(life.site)
        if cells:
            # Columns are usually written several at once: their clock is named once, before their names.
            groups: dict[Clock, list[Any]] = {}
            for name, clock in cells.items():
                group = groups.get(clock)
                if group is None:
                    group = groups[clock] = [clock.hlc, self.get_ordinal(clock.site)]
                group.append(name)
            blob = pack(list(groups.values()))
        return hlc, site, life_hlc, life_site, 1 if dead else None, blob

    def decode(self, fields: Sequence[Any]) -> Record:
        """Return the record of a clock table's fields."""
        hlc, site, life_hlc, life_site, dead, blob = fields
        base = None if hlc is None else Clock(hlc, self._by_ordinal[site])
        if life_hlc is None:
            assert base is not None  # encode leaves out a life only where it is the base
            life = base
        else:
            life = Clock(life_hlc, self._by_ordinal[life_site])
        cells: Mapping[str, Clock] | dict[str, Clock] = NO_CELLS
        if blob is not None:
            found = unpack(blob)
            if isinstance(found, dict):  # as before 0.2
                found = [(at, where, name) for name, (at, where) in found.items()]
            cells = {}
            for at, where, *names in found:
                cells |= dict.fromkeys(names, Clock(Hlc(at), self._by_ordinal[where]))
        return Record(life, dead is not None, base, cells)


def read_lossy(raw: bytes) -> str:
    """Return text that is not UTF-8 (SQLite does not mind) as something that every consumer can handle."""
    return raw.decode("utf-8", "replace")


def fetch_all(connection: sqlite3.Connection, sql: str, values: Sequence[SqlValue] = ()) -> list[Any]:
    """Return all rows of a query, also when some text in them is not UTF-8."""
    try:
        return connection.execute(sql, values).fetchall()
    except sqlite3.OperationalError as error:
        if "UTF-8" not in str(error):
            raise
    connection.text_factory = read_lossy  # a call per text: only where it is needed
    try:
        return connection.execute(sql, values).fetchall()
    finally:
        connection.text_factory = str


def select_noted(schema: TableSchema, notes: str) -> str:
    """Return SQL for what `Table.read_pending` says of each row that is noted in a table of notes."""
    row_is_noted = " AND ".join(f"p.{key(column)} = t.{quote(column)}" for column in schema.pk)
    clock_is_noted = " AND ".join(f"c.{key(column)} = p.{key(column)}" for column in schema.pk)
    keys = ", ".join(f"p.{key(column)}" for column in schema.pk)
    records = ", ".join(f"c.{column}" for column in RECORD_COLUMNS)
    olds = "".join(f", p.{old(column)}" for column in schema.values)
    news = "".join(f", t.{quote(column)}" for column in schema.values)
    return (
        f"SELECT {keys}, p.existed, t.{quote(schema.pk[0])} IS NOT NULL, {records}{olds}{news} "
        f"FROM {notes} AS p LEFT JOIN {quote(schema.name)} AS t ON {row_is_noted} "
        f"LEFT JOIN {clock_table(schema.name)} AS c ON {clock_is_noted}"
    )


class Table:
    """The statements of one replicated table, made once."""

    def __init__(self, connection: sqlite3.Connection, schema: TableSchema) -> None:
        self.schema = schema
        self.key_width = len(schema.pk)
        self._connection = connection
        self._name = quote(schema.name)
        self._clock = clock_table(schema.name)
        self._pending = pending_table(schema.name)
        self._lookups: dict[int, str] = {}
        self._make_writes()
        self._make_reads()

    def _make_writes(self) -> None:
        schema = self.schema
        columns = ", ".join(map(quote, schema.stored))
        marks = ", ".join("?" * len(schema.stored))
        keys = ", ".join(map(quote, schema.pk))
        sets = ", ".join(f"{quote(column)} = excluded.{quote(column)}" for column in schema.values)
        action = f"UPDATE SET {sets}" if sets else "NOTHING"
        self._upsert = (
            f"INSERT INTO {self._name} ({columns}) VALUES ({marks}) ON CONFLICT ({keys}) DO {action}"
        )
        matches = " AND ".join(f"{quote(column)} = ?" for column in schema.pk)
        self._delete = f"DELETE FROM {self._name} WHERE {matches}"
        self._select = f"SELECT {columns} FROM {self._name} WHERE {matches}"
        fields = ", ".join((*map(key, schema.pk), *RECORD_COLUMNS))
        field_marks = ", ".join("?" * (len(schema.pk) + len(RECORD_COLUMNS)))
        self._put_clock = f"INSERT OR REPLACE INTO {self._clock} ({fields}) VALUES ({field_marks})"

    def _make_reads(self) -> None:
        schema = self.schema
        clock_is_row = " AND ".join(f"c.{key(column)} = t.{quote(column)}" for column in schema.pk)
        records = ", ".join(f"c.{column}" for column in RECORD_COLUMNS)
        self.has_pending = f"EXISTS (SELECT 1 FROM {self._pending})"
        self._read_pending = select_noted(schema, self._pending)
        # A row as of the last capture is what its note remembers, or what it is if there is no note. The plus
        # takes the key's type from the comparison: keys in notes have none, and their index needs it so.
        is_noted = " AND ".join(f"p.{key(column)} = +c.{key(column)}" for column in schema.pk)
        noted = f"p.{key(schema.pk[0])} IS NULL"
        captured = "".join(
            f", CASE WHEN {noted} THEN t.{quote(column)} ELSE p.{old(column)} END" for column in schema.values
        )
        self._clock_keys = ", ".join(f"c.{key(column)}" for column in schema.pk)
        self._read_states = (
            f"SELECT {self._clock_keys}, {records}, "
            f"CASE WHEN {noted} THEN t.{quote(schema.pk[0])} IS NOT NULL ELSE p.existed END{captured} "
            f"FROM {self._clock} AS c LEFT JOIN {self._name} AS t ON {clock_is_row} "
            f"LEFT JOIN {self._pending} AS p ON {is_noted}"
        )
        self._read_records = f"SELECT {self._clock_keys}, {records} FROM {self._clock} AS c"
        self._delete_clock = f"DELETE FROM {self._clock} WHERE " + " AND ".join(
            f"{key(column)} = ?" for column in schema.pk
        )
        row_keys = ", ".join(f"t.{quote(column)}" for column in schema.pk)
        self._strays = (
            f"SELECT {row_keys}, 0 FROM {self._name} AS t WHERE NOT EXISTS "
            f"(SELECT 1 FROM {self._clock} AS c WHERE {clock_is_row} AND c.dead IS NULL) AND NOT EXISTS "
            f"(SELECT 1 FROM {self._pending} AS p WHERE "
            + " AND ".join(f"p.{key(column)} = +t.{quote(column)}" for column in schema.pk)
            + ")"
        )
        self._row_keys = row_keys
        self._note_strays = (
            f"INSERT INTO {self._pending} ({', '.join(map(key, schema.pk))}, existed) {self._strays}"
        )

    def read_pending(self) -> list[Any]:
        """Return key, existed, exists, record fields, old values and new values of each noted row."""
        return fetch_all(self._connection, self._read_pending)

    def clear_pending(self) -> None:
        """Forget what was noted."""
        self._connection.execute(f"DELETE FROM {self._pending}")

    def read_row(self, pk: Key) -> Row | None:
        """Return a row in stored order, None when there is none."""
        rows = fetch_all(self._connection, self._select, pk)
        return rows[0] if rows else None

    def read_states(
        self,
        connection: sqlite3.Connection | None = None,
        lower: Key | None = None,
        upper: Key | None = None,
    ) -> Iterator[Any]:
        """Yield key, record fields, limbo, exists and values of each row as captured, by key.

        Keys are behind lower and up to upper. A page is read at a time, and nothing is held between pages.
        """
        yield from self._read_pages(self._read_states, connection or self._connection, lower, upper)

    def read_records(self, lower: Key | None, upper: Key | None) -> Iterator[Any]:
        """Yield key, record fields and limbo of all that has a record, by key, within bounds as above."""
        yield from self._read_pages(self._read_records, self._connection, lower, upper)

    def read_dead(self, lower: Key | None, records_max: int) -> tuple[list[Any], Key | None]:
        """Return the records (as above) of dead rows among the next so many, and the last key of these.

        The key is None when there is nothing behind them.
        """
        where, values = self._between(self._clock_keys, lower, None)
        last = fetch_all(
            self._connection,
            f"SELECT {self._clock_keys} FROM {self._clock} AS c WHERE {where} "
            f"ORDER BY {self._clock_keys} LIMIT 1 OFFSET {records_max - 1}",
            values,
        )
        upper = last[0] if last else None
        where, values = self._between(self._clock_keys, lower, upper)
        return fetch_all(self._connection, f"{self._read_records} WHERE {where} AND c.dead", values), upper

    def _read_pages(
        self, sql: str, source: sqlite3.Connection, lower: Key | None, upper: Key | None
    ) -> Iterator[Any]:
        while True:
            where, values = self._between(self._clock_keys, lower, upper)
            page = fetch_all(
                source, f"{sql} WHERE {where} ORDER BY {self._clock_keys} LIMIT {PAGE_ROWS}", values
            )
            yield from page
            if len(page) < PAGE_ROWS:
                return
            lower = page[-1][: self.key_width]

    def _between(self, keys: str, lower: Key | None, upper: Key | None) -> tuple[str, Key]:
        """Return what holds of keys behind lower and up to upper, and what to bind."""
        marks = ", ".join("?" * self.key_width)
        given = ((">", lower), ("<=", upper))
        bounds = [f"({keys}) {sign} ({marks})" for sign, at in given if at is not None]
        return " AND ".join(bounds) or "1", (lower or ()) + (upper or ())

    def has_strays(self, lower: Key | None, upper: Key | None) -> bool:
        """True when there are rows without a live record that no trigger has noted."""
        where, values = self._between(self._row_keys, lower, upper)
        return bool(fetch_all(self._connection, f"SELECT EXISTS ({self._strays} AND {where})", values)[0][0])

    def note_strays(self, lower: Key | None, upper: Key | None) -> None:
        """Note such rows as a trigger would have."""
        where, values = self._between(self._row_keys, lower, upper)
        self._connection.execute(f"{self._note_strays} AND {where}", values)

    def lookup(self, keys: Sequence[Key]) -> Iterator[Any]:
        """Yield key, record fields and limbo of those keys that have a record."""
        start = 0
        for size in LOOKUP_SIZES:
            while len(keys) - start >= size:
                part = keys[start : start + size]
                start += size
                values = [value for pk in part for value in pk]
                yield from fetch_all(self._connection, self._lookup_sql(size), values)

    def _lookup_sql(self, size: int) -> str:
        sql = self._lookups.get(size)
        if sql is None:
            schema = self.schema
            fields = ", ".join(f"c.{field}" for field in (*map(key, schema.pk), *RECORD_COLUMNS))
            marks = f"({', '.join('?' * self.key_width)})"
            wanted = [f"w{index}" for index in range(self.key_width)]
            matches = " AND ".join(
                f"c.{key(column)} = w.{name}" for column, name in zip(schema.pk, wanted, strict=True)
            )
            sql = (
                f"WITH w ({', '.join(wanted)}) AS (VALUES {', '.join([marks] * size)}) "
                f"SELECT {fields} FROM w CROSS JOIN {self._clock} AS c ON {matches}"
            )
            self._lookups[size] = sql
        return sql

    def write_rows(self, rows: Sequence[Row]) -> None:
        """Insert or overwrite rows given in stored order."""
        if rows:
            self._connection.executemany(self._upsert, rows)

    def delete_rows(self, keys: Sequence[Key]) -> None:
        """Delete rows by key."""
        if keys:
            self._connection.executemany(self._delete, keys)

    def write_records(self, records: Sequence[tuple[Any, ...]]) -> None:
        """Put clock records, given as key, record fields and limbo."""
        if records:
            self._connection.executemany(self._put_clock, records)

    def delete_records(self, keys: Sequence[Key]) -> None:
        """Drop clock records by key."""
        if keys:
            self._connection.executemany(self._delete_clock, keys)
