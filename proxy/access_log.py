"""The access log of a worker: lines into a file or to standard output.

Decides which requests are logged and when lines are written. Refuses to know what is in them.
Invariant: traffic never waits for the log. Lines are written by a thread, many at a time; when it
cannot keep up they are dropped and counted.
"""

from __future__ import annotations

import logging
import os
import queue
import select
import stat
import threading
from typing import TYPE_CHECKING, Final

from .core.access_line import RENDERERS

if TYPE_CHECKING:
    from .core.access_line import Entry
    from .metrics import ProxyMetrics

STDOUT: Final = "-"
# Handed over before the sweeper's next pass when there is so much: bounds memory between two passes.
_BATCH_BYTES: Final = 65_536
# Batches that wait for a slow disk: some 16 MiB.
_WAITING_MAX: Final = 256
# Rotated logs are readable for the group that collects them.
_MODE: Final = 0o640

# Told from batches by identity.
_REOPEN: Final[list[bytes]] = []
_END: Final[list[bytes]] = []

log = logging.getLogger(__name__)


class AccessLog:
    """Open from its creation, which raises OSError, until `close`."""

    # For the sweeper: always due.
    deadline = 0.0

    def __init__(self, file: str, style: str, one_in: int, metrics: ProxyMetrics) -> None:
        self._file = file
        self._render = RENDERERS[style]
        self._one_in = one_in
        self._metrics = metrics
        self._skipped = 0  # requests since the last one that was logged
        self._lines: list[bytes] = []
        self._bytes = 0  # of the lines
        self._batches: queue.Queue[list[bytes]] = queue.Queue(_WAITING_MAX)
        self._descriptor = self._open()
        self._thread = threading.Thread(target=self._write_all, name="access-log", daemon=True)
        self._thread.start()

    def samples(self) -> bool:
        """Count a request; True when it is one that is logged."""
        self._skipped += 1
        if self._skipped < self._one_in:
            return False
        self._skipped = 0
        return True

    def add(self, entry: Entry) -> None:
        """Log a request."""
        line = self._render(entry)
        self._lines.append(line)
        self._bytes += len(line)
        if self._bytes >= _BATCH_BYTES:
            self.handle_deadline()

    def handle_deadline(self) -> None:
        """Hand over what is here."""
        if self._lines:
            try:
                self._batches.put_nowait(self._lines)
            except queue.Full:
                self._metrics.log_lines_dropped += len(self._lines)
            self._lines = []
            self._bytes = 0

    def reopen(self) -> None:
        """Go on in a new file of the same name: the old one was moved away."""
        self.handle_deadline()
        try:
            self._batches.put_nowait(_REOPEN)
        except queue.Full:
            log.warning("access log: too far behind to reopen %s now", self._file)

    def close(self, timeout_s: float = 5.0) -> None:
        """Write what is here, as far as that takes no longer than the timeout."""
        self.handle_deadline()
        try:
            self._batches.put(_END, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout_s)

    def _open(self) -> int:
        if self._file == STDOUT:
            return os.dup(1)
        return os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, _MODE)

    # In the thread

    def _write_all(self) -> None:
        while (lines := self._batches.get()) is not _END:
            if lines is _REOPEN:
                self._reopen_now()
                continue
            try:
                self._write(lines)
            except OSError as error:
                self._metrics.log_lines_dropped += len(lines)
                log.warning("access log: cannot write %s: %s", self._file, error.strerror)
        os.close(self._descriptor)

    def _reopen_now(self) -> None:
        try:
            descriptor = self._open()
        except OSError as error:
            log.warning(
                "access log: cannot reopen %s: %s; going on in the old file", self._file, error.strerror
            )
            return
        os.close(self._descriptor)
        self._descriptor = descriptor

    def _write(self, lines: list[bytes]) -> None:
        if stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            self._write_piece(b"".join(lines))
            return
        # Workers share a pipe: only what is no longer than this is not mixed with what others write.
        piece = b""
        for line in lines:
            if piece and len(piece) + len(line) > select.PIPE_BUF:
                self._write_piece(piece)
                piece = b""
            piece += line
        self._write_piece(piece)

    def _write_piece(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._descriptor, data) :]
