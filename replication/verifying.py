"""Find where two replicas differ though they have seen the same, and heal it.

That happens only behind our back: somebody wrote past the triggers, or put parts of an old file back. One
replica asks for the digests of a peer, range by range of keys, compares them with its own, and takes the
peer's states where they differ. Each heals itself; the peer does so when it asks. Whether states travel, and
when to ask whom, is decided elsewhere; who wins by clocks, in core/merge.py.

What clocks cannot tell is decided here. A clock stands for a value that one site wrote, so:

- a record without its row stands for nothing: who has the row wins;
- equal clocks over different values: who wrote them is right. If that is neither of the two, it is left to a
  session with the writer, and where the writer is gone for good, the larger bytes win;
- a row without a record that no peer has one for is a write of ours, made past the triggers.

A record that is gone with its row looks like a row never heard of, and comes back.

Invariant: after a session in which each asked the other while nobody wrote, both have the same live rows and
clocks in the range, but for what is left to a writer.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from .core.change import RowChange
from .core.codec import CodecError, check_rows, pack, unpack
from .core.merge import Record, get_clock, join
from .errors import SnapshotError
from .merging import TableMerge, check_states, offer_states
from .schema import MergeMode
from .snapshot import Digest, RowState, TableStates, pack_states, read_states, read_states_chunk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from .core.change import Commit, Key, Row
    from .core.clock import SiteId
    from .store import Store
    from .tables import Table

# Live rows under one digest: 40 bytes per 256 rows when nothing differs, and some 50 KB for a row that does.
BLOCK_ROWS: Final = 256

Range = tuple[bytes, int, bytes]  # the upper key, live rows up to it, their digest
Bounds = tuple[bytes | None, bytes | None]  # keys behind the one, up to the other; None is no bound


@dataclass(slots=True)
class Healed:
    """What became of a peer's states: rows that changed, and those left to their writer, by writer.

    commits are to be published like any others; more than one where a row had to be told from others.
    """

    commits: list[Commit] = field(default_factory=list)
    rows: int = 0
    unresolved: Counter[SiteId] = field(default_factory=Counter)


def read_ranges(store: Store, table: str, after: bytes | None, rows_max: int) -> tuple[list[Range], bool]:
    """Return digests of the rows behind a key, of about so many records, and whether that is all there is.

    No ranges that are not all: the table is not known here, and nothing can be said of it. Raises CodecError
    for what is not a key.
    """
    known = store.tables.get(table)
    if known is None:
        return [], False
    ranges: list[Range] = []
    digest = Digest(known)
    latest: Key | None = None  # of the range that is not complete yet
    states = read_states(known, store.sites, None, _decode_key(known, after))
    for count, state in enumerate(states, 1):
        digest.add(state)
        latest = state.pk
        if count >= rows_max or digest.rows == BLOCK_ROWS:
            ranges.append((pack(latest), digest.rows, digest.read()))
            digest = Digest(known)
            latest = None
        if count >= rows_max:
            return ranges, False
    if latest is not None:
        ranges.append((pack(latest), digest.rows, digest.read()))
    return ranges, True


def find_differences(
    store: Store, table: str, after: bytes | None, ranges: Sequence[Range], is_last: bool, rows_max: int
) -> tuple[list[Bounds], bytes | None]:
    """Return the bounds (behind, up to) within which our rows differ from a peer's ranges, and their end.

    None is no bound: what the peer says to be all ends where keys end. Where we have more than rows_max rows
    in the peer's ranges, they are cut there, and the last one counts as different: a peer may have nothing.
    Raises CodecError.
    """
    known = store.tables.get(table)
    if known is None or not (ranges or is_last):
        return [], None
    theirs: list[tuple[bytes | None, bytes]] = [(upper, digest) for upper, _, digest in ranges]
    if is_last:
        theirs[-1:] = [(None, theirs[-1][1] if theirs else Digest(known).read())]
    differing: list[Bounds] = []
    lower = after
    for upper, digest in theirs:
        end = upper
        mine = Digest(known)
        bounds = _decode_key(known, lower), _decode_key(known, upper)
        for state in read_states(known, store.sites, None, *bounds):
            mine.add(state)
            rows_max -= 1
            if rows_max < 0:
                end = pack(state.pk)
                break
        if rows_max < 0 or mine.read() != digest:
            if differing and differing[-1][1] == lower:
                differing[-1] = (differing[-1][0], end)
            else:
                differing.append((lower, end))
        lower = end
        if rows_max < 0:
            break
    return differing, lower


def read_range_states(
    store: Store, table: str, lower: bytes | None, upper: bytes | None, max_chunk_bytes: int
) -> Iterator[bytes]:
    """Yield all that is known here of the rows behind lower, up to upper, as chunks for `heal`."""
    known = store.tables.get(table)
    if known is not None:
        states = read_states(known, store.sites, None, _decode_key(known, lower), _decode_key(known, upper))
        yield from pack_states(known, states, max_chunk_bytes)


def heal(
    store: Store, chunks: Iterable[bytes], wall_ms: int, peer: SiteId, is_gone: Callable[[SiteId], bool]
) -> Healed:
    """Merge a peer's states of rows that differ, and settle what clocks do not.

    is_gone says of a site that it will not be heard of again. Chunks are merged one by one: one that
    is lost is no matter. Raises SnapshotError for what is malformed, of another schema, or too far in the
    future, and what chunks and store raise, all of it only while nothing has been committed.
    """
    healed = Healed()
    try:
        for chunk in chunks:
            _heal_chunk(store, chunk, wall_ms, peer, is_gone, healed)
    except Exception:
        # A commit that is not told of is a gap in our own versions, on all nodes; what is left still differs
        # the next time.
        if not healed.commits:
            raise
    return healed


def _heal_chunk(
    store: Store,
    chunk: bytes,
    wall_ms: int,
    peer: SiteId,
    is_gone: Callable[[SiteId], bool],
    healed: Healed,
) -> None:
    try:
        admitted = store.applier.admit_states(read_states_chunk(chunk), wall_ms)
        if admitted is not None:
            check_states(*admitted)
    except CodecError as error:
        raise SnapshotError(str(error)) from error
    if admitted is not None:
        _heal_part(_Healing(store, admitted[0], peer, is_gone), admitted[1], wall_ms, healed)


def adopt_strays(
    store: Store, table: str, lower: bytes | None, upper: bytes | None, wall_ms: int
) -> Commit | None:
    """Make writes of ours of rows that have no record: call it when peers' states of the range are merged."""
    known = store.tables.get(table)
    if known is None or store.is_held:
        return None
    bounds = _decode_key(known, lower), _decode_key(known, upper)
    if not known.has_strays(*bounds):
        return None

    def work() -> list[RowChange]:
        known.note_strays(*bounds)
        return []

    store.change(work)
    return store.capture(wall_ms)


def _decode_key(table: Table, packed: bytes | None) -> Key | None:
    if packed is None:
        return None
    pk: Any = unpack(packed)
    check_rows([pk], table.key_width)
    key: Key = pk
    return key


def _heal_part(healing: _Healing, part: TableStates, wall_ms: int, healed: Healed) -> None:
    """Merge states; those that SQLite refuses are told from the others by halves, and left."""
    rows: list[RowChange] = []

    def work() -> list[RowChange]:
        rows.extend(healing.merge(part))
        return rows

    try:
        commit = healing.store.change(work, wall_ms)
    except SnapshotError:
        half = len(part.states) // 2
        for states in (part.states[:half], part.states[half:]) if half else ():
            _heal_part(healing, part._replace(states=states), wall_ms, healed)
        return
    if commit is not None:
        healed.commits.append(commit)
    healed.rows += len(rows)
    healed.unresolved += healing.unresolved


class _Healing:
    """Merges states of one table from one peer."""

    def __init__(self, store: Store, table: Table, peer: SiteId, is_gone: Callable[[SiteId], bool]) -> None:
        self.store = store
        self.unresolved: Counter[SiteId] = Counter()  # of the latest merge
        self._table = table
        self._peer = peer
        self._is_gone = is_gone

    def merge(self, part: TableStates) -> list[RowChange]:
        """Merge within a transaction; return the rows that changed."""
        table = self._table
        width = table.key_width
        self.unresolved = Counter()
        sites = self.store.sites
        records = {
            found[:width]: sites.decode(found[width:-1])
            for found in table.lookup([state.pk for state in part.states])
        }
        taken: list[RowState] = []
        void: list[Key] = []
        settled: list[Row] = []
        for state in part.states:
            mine = records.get(state.pk)
            row = table.read_row(state.pk)
            if mine is None or mine.dead:
                taken.append(state)
            elif row is None:
                if self._may_forget(mine, state.record):
                    void.append(state.pk)
                    taken.append(state)
            elif mine != state.record:
                taken.append(state)
            else:
                values = self._settle(mine, row[width:], state, part.columns)
                if values is not None:
                    settled.append(state.pk + values)
        table.delete_records(void)
        merge = TableMerge(table, sites)
        offer_states(merge, table, part._replace(states=taken))
        merge.flush()
        table.write_rows(settled)
        name, to_row = table.schema.name, table.schema.to_row
        return [*merge.rows, *(RowChange(name, row[:width], to_row(row)) for row in settled)]

    def _may_forget(self, mine: Record, theirs: Record) -> bool:
        """Say whether a record whose row is lost gives way: not to who knows less, if others know more."""
        if join(mine, theirs) == theirs:
            return True
        writer = (mine.base or mine.life).site
        if writer in (self.store.site, self._peer) or self._is_gone(writer):
            return True
        self.unresolved[writer] += 1
        return False

    def _settle(self, record: Record, mine: Row, state: RowState, columns: Sequence[str]) -> Row | None:
        """Return the values of a row where both have the same record; None when ours stand."""
        names = self._table.schema.values
        assert state.values is not None  # the record is of a live row
        theirs = dict(zip(columns, state.values, strict=True))
        shared = [index for index, name in enumerate(names) if name in theirs]
        is_by_row = self._table.schema.mode is MergeMode.ROW
        groups = [shared] if is_by_row else [[index] for index in shared]
        values: list[Any] | None = None
        for group in groups:
            old = tuple(mine[index] for index in group)
            new = tuple(theirs[names[index]] for index in group)
            # Packed, 1 and 1.0 differ as they do in the file.
            if pack(old) == pack(new):
                continue
            clock = (record.base if is_by_row else get_clock(record, names[group[0]])) or record.life
            if self._is_theirs(clock.site, old, new):
                values = list(mine) if values is None else values
                for index, value in zip(group, new, strict=True):
                    values[index] = value
        return None if values is None else tuple(values)

    def _is_theirs(self, writer: SiteId, old: Row, new: Row) -> bool:
        if writer == self._peer:
            return True
        if writer == self.store.site:
            return False
        if self._is_gone(writer):
            return pack(new) > pack(old)
        self.unresolved[writer] += 1
        return False
