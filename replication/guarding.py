"""Notice that the file is no longer what this replica left in it, and keep its WAL bounded.

Decides whether the file may still be written to: somebody may have put an older one in its place, or dropped
a replicated table. Does not know rows or changesets. Invariant: a file that holds another state than memory
does not go on under the site that it names, for its versions would stand for two things.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, NoReturn

from . import sidetables
from .errors import ReplacedError, SchemaError
from .identity import read_home
from .staging import prepare_staging

if TYPE_CHECKING:
    from collections.abc import Collection

    from .schema import Schema

# What a WAL keeps of its size when it begins anew; SQLite itself begins anew at 4 MB when no reader is in it.
WAL_KEPT_BYTES: Final = 8 << 20
# A checkpoint of somebody else is read half-way for a moment; what cannot be read for longer is no database.
_UNREADABLE_MAX = 40


class State(NamedTuple):
    """What the file says of the replica; each commit changes it."""

    site: bytes
    version: int
    seq: int


def read_state(connection: sqlite3.Connection) -> State | None:
    """Return what the file says; None when it is not a replica."""
    try:
        row = connection.execute(
            "SELECT t.site, s.version, s.seq FROM _repl_state AS s JOIN _repl_site AS t ON t.ordinal = s.site"
        ).fetchone()
    except sqlite3.OperationalError as error:
        if "no such table" in str(error):
            return None
        raise
    return None if row is None else State(*row)


class FileGuard:
    """Looks after one open file."""

    def __init__(
        self, connection: sqlite3.Connection, path: str, schema: Schema, staged: Collection[str] | None = None
    ) -> None:
        self.problem = ""  # what is wrong with the tables, so long as others leave them so
        self._connection = connection
        self._path = path
        self._schema = schema
        self._staged = staged
        self._home = read_home(path)
        self._is_disowned = False
        self._is_overwritten = False  # set with the former, when the WAL belongs to what the file held before
        self._shape: tuple[int, int, int] | None = None  # of the file, when it was last looked into
        self._in_file: State | None = None  # what it holds without its WAL, as of then
        self._unreadable = 0  # looks in a row that found nothing
        self._schema_version = self._read_schema_version()
        connection.execute(f"PRAGMA journal_size_limit = {WAL_KEPT_BYTES}")

    def check_state(self, expected: State) -> None:
        """Raise ReplacedError unless the file holds this state."""
        found = read_state(self._connection)
        if found != expected:
            self.refuse("another state was put into it" if found else "it is not a replica any more")

    def check_not_older(self, expected: State) -> None:
        """Raise ReplacedError when the file holds an older state, or another site's."""
        try:
            found = read_state(self._connection)
        except sqlite3.DatabaseError as error:
            if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                self.check_file(expected)  # something that was copied over it, with our WAL on top
            raise
        if found is None or found.site != expected.site or found < expected:
            self.refuse("an older state was put into it")

    def check_file(self, expected: State, *, anew: bool = True) -> None:
        """Raise ReplacedError when another file is in its place, or something was copied over it.

        A checkpoint brings the file forward, to no more than what we know, and nothing else writes to it.
        SQLite sees none of this: our connection reads its cache and the WAL. Without anew, the file is looked
        into only when it was written to.
        """
        if self._path == ":memory:":
            return
        try:
            found = os.stat(self._path)  # noqa: PTH116 - every 25 ms: this costs 2 µs
        except FileNotFoundError:
            self._refuse_content("it was removed")
        if str(found.st_ino) != self._home:
            self._refuse_content("another file is in its place")
        shape = (found.st_ino, found.st_mtime_ns, found.st_size)
        if not anew and shape == self._shape:
            return
        state, last = self._read_without_wal(), self._in_file
        if state is not None:
            if state.seq > expected.seq or (last is not None and state.seq < last.seq):
                self._refuse_content("another state was copied over it")
            if state.site not in (expected.site, (last or state).site):
                self._refuse_content("another node's state was copied over it")
        elif last is not None:
            self._unreadable += 1
            if self._unreadable > _UNREADABLE_MAX:
                self._refuse_content("what was copied over it is no database of ours")
            return
        self._shape, self._in_file, self._unreadable = shape, state, 0

    def _read_without_wal(self) -> State | None:
        uri = f"{Path(self._path).absolute().as_uri()}?immutable=1"
        try:
            with closing(sqlite3.connect(uri, uri=True)) as fresh:
                return read_state(fresh)
        except sqlite3.Error:
            return None

    def has_schema_moved(self) -> bool:
        """True when somebody has changed tables or triggers since they were last as they should be."""
        return self._read_schema_version() != self._schema_version

    def restore_schema(self) -> None:
        """Bring back what was dropped, within the caller's transaction; rows come from peers."""
        self._connection.execute("SAVEPOINT restoring")
        try:
            sidetables.migrate(self._connection, self._schema)
            if self._staged is not None:
                prepare_staging(self._connection, self._schema, self._staged)
            self.problem = ""
        except SchemaError as error:
            self._connection.execute("ROLLBACK TO restoring")
            self.problem = str(error)
        self._connection.execute("RELEASE restoring")
        self._schema_version = self._read_schema_version()

    def disown(self) -> bool:
        """Have the file become another site when it is next opened; call it instead of a clean close.

        Return False when the file is still ours.
        """
        if not self._is_disowned:
            return False
        if self._is_overwritten:
            # It would be written over what the file holds now, by the close or by the next who opens it. To
            # empty it makes the checkpoint of the close fail, as SQLite does not look at names again.
            with contextlib.suppress(OSError):
                os.truncate(f"{self._path}-wal", 0)
            for suffix in ("-wal", "-shm"):
                Path(self._path + suffix).unlink(missing_ok=True)
        self._connection.close()
        uri = f"{Path(self._path).absolute().as_uri()}?mode=rw"
        try:
            with closing(sqlite3.connect(uri, uri=True)) as fresh, fresh:
                fresh.execute("UPDATE _repl_state SET is_clean = 0, boot = ''")
        except sqlite3.Error:
            # Somebody holds on to it. A copy has another inode, and so becomes another site as well.
            with contextlib.suppress(OSError):
                shutil.copyfile(self._path, f"{self._path}-disowned")
                Path(f"{self._path}-disowned").replace(self._path)
        return True

    def wal_bytes(self) -> int:
        """Return the size of the WAL."""
        try:
            return Path(f"{self._path}-wal").stat().st_size
        except FileNotFoundError:
            return 0

    def checkpoint(self, bytes_max: int, wait_ms: int) -> int:
        """Empty a WAL that is larger than that, waiting so long for its readers; return its size then.

        Who begins to read when all of it was copied to the file does not read in it, so the wait ends with
        the longest of those who read now. Nobody can write meanwhile.
        """
        if self.wal_bytes() <= bytes_max:
            return self.wal_bytes()
        (busy_ms,) = self._connection.execute("PRAGMA busy_timeout").fetchone()
        self._connection.execute(f"PRAGMA busy_timeout = {wait_ms}")
        try:
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        finally:
            self._connection.execute(f"PRAGMA busy_timeout = {busy_ms}")
        return self.wal_bytes()

    def _read_schema_version(self) -> int:
        return int(self._connection.execute("PRAGMA schema_version").fetchone()[0])

    def refuse(self, reason: str) -> NoReturn:
        """Raise ReplacedError, and remember that the file is to be disowned."""
        self.renounce(f"{self._path} is not the file that this node had: {reason}")

    def renounce(self, reason: str) -> NoReturn:
        """Raise ReplacedError, and remember that the file must not go on as the site that it is."""
        self._is_disowned = True
        raise ReplacedError(reason)

    def _refuse_content(self, reason: str) -> NoReturn:
        self._is_overwritten = True
        self.refuse(reason)
