"""A connection to another node, which passes on what a machine of its is to get.

Decides where sessions begin and end on it; in a session it behaves as a connection to the machine does.
Refuses to know which nodes there are. Invariant: what comes before the other node has said OPENED belongs to
a session that is over, and nobody gets it; and an answer that ends where its connection does is only complete
when the other node says that it was the machine who ended it.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Final

from .core.errors import CONNECT_FAILED, ERRORS, UPSTREAM_RESET, UPSTREAM_TIMEOUT
from .core.peer_frames import (
    CLEAN,
    DATA,
    ENDED,
    GOODBYE,
    HELLO,
    KEPT,
    OPENED,
    REFUSED,
    FrameError,
    FrameReader,
    Order,
    encode_data,
    encode_open,
    encode_release,
    parse_hello,
    parse_refusal,
)
from .peer_metrics import LOST
from .peer_metrics import REFUSED as REFUSED_KIND
from .sweeper import NEVER
from .upstream import State, Upstream

if TYPE_CHECKING:
    import asyncio

    from routing.peering import Relay

    from .core.exchange import Exchange
    from .core.framing import Data
    from .core.plane import Seeker
    from .peer_pool import PeerPool
    from .pool import Pool

# What is told when a machine's connection must not be kept; no count comes near.
_NOT_TO_BE_KEPT: Final = 2**63


class Session(Enum):
    """Where the session of a connection stands."""

    NONE = 1
    OPENING = 2  # asked for, and not answered
    OPEN = 3


class PeerUpstream(Upstream):
    """An open connection to `relay`; the pool of peers makes it and takes it back."""

    def __init__(self, pool: Pool, peers: PeerPool, relay: Relay) -> None:
        super().__init__(pool, (relay.host, relay.port, None))
        self.relay = relay
        # The name that the other node begins with; empty when the connection ended before.
        self.greeting: asyncio.Future[str] = pool.loop.create_future()
        self.label = ""  # of what it has proved itself with; set when it is connected
        self._peers = peers
        self._counts = peers.metrics.node(relay.node)
        self._frames = FrameReader()
        self._session = Session.NONE
        self._seeker: Seeker | None = None  # who is told of OPENED, from `open` to then
        self._unsent = b""  # an OPEN that leaves with the first bytes behind it
        self._used = False  # it has had a session before
        self._received = 0  # bytes of DATA in this session
        self._answer_by = NEVER  # when OPENED or REFUSED has to be here
        self._awaited = False  # the request was sent before the session was open
        self._ended = False  # the other node has ended the session, and the connection is as good as new
        self._leaving = False  # it takes no more sessions

    def open(self, order: Order, seeker: Seeker, deadline: float, *, eager: bool) -> None:
        """Begin a session. An `eager` request follows at once; else the seeker is told when it is open."""
        assert self._session is Session.NONE
        assert self.transport is not None
        self._session = Session.OPENING
        self.reused, self._used = self._used, True
        self._received = 0
        self._awaited = self._ended = False
        self._announced = False
        self._reusable = True
        self._counts.requests += 1
        self.deadline = self._answer_by = deadline
        self._unsent = encode_open(order)
        announcement = seeker.announcement()
        if announcement:
            self.announce(announcement)
        if not eager:
            self._seeker = seeker
            self.transport.write(self._unsent)
            self._unsent = b""

    # What an exchange calls

    def begin(self, exchange: Exchange) -> None:
        """Deliver what comes from now on to this exchange."""
        super().begin(exchange)
        self._keep_deadline()

    def write(self, data: Data) -> None:
        """Send bytes for the machine."""
        if self.transport is not None and self._session is not Session.NONE and data:
            pieces = encode_data(data)
            if self._unsent:
                # One record of TLS, and one system call, for both.
                pieces = (self._unsent + pieces[0], *pieces[1:])
                self._unsent = b""
            self.transport.writelines(pieces)

    def await_response(self) -> None:
        """The request is sent: the machine has a limited time, once it has been reached."""
        if self._session is Session.OPENING:
            self._awaited = True
        else:
            super().await_response()

    def release(self) -> None:
        """End the exchange and its session; keep the connection if its answer ended cleanly."""
        self._exchange = None
        transport = self.transport
        if self._state is not State.IDLE or self._session is not Session.OPEN or transport is None:
            self.close()
            return
        kept = self._reusable and not self._announced and not transport.get_write_buffer_size()
        transport.write(encode_release(self._received if kept else _NOT_TO_BE_KEPT))
        self._recycle()

    def close(self) -> None:
        """End the exchange, and the connection unless the other node has ended the session already."""
        if self._ended:
            self._exchange = None
            self._peer = None
            self._recycle()
        else:
            super().close()

    def cut(self) -> None:
        """Close the connection; who uses it is told that it is lost."""
        if self.transport is not None:
            self.transport.abort()

    def _keep_deadline(self) -> None:
        """Let no other wait take the place of that for the answer to OPEN."""
        if self._session is Session.OPENING:
            self.deadline = self._answer_by

    def _recycle(self) -> None:
        self._session = Session.NONE
        self._ended = False
        self._state = State.IDLE
        self._body = None
        self._buffer = b""
        if self._paused:
            self.resume_reading()
        if self._leaving:
            super().close()
        else:
            self._peers.put(self)

    # What the event loop calls

    def data_received(self, data: bytes) -> None:
        """Take frames."""
        try:
            for kind, payload in self._frames.feed(data):
                self._take_frame(kind, payload)
        except FrameError as error:
            self._fail_seeker(CONNECT_FAILED, f"node {self.relay.node}: {error}")
            self.cut()

    def connection_lost(self, exc: Exception | None) -> None:
        """The other node is gone, or has had enough of us."""
        self._counts.opened -= 1
        self._peers.forget(self)
        if self._session is not Session.NONE and self._state is not State.CLOSED:
            self._counts.fail(LOST)
        self._session = Session.NONE
        self._ended = False
        if not self.greeting.done():
            self.greeting.set_result("")
        self._fail_seeker(CONNECT_FAILED, f"node {self.relay.node} closed the connection")
        # An answer that ends with the connection is not complete when it is this one that ended.
        super().connection_lost(exc or ConnectionResetError())

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport."""
        super().connection_made(transport)
        self._counts.connections += 1
        self._counts.opened += 1

    def pause_writing(self) -> None:
        """The other node does not read."""
        super().pause_writing()
        self._keep_deadline()

    def resume_writing(self) -> None:
        """The other node reads again."""
        super().resume_writing()
        self._keep_deadline()

    def handle_deadline(self) -> None:
        """A wait took too long."""
        if self._session is not Session.OPENING:
            super().handle_deadline()
            return
        self._counts.fail(LOST)
        self._peers.handle_silent(self)
        if self._seeker is not None:
            self._fail_seeker(UPSTREAM_TIMEOUT, f"node {self.relay.node} did not answer in time")
            super().close()
        else:
            # Others are likely to wait in vain as well: this request goes to another machine, if it may.
            self.reused = False
            self._lose(UPSTREAM_RESET, f"node {self.relay.node} did not answer in time")

    def _offer_splice(self, exchange: Exchange) -> None:
        """Copy: bytes of the answer come in frames."""

    # Frames

    def _take_frame(self, kind: int, payload: bytes) -> None:
        session = self._session
        if kind == DATA:
            if session is Session.OPEN:
                self._received += len(payload)
                super().data_received(payload)
        elif kind == OPENED:
            if session is Session.OPENING:
                self._handle_opened(kept=payload == KEPT)
        elif kind == REFUSED:
            if session is Session.OPENING:
                self._handle_refused(*parse_refusal(payload))
        elif kind == ENDED:
            if session is Session.OPEN:
                self._handle_ended(clean=payload == CLEAN)
        elif kind == GOODBYE:
            self._leaving = True
            self._peers.forget(self)
            if session is Session.NONE:
                super().close()
        elif kind == HELLO and not self.greeting.done():
            self.greeting.set_result(parse_hello(payload))
        else:
            raise FrameError("an unknown frame")

    def _handle_opened(self, *, kept: bool) -> None:
        self._session = Session.OPEN
        self.reused = kept
        self.deadline = NEVER
        seeker, self._seeker = self._seeker, None
        if seeker is not None:
            seeker.handle_connected(self)
        elif self._awaited:
            super().await_response()

    def _handle_refused(self, code: str, reason: str) -> None:
        self._counts.fail(REFUSED_KIND)
        self.deadline = NEVER
        exchange, seeker = self._exchange, self._seeker
        self._exchange = self._seeker = None
        self._recycle()
        code = code if code in ERRORS else CONNECT_FAILED
        detail = f"through node {self.relay.node}: {reason}"
        if seeker is not None:
            seeker.handle_connect_failed(code, detail)
        elif exchange is not None:
            exchange.handle_unreached(code, detail)

    def _handle_ended(self, *, clean: bool) -> None:
        self._ended = True
        self.deadline = NEVER
        self._end_stream(clean=clean)
        if self._ended:  # nobody has taken the connection back
            self.close()

    def _fail_seeker(self, code: str, detail: str) -> None:
        seeker, self._seeker = self._seeker, None
        if seeker is not None:
            seeker.handle_connect_failed(code, detail)
