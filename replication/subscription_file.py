"""Keep subscriptions in a file beside the database, so that listeners can resume after a crash.

Decides what is on disk and when it is not to be trusted. A file of its own: writing it must not wait for
those who write to the database, nor they for it. Synchronous; for one thread.

Invariant: a change is in the file before anybody hears of it, so a number never stands for two changes.
After a power failure the last ones may be missing (synchronous=NORMAL): then all in the file is forgotten,
and whoever comes back is told that there is no such subscription. A file that fails, as on a full disk, is
removed: subscriptions go on in memory and end with the process.
"""

from __future__ import annotations

import logging
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from replication.core.codec import pack, unpack
from replication.core.subscription import Change, ChangeKind

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from replication.database import Params

log = logging.getLogger(__name__)

_FORMAT: Final = 1
_TABLES: Final = """
CREATE TABLE state (format INTEGER NOT NULL, boot TEXT NOT NULL, is_clean INTEGER NOT NULL);
CREATE TABLE subscription (
    id TEXT PRIMARY KEY, sql TEXT NOT NULL, params BLOB NOT NULL,
    columns BLOB NOT NULL, identity BLOB NOT NULL,
    last_row_id INTEGER NOT NULL, last_id INTEGER NOT NULL, seq INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE row (
    subscription TEXT NOT NULL, id INTEGER NOT NULL, cells BLOB NOT NULL, PRIMARY KEY (subscription, id)
) WITHOUT ROWID;
CREATE TABLE change (
    subscription TEXT NOT NULL, id INTEGER NOT NULL, kind TEXT NOT NULL, row_id INTEGER NOT NULL,
    cells BLOB NOT NULL, PRIMARY KEY (subscription, id)
) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class Saved:
    """A subscription as it is kept; seq is the commit that its rows include."""

    id: str
    sql: str
    params: Params
    columns: tuple[str, ...]
    identity: tuple[int, ...]
    last_row_id: int
    last_id: int
    seq: int
    rows: list[tuple[int, bytes]]
    changes: list[Change]


class SubscriptionFile:
    """The file, open. `is_lost` is set when it has failed and was removed; all calls do nothing then."""

    def __init__(self, path: Path, boot: str) -> None:
        self.is_lost = False
        self._path = path
        self._boot = boot
        self._connection: sqlite3.Connection | None = None

    def open(self) -> list[Saved]:
        """Open or create the file and return what it keeps; nothing when it cannot be trusted."""
        try:
            return self._open()
        except (sqlite3.Error, OSError, TypeError, ValueError) as error:
            log.warning("%s is made anew: %s", self._path, error)
        self._remove()
        self._guard(self._open)
        return []

    def _open(self) -> list[Saved]:
        self._connection = connection = sqlite3.connect(
            self._path, isolation_level=None, check_same_thread=False
        )
        connection.execute("PRAGMA journal_mode = WAL")
        # That we have begun must outlive a power failure, or what is lost by it would not be missed.
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("BEGIN IMMEDIATE")
        if connection.execute("SELECT 1 FROM sqlite_master").fetchone() is None:
            for statement in _TABLES.split(";\n"):
                connection.execute(statement)
            connection.execute("INSERT INTO state VALUES (?, ?, 1)", (_FORMAT, self._boot))
        number, boot, is_clean = connection.execute("SELECT format, boot, is_clean FROM state").fetchone()
        if number != _FORMAT:
            raise ValueError(f"it has format {number}")
        if not is_clean and (not boot or boot != self._boot):
            log.warning("%s was not closed before the machine restarted; it is emptied", self._path)
            for table in ("subscription", "row", "change"):
                connection.execute(f"DELETE FROM {table}")  # noqa: S608 - names of this file
        saved = self._load(connection)
        connection.execute("UPDATE state SET boot = ?, is_clean = 0", (self._boot,))
        connection.execute("COMMIT")
        connection.execute("PRAGMA synchronous = NORMAL")
        return saved

    def _load(self, connection: sqlite3.Connection) -> list[Saved]:
        found = []
        for saved in connection.execute("SELECT * FROM subscription").fetchall():
            id_, sql, params, columns, identity, last_row_id, last_id, seq = saved
            rows = connection.execute("SELECT id, cells FROM row WHERE subscription = ? ORDER BY id", (id_,))
            changes = connection.execute(
                "SELECT id, kind, row_id, cells FROM change WHERE subscription = ? ORDER BY id", (id_,)
            )
            found.append(
                Saved(
                    id_,
                    sql,
                    unpack(params),
                    tuple(unpack(columns)),
                    tuple(unpack(identity)),
                    last_row_id,
                    last_id,
                    seq,
                    rows.fetchall(),
                    [Change(number, ChangeKind(kind), row, cells) for number, kind, row, cells in changes],
                )
            )
        return found

    def create(self, saved: Saved) -> None:
        """Keep a subscription that is new."""

        def act() -> None:
            self._execute(
                "INSERT INTO subscription VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    saved.id,
                    saved.sql,
                    pack(saved.params),
                    pack(saved.columns),
                    pack(saved.identity),
                    saved.last_row_id,
                    saved.last_id,
                    saved.seq,
                ),
            )
            self._execute_many("INSERT INTO row VALUES (?, ?, ?)", [(saved.id, *row) for row in saved.rows])

        self._guard_transaction(act)

    def append(self, id_: str, changes: Sequence[Change], *, floor: int, last_row_id: int, seq: int) -> None:
        """Keep changes and the rows that they leave, and forget changes before floor."""
        if not changes:
            return

        def act() -> None:
            written = [(id_, c.row_id, c.cells) for c in changes if c.kind is not ChangeKind.DELETE]
            deleted = [(id_, c.row_id) for c in changes if c.kind is ChangeKind.DELETE]
            self._execute_many("INSERT OR REPLACE INTO row VALUES (?, ?, ?)", written)
            self._execute_many("DELETE FROM row WHERE subscription = ? AND id = ?", deleted)
            self._execute_many(
                "INSERT INTO change VALUES (?, ?, ?, ?, ?)",
                [(id_, change.id, change.kind.value, change.row_id, change.cells) for change in changes],
            )
            self._execute("DELETE FROM change WHERE subscription = ? AND id < ?", (id_, floor))
            self._execute(
                "UPDATE subscription SET last_row_id = ?, last_id = ?, seq = ? WHERE id = ?",
                (last_row_id, changes[-1].id, seq, id_),
            )

        self._guard_transaction(act)

    def drop(self, id_: str) -> None:
        """Forget a subscription."""

        def act() -> None:
            self._execute("DELETE FROM subscription WHERE id = ?", (id_,))
            self._execute("DELETE FROM row WHERE subscription = ?", (id_,))
            self._execute("DELETE FROM change WHERE subscription = ?", (id_,))

        self._guard_transaction(act)

    def close(self) -> None:
        """Close the file; one that is closed is trusted after a restart of the machine."""

        def act() -> None:
            self._execute("PRAGMA synchronous = FULL")
            self._execute("UPDATE state SET is_clean = 1")

        self._guard(act)
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _execute(self, sql: str, values: Sequence[Any] = ()) -> None:
        assert self._connection is not None, "the file is open"
        self._connection.execute(sql, values)

    def _execute_many(self, sql: str, values: Sequence[Sequence[Any]]) -> None:
        assert self._connection is not None, "the file is open"
        self._connection.executemany(sql, values)

    def _guard_transaction(self, act: Callable[[], None]) -> None:
        def within() -> None:
            self._execute("BEGIN IMMEDIATE")
            act()
            self._execute("COMMIT")

        self._guard(within)

    def _guard(self, act: Callable[[], Any]) -> None:
        """Do something with the file, or do without it from now on."""
        if self.is_lost:
            return
        try:
            act()
        except (sqlite3.Error, OSError) as error:
            log.warning("%s failed, so subscriptions will not outlive this process: %s", self._path, error)
            self._remove()
            self.is_lost = True

    def _remove(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        for suffix in ("", "-wal", "-shm"):
            try:
                Path(f"{self._path}{suffix}").unlink(missing_ok=True)
            except OSError as error:
                log.warning("%s%s cannot be removed: %s", self._path, suffix, error)
