"""A session with a machine behind another node, in the shape of a connection.

For services without HTTP: what passes their bytes works on transports. Decides nothing. Refuses to know
frames and bytes. Invariant: the protocol hears of the end once, behind the last byte; and a machine's end
that was none in good order comes as an error, so that nobody takes a part for the whole. As with TLS, one
direction cannot end alone.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from .sweeper import NEVER

if TYPE_CHECKING:
    from .peer_upstream import PeerUpstream


class _NoSocket:
    """Options of a socket are those of the connection between the nodes, and not for its users to set."""

    def setsockopt(self, *_: object) -> None:
        """Leave it as it is."""


_NO_SOCKET: Final = _NoSocket()


class PeerTunnel(asyncio.Transport):
    """The transport of `protocol`; made when the session is open."""

    def __init__(self, upstream: PeerUpstream, protocol: asyncio.Protocol) -> None:
        super().__init__({"socket": _NO_SOCKET})
        self._upstream = upstream
        self._protocol = protocol
        self._closing = False
        upstream.start_tunnel(_MachineEnd(self, upstream, protocol))
        protocol.connection_made(self)

    def write(self, data: Any) -> None:
        """Send bytes to the machine."""
        if not self._closing:
            self._upstream.write_tunnelled(data)

    def can_write_eof(self) -> bool:
        """False: the end of one direction is the end of both."""
        return False

    def is_closing(self) -> bool:
        """True from the end of the session on."""
        return self._closing

    def pause_reading(self) -> None:
        """Stop reading what comes from the machine."""
        self._upstream.pause_reading()

    def resume_reading(self) -> None:
        """Go on reading what comes from the machine."""
        self._upstream.resume_reading()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Keep the limits that the connection between the nodes has."""

    def close(self) -> None:
        """Close once everything is sent."""
        if not self._closing:
            self._upstream.end_tunnel()
            self.end(None)

    def abort(self) -> None:
        """Cut the session, so that the machine's side is cut as well."""
        if not self._closing:
            self._upstream.reset()
            self.end(None)

    def end(self, error: Exception | None) -> None:
        """Tell the protocol of the end."""
        if not self._closing:
            self._closing = True
            asyncio.get_running_loop().call_soon(self._protocol.connection_lost, error)


class _MachineEnd:
    """What the session sees of a tunnel."""

    def __init__(self, tunnel: PeerTunnel, upstream: PeerUpstream, protocol: asyncio.Protocol) -> None:
        self._tunnel = tunnel
        self._upstream = upstream
        self._protocol = protocol

    def write_tunnelled(self, data: bytes) -> None:
        """Take bytes of the machine."""
        if not self._tunnel.is_closing():
            self._protocol.data_received(data)

    def pause_reading(self) -> None:
        """The machine takes nothing."""
        self._protocol.pause_writing()

    def resume_reading(self) -> None:
        """The machine takes bytes again."""
        self._protocol.resume_writing()

    def end_tunnel(self) -> None:
        """The machine has ended its connection, or the other node is gone."""
        clean = self._upstream.ended_cleanly
        self._tunnel.end(None if clean else ConnectionResetError("the machine's connection was cut"))

    def handle_deadline(self) -> None:
        """How long nothing may go through is for the client's side to say."""
        self._upstream.deadline = NEVER
