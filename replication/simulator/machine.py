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

    def __init__(self, seed: int, index: int, schema: Schema, store_class: type[Store], renews: bool) -> None:
        self.is_full = False
        self._rng = Random(f"{seed}/disk/{index}")
        self._schema = schema
        self._store_class = store_class
        self._renews = renews  # whether a store that comes back from a power failure is told so
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
            boot=f"boot {self._boot if self._renews else 0}",
            make_site=lambda: SiteId(self._rng.randbytes(16)),
        )
        self.sync()  # opening syncs the identity
        self.set_full(self.is_full)
        return self._store

    def sync(self) -> None:
        """Make all that was committed survive a power failure."""
        assert self._store is not None, "the disk is open"
        self._synced = self._store.connection.serialize()

    def kill(self) -> None:
        """End a life with the process: what was committed is in the operating system's hands."""
        assert self._store is not None, "the disk is open"
        self._left = self._store.connection.serialize()
        self._store.connection.close()
        self._store = None

    def cut_power(self) -> None:
        """End a life with the machine: what was not synced is lost."""
        assert self._store is not None, "the disk is open"
        self._left = self._synced
        self._boot += 1
        self._store.connection.close()
        self._store = None

    def set_full(self, is_full: bool) -> None:
        """Allow the file to grow, or not."""
        self.is_full = is_full
        if self._store is not None:
            self._store.connection.execute(f"PRAGMA max_page_count = {1 if is_full else _PAGES_MAX}")

    @contextlib.contextmanager
    def failing(self, steps: int) -> Iterator[None]:
        """Interrupt SQLite once after so many steps of its virtual machine, if it makes as many."""
        assert self._store is not None, "the disk is open"
        remaining = steps

        def step() -> bool:
            nonlocal remaining
            remaining -= 1
            return remaining == 0

        connection = self._store.connection
        connection.set_progress_handler(step, 1)
        try:
            yield
        finally:
            connection.set_progress_handler(None, 0)
