"""Where other nodes connect that want requests passed on to machines of this one.

Decides who is let in: over TLS whoever shows a certificate that this node accepts, and without a cluster key
only what comes from this machine. Refuses to know what is asked for. Invariant: a stranger gets no byte of
ours but those of a handshake, and at most `HANDSHAKES_MAX` connections are before the end of theirs.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from typing import TYPE_CHECKING, Final

from .accepting import Acceptor
from .peer_session import PeerSession

if TYPE_CHECKING:
    from .core.plane import Plane
    from .peer_pool import Identity, PeerPool

HANDSHAKES_MAX: Final = 256
# Two round trips around the world, with a packet lost.
HANDSHAKE_TIMEOUT_S: Final = 5.0
_BACKLOG: Final = 1_024


class PeerListener:
    """One listening socket, and all connections that came in on it."""

    def __init__(self, plane: Plane, peers: PeerPool, identity: Identity, sessions: set[PeerSession]) -> None:
        self._sessions = sessions  # all that are open
        self._plane = plane
        self._peers = peers
        self._identity = identity
        self._metrics = peers.metrics
        self._loop = asyncio.get_running_loop()
        self._acceptor = Acceptor(self._admit)
        self._pending: dict[asyncio.Task[None], None] = {}  # the oldest is first

    def start(self, sock: socket.socket) -> None:
        """Accept connections on a bound socket."""
        self._acceptor.start(sock, _BACKLOG)

    def drain(self) -> None:
        """Take what the kernel has accepted and no more; sessions go on, and no more are asked for."""
        self._acceptor.stop()
        for session in list(self._sessions):
            session.drain()

    @property
    def is_busy(self) -> bool:
        """True while there are connections, of which each may bring one more session."""
        return bool(self._pending or self._sessions)

    def close_idle(self) -> None:
        """End connections without a session."""
        for session in list(self._sessions):
            session.close_idle()

    def recheck(self) -> None:
        """Cut connections whose other side is not accepted any more."""
        for session in list(self._sessions):
            if not self._identity.accepts(session.label):
                session.abort()

    async def close(self) -> None:
        """Cut everything."""
        self._acceptor.stop()
        for task in self._pending:
            task.cancel()
        if self._pending:
            await asyncio.wait(list(self._pending))
        for session in list(self._sessions):
            session.abort()
        while self._sessions:  # noqa: ASYNC110 - each turn is one of the loop, and there are two or three
            await asyncio.sleep(0)

    def _admit(self, sock: socket.socket, address: str) -> None:
        contexts = self._identity.contexts()
        if contexts is None and not ipaddress.ip_address(address).is_loopback:
            sock.close()
            self._metrics.turn_away("no_key")
            return
        if len(self._pending) >= HANDSHAKES_MAX:
            # An honest node takes two round trips: the oldest is the one least likely to be one.
            next(iter(self._pending)).cancel()
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # see PeerSession.handle_deadline
        task = self._loop.create_task(self._shake_hands(sock, None if contexts is None else contexts[0]))
        self._pending[task] = None
        task.add_done_callback(self._pending.pop)

    async def _shake_hands(self, sock: socket.socket, context: ssl.SSLContext | None) -> None:
        """Hand the socket to the event loop, which from here on closes it whatever happens."""
        timeout_s = None if context is None else HANDSHAKE_TIMEOUT_S
        try:
            transport, session = await self._loop.connect_accepted_socket(
                lambda: PeerSession(self._plane, self._peers, self._sessions),
                sock,
                ssl=context,
                ssl_handshake_timeout=timeout_s,
            )
        except ssl.SSLError:
            self._metrics.turn_away("refused")
        except OSError:
            self._metrics.turn_away("closed")
        else:
            session.label = self._identity.label(transport)
