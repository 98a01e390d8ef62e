"""Chunks on disk beside the database: a snapshot waits there, not in memory, for a slow peer.

Decides nothing. Knows nothing of what a chunk holds. Invariant: the file has no name, so that nothing of it
is left when the process ends, however it ends.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from replication.host import SpoolError

# Against a peer that sends without end.
SPOOL_BYTES_MAX = 16 * 1024**3


class DiskSpool:
    """One spool."""

    def __init__(self, directory: Path) -> None:
        self._size = 0
        # cast: typeshed has a wrapper class for what is a plain file
        self._file = cast("BinaryIO", tempfile.TemporaryFile(dir=directory))  # noqa: SIM115 - closed by close

    def write(self, chunk: bytes) -> None:
        """Add a chunk; raises SpoolError, OSError."""
        self._size += len(chunk)
        if self._size > SPOOL_BYTES_MAX:
            raise SpoolError("snapshot_size")
        self._file.write(len(chunk).to_bytes(4, "big"))
        self._file.write(chunk)

    def read(self) -> Iterator[bytes]:
        """Return the chunks from the first on."""
        self._file.seek(0)
        while header := self._file.read(4):
            yield self._file.read(int.from_bytes(header, "big"))

    def close(self) -> None:
        """Let go of what is held."""
        self._file.close()
