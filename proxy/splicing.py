"""Large bodies that go from socket to socket inside the kernel.

Decides when bytes move; refuses to know what they are and where they end beyond their number. A pipe stands
between the two sockets, and pages change hands instead of being copied through this process: a sixth less
CPU for a megabyte. Linux only, and not where bytes are looked at or changed: TLS, chunks, compression.

Invariant: a splice passes on exactly as many bytes as it was told, and none of them is lost while it runs;
what a slow reader leaves waiting is at most one pipe.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    import asyncio
    import socket

# What is left of a body must be worth four more files and two registrations, some 20 us.
SPLICED_BYTES_MIN: Final = 262_144
# What a slow reader leaves waiting; larger ones save nothing, half of it costs a tenth more.
PIPE_BYTES: Final = 131_072
# At a time, four files each; other bodies are copied.
SPLICES_MAX: Final = 256
# Fills of the pipe in one turn of the loop.
_FILLS_MAX: Final = 8
# Pipes kept for the next splice.
_IDLE_MAX: Final = 16
_FLAGS: Final = 1 | 2  # SPLICE_F_MOVE and SPLICE_F_NONBLOCK, which `os` names from 3.14 on
IS_POSSIBLE: Final = hasattr(os, "splice") and hasattr(fcntl, "F_SETPIPE_SZ")


class Owner(Protocol):
    """Who started a splice; the splice is over when one of the last three was called."""

    def handle_spliced(self, size: int, *, waits: bool) -> None:
        """So many bytes went on; `waits` when the reader had no room for others."""

    def handle_splice_ended(self, *, rest: bool) -> None:
        """All bytes went on; `rest` when others came behind them."""

    def handle_splice_cut(self) -> None:
        """The writer has closed its side, or failed."""

    def handle_splice_refused(self) -> None:
        """The reader's connection failed."""


class Pipes:
    """The pipes of one worker."""

    def __init__(self) -> None:
        self.running = 0
        self._idle: list[tuple[int, int]] = []

    def take(self) -> tuple[int, int]:
        """Return an empty pipe, as (to read from, to write to). Raises OSError."""
        pipe = self._idle.pop() if self._idle else _make_pipe()
        self.running += 1
        return pipe

    def put(self, pipe: tuple[int, int], *, empty: bool) -> None:
        """Take a pipe back."""
        self.running -= 1
        if empty and len(self._idle) < _IDLE_MAX:
            self._idle.append(pipe)
        else:
            _close(*pipe)

    def close(self) -> None:
        """Close those that nobody uses."""
        while self._idle:
            _close(*self._idle.pop())


class Splice:
    """Moves `left` bytes from one connected socket to another. Both stay open."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        pipes: Pipes,
        ends: tuple[socket.socket, socket.socket],
        left: int,
        owner: Owner,
    ) -> None:
        """Begin. Raises OSError when files are short; nothing has moved then."""
        self._loop = loop
        self._pipes = pipes
        self._owner: Owner | None = owner
        self._left = left  # not yet in the pipe
        self._held = 0  # in the pipe
        self._rest = False  # a byte of what is not to go on, in the pipe too
        self._pipe = pipes.take()
        self._files: list[int] = []
        try:
            # The loop does not let others wait for the files of its transports.
            for end in ends:
                self._files.append(os.dup(end.fileno()))
        except OSError:
            self.stop()
            raise
        self._waits_to_write = False
        loop.add_reader(self._files[0], self._fill)

    def stop(self) -> None:
        """End it where it is; nothing is called any more."""
        self._owner = None
        for file in self._files:
            self._loop.remove_reader(file)
            self._loop.remove_writer(file)
        _close(*self._files)
        self._files.clear()
        self._pipes.put(self._pipe, empty=not self._held and not self._rest)

    def _fill(self) -> None:
        # Until there is no more: after a reset uvloop tells of a file once, however much is still to be read.
        for _ in range(_FILLS_MAX):
            owner = self._owner
            if owner is None or self._waits_to_write:
                return
            try:
                # One more than there is to be, as the next answer must not begin with it.
                size = os.splice(self._files[0], self._pipe[1], min(self._left, PIPE_BYTES) + 1, flags=_FLAGS)
            except BlockingIOError:
                return
            except OSError:
                size = 0
            if not size:
                self.stop()
                owner.handle_splice_cut()
                return
            if size > self._left:
                size = self._left
                self._rest = True
            self._left -= size
            self._held += size
            self._drain()
        self._loop.call_soon(self._fill)

    def _drain(self) -> None:
        owner = self._owner
        if owner is None:
            return
        size = 0
        try:
            size = os.splice(self._pipe[0], self._files[1], self._held, flags=_FLAGS)
        except BlockingIOError:
            pass
        except OSError:
            self.stop()
            owner.handle_splice_refused()
            return
        self._held -= size
        if self._held:
            self._wait(to_write=True)
        elif self._left:
            self._wait(to_write=False)
        else:
            self.stop()
        owner.handle_spliced(size, waits=self._held > 0)
        if not self._held and not self._left:
            owner.handle_splice_ended(rest=self._rest)

    def _wait(self, *, to_write: bool) -> None:
        if to_write == self._waits_to_write:
            return
        self._waits_to_write = to_write
        source, sink = self._files
        if to_write:
            self._loop.remove_reader(source)
            self._loop.add_writer(sink, self._drain)
        else:
            self._loop.remove_writer(sink)
            self._loop.add_reader(source, self._fill)


def _make_pipe() -> tuple[int, int]:
    pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    # Refused to users with many pipes: a smaller one does the same.
    with contextlib.suppress(OSError):
        fcntl.fcntl(pipe[1], fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return pipe


def _close(*files: int) -> None:
    for file in files:
        os.close(file)
