"""Take in a whole replica: a snapshot that is merged within a transaction of the store.

Decides which rows that are here go with it: what the sender has seen and does not have was deleted there, and
the deletion forgotten. Does not know how the chunks came.

Invariant: a row goes only when the sender has seen all that was written to it here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from .collecting import read_hlc
from .core.change import RowChange
from .core.clock import HLC_MAX, NEVER
from .core.versions import VersionRanges
from .merging import TableMerge, offer_states
from .snapshot import Head, TableStates, compute_latest, read_snapshot

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .core.change import EncodedChangeset, Key
    from .core.clock import Hlc, SiteId
    from .core.merge import Record
    from .store import Store
    from .tables import Table

# Of a snapshot that changes more rows than that, only the tables are named: memory stays bounded, and whoever
# follows them is quicker to read them again.
NAMED_ROWS_MAX: Final = 10_000


def adopt_snapshot(
    store: Store, chunks: Iterable[bytes], wall_ms: int
) -> tuple[list[RowChange], dict[str, None]]:
    """Merge a snapshot, then count what it stands for as seen; return changed rows, and tables to read again.

    Raises CodecError when it is malformed, incomplete, needs another schema or comes from too far in the
    future, and what SQLite raises: the transaction is to be undone then.
    """
    rows: list[RowChange] = []
    reload: dict[str, None] = {}
    parts = read_snapshot(chunks)
    head = next(parts)
    assert isinstance(head, Head)  # a snapshot begins with it
    store.applier.check_ahead(head.collected, wall_ms)
    replacement = _Replacement(store, head)
    for part in parts:
        if isinstance(part, TableStates):
            rows += _adopt_states(store, replacement, part, wall_ms)
        elif not isinstance(part, Head):
            rows += _adopt_parked(store, part, wall_ms)
        if len(rows) > NAMED_ROWS_MAX:
            reload.update(dict.fromkeys(change.table for change in rows))
            rows.clear()
    with store.applier.unnoticed():
        rows += replacement.finish()
    store.ledger.adopt(head.seen, store.log)
    return rows, reload


def _adopt_states(
    store: Store, replacement: _Replacement, part: TableStates, wall_ms: int
) -> list[RowChange]:
    admitted = store.applier.admit_states(part, wall_ms)
    if admitted is None:
        return []
    table, states = admitted
    with store.applier.unnoticed():
        gone = replacement.drop_unmentioned(table, states)
        merge = TableMerge(table, store.sites)
        offer_states(merge, table, states)
        merge.flush()
    return gone + merge.rows


def _adopt_parked(store: Store, changesets: list[EncodedChangeset], wall_ms: int) -> list[RowChange]:
    """Take over what the sender could not apply: perhaps we can, or we park it too."""
    fresh = [item for item in changesets if not store.ledger.has(item.site, item.version)]
    rows, parked = store.applier.apply(fresh, wall_ms)
    store.parking.put(parked)
    return rows


class _Replacement:
    """Drops what the sender of a snapshot has seen and does not have: it was deleted, and that forgotten.

    Parts must be told of in the order in which they come; keys grow from part to part of a table. Does
    nothing when nothing was forgotten.
    """

    def __init__(self, store: Store, head: Head) -> None:
        self._store = store
        self._before = head.collected
        self._reached: dict[str, Key | None] = {}
        # By site, the time of the first changeset that is here and that the sender has not seen.
        self._unknown_from: dict[SiteId, Hlc] = {}
        if not self._before:
            return
        for site, ranges in store.ledger.seen.items():
            missing = head.seen.get(site, VersionRanges()).missing(ranges.last)
            if missing:
                logged = store.log.read(site, missing[0][0], missing[0][0], 1)
                hlc = read_hlc(logged[0].payload) if logged else None
                self._unknown_from[site] = hlc or NEVER

    def drop_unmentioned(self, table: Table, part: TableStates) -> list[RowChange]:
        """Drop rows between the keys of a part that are not in it; return what went."""
        name = table.schema.name
        lower = self._reached.setdefault(name, None)
        if not self._before or not part.states:
            return []
        self._reached[name] = upper = part.states[-1].pk
        return self._drop(table, lower, upper, {state.pk for state in part.states})

    def finish(self) -> list[RowChange]:
        """Drop rows behind the last part of each table; return what went."""
        if not self._before:
            return []
        rows: list[RowChange] = []
        for name, reached in self._reached.items():
            rows += self._drop(self._store.tables[name], reached, None, set())
        self._store.ledger.note_collected(self._before)
        return rows

    def _drop(
        self, table: Table, lower: Key | None, upper: Key | None, mentioned: set[Key]
    ) -> list[RowChange]:
        width = table.key_width
        gone: list[Key] = []
        for found in table.read_records(lower, upper):
            pk = found[:width]
            if pk not in mentioned and self._is_forgotten(self._store.sites.decode(found[width:-1])):
                gone.append(pk)
        table.delete_rows(gone)
        table.delete_records(gone)
        return [RowChange(table.schema.name, pk, None) for pk in gone]

    def _is_forgotten(self, record: Record) -> bool:
        """True when the sender must have known of a row, and may have forgotten its deletion."""
        if record.dead or compute_latest(record) > self._before:
            return False
        clocks = (record.life, *record.cells.values()) + (() if record.base is None else (record.base,))
        return not any(clock.hlc >= self._unknown_from.get(clock.site, HLC_MAX) for clock in clocks)
