"""What outlives a crash: the disk with its image, and the clock on the board.

Decides what is left after a failure. Knows nothing of peers. Invariant: after a kill the disk has all that
was committed; after a power failure it has what was last synced, and no more.

SQLite's own means make the faults: a page limit for a full disk, an interrupt at some step of its virtual
machine for an I/O error or a kill in the middle of a transaction.
"""

import contextlib
import sqlite3
from collections.abc import Iterator
from random import Random

from replication.core.clock import SiteId
from replication.identity import Opened
from replication.schema import Schema
from replication.store import Store

# Any date: it only has to be later than the epoch by more than clocks jump.
EPOCH_MS = 1_700_000_000_000
_PAGES_MAX = 1 << 30


class WallClock:
    """A node's wall clock: wrong by an offset, and by more each second."""

    def __init__(self) -> None:
        self.offset_ms = 0
        self.drift_ppm = 0

    def compute_ms(self, now_us: int) -> int:
        """Return what the clock shows."""
        return EPOCH_MS + (now_us + now_us * self.drift_ppm // 1_000_000) // 1000 + self.offset_ms


class Disk:
    """One node's database, across its lives."""

    def __init__(
        self,
        seed: int,
        index: int,
        schema: Schema,
        *,
        store_class: type[Store],
        renews: bool,
        keeps_synced: bool,
    ) -> None:
        self.is_full = False
        self._rng = Random(f"{seed}/disk/{index}")
        self._schema = schema
        self._store_class = store_class
        self._renews = renews  # whether a store that comes back from a power failure is told so
        self._keeps_synced = (
            keeps_synced  # whether there will be power failures, so that it is worth its time
        )
        self._boot = 0
        self._synced = b""  # the image that a power failure leaves
        self._left = b""  # the image that the next life finds
        self._store: Store | None = None

    def open(self) -> Store:
        """Open what the last life left."""
        connection = sqlite3.connect(":memory:", isolation_level=None)
        if self._left:
            connection.deserialize(self._left)
        self._store = self._store_class.adopt(
            connection,
            ":memory:",
            self._schema,
            Opened(boot=f"boot {self._boot if self._renews else 0}"),
            make_site=lambda: SiteId(self._rng.randbytes(16)),
        )
        self.sync()  # opening syncs the identity
        self.set_full(self.is_full)
        return self._store

    def sync(self) -> None:
        """Make all that was committed survive a power failure."""
        if self._keeps_synced:
            self._synced = self._read_image()

    def kill(self) -> None:
        """End a life with the process: what was committed is in the operating system's hands."""
        self._left = self._read_image()
        assert self._store is not None, "the disk is open"
        self._store.connection.close()
        self._store = None

    def cut_power(self) -> None:
        """End a life with the machine: what was not synced is lost."""
        assert self._store is not None, "the disk is open"
        self._left = self._synced
        self._boot += 1
        self._store.connection.close()
        self._store = None

    def _read_image(self) -> bytes:
        """Return what is committed: an image taken within a transaction would hold some of it."""
        assert self._store is not None, "the disk is open"
        connection = self._store.connection
        if connection.in_transaction:  # one that failed, and whose undoing failed too
            connection.rollback()
        return connection.serialize()

    def set_full(self, is_full: bool) -> None:
        """Allow the file to grow, or not."""
        self.is_full = is_full
        if self._store is not None:
            self._store.connection.execute(f"PRAGMA max_page_count = {1 if is_full else _PAGES_MAX}")

    def write_past_triggers(self, sql: str, key: object) -> bool:
        """Change rows as somebody would who keeps triggers from noting it; False when it cannot be done."""
        assert self._store is not None, "the disk is open"
        connection = self._store.connection
        if connection.in_transaction:  # one that failed, and whose undoing failed too
            return False
        connection.execute("BEGIN")
        try:
            connection.execute("UPDATE _repl_state SET merging = 1")
            changed = connection.execute(sql, (key,)).rowcount
            connection.execute("UPDATE _repl_state SET merging = 0")
            connection.execute("COMMIT")
        except sqlite3.OperationalError:  # the disk is full
            connection.execute("ROLLBACK")
            return False
        return changed > 0

    @contextlib.contextmanager
    def failing(self, steps: int, *, lasting: bool) -> Iterator[None]:
        """Interrupt SQLite at that step of its virtual machine, and, when lasting, at all that follow."""
        assert self._store is not None, "the disk is open"
        remaining = steps
        is_committing = False

        def watch(sql: str) -> None:
            # An interrupt within COMMIT comes when all is in the file: an error that no disk makes.
            nonlocal is_committing
            is_committing = sql == "COMMIT"

        def step() -> bool:
            nonlocal remaining
            if is_committing:
                return False
            remaining -= 1
            return remaining <= 0 if lasting else remaining == 0

        connection = self._store.connection
        connection.set_progress_handler(step, 1)
        connection.set_trace_callback(watch)
        try:
            yield
        finally:
            connection.set_progress_handler(None, 0)
            connection.set_trace_callback(None)
