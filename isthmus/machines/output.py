"""What machines that are processes say, in the log of their node.

Decides how much of it is logged. Refuses to know processes. Invariant: a machine that says too much, or never
ends a line, costs a bounded amount of memory and log.
"""

from __future__ import annotations

import asyncio
import logging
import os
import stat
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

log = logging.getLogger(__name__)

LINE_BYTES_MAX: Final = 1_000
# More is no log any more; what was left out is counted and told.
LINES_PER_S_MAX: Final = 200


class Lines:
    """Cuts bytes into lines. Pure: `now` is given, and what is to be logged is returned."""

    def __init__(self) -> None:
        self._rest = b""
        self._second = 0
        self._count = 0
        self._dropped = 0

    def feed(self, data: bytes, now: float) -> list[str]:
        """Return the lines to log; what comes after LINE_BYTES_MAX of a line is cut."""
        told: list[str] = []
        if int(now) != self._second:
            self._second, self._count = int(now), 0
            if self._dropped:
                told.append(f"({self._dropped} lines were too much for a second and are left out)")
                self._dropped = 0
        *lines, rest = (self._rest + data).split(b"\n")
        # Of an endless line the beginning is kept, and what follows is passed over up to its end.
        self._rest = rest[: LINE_BYTES_MAX + 1]
        for line in lines:
            text = line.rstrip(b"\r")
            if not text:
                continue
            if self._count >= LINES_PER_S_MAX:
                self._dropped += 1
                continue
            self._count += 1
            cut = b" \xe2\x80\xa6" if len(text) > LINE_BYTES_MAX else b""
            told.append((text[:LINE_BYTES_MAX] + cut).decode("utf-8", "replace"))
        return told


class Output:
    """A named pipe in which a machine writes, also while nobody reads it.

    The machine has both ends open, so it is not ended by a write when this node's agent is restarted; the
    next agent reads on. `_reader` is set from `open` to `close`.
    """

    def __init__(self, machine: str, path: Path) -> None:
        self._machine = machine
        self._path = path
        self._lines = Lines()
        self._reader = -1

    def open(self) -> None:
        """Begin to read. Raises OSError."""
        if not (self._path.exists() and stat.S_ISFIFO(self._path.stat().st_mode)):
            self._path.unlink(missing_ok=True)
            os.mkfifo(self._path, 0o600)
        self._reader = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        asyncio.get_running_loop().add_reader(self._reader, self._read)

    def open_for_machine(self) -> int:
        """Return a descriptor for its standard output; to be closed once it has it."""
        return os.open(self._path, os.O_RDWR | os.O_CLOEXEC)

    def close(self) -> None:
        """Stop reading; the pipe stays for as long as the machine runs."""
        if self._reader >= 0:
            asyncio.get_running_loop().remove_reader(self._reader)
            os.close(self._reader)
            self._reader = -1

    def _read(self) -> None:
        try:
            data = os.read(self._reader, 65_536)
        except BlockingIOError:
            return
        now = asyncio.get_running_loop().time()
        for line in self._lines.feed(data or b"\n", now):
            log.info("a machine says", extra={"machine": self._machine, "line": line})
        if not data:
            self.close()  # nobody has it open for writing any more: it has ended
