"""Connections whose bytes are passed on as they are, between a client and one machine.

Decides how bytes, ends and cuts of one side become those of the other. Refuses to know what the bytes mean,
and which machine it is (see `core.tcp_session`). Invariants: a side whose other side takes nothing is not
read, so no more than the write buffer waits; the end of what one side sends is passed on behind its last
byte; what is no such end reaches the other side as a reset, so that nobody takes a part for the whole.

TLS cannot end in one direction only: with it, on either side, the end of one is the end of both.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

from .admission import MEMORY
from .core.addresses import name_peer
from .core.phase import Phase
from .core.proxy_protocol import render_announcement
from .core.tcp_session import TcpSession
from .sweeper import NEVER
from .transports import bound_unsent, go_on_reading, hold_reading, reset

if TYPE_CHECKING:
    from routing.table import Service

    from .core.plane import Plane
    from .core.proxy_protocol import Endpoint
    from .metrics import MachineMetrics


class Side(asyncio.Protocol):
    """One of the two connections; `peer` is the other one, from `join` on."""

    def __init__(self, plane: Plane) -> None:
        self.plane = plane
        self.transport: asyncio.Transport | None = None  # from connection_made to connection_lost
        self.peer: Side | None = None
        self._early = b""  # what came before there was a peer
        self._paused = False  # not reading
        self._received_end = False
        self._sent_end = False
        self._failed = False  # lost in another way than by an end

    # What the event loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport."""
        self.transport = cast("asyncio.Transport", transport)
        bound = self.plane.settings.write_buffer_bytes_max
        self.transport.set_write_buffer_limits(bound)
        bound_unsent(self.transport, bound)

    def data_received(self, data: bytes) -> None:
        """Pass bytes on, or keep the first ones until there is somebody to pass them to."""
        peer = self.peer
        if peer is None:
            self._early += data
            self.pause_reading()
        else:
            self.count(len(data))
            peer.write(data)

    def eof_received(self) -> bool:
        """Pass the end on; True while the other direction is open."""
        self._received_end = True
        if self.peer is not None:
            self.peer.end_writing()
        transport = self.transport
        return transport is not None and transport.can_write_eof() and not self._sent_end

    def pause_writing(self) -> None:
        """Stop the other side: this one takes nothing at the moment."""
        if self.peer is not None:
            self.peer.pause_reading()

    def resume_writing(self) -> None:
        """Let the other side go on."""
        if self.peer is not None:
            self.count(0)
            self.peer.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """Close the other side: behind what it still has to send if all ended well, else at once."""
        self.transport = None
        self._failed = exc is not None
        if self.peer is not None:
            self._end_peer(self.peer)

    # What the other side calls

    def join(self, peer: Side) -> None:
        """Pass on to the peer what came so far, and whatever comes."""
        self.peer = peer
        early, self._early = self._early, b""
        if early:
            self.count(len(early))
            peer.write(early)
        if self.transport is None:
            self._end_peer(peer)
        elif self._received_end:
            peer.end_writing()
        else:
            self.resume_reading()

    def write(self, data: bytes) -> None:
        """Send bytes of the other side."""
        transport = self.transport
        if transport is not None and not transport.is_closing():
            transport.write(data)

    def end_writing(self) -> None:
        """Send the end of the other side's bytes, behind them."""
        transport = self.transport
        if transport is None or transport.is_closing():
            return
        if transport.can_write_eof():
            self._sent_end = True
            transport.write_eof()
        else:
            transport.close()

    def pause_reading(self) -> None:
        """Stop reading from this side."""
        transport = self.transport
        if not self._paused and transport is not None and not transport.is_closing():
            self._paused = True
            hold_reading(transport)

    def resume_reading(self) -> None:
        """Go on reading from this side."""
        transport = self.transport
        if self._paused and transport is not None and not transport.is_closing():
            self._paused = False
            if not self._received_end:
                go_on_reading(transport)

    def close(self) -> None:
        """Close once everything is sent."""
        if self.transport is not None:
            self.transport.close()

    def abort(self) -> None:
        """Cut the connection, and let its peer know that this is no end."""
        if self.transport is not None:
            reset(self.transport)

    def count(self, size: int) -> None:
        """Count bytes that this side has sent, and that something moves."""
        raise NotImplementedError

    def _end_peer(self, peer: Side) -> None:
        if self._failed:
            peer.abort()
        else:
            peer.close()


class TcpMachine(Side):
    """The machine's side; `deadline` is the pool's to set, and the client's is the one that counts."""

    deadline = NEVER

    def __init__(self, client: TcpClient) -> None:
        super().__init__(client.plane)
        self._client = client

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Count it."""
        super().connection_made(transport)
        self.plane.metrics.upstreams += 1
        self.plane.metrics.upstreams_open += 1

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self.plane.metrics.upstreams_open -= 1
        super().connection_lost(exc)
        self._client.end_if_over()

    def announce(self, header: bytes) -> None:
        """Begin with a PROXY header."""
        self.write(header)

    def count(self, size: int) -> None:
        """Count bytes from the machine."""
        self._client.count_sent(size)


class TcpClient(Side):
    """The client's side, which owns both; `relays` is where the server and the sweeper find it.

    `server_name` is what the client asked for over TLS, as far as somebody has looked.
    """

    def __init__(
        self, plane: Plane, port: int, relays: set[TcpClient], service: Service, server_name: str
    ) -> None:
        super().__init__(plane)
        self.port = port
        self.deadline = NEVER
        # Source and destination as a trusted proxy in front told them; set before `connection_made`.
        self.announced: tuple[Endpoint, Endpoint] | None = None
        self.name = ""  # the client's address
        self.server_name = server_name
        self.bytes_in = 0
        self.bytes_out = 0
        self._relays = relays
        self._ends: tuple[Endpoint, Endpoint] = (("", 0), ("", 0))  # set by `connection_made`
        self._admitted: str | None = None  # what the connection is counted under; None when it is not
        self._session: TcpSession | None = None  # from `connection_made` until both sides are closed
        self._service = service
        self._counts: MachineMetrics | None = None  # set by `relay`
        options = service.options
        self._idle_timeout_s = (
            options.idle_timeout_s if options is not None else 0.0
        ) or plane.settings.tunnel_timeout_s

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Look for a machine, if this client may have one."""
        super().connection_made(transport)
        plane = self.plane
        self._relays.add(self)
        plane.metrics.connections += 1
        plane.metrics.connections_open += 1
        self._ends = self.announced or (
            _read_endpoint(transport.get_extra_info("peername")),
            _read_endpoint(transport.get_extra_info("sockname")),
        )
        self.name = self._ends[0][0]
        counted = plane.admission.name(self.name)
        refusal = MEMORY if plane.shedding else plane.admission.admit(counted)
        if refusal is None:
            self._admitted = counted
            self._session = TcpSession(plane, self, self._service)
            self._session.start()
        else:
            plane.metrics.count_shed(refusal)
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self.plane.metrics.connections_open -= 1
        if self._admitted is not None:
            self.plane.admission.leave(self._admitted)
        super().connection_lost(exc)
        self.end_if_over()

    def eof_received(self) -> bool:
        """Pass the end on; who leaves the queue without a word is not waited for."""
        if self._session is not None and self._session.phase is Phase.QUEUED and not self._early:
            self.abort()
        return super().eof_received()

    def end_if_over(self) -> None:
        """Close the books once both sides are closed."""
        if self.transport is None and (self.peer is None or self.peer.transport is None):
            self._relays.discard(self)
            self.deadline = NEVER
            session, self._session = self._session, None
            if session is not None:
                session.handle_closed()
            if self._counts is not None:
                self._counts.tcp_open -= 1
                self._counts = None

    def handle_deadline(self) -> None:
        """Nothing moved for too long, in either direction."""
        self.cut()

    def cut(self) -> None:
        """Cut both sides."""
        self.abort()
        if self.peer is not None:
            self.peer.abort()

    # What the session calls

    def make_machine(self) -> TcpMachine:
        """Return the protocol of a new connection to a machine."""
        return TcpMachine(self)

    def relay(self, machine: TcpMachine) -> None:
        """From now on pass bytes between both sides."""
        assert self._session is not None
        assert self._session.target is not None
        counts = self._counts = self.plane.metrics.machine(self._session.target)
        counts.tcp_connections += 1
        counts.tcp_open += 1
        self.count(0)
        self.join(machine)
        machine.join(self)

    def refuse(self) -> None:
        """No machine takes the connection."""
        self.abort()

    def announce(self, version: str) -> bytes:
        """Return the PROXY header for this client."""
        return render_announcement(version, *self._ends)

    # Counting

    def count(self, size: int) -> None:
        """Count bytes from the client."""
        self.bytes_in += size
        if self._counts is not None:
            self._counts.tcp_bytes_in += size
        self.deadline = self.plane.now() + self._idle_timeout_s

    def count_sent(self, size: int) -> None:
        """Count bytes from the machine."""
        self.bytes_out += size
        if self._counts is not None:
            self._counts.tcp_bytes_out += size
        self.deadline = self.plane.now() + self._idle_timeout_s


def _read_endpoint(address: object) -> Endpoint:
    """Return a socket's address; one that is closed already may have none."""
    return (name_peer(address[0]), address[1]) if isinstance(address, tuple) else ("127.0.0.1", 0)
