"""The replicated database of one node: writes in, changesets out; changesets in, rows out.

The store decides what is one transaction. Rows, clock records, the log, what was seen, the hybrid clock and
the counters change together or not at all. It does not know peers, threads or event loops, and never reads
the wall clock: callers pass wall_ms.

Invariant: a version is seen if and only if its effect (or its parked payload) is in the same file, and a pair
of site and version is never used for two changesets.

Durability: WAL with synchronous=NORMAL. After kill -9 nothing committed is lost. After a power failure the
last commits may be, unless it is FULL; what peers sent is simply fetched again. Own versions could be handed
out twice then, so a file that was not closed and is opened after a reboot goes on under a new site identity.
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, Self

from . import sidetables
from .capture import TableCapture
from .changelog import ChangeLog
from .collecting import Replacement
from .core.change import CHANGESET_BYTES_MAX, Changeset, Commit, EncodedChangeset, SqlValue
from .core.clock import (
    MAX_DRIFT_MS,
    NEVER,
    SITE_BYTES,
    Clock,
    Hlc,
    HybridClock,
    SiteId,
    compute_ms,
    hlc_from_ms,
)
from .core.codec import CodecError, decode_changeset, encode_bounded, pack, unpack
from .core.versions import VersionRanges
from .errors import POISON, SchemaError, SnapshotError, StatementError, StoreError, is_trouble, translated
from .guarding import FileGuard, State
from .identity import Opened, prepare_identity, read_boot, read_home
from .merging import TableMerge, check_change, offer_change, offer_states
from .names import Names
from .parking import ParkedChangeset, Parking
from .schema_plan import plan_schema
from .snapshot import (
    Head,
    TableStates,
    compute_digest,
    compute_latest,
    read_snapshot,
    stream_snapshot,
    write_snapshot,
)
from .tables import Sites, Table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from .core.change import RowChange, TableChange
    from .schema import Schema

# A person with a shell may hold the lock for a while; a program that holds it for five seconds is stuck.
BUSY_TIMEOUT_MS: Final = 5_000
# Statements per table and a few of the store's own; preparing one again costs more than running it.
CACHED_STATEMENTS: Final = 512
# The log may take this part of what all else in the file takes, which is about a quarter of the bare tables.
# Beyond that it costs more than the snapshots that it saves.
LOG_SHARE: Final = 1 / 5
# How far ahead of the wall clock times are promised in the file, so that an idle node that beats writes a page
# in so many ms. After a crash writes begin with what was promised: with MAX_DRIFT_MS, two seconds are left for
# clocks that differ.
PROMISED_MS: Final = 3_000
# Of a snapshot that changes more rows than that, only the tables are named: memory stays bounded, and whoever
# follows them is quicker to read them again.
NAMED_ROWS_MAX: Final = 10_000
_WRITES = re.compile(
    r"(?:\s+|--[^\n]*\n|/\*.*?\*/)*(INSERT|UPDATE|DELETE|REPLACE|WITH)\b", re.IGNORECASE | re.DOTALL
)
Synchronous = Literal["normal", "full"]
Statement = tuple[str, "Sequence[SqlValue] | Mapping[str, SqlValue]"]


@dataclass(frozen=True, slots=True)
class ApplyResult:
    """What became of a batch: changesets applied, had already, and set aside."""

    commit: Commit | None
    applied: int
    duplicates: int
    parked: int


class Store:
    """One replica in one SQLite file. Synchronous; calls must not overlap."""

    def __init__(self, connection: sqlite3.Connection, path: str, schema: Schema, max_drift_ms: int) -> None:
        self.connection = connection
        self.site = SiteId(b"")  # set by _load, from the file
        self.seq = 0  # set by _load and by each commit that changes rows
        self.is_held = False  # set by _load, cleared by release: versions of ours may be known to peers alone
        self.collected_hlc = NEVER  # set by _load; deletions up to it may have been forgotten here
        self.dropped_parked = 0  # parked changesets that were given up since the file was opened
        self._path = path
        self._clock = HybridClock(max_drift_ms=max_drift_ms)
        self._promised = NEVER  # set by _load, beat and commits: no beat was later, and the file says so
        self._has_beaten = False
        self._version = 0
        self._ordinal = 0
        self._sites = Sites(connection)
        self._parking = Parking(connection, self._sites)
        self._seen: dict[SiteId, VersionRanges] = {}
        self._touched: dict[SiteId, None] = {}  # sites whose ranges the transaction has changed
        self._use(schema)
        self._data_version = -1
        self._is_stale = False  # while a failed transaction is not undone: memory may be wrong
        self._log = ChangeLog(connection, self._sites)
        self._load()
        self._clock.observe(self._promised)
        self._left = self._state()  # what the last commit left in the file

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        schema: Schema,
        *,
        max_drift_ms: int = MAX_DRIFT_MS,
        site: SiteId | None = None,
        synchronous: Synchronous = "normal",
    ) -> Store:
        """Open or create a replica and bring it to the schema.

        site is for a new file; without it a random one is made. synchronous is SQLite's. Raises SchemaError
        when the schema would destroy data, StoreError when the file cannot be used, BusyError when another
        process holds it.
        """
        name = os.fspath(path)
        connection = sqlite3.connect(
            name, isolation_level=None, check_same_thread=False, cached_statements=CACHED_STATEMENTS
        )
        opened = Opened(read_boot(), read_home(name))
        store = cls.adopt(connection, name, schema, opened, max_drift_ms=max_drift_ms, site=site)
        connection.execute(f"PRAGMA synchronous = {synchronous}")
        return store

    @classmethod
    def adopt(
        cls,
        connection: sqlite3.Connection,
        path: str,
        schema: Schema,
        opened: Opened,
        *,
        max_drift_ms: int = MAX_DRIFT_MS,
        site: SiteId | None = None,
        make_site: Callable[[], bytes] = lambda: os.urandom(SITE_BYTES),
    ) -> Self:
        """Make a replica of an open connection, as `open` does; it is closed if that fails.

        A file that must not go on as the site that it was becomes the one that make_site names.
        """
        try:
            with translated():
                connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
                connection.execute("PRAGMA journal_mode = WAL")
                # The identity that the coming commits are made under must outlive a power failure.
                connection.execute("PRAGMA synchronous = FULL")
                connection.execute("BEGIN IMMEDIATE")
                prepare_identity(connection, site, opened, make_site)
                sidetables.migrate(connection, schema)
                connection.execute("COMMIT")
                connection.execute("PRAGMA synchronous = NORMAL")
            return cls(connection, path, schema, max_drift_ms)
        except BaseException:
            connection.close()
            raise

    def _use(self, schema: Schema) -> None:
        """Read and write by a schema that the file has."""
        self._names = Names.of_schema(schema)
        self._tables = {name: Table(self.connection, table) for name, table in schema.tables.items()}
        checks = ", ".join(table.has_pending for table in self._tables.values())
        self._has_pending = f"SELECT {checks}" if checks else ""
        self._guard = FileGuard(self.connection, self._path, schema)

    def extend(self, schema: Schema, declared: str | None = None) -> None:
        """Take up tables, columns and indexes that a schema has beyond ours, without rewriting a row.

        declared is the text of a schema file, kept as apply_plan keeps it. Raises SchemaError, with nothing
        changed, for what takes a plan.
        """
        with self._transaction():
            for step in plan_schema(self.connection, schema).steps:
                if not step.is_online:
                    raise SchemaError(f"{step.text}: that takes a plan")
            sidetables.migrate(self.connection, schema)
            if declared is not None:
                sidetables.write_declared(self.connection, declared)
        self._use(schema)

    def close(self) -> None:
        """Close the file; a file that is closed keeps its identity across reboots."""
        if self._guard.disown():
            return
        with contextlib.suppress(sqlite3.Error):  # a full disk must not keep us from closing
            self.connection.execute("PRAGMA synchronous = FULL")
            self.connection.execute("UPDATE _repl_state SET is_clean = 1, hlc = ?", (self._clock.last,))
            self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        self.connection.close()

    # Writing

    def execute(self, statements: Sequence[Statement], wall_ms: int) -> tuple[list[int], Commit | None]:
        """Run statements that write, in one transaction; return rows affected by each, and the commit.

        The commit is None when no value changed. Raises StatementError, with nothing changed, when one fails,
        is not a write, or returns rows.
        """
        affected: list[int] = []
        with self._transaction():
            for index, (sql, values) in enumerate(statements):
                affected.append(self._run(index, sql, values))
            rows, own = self._capture_noted(wall_ms)
            _check_whole(own)
            commit = self._conclude(rows, own)
        return affected, commit

    def execute_many(
        self, calls: Iterable[Sequence[Statement]], wall_ms: int
    ) -> tuple[list[list[int] | StatementError], Commit | None]:
        """Run the statements of several callers in one transaction and one changeset.

        Return rows affected, or the error, of each caller: all statements of a caller take effect or none.
        Raises StatementError, with nothing changed for anybody, when one has rolled back for all.
        """
        with self._transaction():
            outcomes = [self._run_apart(statements) for statements in calls]
            rows, own = self._capture_noted(wall_ms)
            _check_whole(own)
            commit = self._conclude(rows, own)
        return outcomes, commit

    def probe(self) -> None:
        """Give back what the WAL holds of the disk, and write a page; raises StoreError, BusyError."""
        with self._sound():
            self.connection.execute("PRAGMA busy_timeout = 0")  # not worth a wait for readers
            try:
                self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            finally:
                self.connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
        with self._transaction():
            self.connection.execute("UPDATE _repl_state SET seq = seq")

    def release(self) -> None:
        """Let a database that was put back write again: all versions that it had given out are here."""
        with self._transaction():
            self.connection.execute(f"DROP TABLE IF EXISTS {sidetables.HELD_TABLE}")
        self.is_held = False

    def capture(self, wall_ms: int) -> Commit | None:
        """Gather what others wrote to the file since the last look; None when no value changed."""
        with self._sound():
            noted = self._noted_tables()
        if not noted:
            return None
        with self._transaction():
            rows, own = self._capture_noted(wall_ms)
            return self._conclude(rows, own)

    def foreign_writes(self) -> bool:
        """True when another connection has committed since the last call.

        Tables and triggers that it dropped are made again. Raises ReplacedError when it left another state.
        """
        with self._sound():
            (version,) = self.connection.execute("PRAGMA data_version").fetchone()
            if version == self._data_version:
                return False
            self._guard.check_state(self._left)
            has_schema_moved = self._guard.has_schema_moved()
        if has_schema_moved:
            with self._transaction():
                self._guard.restore_schema()
        self._data_version = version
        return True

    def check_file(self) -> None:
        """Raise ReplacedError when the file was replaced or overwritten, unseen by foreign_writes."""
        with self._sound():
            self._guard.check_file(self._left)

    @property
    def schema_problem(self) -> str:
        """How others left the tables, where that cannot be undone here; empty when they are right."""
        return self._guard.problem

    def wal_bytes(self) -> int:
        """Return the size of the WAL."""
        return self._guard.wal_bytes()

    def checkpoint(self, bytes_max: int, wait_ms: int) -> int:
        """Empty the WAL when it is larger than that; wait so long for readers. Return its size then."""
        with self._sound():
            return self._guard.checkpoint(bytes_max, wait_ms)

    # Merging

    def apply(self, batch: Sequence[EncodedChangeset], wall_ms: int) -> ApplyResult:
        """Merge changesets, in any order, in one transaction.

        One that cannot be applied here is parked, with the reason, and does not stop the others.
        """
        fresh: dict[tuple[SiteId, int], EncodedChangeset] = {}
        with self._sound():
            for encoded in batch:
                seen = self._seen.get(encoded.site)
                if seen is None or not seen.contains(encoded.version):
                    fresh.setdefault((encoded.site, encoded.version), encoded)
        duplicates = len(batch) - len(fresh)
        if not fresh:
            return ApplyResult(None, 0, duplicates, 0)
        changesets = list(fresh.values())
        with self._transaction():
            rows, own = self._capture_noted(wall_ms)
            merged, parked = self._merge_encoded(changesets, wall_ms)
            self._parking.put(parked)
            self._log.append(changesets)
            for encoded in changesets:
                self._mark_seen(encoded.site, encoded.version, encoded.version)
            commit = self._conclude(rows + merged, own + changesets)
        return ApplyResult(commit, len(changesets) - len(parked), duplicates, len(parked))

    def parked(self) -> list[ParkedChangeset]:
        """Return the changesets that are held but could not be applied, the oldest first."""
        with self._sound():
            return self._parking.read()

    def retry_parked(self, wall_ms: int) -> Commit | None:
        """Apply what can be applied by now: after a schema change, or when a far-off time has come."""
        waiting = [entry.encoded for entry in self.parked()]
        if not waiting:
            return None
        with self._transaction():
            rows, own = self._capture_noted(wall_ms)
            merged, parked = self._merge_encoded(waiting, wall_ms)
            self._parking.clear()
            self._parking.put(parked)
            return self._conclude(rows + merged, own)

    def drop_parked(self, site: SiteId, version: int) -> bool:
        """Give up a changeset that is parked; return whether it was. It stays seen, and is passed on."""
        with self._transaction():
            return self._parking.remove(site, version)

    def change(self, work: Callable[[], list[RowChange]], wall_ms: int | None = None) -> Commit | None:
        """Run what changes rows and clock records themselves, in one transaction and unnoticed by triggers.

        With wall_ms, what was noted is captured before. Raises SnapshotError, with nothing changed, when
        SQLite refuses a value.
        """
        try:
            with self._transaction():
                rows, own = ([], []) if wall_ms is None else self._capture_noted(wall_ms)
                with self._merging():
                    rows += work()
                return self._conclude(rows, own)
        except POISON as error:
            raise SnapshotError(str(error)) from error

    # What was seen, and the log

    def seen(self) -> dict[SiteId, VersionRanges]:
        """Return which versions this replica has, by site, its own included."""
        with self._sound():
            return {site: ranges.copy() for site, ranges in self._seen.items()}

    def log_floor(self, site: SiteId) -> int:
        """Return the version from which on all that was seen of a site is in the log."""
        with self._sound():
            floor = self._log.floor(site)
        if floor is None:
            seen = self._seen.get(site)
            return 1 if seen is None else seen.last + 1
        return floor

    def find_large(self, site: SiteId, first: int, last: int, over_bytes: int) -> tuple[int, int] | None:
        """Return version and size of the first logged changeset in a range that is larger than that."""
        with self._sound():
            return self._log.find_large(site, first, last, over_bytes)

    def read_parts(self, site: SiteId, version: int, offset: int, size: int) -> Iterator[bytes]:
        """Yield a logged payload from an offset on in parts; raises StoreError when it is not in the log."""
        with self._sound():
            yield from self._log.read_parts(site, version, offset, size)

    def read_log(self, site: SiteId, first: int, last: int, max_bytes: int) -> list[EncodedChangeset]:
        """Return logged changesets in order of version, at least one if any, then up to the size."""
        with self._sound():
            return self._log.read(site, first, last, max_bytes)

    def prune_log(self, keep: Mapping[SiteId, int]) -> int:
        """Drop log entries below the version given for their site; return how many."""
        with self._transaction():
            return sum(self._log.drop(site, version - 1) for site, version in keep.items())

    def trim_log(self, versions_max: int, bytes_min: int) -> int:
        """Drop log entries that are too many or take more of the file than LOG_SHARE; return how many.

        The oldest of each site go, beyond so many; of bytes, those of the busiest sites. The log may always
        have bytes_min. Pages are used again: called every few seconds, the file has few that hold nothing.
        """
        with self._sound():
            bytes_max = max(bytes_min, int(LOG_SHARE * (self._used_bytes() - self._log.size_bytes)))
            if not self._log.is_above(versions_max, bytes_max):
                return 0
        with self._transaction():
            return self._log.trim(versions_max, bytes_max)

    def _used_bytes(self) -> int:
        """Return the size of the pages that hold something."""
        pages, free, page_bytes = (
            int(self.connection.execute(f"PRAGMA {name}").fetchone()[0])
            for name in ("page_count", "freelist_count", "page_size")
        )
        return (pages - free) * page_bytes

    # Whole replicas

    def snapshot(self, max_chunk_bytes: int) -> Iterator[bytes]:
        """Return the chunks of a consistent snapshot.

        A file is read on a connection of its own, which keeps the WAL from being reset until the iterator
        ends or is closed. A database in memory has no second connection: its chunks are made at once.
        """
        if self._path == ":memory:":
            chunks = write_snapshot(
                self.connection, self._tables.values(), self._sites, self._seen, max_chunk_bytes
            )
            return iter(list(chunks))
        # Calls on the store do not overlap, so seen() is what the view of the other connection has.
        return stream_snapshot(self._path, self._tables.values(), self._sites, self.seen(), max_chunk_bytes)

    def apply_snapshot(
        self, chunks: Iterable[bytes], wall_ms: int, replace_before: Hlc = NEVER
    ) -> Commit | None:
        """Merge a snapshot in one transaction, then count what it stands for as seen.

        replace_before is the sender's collected_hlc: rows up to it that the sender has seen and does not have
        were deleted, and are dropped (see collecting.py); it becomes ours too. Raises SnapshotError, with
        nothing applied, when it is malformed, incomplete, needs another schema or comes from too far in the
        future.
        """
        seen: dict[SiteId, VersionRanges] = {}
        reload: dict[str, None] = {}
        try:
            with self._transaction():
                rows, own = self._capture_noted(wall_ms)
                replacement = Replacement(self, replace_before)
                for part in read_snapshot(chunks):
                    if isinstance(part, Head):
                        seen = part.seen
                        replacement.protect(self._seen, seen)
                    elif isinstance(part, TableStates):
                        admitted = self.admit_states(part, wall_ms)
                        if admitted is not None:
                            with self._merging():
                                rows += replacement.drop_unmentioned(*admitted)
                                rows += _merge_states(*admitted, self._sites)
                    else:
                        rows += self._merge_parked(part, wall_ms)
                    if len(rows) > NAMED_ROWS_MAX:
                        reload.update(dict.fromkeys(change.table for change in rows))
                        rows.clear()
                with self._merging():
                    rows += replacement.finish()
                self._adopt_seen(seen)
                return self._conclude(rows, own, tuple(reload))
        except (CodecError, *POISON) as error:
            raise SnapshotError(str(error)) from error

    def digest(self, table: str) -> bytes:
        """Return a hash of a table's rows and clocks, equal on replicas that know the same."""
        return compute_digest(self._tables[table], self._sites)

    # Within a transaction

    @property
    def tables(self) -> Mapping[str, Table]:
        """The replicated tables, for those who `change` them."""
        return self._tables

    @property
    def sites(self) -> Sites:
        """The file's numbers for sites."""
        return self._sites

    def admit_states(self, part: TableStates, wall_ms: int) -> tuple[Table, TableStates] | None:
        """Return the table and the states as it has them; None when it was dropped here.

        Raises CodecError for one that is unknown and for times too far ahead.
        """
        latest = max((compute_latest(state.record) for state in part.states), default=Hlc(0))
        if self._clock.is_too_far_ahead(latest, wall_ms):
            raise CodecError(f"its clock is {compute_ms(latest) - wall_ms} ms ahead")
        renamed = self._names.translate_states(part)
        if renamed is None:
            return None
        table = self._tables.get(renamed.table)
        if table is None:
            raise CodecError(f"unknown table {part.table}")
        self._clock.observe(latest)
        return table, renamed

    def note_collected(self, hlc: Hlc) -> None:
        """Remember that deletions up to a time may have been forgotten."""
        if hlc > self.collected_hlc:
            sidetables.write_collected(self.connection, hlc)
            self.collected_hlc = hlc

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._sound():
            try:
                # Within the try: an interrupt can come when it has begun and not yet returned.
                self.connection.execute("BEGIN IMMEDIATE")
                yield
                self.connection.execute("COMMIT")
                self._log.commit()
                self._left = self._state()
            except BaseException:
                self._is_stale = True
                self._recover()
                raise

    @contextlib.contextmanager
    def _sound(self) -> Iterator[None]:
        """Look at memory and file only when nothing of a failed transaction is left in them."""
        with translated():
            self._recover()
            yield

    def _recover(self) -> None:
        """Go back to what the file says after a failure; if that fails too, before the next call."""
        if not self._is_stale:
            return
        if self.connection.in_transaction:  # SQLite has rolled back by itself when the disk is full
            self.connection.execute("ROLLBACK")
        self._log.rollback()
        self._guard.check_not_older(self._left)
        self._load()
        self._left = self._state()
        self._data_version = -1  # what others wrote may have been looked at and not captured
        self._is_stale = False

    def _load(self) -> None:
        """Read what is kept in memory from the file: at the start, and after a rollback."""
        self._sites.reload()
        row = self.connection.execute("SELECT site, version, hlc, seq FROM _repl_state").fetchone()
        self._ordinal, self._version, hlc, self.seq = row
        self.site = self._sites.get_site(self._ordinal)
        self._promised = Hlc(hlc)
        self._seen = {
            self._sites.get_site(ordinal): VersionRanges.decode(unpack(ranges))
            for ordinal, ranges in self.connection.execute("SELECT site, ranges FROM _repl_seen")
        }
        self._touched.clear()
        self.is_held = sidetables.is_held(self.connection)
        self.collected_hlc = Hlc(sidetables.read_collected(self.connection))

    def beat(self, wall_ms: int, floor: Hlc) -> tuple[int, Hlc]:
        """Return our last version, and a time, after floor, that all later ones will be after.

        That holds after a crash too, whatever the wall clock does; raises StoreError, BusyError.
        """
        with self._sound():
            self._has_beaten = True
            self._clock.observe(floor)
            hlc = self._clock.tick(wall_ms)
            if hlc > self._promised:
                with self._transaction():
                    self._promise(wall_ms)
                    self.connection.execute("UPDATE _repl_state SET hlc = ?", (self._promised,))
            return self._version, hlc

    def _promise(self, wall_ms: int) -> None:
        """Let the transaction that is under way keep times to come."""
        self._promised = max(self._promised, self._clock.last, hlc_from_ms(wall_ms + PROMISED_MS))

    def _state(self) -> State:
        return State(self.site, self._version, self.seq)

    def _run(self, index: int, sql: str, values: Sequence[SqlValue] | Mapping[str, SqlValue]) -> int:
        if _WRITES.match(sql) is None:
            raise StatementError(index, "only INSERT, UPDATE, DELETE and REPLACE can be executed")
        try:
            cursor = self.connection.execute(sql, values)
        except (sqlite3.Error, sqlite3.Warning, OverflowError, UnicodeError) as error:
            if isinstance(error, sqlite3.OperationalError) and is_trouble(error):
                raise
            raise StatementError(index, str(error)) from error
        if cursor.description is not None:
            cursor.close()
            raise StatementError(index, "the statement returns rows; use a query")
        if cursor.rowcount >= 0:
            return cursor.rowcount
        # The driver does not count for a statement that begins with WITH.
        return int(self.connection.execute("SELECT changes()").fetchone()[0])

    def _run_apart(self, statements: Sequence[Statement]) -> list[int] | StatementError:
        outcome: list[int] | StatementError
        self.connection.execute("SAVEPOINT caller")
        try:
            outcome = [self._run(index, sql, values) for index, (sql, values) in enumerate(statements)]
        except StatementError as error:
            if not self.connection.in_transaction:  # OR ROLLBACK: what others wrote is gone with it
                raise
            self.connection.execute("ROLLBACK TO caller")
            outcome = error
        self.connection.execute("RELEASE caller")
        return outcome

    def _noted_tables(self) -> list[Table]:
        if not self._has_pending:
            return []
        flags = self.connection.execute(self._has_pending).fetchone()
        return [table for table, noted in zip(self._tables.values(), flags, strict=True) if noted]

    def _capture_noted(self, wall_ms: int) -> tuple[list[RowChange], list[EncodedChangeset]]:
        """Make one changeset of what triggers have noted; nothing when no value changed.

        What somebody else wrote cannot be refused: more than a changeset may hold becomes several.
        """
        noted = self._noted_tables()
        if not noted:
            return [], []
        if self._has_beaten:
            self._promise(wall_ms)  # so that a node that writes need not do so for its beats
        if self.is_held:
            raise StoreError("this database was put back and does not have all of its own versions yet")
        hlc = self._clock.tick(wall_ms)
        rows: list[RowChange] = []
        changes: list[TableChange] = []
        for table in noted:
            gathered = TableCapture(table, self._sites, Clock(hlc, self.site))
            changes += gathered.run()
            rows += gathered.rows
        if not changes:
            return [], []
        own = []
        for payload in encode_bounded(Changeset(hlc, tuple(changes)), CHANGESET_BYTES_MAX):
            self._version += 1
            own.append(EncodedChangeset(self.site, self._version, payload))
        self._log.append(own)
        self._mark_seen(self.site, own[0].version, own[-1].version)
        return rows, own

    def _merge_encoded(
        self, changesets: Sequence[EncodedChangeset], wall_ms: int
    ) -> tuple[list[RowChange], list[tuple[EncodedChangeset, str]]]:
        """Merge what can be merged; return the rows that changed, and the others with the reason."""
        parked: list[tuple[EncodedChangeset, str]] = []
        sound: list[tuple[EncodedChangeset, Changeset]] = []
        for encoded in changesets:
            try:
                sound.append((encoded, self._check(encoded, wall_ms)))
            except CodecError as error:
                parked.append((encoded, str(error)))
        if not sound:
            return [], parked
        try:
            return self._merge_at_once(sound), parked
        except POISON as error:
            if len(sound) == 1:
                parked.append((sound[0][0], str(error)))
                return [], parked
        # Something in the batch cannot be stored. One by one, the culprit harms nobody else.
        rows: list[RowChange] = []
        for entry in sound:
            try:
                rows += self._merge_at_once([entry])
            except POISON as error:
                parked.append((entry[0], str(error)))
        return rows, parked

    def _check(self, encoded: EncodedChangeset, wall_ms: int) -> Changeset:
        changeset = self._names.translate(decode_changeset(encoded.payload))
        if self._clock.is_too_far_ahead(changeset.hlc, wall_ms):
            raise CodecError(f"its clock is {compute_ms(changeset.hlc) - wall_ms} ms ahead")
        for change in changeset.changes:
            check_change(self._tables.get(change.table), change)
        return changeset

    def _merge_at_once(self, changesets: Sequence[tuple[EncodedChangeset, Changeset]]) -> list[RowChange]:
        """Merge all or, if SQLite refuses a value, nothing."""
        with self._merging():
            merges: dict[str, TableMerge] = {}
            for encoded, changeset in changesets:
                clock = Clock(changeset.hlc, encoded.site)
                for change in changeset.changes:
                    table = self._tables[change.table]
                    merge = merges.get(change.table)
                    if merge is None:
                        merge = merges[change.table] = TableMerge(table, self._sites)
                    offer_change(merge, table, change, clock)
            rows: list[RowChange] = []
            for merge in merges.values():
                merge.flush()
                rows += merge.rows
        for _, changeset in changesets:
            self._clock.observe(changeset.hlc)
        return rows

    def _merge_parked(self, changesets: list[EncodedChangeset], wall_ms: int) -> list[RowChange]:
        """Take over what the sender of a snapshot could not apply: perhaps we can, or we park it too."""
        fresh = [
            encoded
            for encoded in changesets
            if not self._seen.get(encoded.site, VersionRanges()).contains(encoded.version)
        ]
        rows, parked = self._merge_encoded(fresh, wall_ms)
        self._parking.put(parked)
        return rows

    @contextlib.contextmanager
    def _merging(self) -> Iterator[None]:
        """Keep triggers from noting what is written here; undo it all when SQLite refuses a value."""
        self.connection.execute("SAVEPOINT merging")
        try:
            self.connection.execute("UPDATE _repl_state SET merging = 1")
            yield
            self.connection.execute("UPDATE _repl_state SET merging = 0")
        except POISON:
            self.connection.execute("ROLLBACK TO merging")
            self._sites.reload()
            raise
        finally:
            if self.connection.in_transaction:
                self.connection.execute("RELEASE merging")

    def _mark_seen(self, site: SiteId, first: int, last: int) -> None:
        self._seen.setdefault(site, VersionRanges()).add(first, last)
        self._touched[site] = None
        if site == self.site:
            # Our own versions, told by peers to a file that had lost them: they are taken.
            self._version = max(self._version, last)

    def _adopt_seen(self, seen: Mapping[SiteId, VersionRanges]) -> None:
        for site, theirs in seen.items():
            mine = self._seen.get(site, VersionRanges())
            unlogged = [
                last for first, last in mine.missing(theirs.last) if not _is_disjoint(theirs, first, last)
            ]
            if unlogged:
                # The log has a hole now; what is below it cannot be served without it.
                self._log.drop(site, unlogged[-1])
            for first, last in theirs:
                self._mark_seen(site, first, last)

    def _conclude(
        self, rows: list[RowChange], changesets: list[EncodedChangeset], reload: tuple[str, ...] = ()
    ) -> Commit | None:
        """Write counters and ranges; return what the transaction did, if anything."""
        for site in self._touched:
            self.connection.execute(
                "INSERT OR REPLACE INTO _repl_seen VALUES (?, ?)",
                (self._sites.get_ordinal(site), pack(self._seen[site].encode())),
            )
        self._touched.clear()
        if rows or reload:
            self.seq += 1
        left = self._left
        hlc = max(self._clock.last, self._promised)
        cursor = self.connection.execute(
            "UPDATE _repl_state SET version = ?, hlc = ?, seq = ? WHERE version = ? AND seq = ? AND site = ?",
            (self._version, hlc, self.seq, left.version, left.seq, self._ordinal),
        )
        if cursor.rowcount != 1:
            self._guard.refuse("another state was put into it")
        if not rows and not reload and not changesets:
            return None
        return Commit(self.seq, tuple(rows), tuple(changesets), reload)


def _merge_states(table: Table, part: TableStates, sites: Sites) -> list[RowChange]:
    merge = TableMerge(table, sites)
    offer_states(merge, table, part)
    merge.flush()
    return merge.rows


def _check_whole(own: Sequence[EncodedChangeset]) -> None:
    if len(own) > 1:
        limit = f"{CHANGESET_BYTES_MAX >> 20} MiB"
        raise StatementError(0, f"the transaction changes more than {limit}; make several of it")


def _is_disjoint(ranges: VersionRanges, first: int, last: int) -> bool:
    return all(high < first or low > last for low, high in ranges)
