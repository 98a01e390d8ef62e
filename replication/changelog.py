"""Keep changesets for peers that lack them, and decide which to drop when they take too much room.

All sites may keep equally many bytes, and quiet ones keep all that they have: the busiest are trimmed first.
The newest changeset of a site stays, whatever its size, for peers that its broadcast has not reached. This
module does not know rows, and runs within transactions of its caller, who tells how they ended.

Invariant: what is kept of a site is all that was seen of it from some version on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from .core.change import EncodedChangeset

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable, Iterator, Sequence

    from .core.clock import SiteId
    from .tables import Sites

# The log may take this part of what all else in the file takes, which is about a quarter of the bare tables.
# Beyond that it costs more than the snapshots that it saves.
SHARE: Final = 1 / 5
VERSION_BITS: Final = 40
_VERSION_MAX: Final = (1 << VERSION_BITS) - 1
# What an entry takes of pages of 4 KiB: it lies whole in one, beside as many as there is room for, or is too
# large and leaves half of its last one empty. A few bytes are its key. The same as compute_cost.
_COST: Final = (
    "CASE WHEN length(payload) > 4060 THEN length(payload) + 2048 "
    "ELSE 4096 / (4096 / (length(payload) + 16)) END"
)


class _Kept(NamedTuple):
    """What is kept of one site."""

    entries: int
    size_bytes: int


_NOTHING: Final = _Kept(0, 0)


class ChangeLog:
    """The log of one replica."""

    def __init__(self, connection: sqlite3.Connection, sites: Sites) -> None:
        self._connection = connection
        self._sites = sites
        # The sizes of payloads are in the leaves: reading them does not read the payloads of large entries.
        rows = connection.execute(
            f"SELECT id >> {VERSION_BITS}, count(*), sum({_COST}) FROM _repl_log GROUP BY 1"  # noqa: S608  constants
        )
        self._kept = {ordinal: _Kept(entries, size) for ordinal, entries, size in rows}
        self._before: dict[int, _Kept] = {}  # of sites that the transaction has changed; cleared at its end

    def commit(self) -> None:
        """Take note that the transaction has ended well."""
        self._before.clear()

    def rollback(self) -> None:
        """Go back to what was before the transaction."""
        self._kept.update(self._before)
        self._before.clear()

    @property
    def size_bytes(self) -> int:
        """About how much of the file the log takes."""
        return sum(kept.size_bytes for kept in self._kept.values())

    def append(self, changesets: Iterable[EncodedChangeset]) -> None:
        """Add changesets that were not seen before."""
        rows = []
        counts: dict[int, list[int]] = {}
        for encoded in changesets:
            ordinal = self._sites.get_ordinal(encoded.site)
            rows.append((ordinal << VERSION_BITS | encoded.version, encoded.payload))
            count = counts.get(ordinal)
            if count is None:
                count = counts[ordinal] = [0, 0]
            count[0] += 1
            count[1] += compute_cost(len(encoded.payload))
        for ordinal, (entries, size_bytes) in counts.items():
            self._count(ordinal, entries, size_bytes)
        self._connection.executemany("INSERT OR REPLACE INTO _repl_log VALUES (?, ?)", rows)

    def floor(self, site: SiteId) -> int | None:
        """Return the first version that is kept of a site."""
        ordinal = self._sites.find(site)
        if ordinal is None:
            return None
        found = self._connection.execute(
            "SELECT min(id) FROM _repl_log WHERE id BETWEEN ? AND ?", _id_range(ordinal, 1, _VERSION_MAX)
        ).fetchone()[0]
        return None if found is None else int(found) & _VERSION_MAX

    def read(self, site: SiteId, first: int, last: int, max_bytes: int) -> list[EncodedChangeset]:
        """Return entries in order of version, at least one if any, then up to the size."""
        ordinal = self._sites.find(site)
        if ordinal is None or first > last:
            return []
        entries: list[EncodedChangeset] = []
        size = 0
        cursor = self._connection.execute(
            "SELECT id, payload FROM _repl_log WHERE id BETWEEN ? AND ? ORDER BY id",
            _id_range(ordinal, first, last),
        )
        for number, payload in cursor:
            size += len(payload)
            if entries and size > max_bytes:
                break
            entries.append(EncodedChangeset(site, number & _VERSION_MAX, payload))
        cursor.close()
        return entries

    def find_large(self, site: SiteId, first: int, last: int, over_bytes: int) -> tuple[int, int] | None:
        """Return version and size of the first entry in a range whose payload is larger than that."""
        ordinal = self._sites.find(site)
        if ordinal is None or first > last:
            return None
        found = self._connection.execute(
            "SELECT id, length(payload) FROM _repl_log WHERE id BETWEEN ? AND ? AND length(payload) > ? "
            "ORDER BY id LIMIT 1",
            (*_id_range(ordinal, first, last), over_bytes),
        ).fetchone()
        return None if found is None else (found[0] & _VERSION_MAX, found[1])

    def read_parts(self, site: SiteId, version: int, offset: int, size: int) -> Iterator[bytes]:
        """Yield the payload of an entry, which must be there, from an offset on in parts of a size."""
        number, _ = _id_range(self._sites.get_ordinal(site), version, version)
        # One handle for all: where a part begins is found by walking the pages from the first on.
        with self._connection.blobopen("_repl_log", "payload", number, readonly=True) as blob:
            blob.seek(offset)
            while part := blob.read(size):
                yield part

    def drop(self, site: SiteId, last: int) -> int:
        """Drop the entries of a site up to a version; return how many."""
        ordinal = self._sites.find(site)
        if ordinal is None or last < 1:
            return 0
        return self._drop(ordinal, last)

    def compute_bytes_max(self, bytes_min: int) -> int:
        """Return how much the log may take of the file: its share, or bytes_min where that is more."""
        pages, free, page_bytes = (
            int(self._connection.execute(f"PRAGMA {name}").fetchone()[0])
            for name in ("page_count", "freelist_count", "page_size")
        )
        return max(bytes_min, int(SHARE * ((pages - free) * page_bytes - self.size_bytes)))

    def is_above(self, versions_max: int, bytes_max: int) -> bool:
        """True when there is something to trim."""
        return self.size_bytes > bytes_max or any(kept.entries > versions_max for kept in self._kept.values())

    def trim(self, versions_max: int, bytes_max: int) -> int:
        """Drop the oldest entries of sites that have too many, or more bytes than their share."""
        share = compute_share([kept.size_bytes for kept in self._kept.values()], bytes_max)
        return sum(
            self._trim(ordinal, kept, versions_max, share)
            for ordinal, kept in list(self._kept.items())
            if kept.entries > versions_max or kept.size_bytes > share
        )

    def _trim(self, ordinal: int, kept: _Kept, versions_max: int, bytes_max: int) -> int:
        entries, size = kept
        last = 0
        cursor = self._connection.execute(
            f"SELECT id, {_COST} FROM _repl_log WHERE id BETWEEN ? AND ? ORDER BY id",  # noqa: S608  constants
            _id_range(ordinal, 1, _VERSION_MAX),
        )
        for number, cost in cursor:
            if entries <= 1 or (entries <= versions_max and size <= bytes_max):
                break
            entries -= 1
            size -= cost
            last = number & _VERSION_MAX
        cursor.close()
        return self._drop(ordinal, last)

    def _drop(self, ordinal: int, last: int) -> int:
        span = _id_range(ordinal, 1, last)
        entries, size = self._connection.execute(
            f"SELECT count(*), sum({_COST}) FROM _repl_log WHERE id BETWEEN ? AND ?",  # noqa: S608  constants
            span,
        ).fetchone()
        if entries:
            self._connection.execute("DELETE FROM _repl_log WHERE id BETWEEN ? AND ?", span)
            self._count(ordinal, -entries, -size)
        return int(entries)

    def _count(self, ordinal: int, entries: int, size_bytes: int) -> None:
        kept = self._kept.get(ordinal, _NOTHING)
        self._before.setdefault(ordinal, kept)
        self._kept[ordinal] = _Kept(kept.entries + entries, kept.size_bytes + size_bytes)


def compute_cost(payload_bytes: int) -> int:
    """Return about how much of the file an entry takes; the same as what is computed in SQL."""
    return payload_bytes + 2048 if payload_bytes > 4060 else 4096 // (4096 // (payload_bytes + 16))


def compute_share(sizes: Sequence[int], bytes_max: int) -> int:
    """Return how many bytes each may keep, so that all together keep no more than bytes_max."""
    remaining = bytes_max
    for index, size in enumerate(sorted(sizes)):
        share = remaining // (len(sizes) - index)
        if size > share:
            return share
        remaining -= size
    return bytes_max


def _id_range(ordinal: int, first: int, last: int) -> tuple[int, int]:
    """Return the ids of versions of a site; one integer key, and the versions of one site lie together."""
    base = ordinal << VERSION_BITS
    return base | min(max(first, 0), _VERSION_MAX), base | min(last, _VERSION_MAX)
