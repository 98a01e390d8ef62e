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
import sqlite3
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, NoReturn, Self

from . import sidetables
from .adopting import adopt_snapshot
from .applying import Applier
from .capture import Capture
from .changelog import ChangeLog
from .core.change import CHANGESET_BYTES_MAX, Commit, EncodedChangeset
from .core.clock import MAX_DRIFT_MS, SITE_BYTES, HybridClock, SiteId
from .core.codec import CodecError
from .core.limits import names_table
from .core.member import MemberInfo
from .errors import POISON, SchemaError, SnapshotError, StatementError, StoreError, translate, translated
from .guarding import FileGuard
from .identity import Opened, prepare_identity, read_boot, read_home
from .ledger import Ledger
from .parking import ParkedChangeset, Parking
from .schema_plan import plan_schema
from .snapshot import compute_digest, stream_snapshot, write_snapshot
from .staging import Staging, prepare_staging
from .statements import run_apart, run_statements
from .tables import Sites, Table

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    from .core.change import RowChange
    from .core.clock import Clock, Hlc
    from .core.versions import VersionRanges
    from .schema import Schema
    from .staging import Staged
    from .statements import Statement

# A person with a shell may hold the lock for a while; a program that holds it for five seconds is stuck.
BUSY_TIMEOUT_MS: Final = 5_000
# Statements per table and a few of the store's own; preparing one again costs more than running it.
CACHED_STATEMENTS: Final = 512
Synchronous = Literal["normal", "full"]


@dataclass(frozen=True, slots=True)
class ApplyResult:
    """What became of a batch: changesets applied, had already, and set aside."""

    commit: Commit | None
    applied: int
    duplicates: int
    parked: int


class Store:
    """One replica in one SQLite file. Synchronous; calls must not overlap."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        path: str,
        schema: Schema,
        max_drift_ms: int,
        staged: Collection[str] | None = None,
    ) -> None:
        self.connection = connection
        # Tables of which what other clients wrote stays uncaptured for now. Set by whoever limits their pace;
        # one that is written to here is taken out.
        self.deferred: frozenset[str] = frozenset()
        self.dropped_parked = 0  # parked changesets that were given up since the file was opened
        # What it is made of, for those who work within its transactions.
        self.sites = Sites(connection)
        self.parking = Parking(connection, self.sites)
        self.log = ChangeLog(connection, self.sites)
        self._path = path
        self._staged = staged
        self._clock = HybridClock(max_drift_ms=max_drift_ms)
        self.ledger = Ledger(connection, self.sites, self._clock)
        self._use(schema)
        self._data_version = -1
        self._is_stale = False  # while a failed transaction is not undone: memory may be wrong

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        schema: Schema,
        *,
        max_drift_ms: int = MAX_DRIFT_MS,
        site: SiteId | None = None,
        synchronous: Synchronous = "normal",
        staged: Collection[str] | None = None,
    ) -> Store:
        """Open or create a replica and bring it to the schema.

        site is for a new file; without it a random one is made. synchronous is SQLite's. What is written to
        staged tables is held back from those who follow; None leaves that as the file has it.

        Raises SchemaError when the schema would destroy data, StoreError when the file cannot be used,
        BusyError when another process holds it.
        """
        name = os.fspath(path)
        connection = sqlite3.connect(
            name, isolation_level=None, check_same_thread=False, cached_statements=CACHED_STATEMENTS
        )
        opened = Opened(read_boot(), read_home(name))
        store = cls.adopt(
            connection, name, schema, opened, max_drift_ms=max_drift_ms, site=site, staged=staged
        )
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
        staged: Collection[str] | None = None,
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
                if staged is not None:
                    prepare_staging(connection, schema, staged)
                connection.execute("COMMIT")
                connection.execute("PRAGMA synchronous = NORMAL")
            return cls(connection, path, schema, max_drift_ms, staged)
        except BaseException:
            connection.close()
            raise

    def _use(self, schema: Schema) -> None:
        """Read and write by a schema that the file has."""
        connection = self.connection
        self.tables = {name: Table(connection, table) for name, table in schema.tables.items()}
        self.applier = Applier(connection, schema, self.tables, self.sites, self._clock)
        self._capture = Capture(connection, self.tables, self.sites, self._clock, self.ledger, self.log)
        self._guard = FileGuard(connection, self._path, schema, self._staged)
        held_back = {name: schema.tables[name] for name in self._staged or ()}
        self._staging = Staging(connection, held_back, self.sites)

    @property
    def site(self) -> SiteId:
        """The identity of this database."""
        return self.ledger.site

    @property
    def seq(self) -> int:
        """The number of commits that changed rows."""
        return self.ledger.seq

    @property
    def is_held(self) -> bool:
        """True while nothing may be written: versions of ours may be known to peers alone."""
        return self.ledger.is_held

    @property
    def collected_hlc(self) -> Hlc:
        """The time up to which deletions may have been forgotten here."""
        return self.ledger.collected_hlc

    def members(self) -> list[MemberInfo]:
        """Return the members of the cluster that were known when the file was last in use."""
        with self._sound():
            found = sidetables.read_members(self.connection)
        return [
            MemberInfo(SiteId(site), name, host, port, incarnation)
            for site, name, host, port, incarnation in found
        ]

    def remember(self, members: Iterable[MemberInfo]) -> None:
        """Keep who the members are, for the next start; writes nothing when the file says so already."""
        rows = sorted((info.site, info.name, info.host, info.port, info.incarnation) for info in members)
        with self._sound():
            if sidetables.read_members(self.connection) == rows:
                return
        with self._transaction():
            sidetables.write_members(self.connection, rows)

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
        self._check_released()
        with self._transaction():
            self._undefer_named(statements)
            affected = run_statements(self.connection, statements)
            rows, own = self._capture.run(wall_ms, self.deferred)
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
        self._check_released()
        with self._transaction():
            outcomes = []
            for statements in calls:
                self._undefer_named(statements)
                outcomes.append(run_apart(self.connection, statements))
            rows, own = self._capture.run(wall_ms, self.deferred)
            _check_whole(own)
            commit = self._conclude(rows, own)
        return outcomes, commit

    def _check_released(self) -> None:
        if self.is_held:
            raise StoreError("this database was put back and does not have all of its own versions yet")

    def _undefer_named(self, statements: Sequence[Statement]) -> None:
        self.deferred -= {name for name in self.deferred for sql, _ in statements if names_table(sql, name)}

    def probe(self) -> None:
        """Give back what the WAL holds of the disk, and write a page; raises StoreError, BusyError."""
        with self._sound():
            self._guard.checkpoint(0, 0)  # not worth a wait for readers
        with self._transaction():
            self.connection.execute("UPDATE _repl_state SET seq = seq")

    def release(self) -> None:
        """Let a database that was put back write again: all versions that it had given out are here."""
        with self._transaction():
            self.ledger.release()

    def capture(self, wall_ms: int) -> Commit | None:
        """Gather what others wrote to the file since the last look; None when no value changed."""
        with self._sound():
            noted = self._capture.find_noted(self.deferred)
        if not noted:
            return None
        with self._transaction():
            rows, own = self._capture.run(wall_ms, self.deferred)
            return self._conclude(rows, own)

    def foreign_writes(self) -> bool:
        """True when another connection has committed since the last call.

        Tables and triggers that it dropped are made again. Raises ReplacedError when it left another state,
        or when somebody has removed, replaced or overwritten the file.
        """
        with self._sound():
            (version,) = self.connection.execute("PRAGMA data_version").fetchone()
            if version != self._data_version:
                self._guard.check_state(self.ledger.left)
            self._guard.check_file(self.ledger.left, anew=False)
            if version == self._data_version:
                return False
            has_schema_moved = self._guard.has_schema_moved()
        if has_schema_moved:
            with self._transaction():
                self._guard.restore_schema()
        self._data_version = version
        return True

    def check_file(self) -> None:
        """Raise ReplacedError when the file was removed, replaced or overwritten, whatever its times say."""
        with self._sound():
            self._guard.check_file(self.ledger.left)

    def renounce(self, reason: str) -> NoReturn:
        """Raise ReplacedError, and have the file become another site when it is next opened."""
        self._guard.renounce(reason)

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
            left_bytes = self._guard.checkpoint(bytes_max, wait_ms)
            self._guard.check_file(self.ledger.left, anew=False)
            return left_bytes

    # Merging

    def apply(self, batch: Sequence[EncodedChangeset], wall_ms: int) -> ApplyResult:
        """Merge changesets, in any order, in one transaction.

        One that cannot be applied here is parked, with the reason, and does not stop the others.
        """
        fresh: dict[tuple[SiteId, int], EncodedChangeset] = {}
        with self._sound():
            for encoded in batch:
                if not self.ledger.has(encoded.site, encoded.version):
                    fresh.setdefault((encoded.site, encoded.version), encoded)
        duplicates = len(batch) - len(fresh)
        if not fresh:
            return ApplyResult(None, 0, duplicates, 0)
        changesets = list(fresh.values())
        with self._transaction():
            sound, parked = self.applier.check(changesets, wall_ms)
            # What waits in a table is older than what is merged into it now, and has to get its time before.
            if self.deferred:
                self.deferred -= {change.table for _, changeset in sound for change in changeset.changes}
            rows, own = self._capture.run(wall_ms, self.deferred)
            merged, poison = self.applier.merge(sound)
            parked += poison
            self.parking.put(parked)
            self.log.append(changesets)
            for encoded in changesets:
                self.ledger.mark(encoded.site, encoded.version, encoded.version)
            commit = self._conclude(rows + merged, own + changesets)
        return ApplyResult(commit, len(changesets) - len(parked), duplicates, len(parked))

    def parked(self) -> list[ParkedChangeset]:
        """Return the changesets that are held but could not be applied, the oldest first."""
        with self._sound():
            return self.parking.read()

    def retry_parked(self, wall_ms: int) -> Commit | None:
        """Apply what can be applied by now: after a schema change, or when a far-off time has come."""
        waiting = [entry.encoded for entry in self.parked()]
        if not waiting:
            return None
        with self._transaction():
            rows, own = self._capture.run(wall_ms)
            merged, parked = self.applier.apply(waiting, wall_ms)
            self.parking.clear()
            self.parking.put(parked)
            return self._conclude(rows + merged, own)

    def drop_parked(self, site: SiteId, version: int) -> bool:
        """Give up a changeset that is parked; return whether it was. It stays seen, and is passed on."""
        with self._transaction():
            return self.parking.remove(site, version)

    # What is held back from those who follow

    def read_staged(self) -> Staged:
        """Return the rows that are held back, and the strikes of the changesets that wrote them."""
        with self._transaction():
            return self._staging.read()

    def release_staged(self, clocks: Collection[Clock]) -> Commit | None:
        """Show the rows that were last written by these changesets; None when there are none any more."""
        with self._transaction():
            return self._conclude([], [], released=self._staging.release(clocks))

    def put_strikes(self, strikes: Mapping[Clock, int]) -> None:
        """Keep how often changesets that are held back have done harm."""
        with self._transaction():
            self._staging.put_strikes(strikes)

    def change(self, work: Callable[[], list[RowChange]], wall_ms: int | None = None) -> Commit | None:
        """Run what changes rows and clock records themselves, in one transaction and unnoticed by triggers.

        With wall_ms, what was noted is captured before. Raises SnapshotError, with nothing changed, when
        SQLite refuses a value.
        """
        try:
            with self._transaction():
                rows, own = ([], []) if wall_ms is None else self._capture.run(wall_ms)
                with self.applier.unnoticed():
                    rows += work()
                return self._conclude(rows, own)
        except POISON as error:
            raise SnapshotError(str(error)) from error

    # What was seen, and the log

    def seen(self) -> dict[SiteId, VersionRanges]:
        """Return which versions this replica has, by site, its own included."""
        with self._sound():
            return {site: ranges.copy() for site, ranges in self.ledger.seen.items()}

    def log_floor(self, site: SiteId) -> int:
        """Return the version from which on all that was seen of a site is in the log."""
        with self._sound():
            floor = self.log.floor(site)
        if floor is None:
            seen = self.ledger.seen.get(site)
            return 1 if seen is None else seen.last + 1
        return floor

    def find_large(self, site: SiteId, first: int, last: int, over_bytes: int) -> tuple[int, int] | None:
        """Return version and size of the first logged changeset in a range that is larger than that."""
        with self._sound():
            return self.log.find_large(site, first, last, over_bytes)

    def read_parts(self, site: SiteId, version: int, offset: int, size: int) -> Iterator[bytes]:
        """Yield a logged payload from an offset on in parts; raises StoreError when it is not in the log."""
        with self._sound():
            yield from self.log.read_parts(site, version, offset, size)

    def read_log(self, site: SiteId, first: int, last: int, max_bytes: int) -> list[EncodedChangeset]:
        """Return logged changesets in order of version, at least one if any, then up to the size."""
        with self._sound():
            return self.log.read(site, first, last, max_bytes)

    def prune_log(self, keep: Mapping[SiteId, int]) -> int:
        """Drop log entries below the version given for their site; return how many."""
        with self._transaction():
            return sum(self.log.drop(site, version - 1) for site, version in keep.items())

    def trim_log(self, versions_max: int, bytes_min: int) -> int:
        """Drop log entries that are too many or take more of the file than their share; return how many.

        The oldest of each site go, beyond so many; of bytes, those of the busiest sites. The log may always
        have bytes_min. Pages are used again: called every few seconds, the file has few that hold nothing.
        """
        with self._sound():
            bytes_max = self.log.compute_bytes_max(bytes_min)
            if not self.log.is_above(versions_max, bytes_max):
                return 0
        with self._transaction():
            return self.log.trim(versions_max, bytes_max)

    # Whole replicas

    def snapshot(self, max_chunk_bytes: int) -> Iterator[bytes]:
        """Return the chunks of a consistent snapshot.

        A file is read on a connection of its own, which keeps the WAL from being reset until the iterator
        ends or is closed. A database in memory has no second connection: its chunks are made at once.
        """
        if self._path == ":memory:":
            chunks = write_snapshot(
                self.connection, self.tables.values(), self.sites, self.ledger.seen, max_chunk_bytes
            )
            return iter(list(chunks))
        # Calls on the store do not overlap, so seen() is what the view of the other connection has.
        return stream_snapshot(self._path, self.tables.values(), self.sites, self.seen(), max_chunk_bytes)

    def apply_snapshot(self, chunks: Iterable[bytes], wall_ms: int) -> Commit | None:
        """Merge a snapshot in one transaction, then count what it stands for as seen.

        Rows that the sender has seen and does not have any more are dropped (see adopting.py). Raises
        SnapshotError, with nothing applied, when it is malformed, incomplete, needs another schema or comes
        from too far in the future.
        """
        try:
            with self._transaction():
                rows, own = self._capture.run(wall_ms)
                merged, reload = adopt_snapshot(self, chunks, wall_ms)
                return self._conclude(rows + merged, own, tuple(reload))
        except (CodecError, *POISON) as error:
            raise SnapshotError(str(error)) from error

    def digest(self, table: str) -> bytes:
        """Return a hash of a table's rows and clocks, equal on replicas that know the same."""
        return compute_digest(self.tables[table], self.sites)

    # Within a transaction

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        try:  # as in _sound: one generator within another costs each write a few percent
            self._recover()
            try:
                # Within the try: an interrupt can come when it has begun and not yet returned.
                self.connection.execute("BEGIN IMMEDIATE")
                yield
                self.connection.execute("COMMIT")
                self.log.commit()
                self.ledger.commit()
            except BaseException:
                self._is_stale = True
                self._recover()
                raise
        except POISON:
            raise
        except sqlite3.Error as error:
            raise translate(error) from error

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
        self.log.rollback()
        self._guard.check_not_older(self.ledger.left)
        self.ledger.load()
        self._data_version = -1  # what others wrote may have been looked at and not captured
        self._is_stale = False

    def beat(self, wall_ms: int, floor: Hlc) -> tuple[int, Hlc]:
        """Return our last version, and a time, after floor, that all later ones will be after.

        That holds after a crash too, whatever the wall clock does; raises StoreError, BusyError.
        """
        with self._sound():
            self.ledger.has_beaten = True
            self._clock.observe(floor)
            hlc = self._clock.tick(wall_ms)
            if hlc > self.ledger.promised:
                with self._transaction():
                    self.ledger.promise(wall_ms)
                    self._conclude([], [])
            return self.ledger.version, hlc

    def _conclude(
        self,
        rows: list[RowChange],
        changesets: list[EncodedChangeset],
        reload: tuple[str, ...] = (),
        released: Sequence[RowChange] = (),
    ) -> Commit | None:
        """Write counters and ranges; return what the transaction did, if anything."""
        shown, held = self._staging.split(rows) if self._staged else (rows, [])
        if not self.ledger.write(has_rows=bool(rows or reload or released)):
            self._guard.refuse("another state was put into it")
        if not rows and not reload and not changesets and not released:
            return None
        return Commit(self.seq, (*shown, *released), tuple(changesets), reload, tuple(held))


def _check_whole(own: Sequence[EncodedChangeset]) -> None:
    if len(own) > 1:
        limit = f"{CHANGESET_BYTES_MAX >> 20} MiB"
        raise StatementError(0, f"the transaction changes more than {limit}; make several of it")
