"""Copy a replica to one file while others write to it, and make a replica of such a file again.

Decides what a backup is, when it is sound, and under which identity it comes back. Knows nothing of what
the tables are for, and needs no agent: it reads the file as any other SQLite client does, so that writes go
on meanwhile. Blocks; takes about as long as copying the file and reading it twice.

Invariant: a file under a backup's name is complete and was read back; what failed leaves nothing.

A backup is a SQLite database with one table more, which says when it was made and holds a digest of the
whole file (counted with zeros in the place of the digest). SQLite's own check does not see a changed byte
within a value. Nobody who opens a backup as a replica goes on under the identity of the node that it came
from: versions that this node has given out since would be given out again, for other changes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import sqlite3
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from .core.clock import SITE_BYTES, SiteId
from .errors import ReplicationError, StoreError
from .identity import renew_identity
from .sidetables import HELD_TABLE, has_common, pending_table
from .store import BUSY_TIMEOUT_MS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DIGEST_BYTES: Final = 32
# One slice of the copy: short enough that other threads of the process and a Ctrl-C are not kept waiting.
SLICE_PAGES: Final = 512
READ_BYTES: Final = 1 << 20
# A running agent gathers what others wrote within 25 ms; after this long there is none.
GATHER_S: Final = 5.0
GATHER_POLL_S: Final = 0.03


class BackupError(ReplicationError):
    """A backup cannot be made, is not sound, or cannot be put in place; nothing was changed."""


@dataclass(frozen=True, slots=True)
class BackupInfo:
    """What a sound backup says of itself."""

    path: Path
    site: SiteId  # that it was made of
    version: int  # the last of that site's own
    taken_ms: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Restored:
    """What was put in place: the backup, the identity that it goes on under, and what was there before."""

    backup: BackupInfo
    site: SiteId
    replaced: Path | None


# Making one


def make_backup(database: Path, target: Path, now_ms: int, *, keep: int | None = None) -> BackupInfo:
    """Copy a replica as it is at one moment; return what was made once it is on the disk and read back.

    Into a directory the name is made of the time, and with `keep` all but the newest so many of that
    directory, which is made where there is none, are removed afterwards. An existing file is never
    overwritten. Raises BackupError.
    """
    if keep is not None:
        if keep < 1:
            raise BackupError("how many to keep is a number from 1 on")
        with _told(target):
            target.mkdir(mode=0o700, exist_ok=True)
    directory = target if target.is_dir() else None
    if directory is not None:
        target = directory / f"{database.stem}-{_stamp(now_ms)}.db"
    with _told(target), _locked_directory(target.parent):
        if directory is not None:
            for stale in directory.glob(f".{database.stem}-*.db.part*"):
                stale.unlink()  # of a backup that was killed; one that goes on would have the lock
        if target.exists():
            raise BackupError(f"{target} exists; a backup overwrites nothing")
        with _part_of(target) as part:
            with contextlib.closing(_pin(database)) as source:
                _copy(source, part)
            _seal(part, now_ms)
            info = _check(part, f"the copy of {database}")
            _put(part, target)
        if keep is not None:
            _prune(target, database.stem, keep)
    return BackupInfo(target, info.site, info.version, info.taken_ms, info.size_bytes)


def _stamp(now_ms: int) -> str:
    moment = datetime.fromtimestamp(now_ms / 1000, UTC)
    return f"{moment:%Y%m%dT%H%M%S}.{now_ms % 1000:03d}Z"


def _pin(database: Path) -> sqlite3.Connection:
    """Return a connection whose view is fixed at a moment at which every write is part of a changeset.

    A write that is only noted would be in the copy's rows without a clock. The write lock is held for that
    moment alone; the view itself keeps nobody from writing, only the WAL from starting over.
    """
    if not database.exists():
        raise BackupError(f"{database}: there is no database")
    with _told(database), contextlib.ExitStack() as undo:
        guard = undo.enter_context(contextlib.closing(_connect(database, "rw")))
        reader = _connect(database, "ro")
        keep_reader = contextlib.ExitStack()
        keep_reader.callback(reader.close)
        undo.enter_context(keep_reader)
        if not has_common(guard):
            raise BackupError(f"{database} is no replica")
        deadline = time.monotonic() + GATHER_S
        while True:
            guard.execute("BEGIN IMMEDIATE")
            try:
                if not _is_noted(guard):
                    reader.execute("BEGIN")
                    reader.execute("SELECT seq FROM _repl_state").fetchone()
                    keep_reader.pop_all()
                    return reader
            finally:
                guard.execute("ROLLBACK")
            if time.monotonic() > deadline:
                raise BackupError(
                    f"{database} holds writes that no agent has gathered; start the node, then back it up"
                )
            time.sleep(GATHER_POLL_S)


def _is_noted(connection: sqlite3.Connection) -> bool:
    names = [name for (name,) in connection.execute("SELECT name FROM _repl_table").fetchall()]
    return any(
        connection.execute(f"SELECT EXISTS (SELECT 1 FROM {pending_table(name)})").fetchone()[0]  # noqa: S608 — quoted
        for name in names
    )


def _copy(source: sqlite3.Connection, part: Path) -> None:
    with contextlib.closing(_connect(part, "rw")) as copy:
        # Nobody reads the copy before it is complete, and what is not complete is thrown away.
        copy.execute("PRAGMA journal_mode = OFF")
        copy.execute("PRAGMA synchronous = OFF")
        source.backup(copy, pages=SLICE_PAGES)


def _seal(part: Path, now_ms: int) -> None:
    """Make the copy one that says what it is, stands without a WAL, and has nobody's identity."""
    mark = os.urandom(DIGEST_BYTES)
    with contextlib.closing(_connect(part, "rw")) as copy:
        copy.execute("PRAGMA journal_mode = DELETE")
        copy.execute("BEGIN")
        copy.execute("DROP TABLE IF EXISTS _repl_backup")
        copy.execute("CREATE TABLE _repl_backup (taken_ms INTEGER NOT NULL, digest BLOB NOT NULL)")
        copy.execute("INSERT INTO _repl_backup VALUES (?, ?)", (now_ms, mark))
        # As after a power failure: an agent that finds this file under the name of its own takes a new site.
        copy.execute("UPDATE _repl_state SET is_clean = 0, boot = ''")
        copy.execute("COMMIT")
    at = _find(part, mark)
    assert at is not None  # 32 bytes do not leave the page that their row is on
    digest = _compute_digest(part, at)
    with part.open("r+b") as file:
        file.seek(at)
        file.write(digest)


def _put(part: Path, target: Path) -> None:
    """Give a file its name, so that it is there after a power failure too, or not at all."""
    descriptor = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    part.rename(target)
    _sync_directory(target.parent)


def _prune(newest: Path, stem: str, keep: int) -> None:
    """Remove the oldest backups of a directory; the one just made stays, whatever the clock said."""
    ours = re.compile(rf"{re.escape(stem)}-\d{{8}}T\d{{6}}\.\d{{3}}Z\.db")
    others = sorted(
        file for file in newest.parent.iterdir() if ours.fullmatch(file.name) and file.name != newest.name
    )
    for file in others[: max(0, len(others) - (keep - 1))]:
        file.unlink()


# Judging one


def check_backup(path: Path) -> BackupInfo:
    """Read a backup from end to end and return what it says of itself; raises BackupError."""
    return _check(path, str(path))


def _check(path: Path, name: str) -> BackupInfo:
    with _told(name):
        if not path.is_file():
            raise BackupError(f"{name}: there is no such file")
        with contextlib.closing(_connect(path, "ro&immutable=1")) as backup:
            if not has_common(backup) or not _has_table(backup, "_repl_backup"):
                raise BackupError(f"{name} is not a backup: it was not made by this program")
            taken_ms, digest = backup.execute("SELECT taken_ms, digest FROM _repl_backup").fetchone()
            at = _find(path, digest) if len(digest) == DIGEST_BYTES else None
            if at is None or _compute_digest(path, at) != digest:
                raise BackupError(f"{name} is damaged: it is not what was written")
            (found,) = backup.execute("PRAGMA integrity_check(1)").fetchone()
            if found != "ok":
                raise BackupError(f"{name} is damaged: {found}")
            site, version = backup.execute(
                "SELECT t.site, s.version FROM _repl_state AS s JOIN _repl_site AS t ON t.ordinal = s.site"
            ).fetchone()
        return BackupInfo(path, SiteId(site), version, taken_ms, path.stat().st_size)


def _has_table(connection: sqlite3.Connection, name: str) -> bool:
    found = connection.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?", (name,))
    return found.fetchone() is not None


def _find(path: Path, mark: bytes) -> int | None:
    """Return where in a file some bytes are first, None when nowhere."""
    offset = 0
    tail = b""
    with path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            window = tail + chunk
            at = window.find(mark)
            if at >= 0:
                return offset - len(tail) + at
            offset += len(chunk)
            tail = window[-(len(mark) - 1) :]
    return None


def _compute_digest(path: Path, at: int) -> bytes:
    """Return the digest of a file with zeros in the place of the digest itself."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    with path.open("rb") as file:
        left = at
        while left and (chunk := file.read(min(READ_BYTES, left))):
            digest.update(chunk)
            left -= len(chunk)
        digest.update(bytes(DIGEST_BYTES))
        file.seek(at + DIGEST_BYTES)
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
    return digest.digest()


# Putting one in place


def restore_backup(backup: Path, database: Path, now_ms: int, *, keep_site: bool = False) -> Restored:
    """Put a backup in the place of a replica that no agent has open; the caller holds the agent's lock.

    It goes on as a new site, which knows all that the backup's site had written as that one's. With
    `keep_site` it is to be that site again: the file is marked, so that an agent first fetches from its peers
    what the site wrote after the backup. A database that is in the place is set aside. Raises BackupError;
    the place is as it was then.
    """
    with _told(backup), _part_of(database) as part:
        shutil.copyfile(backup, part)
        info = _check(part, str(backup))
        site = _adopt(part, keep_site=keep_site)
        replaced = _set_aside(database, now_ms)
        _put(part, database)
    return Restored(
        BackupInfo(backup, info.site, info.version, info.taken_ms, info.size_bytes), site, replaced
    )


def _adopt(part: Path, *, keep_site: bool) -> SiteId:
    with contextlib.closing(_connect(part, "rw")) as copy:
        copy.execute("BEGIN")
        copy.execute("DROP TABLE _repl_backup")
        if keep_site:
            copy.execute(f"CREATE TABLE IF NOT EXISTS {HELD_TABLE} (site BLOB NOT NULL)")
        else:
            renew_identity(copy, os.urandom(SITE_BYTES))
        # Closed properly, by whoever makes it: the identity that it has now is the one to go on under.
        copy.execute("UPDATE _repl_state SET is_clean = 1, home = ''")
        copy.execute("COMMIT")
        (site,) = copy.execute(
            "SELECT t.site FROM _repl_state AS s JOIN _repl_site AS t ON t.ordinal = s.site"
        ).fetchone()
    assert len(site) == SITE_BYTES
    return SiteId(site)


def _set_aside(database: Path, now_ms: int) -> Path | None:
    """Rename what is in the place. Its WAL goes first: a database would take another's for its own."""
    aside = database.with_name(f"{database.name}.replaced-{_stamp(now_ms)}")
    for suffix in ("-wal", "-shm", ""):
        file = database.with_name(database.name + suffix)
        if file.exists():
            file.rename(aside.with_name(aside.name + suffix))
    _sync_directory(database.parent)
    return aside if aside.exists() else None


# Files


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    return sqlite3.connect(uri, uri=True, isolation_level=None, timeout=BUSY_TIMEOUT_MS / 1000)


@contextlib.contextmanager
def _part_of(target: Path) -> Iterator[Path]:
    """Provide an empty file beside the target, for its owner alone, that is gone afterwards."""
    part = target.with_name(f".{target.name}.part")
    with contextlib.ExitStack() as undo:
        for suffix in ("", "-journal", "-wal", "-shm"):
            undo.callback(part.with_name(part.name + suffix).unlink, missing_ok=True)
        part.unlink(missing_ok=True)  # of one that was killed
        os.close(os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        yield part


@contextlib.contextmanager
def _locked_directory(directory: Path) -> Iterator[None]:
    """Let one backup at a time write to a directory."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BackupError(f"another backup into {directory} is under way") from None
        yield
    finally:
        os.close(descriptor)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _told(path: Path | str) -> Iterator[None]:
    """Raise a BackupError, which names the file, for what SQLite or the system says."""
    try:
        yield
    except OSError as error:
        raise BackupError(f"{error.filename or path}: {error.strerror}") from error
    except (sqlite3.Error, StoreError, TypeError, ValueError) as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        damaged = " is damaged" if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) else ""
        raise BackupError(f"{path}{damaged}: {error}") from error
