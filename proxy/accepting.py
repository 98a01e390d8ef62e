"""Taking connections off a listening socket.

Decides how many at a time, and when to pause; refuses to know what becomes of them. For listeners that look
at a connection before the event loop may have it. Invariant: after `stop` nothing is taken any more, and the
socket is closed.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

# Connections taken in one turn of the loop before requests get theirs again.
ACCEPTS_A_TURN: Final = 64
# Without file descriptors, accepting at once again would only spin.
_PAUSE_S: Final = 0.5


class Acceptor:
    """One listening socket; `admit` gets each connection, with the address of its other end."""

    def __init__(self, admit: Callable[[socket.socket, str], None]) -> None:
        self._admit = admit
        self._loop = asyncio.get_running_loop()
        self._socket: socket.socket | None = None  # from `start` to `stop`
        self._backlog = 0

    def start(self, sock: socket.socket, backlog: int) -> None:
        """Accept connections on a bound socket."""
        sock.setblocking(False)
        sock.listen(backlog)
        self._socket = sock
        self._backlog = backlog
        self._loop.add_reader(sock, self.accept)

    def stop(self) -> None:
        """Take what the kernel has accepted, which it resets when nobody does, and no more."""
        for _ in range(self._backlog // ACCEPTS_A_TURN):
            self.accept()
        if self._socket is not None:
            self._loop.remove_reader(self._socket)
            self._socket.close()
            self._socket = None

    def accept(self) -> None:
        """Take what has come, or the first ACCEPTS_A_TURN of it."""
        for _ in range(ACCEPTS_A_TURN):
            if self._socket is None:
                return
            try:
                sock, peer = self._socket.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError:
                self._loop.remove_reader(self._socket)
                self._loop.call_later(_PAUSE_S, self._resume)
                return
            self._admit(sock, peer[0].partition("%")[0])

    def _resume(self) -> None:
        if self._socket is not None:
            self._loop.add_reader(self._socket, self.accept)
