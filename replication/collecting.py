"""Decide when what is kept of deleted rows, and of changesets that could not be applied, can be forgotten.

A tombstone is there for those who do not know of the deletion yet. Once every member has seen all that was
written up to a time, the tombstones up to it can go. A replica that was away meanwhile does not count as a
member: it takes a snapshot when it is back, and drops what the sender has forgotten (see adopting.py). When
every member has passed a time is found out elsewhere.

Invariant: a tombstone goes only when nothing that could bring its row back is still to come, from peers or
out of what is parked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from .core.clock import NEVER, Hlc, hlc_from_ms
from .core.codec import CodecError, decode_changeset
from .snapshot import compute_latest

if TYPE_CHECKING:
    from .core.change import Key, RowChange
    from .store import Store
    from .tables import Table

# As much as a person can look through by hand would do; this is for a burst while a schema is on its way.
PARKED_BYTES_MAX: Final = 64 * 1024 * 1024


class Collector:
    """Goes through the tables of a replica again and again, a part at a time."""

    def __init__(self, store: Store, *, keep_ms: int, parked_bytes_max: int = PARKED_BYTES_MAX) -> None:
        self._store = store
        self._keep_ms = keep_ms
        self._parked_bytes_max = parked_bytes_max
        self._waiting: list[str] = []  # tables still to go through in this pass
        self._after: Key | None = None  # up to where the first of these is done
        self._bound = NEVER  # of this pass: nothing that was parked before it stays behind

    def run(self, stable_hlc: Hlc, wall_ms: int, limit: int) -> int:
        """Look at so many records, from where the last call ended; return how many tombstones were dropped.

        stable_hlc is a time up to which every member has seen all changesets of all members. What is younger
        than keep_ms stays in any case. Each pass begins with what is parked.
        """
        store = self._store
        if not self._waiting:
            self._waiting = list(store.tables)
            self._after = None
            self._bound = min(stable_hlc, hlc_from_ms(max(0, wall_ms - self._keep_ms)))
            self._drop_parked()
        dropped = 0
        while self._waiting and limit > 0:
            table = store.tables.get(self._waiting[0])
            if table is not None:
                looked_at, gone = self._drop_tombstones(table, limit)
                limit -= looked_at
                dropped += gone
            if table is None or self._after is None:
                self._waiting.pop(0)
                self._after = None
        return dropped

    def _drop_tombstones(self, table: Table, limit: int) -> tuple[int, int]:
        """Look at the next records of a table; return how many there can have been, and were dropped."""
        store = self._store
        dead, self._after = table.read_dead(self._after, limit)
        width = table.key_width
        gone: list[Key] = []
        latest = Hlc(0)
        for found in dead:
            # Values written after the deletion, by who did not know of it, wait for an insert that lies
            # between. They may go too: once all clocks are stable, no such insert can come.
            at = compute_latest(store.sites.decode(found[width:-1]))
            if at <= self._bound:
                gone.append(found[:width])
                latest = max(latest, at)

        def work() -> list[RowChange]:
            table.delete_records(gone)
            store.ledger.note_collected(latest)
            return []

        if gone:
            store.change(work)
        return limit if self._after is not None else max(1, len(dead)), len(gone)

    def _drop_parked(self) -> None:
        """Give up parked changesets that all have passed, or that are too much.

        So none is left that is older than a tombstone that goes, and could bring its row back. One that
        cannot be read has no time: it goes when there is too much, or by hand.
        """
        store = self._store
        kept_bytes = 0
        for entry in reversed(store.parked()):
            hlc = read_hlc(entry.payload)
            is_passed = hlc is not None and hlc <= self._bound
            kept_bytes += 0 if is_passed else len(entry.payload)
            if is_passed or kept_bytes > self._parked_bytes_max:
                store.drop_parked(entry.site, entry.version)
                store.dropped_parked += 1


def read_hlc(payload: bytes) -> Hlc | None:
    """Return the time of a changeset; None when it cannot be read."""
    try:
        return decode_changeset(payload).hlc
    except CodecError:
        return None
