"""Decide how a changeset is laid out in bytes.

MessagePack keeps what SQLite distinguishes: 64-bit integers, reals, text, blobs and NULL. Rows are grouped by
table and by the columns that they carry, so that a bulk change names its columns once and a receiver can
hand its rows to SQLite as they are. The first field is the format's number. This module does not know
the receiver's schema.

Invariant: what decode returns is well formed and its types are SQLite's; all else is a CodecError.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgpack

from .change import Changeset, TableChange, split_changes
from .clock import HLC_MAX, SITE_BYTES, Clock, Hlc, SiteId

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .change import Key, Row

FORMAT: Final = 1
SQL_TYPES: Final = frozenset((int, float, str, bytes, type(None)))
INT64_MIN: Final = -(2**63)
INT64_MAX: Final = 2**63 - 1


class CodecError(ValueError):
    """A payload that is not a changeset, or one of a format that this version does not read."""


class SiteTable:
    """The sites that one message names, so that each of its clocks names its site by a small number."""

    __slots__ = ("_index", "sites")

    def __init__(self) -> None:
        self.sites: list[SiteId] = []
        self._index: dict[SiteId, int] = {}

    def encode(self, clock: Clock) -> tuple[int, int]:
        """Return a clock with its site as a number."""
        index = self._index.get(clock.site)
        if index is None:
            index = self._index[clock.site] = len(self.sites)
            self.sites.append(clock.site)
        return clock.hlc, index


def encode_changeset(changeset: Changeset) -> bytes:
    """Return the payload of a changeset."""
    sites = SiteTable()
    tables = []
    for change in changeset.changes:
        # Rows that this very changeset created are the usual case: None then stands for the whole list.
        created = None
        if any(change.created):
            created = [None if clock is None else sites.encode(clock) for clock in change.created]
        tables.append(
            (
                change.table,
                change.by_column,
                change.key_columns,
                change.columns,
                change.rows,
                created,
                change.deleted,
            )
        )
    return pack((FORMAT, changeset.hlc, sites.sites, tables))


def encode_bounded(changeset: Changeset, bytes_max: int) -> list[bytes]:
    """Return the payloads of a changeset: one, or several where one would be larger than that.

    A row is never divided, so a payload with a single row may be larger.
    """
    payload = encode_changeset(changeset)
    if (
        len(payload) <= bytes_max
        or sum(len(change.rows) + len(change.deleted) for change in changeset.changes) == 1
    ):
        return [payload]
    return [
        part
        for half in split_changes(changeset.changes)
        for part in encode_bounded(Changeset(changeset.hlc, half), bytes_max)
    ]


def decode_changeset(payload: bytes) -> Changeset:
    """Return the changeset of a payload; raise CodecError for anything that is not one."""
    fields = unpack_foreign(payload, maps_max=0)
    if not isinstance(fields, tuple) or not fields or type(fields[0]) is not int:
        raise CodecError("not a changeset")
    if fields[0] != FORMAT:
        raise CodecError(f"format {fields[0]} is not known here")
    try:
        _, hlc, sites, tables = fields
        known = decode_sites(sites)
        limit = check_hlc(hlc)
        check_tuples(tables)
        return Changeset(limit, tuple(_decode_table(table, known, limit) for table in tables))
    except (TypeError, ValueError, IndexError) as error:
        raise CodecError(f"malformed changeset: {error}") from error


def _decode_table(fields: Any, sites: Sequence[SiteId], limit: Hlc) -> TableChange:
    table, by_column, key_columns, columns, rows, created, deleted = fields
    check_tuples(key_columns, columns, rows, deleted, () if created is None else created)
    check_names(table, *key_columns, *columns)
    # Names are cut: they are a stranger's, and end up in a log.
    if rows and not set(key_columns) <= set(columns):
        raise CodecError(f"rows of {table[:64]!r} lack their key")
    if any(len(set(names)) != len(names) for names in (key_columns, columns)) or not key_columns:
        raise CodecError(f"columns of {table[:64]!r} are not a set with a key")
    check_rows(rows, len(columns))
    check_rows(deleted, len(key_columns))
    if created is None:
        clocks: tuple[Clock | None, ...] = (None,) * len(rows)
    else:
        clocks = tuple(None if pair is None else decode_clock(pair, sites, limit) for pair in created)
        if len(clocks) != len(rows):
            raise CodecError(f"{table[:64]!r} has {len(rows)} rows but {len(clocks)} clocks")
    return TableChange(table, bool(by_column), key_columns, columns, rows, clocks, deleted)


def check_tuples(*values: object) -> None:
    """Raise CodecError unless all are sequences; a text would iterate as well, over its letters."""
    for value in values:
        if type(value) is not tuple:
            raise CodecError("not a sequence")


def check_names(*names: object) -> None:
    """Raise CodecError unless all can name a table or a column."""
    for name in names:
        if type(name) is not str:
            raise CodecError("a name is not text")


def decode_sites(sites: Any) -> list[SiteId]:
    """Return a message's table of sites."""
    for site in sites:
        if type(site) is not bytes or len(site) != SITE_BYTES:
            raise CodecError("a site is not 16 bytes")
    return list(sites)


def check_hlc(hlc: Any) -> Hlc:
    """Return a hybrid time that SQLite can store."""
    if type(hlc) is not int or not 0 < hlc <= HLC_MAX:
        raise CodecError("not a time")
    return Hlc(hlc)


def decode_clock(pair: Any, sites: Sequence[SiteId], limit: Hlc) -> Clock:
    """Return a clock; refuse one later than the message that tells of it, which nobody could have known."""
    hlc, index = pair
    if check_hlc(hlc) > limit:
        raise CodecError("a clock is later than its changeset")
    if type(index) is not int or index < 0:
        raise CodecError("not a site's number")
    return Clock(Hlc(hlc), sites[index])


def check_rows(rows: Sequence[Row] | Sequence[Key], width: int) -> None:
    """Raise CodecError unless each row has the width and holds values that SQLite can hold."""
    types: set[type] = set()
    for row in rows:
        if type(row) is not tuple or len(row) != width:
            raise CodecError(f"a row has not {width} values")
        types.update(map(type, row))
    if not types <= SQL_TYPES:
        raise CodecError("a value has a type that SQLite has not")
    if int in types and any(
        type(value) is int and not INT64_MIN <= value <= INT64_MAX for row in rows for value in row
    ):
        raise CodecError("an integer is beyond 64 bits")


def pack(value: object) -> bytes:
    """Return MessagePack bytes."""
    return msgpack.packb(value, use_bin_type=True)


def unpack(data: bytes) -> Any:
    """Return what our own MessagePack bytes hold, sequences as tuples; raise CodecError for anything else."""
    try:
        return msgpack.unpackb(data, use_list=False, raw=False, strict_map_key=True)
    except (ValueError, RecursionError, msgpack.UnpackException) as error:
        raise CodecError(f"not MessagePack: {error}") from error


def unpack_foreign(data: bytes, *, maps_max: int) -> Any:
    """Return what MessagePack bytes of anyone hold, in memory bounded by their size; raise CodecError.

    Keys of maps are text or bytes, none of them twice.
    """
    maps = 0

    def read_map(pairs: list[tuple[str | bytes, Any]]) -> dict[str | bytes, Any]:
        nonlocal maps
        maps += 1
        found = dict(pairs)
        # An empty map is one byte here and 64 in memory.
        if maps > maps_max or len(found) != len(pairs):
            raise ValueError("too many maps, or a key twice")
        return found

    try:
        # A sequence is allocated at the length that it declares, and they nest: 1 kB could ask for 30 MB.
        # Skipping allocates nothing, fails where there is less than was declared, and takes a microsecond.
        lengths = msgpack.Unpacker(max_buffer_size=len(data), strict_map_key=True)
        lengths.feed(data)
        lengths.skip()
        return msgpack.unpackb(
            data,
            use_list=False,
            raw=False,
            strict_map_key=True,
            max_ext_len=0,
            object_pairs_hook=read_map,
        )
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise CodecError(f"not MessagePack: {error}") from error
