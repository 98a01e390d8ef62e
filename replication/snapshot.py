"""Write all that a replica knows as a stream of chunks, and read such a stream.

For a peer that is new or was away for longer than the log reaches. A snapshot is states of rows (live and
deleted, with their clocks), the changesets that are parked, and which versions all that stands for. It is
merged like anything else, so it is safe on a replica that has data. This module does not know how it travels.

Invariant: what a snapshot says was seen is in it, either in rows or as parked changesets.
"""

from __future__ import annotations

import hashlib
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from .core.change import EncodedChangeset
from .core.clock import HLC_MAX, NEVER, Clock, Hlc, SiteId
from .core.codec import (
    CodecError,
    SiteTable,
    check_hlc,
    check_names,
    check_rows,
    check_tuples,
    decode_clock,
    decode_sites,
    pack,
    unpack,
    unpack_foreign,
)
from .core.merge import NO_CELLS, Record
from .core.versions import VersionRanges
from .core.wire import VERSION_MAX
from .schema import MergeMode
from .sidetables import read_collected
from .tables import read_lossy

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from .core.change import Key, Row
    from .tables import Sites, Table

SNAPSHOT_FORMAT: Final = 1
DIGEST_BYTES: Final = 16
# Bytes of a row, and of a value, beside text and blobs: guesses from above, for the size of chunks.
_ROW_OVERHEAD_BYTES: Final = 96
_VALUE_OVERHEAD_BYTES: Final = 9
# A row has one map, and with its clock and key is longer than this: so maps cost a multiple of the bytes.
_ROW_BYTES_MIN: Final = 8


class RowState(NamedTuple):
    """One row as a replica knows it; values are in stored order, without the key, None where none matter."""

    pk: Key
    record: Record
    values: Row | None


class TableStates(NamedTuple):
    """States of rows of one table."""

    table: str
    by_column: bool
    key_columns: tuple[str, ...]
    columns: tuple[str, ...]
    states: list[RowState]


class Head(NamedTuple):
    """What the whole snapshot stands for; it lacks tombstones of what was deleted up to collected."""

    seen: dict[SiteId, VersionRanges]
    collected: Hlc


Part = Head | TableStates | list[EncodedChangeset]


def read_states(
    table: Table,
    sites: Sites,
    connection: sqlite3.Connection | None = None,
    lower: Key | None = None,
    upper: Key | None = None,
) -> Iterator[RowState]:
    """Yield the states of a table's rows, by key: those behind lower, up to upper."""
    width = table.key_width
    fields: tuple[Any, ...] = ()
    for found in table.read_states(connection, lower, upper):
        if found[width : width + 6] != fields:  # rows that were written together have equal records
            fields = found[width : width + 6]
            record = sites.decode(fields)
        limbo, exists, values = found[width + 6], found[width + 7], found[width + 8 :]
        if record.dead:
            values = None
            if limbo is not None:
                kept = unpack(limbo)
                defaults = table.schema.defaults
                values = tuple(kept.get(column, defaults[column]) for column in table.schema.values)
        elif not exists:
            continue  # taken away without a trigger; there is nothing to tell of it
        yield RowState(found[:width], record, values)


def compute_digest(table: Table, sites: Sites) -> bytes:
    """Return a hash of all live rows of a table and their clocks, equal on replicas that know the same."""
    digest = Digest(table)
    for state in read_states(table, sites):
        digest.add(state)
    return digest.read()


class Digest:
    """A hash of live rows and their clocks, in the order of their keys.

    Dead rows have no part in it: replicas forget them at different times. One that is dead here and alive
    there shows all the same. Nor have columns at the end that are at their default: a replica whose schema
    does not have them yet knows as much.
    """

    __slots__ = ("_defaults", "_hash", "rows")

    def __init__(self, table: Table) -> None:
        self.rows = 0  # live rows that were added
        self._hash = hashlib.blake2b(digest_size=DIGEST_BYTES)
        self._defaults = [table.schema.defaults[column] for column in table.schema.values]

    def add(self, state: RowState) -> None:
        """Add the next row."""
        pk, (life, dead, base, cells), values = state
        if dead or values is None:
            return
        width = len(values)
        while width and _is_same(values[width - 1], self._defaults[width - 1]):
            width -= 1
        if width < len(values):
            values = values[:width]
        self.rows += 1
        if cells:
            self._hash.update(pack((pk, life, base, values, sorted(cells.items()))))
        else:
            self._hash.update(pack((pk, life, base, values)))

    def read(self) -> bytes:
        """Return the hash of what was added."""
        return self._hash.digest()


def _is_same(value: object, other: object) -> bool:
    return value == other and type(value) is type(other)


def stream_snapshot(
    path: str,
    tables: Iterable[Table],
    sites: Sites,
    seen: Mapping[SiteId, VersionRanges],
    max_chunk_bytes: int,
) -> Iterator[bytes]:
    """Return the chunks of a file as it is now, read as they are asked for on a connection of its own."""
    reader = sqlite3.connect(
        f"{Path(path).absolute().as_uri()}?mode=ro", uri=True, isolation_level=None, check_same_thread=False
    )
    reader.text_factory = read_lossy  # as in a capture: one text that is not UTF-8 must not stop it all
    reader.execute("BEGIN")
    reader.execute("SELECT seq FROM _repl_state").fetchone()  # the first read fixes the view
    return _stream(reader, write_snapshot(reader, tables, sites, seen, max_chunk_bytes))


def _stream(reader: sqlite3.Connection, chunks: Iterator[bytes]) -> Iterator[bytes]:
    try:
        yield from chunks
    finally:
        reader.close()


def write_snapshot(
    connection: sqlite3.Connection,
    tables: Iterable[Table],
    sites: Sites,
    seen: Mapping[SiteId, VersionRanges],
    max_chunk_bytes: int,
) -> Iterator[bytes]:
    """Yield chunks of about the size, read in the transaction that the connection is in."""
    count = 1
    ranges = [(site, found.encode()) for site, found in seen.items()]
    yield pack((SNAPSHOT_FORMAT, "head", ranges, read_collected(connection)))
    for table in tables:
        for chunk in pack_states(table, read_states(table, sites, connection), max_chunk_bytes):
            yield chunk
            count += 1
    for site, version, payload in connection.execute("SELECT site, version, payload FROM _repl_parked"):
        yield pack((SNAPSHOT_FORMAT, "parked", [(sites.get_site(site), version, payload)]))
        count += 1
    yield pack((SNAPSHOT_FORMAT, "end", count))


def pack_states(table: Table, states: Iterable[RowState], max_chunk_bytes: int) -> Iterator[bytes]:
    """Yield chunks of about the size, at least one: a table that is empty is told of too."""
    batch: list[RowState] = []
    size = 0
    for state in states:
        if size >= max_chunk_bytes:
            yield _pack_states(table, batch)
            batch = []
            size = 0
        batch.append(state)
        size += _estimate_bytes(state)
    yield _pack_states(table, batch)


def _estimate_bytes(state: RowState) -> int:
    size = _ROW_OVERHEAD_BYTES + _ROW_OVERHEAD_BYTES * len(state.record.cells)
    for value in state.pk + (state.values or ()):
        size += _VALUE_OVERHEAD_BYTES + (len(value) if isinstance(value, (str, bytes)) else 0)
    return size


def _pack_states(table: Table, states: list[RowState]) -> bytes:
    schema = table.schema
    sites = SiteTable()
    rows = []
    for pk, (life, dead, base, cells), values in states:
        packed_base = None if base is None else sites.encode(base)
        packed_cells = {name: sites.encode(clock) for name, clock in cells.items()}
        rows.append((pk, sites.encode(life), dead, packed_base, packed_cells, values))
    by_column = schema.mode is MergeMode.COLUMN
    return pack(
        (SNAPSHOT_FORMAT, "rows", schema.name, by_column, schema.pk, schema.values, sites.sites, rows)
    )


def read_snapshot(chunks: Iterable[bytes]) -> Iterator[Part]:
    """Yield what the chunks hold, the head first; raise CodecError for what is malformed, late or missing."""
    is_complete = False
    for count, chunk in enumerate(chunks):
        fields = unpack_foreign(chunk, maps_max=len(chunk) // _ROW_BYTES_MIN)
        if is_complete or not isinstance(fields, tuple) or len(fields) < 2 or fields[0] != SNAPSHOT_FORMAT:
            raise CodecError("not a chunk of a snapshot")
        kind = fields[1]
        if (kind == "head") is not (count == 0):
            raise CodecError("a snapshot begins with its head, once")
        try:
            if kind == "end":
                is_complete = fields[2] == count
            else:
                yield _decode_part(kind, fields[2:])
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            raise CodecError(f"malformed chunk: {error}") from error
    if not is_complete:
        raise CodecError("the snapshot is not complete")


def read_states_chunk(chunk: bytes) -> TableStates:
    """Return the states of one chunk of `pack_states`; raise CodecError for anything else."""
    fields = unpack_foreign(chunk, maps_max=len(chunk) // _ROW_BYTES_MIN)
    try:
        if fields[:2] != (SNAPSHOT_FORMAT, "rows"):
            raise CodecError("not a chunk of rows")
        part = _decode_part("rows", fields[2:])
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise CodecError(f"malformed chunk: {error}") from error
    assert isinstance(part, TableStates)  # the kind was asked for
    return part


def _decode_part(kind: object, fields: tuple[Any, ...]) -> Part:
    if kind == "head":
        pairs, collected = fields
        decode_sites(site for site, _ in pairs)
        seen = {SiteId(site): _decode_ranges(ranges) for site, ranges in pairs}
        return Head(seen, check_hlc(collected) if collected else NEVER)
    if kind == "parked":
        (entries,) = fields
        for site, version, payload in entries:
            decode_sites((site,))
            if type(version) is not int or type(payload) is not bytes or not 0 < version < VERSION_MAX:
                raise CodecError("not a parked changeset")
        return [EncodedChangeset(SiteId(site), version, payload) for site, version, payload in entries]
    if kind != "rows":
        raise CodecError("unknown chunk")
    table, by_column, key_columns, columns, sites, rows = fields
    check_tuples(key_columns, columns, rows, *rows)
    check_names(table, *key_columns, *columns)
    known = decode_sites(sites)
    check_rows([row[0] for row in rows], len(key_columns))
    check_rows([row[5] for row in rows if row[5] is not None], len(columns))
    states: list[RowState] = []
    fields_before: tuple[Any, ...] = ()
    for row in rows:
        if row[1:5] != fields_before:  # rows that were written together share a record
            fields_before, record = row[1:5], _decode_record(row, known)
        states.append(RowState(row[0], record, row[5]))
    if any(values is None and not record.dead for _, record, values in states):
        raise CodecError("a live row without values")
    return TableStates(table, bool(by_column), key_columns, columns, states)


def _decode_ranges(pairs: Sequence[tuple[int, int]]) -> VersionRanges:
    """Return ranges that are in order; others would cost the square of their number."""
    last = -1
    for first, upto in pairs:
        if type(first) is not int or type(upto) is not int or not last + 1 < first <= upto < VERSION_MAX:
            raise CodecError("not ranges of versions in order")
        last = upto
    return VersionRanges.decode(pairs)


def _decode_record(row: tuple[Any, ...], sites: Sequence[SiteId]) -> Record:
    _, life, dead, base, cells, _ = row
    limit = Hlc(HLC_MAX)
    decoded: Mapping[str, Clock] = NO_CELLS
    if cells:
        check_names(*cells)
        decoded = {name: decode_clock(pair, sites, limit) for name, pair in cells.items()}
    return Record(
        decode_clock(life, sites, limit),
        bool(dead),
        None if base is None else decode_clock(base, sites, limit),
        decoded,
    )


def compute_latest(record: Record) -> Hlc:
    """Return the largest time in a record."""
    latest = record.life.hlc if record.base is None else max(record.life.hlc, record.base.hlc)
    return max([latest, *(clock.hlc for clock in record.cells.values())])
