"""One connection to a machine.

Decides where an answer begins and ends on the wire and whether the connection can be used again.
Refuses to know what a request is and what becomes of the answer. Invariant: a connection on which a
byte came that no exchange asked for is closed and never used again.
"""

from __future__ import annotations

import asyncio
import contextlib
from enum import Enum
from typing import TYPE_CHECKING, Final, cast

from .core.errors import BAD_RESPONSE, UPSTREAM_RESET, UPSTREAM_TIMEOUT, ResponseError
from .core.framing import COPIED_BYTES_MAX, Body, BodyError, ChunkedBody, Data, FixedBody, UntilClose
from .core.plane import Machine
from .core.response_head import SWITCHING_PROTOCOLS, parse_response_head
from .core.usual_heads import read_usual_response
from .splicing import IS_POSSIBLE, SPLICED_BYTES_MIN, SPLICES_MAX, Splice
from .sweeper import NEVER
from .transports import go_on_reading, hold_reading, read_left, reset

if TYPE_CHECKING:
    from .core.exchange import Exchange
    from .core.plane import TunnelEnd
    from .core.response_head import ResponseHead
    from .pool import MachineAddress, Pool


class State(Enum):
    """What the next byte on the wire would be."""

    IDLE = 1  # a violation
    HEAD = 2  # of a head
    BODY = 3
    DISCARD = 4  # of a body that nobody wants
    TUNNEL = 5
    CLOSED = 6


_IDLE: Final = State.IDLE
_HEAD: Final = State.HEAD
_BODY: Final = State.BODY
_DISCARD: Final = State.DISCARD
_TUNNEL: Final = State.TUNNEL
_CLOSED: Final = State.CLOSED


class Upstream(asyncio.Protocol, Machine):
    """An open connection to `address`; the pool makes it and takes it back."""

    def __init__(self, pool: Pool, address: MachineAddress) -> None:
        self.pool = pool
        self.address = address
        self.deadline = NEVER
        self.reused = False  # set when it goes back to the pool
        self._announced = False  # it began with a PROXY header: for one client only
        self.transport: asyncio.Transport | None = None  # from connection_made to connection_lost
        self._state = _IDLE
        self._exchange: Exchange | None = None  # set by `begin`, cleared when its answer ends
        self._buffer = b""  # the part of a head that is here
        self._body: Body | None = None
        self._reusable = True  # false from `begin` until a head says otherwise
        self._paused = False  # not reading
        self._blocked = False  # from pause_writing to resume_writing
        self._discard_left = 0
        self._splice: Splice | None = None  # moves the rest of the body
        self._peer: TunnelEnd | None = None  # the client's side of a tunnel
        self.ended_cleanly = False  # set when the machine ends the connection in good order
        self._loop = pool.loop

    def announce(self, header: bytes) -> None:
        """Begin with a PROXY header; the connection is never used for another exchange."""
        self._announced = True
        self.write(header)

    # What an exchange calls

    def begin(self, exchange: Exchange) -> None:
        """Deliver what comes from now on to this exchange."""
        assert self._state is _IDLE
        self._exchange = exchange
        self._state = _HEAD
        self._reusable = False
        self.deadline = NEVER

    def write(self, data: Data) -> None:
        """Send bytes of the request."""
        if self.transport is not None:
            self.transport.write(data)

    def await_response(self) -> None:
        """The request is sent: the machine has a limited time to answer."""
        if self._state is _HEAD:
            self.deadline = self._loop.time() + self.pool.settings.response_timeout_s

    def pause_reading(self) -> None:
        """Stop reading the answer."""
        if not self._paused and self.transport is not None:
            self._paused = True
            hold_reading(self.transport)
            self.deadline = NEVER  # the client's limits hold meanwhile

    def resume_reading(self) -> None:
        """Go on reading the answer."""
        if self._paused and self.transport is not None:
            self._paused = False
            go_on_reading(self.transport)
            if self._state is _BODY:
                self.deadline = self._loop.time() + self.pool.settings.stream_timeout_s
            elif self._state is _TUNNEL:
                self._await_tunnel()

    def release(self) -> None:
        """End the exchange; keep the connection if its answer ended cleanly."""
        self._exchange = None
        transport = self.transport
        # What is not even sent cannot have been read by the machine: its answer came too early.
        if (
            self._state is _IDLE
            and self._reusable
            and not self._announced
            and transport is not None
            and not transport.get_write_buffer_size()
        ):
            self.reused = True
            if self._paused:
                self.resume_reading()
            self.pool.put(self)
        else:
            self.close()

    def discard(self) -> None:
        """End the exchange; read the rest of the answer if it is small, then as `release`."""
        self._exchange = None
        if self._state is _BODY and self._reusable:
            self._state = _DISCARD
            self._discard_left = self.pool.settings.discard_bytes_max
            self.resume_reading()
            self.deadline = self._loop.time() + self.pool.settings.linger_s
        else:
            self.release()

    def close(self) -> None:
        """End the exchange and the connection."""
        self._stop_splice()
        self._exchange = None
        self._peer = None
        self._state = _CLOSED
        if self.transport is not None:
            self.transport.abort()

    def start_tunnel(self, peer: TunnelEnd) -> None:
        """Pass bytes to and from the client from now on."""
        self._state = _TUNNEL
        self._exchange = None
        self._peer = peer
        self._await_tunnel()

    def write_tunnelled(self, data: bytes) -> None:
        """Send bytes of the client."""
        self.write(data)
        self._await_tunnel()

    def _await_tunnel(self) -> None:
        if not self._blocked:
            self.deadline = self._loop.time() + self.pool.settings.tunnel_timeout_s

    def end_tunnel(self) -> None:
        """The client's side has ended: send what is left, then close."""
        self._peer = None
        self._state = _CLOSED
        if self.transport is not None:
            settings = self.pool.settings
            waits = self.transport.get_write_buffer_size() > 0
            self.deadline = self._loop.time() + (settings.send_timeout_s if waits else settings.linger_s)
            self.transport.close()

    def reset(self) -> None:
        """Close at once, and so that the other side knows this for no end in good order."""
        if self.transport is not None:
            reset(self.transport)
        self.close()

    def leave_tunnel(self) -> None:
        """Nothing is under way in the tunnel any more: the connection can carry an exchange."""
        self._peer = None
        self._state = _IDLE
        self.deadline = NEVER
        self.release()

    # What the event loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport."""
        self.transport = cast("asyncio.Transport", transport)
        self.transport.set_write_buffer_limits(self.pool.settings.write_buffer_bytes_max)
        self.pool.add(self)

    def data_received(self, data: bytes) -> None:
        """Take bytes of an answer."""
        state = self._state
        if state is _HEAD:
            try:
                self._read_head(self._buffer + data if self._buffer else data)
            except (ResponseError, BodyError) as error:
                self._lose(BAD_RESPONSE, str(error))
        elif state is _BODY:
            self._read_body(data)
        elif state is _TUNNEL:
            if self._peer is not None:
                self._await_tunnel()
                self._peer.write_tunnelled(data)
        elif state is _DISCARD:
            self._discard_body(data)
        else:
            # Nobody asked: an answer before its request, or what followed a complete one.
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """End whatever was going on."""
        if exc is not None and self._state in {_HEAD, _TUNNEL} and self.transport is not None:
            # A machine that answers before it has the whole body, and closes: its answer counts.
            left = read_left(self.transport)
            if left:
                self._announced = True  # never kept for another request
                self.data_received(left)
        self._stop_splice()
        self.transport = None
        self.deadline = NEVER
        self.pool.remove(self)
        self._end_stream(clean=exc is None)

    def _end_stream(self, *, clean: bool) -> None:
        self.ended_cleanly = clean
        if self._peer is not None:
            peer, self._peer = self._peer, None
            self._state = _CLOSED
            peer.end_tunnel()
            return
        exchange = self._exchange
        if exchange is not None and self._state is _BODY and clean and type(self._body) is UntilClose:
            self._exchange = None
            self._state = _CLOSED
            exchange.handle_response_body(b"", ended=True)
        else:
            self._lose(UPSTREAM_RESET, "")

    def pause_writing(self) -> None:
        """The machine does not read: stop the client, and wait only so long."""
        self._blocked = True
        if self._peer is not None:
            self._peer.pause_reading()
        elif self._exchange is not None:
            self._exchange.handle_machine_slow(slow=True)
        self.deadline = self._loop.time() + self.pool.settings.send_timeout_s

    def resume_writing(self) -> None:
        """The machine reads again."""
        self._blocked = False
        if self._peer is not None:
            self._peer.resume_reading()
            self._await_tunnel()
        elif self._exchange is not None:
            self.deadline = NEVER
            self._exchange.handle_machine_slow(slow=False)
            if self._exchange is not None and self._exchange.body_ended:
                self.await_response()

    def handle_deadline(self) -> None:
        """A wait took too long."""
        if self._state is _TUNNEL and self._peer is not None:
            self._peer.handle_deadline()
        elif self._exchange is not None:
            self._lose(UPSTREAM_TIMEOUT, "")
        else:
            self.close()

    # The answer

    def _lose(self, code: str, detail: str) -> None:
        exchange = self._exchange
        self.close()
        if exchange is not None:
            exchange.handle_machine_lost(code, detail)

    def _read_head(self, data: bytes) -> None:
        settings = self.pool.settings
        exchange = self._exchange
        assert exchange is not None
        while True:
            end = data.find(b"\r\n\r\n") + 4
            if end < 4 or end > settings.response_head_bytes_max:
                if len(data) > settings.response_head_bytes_max:
                    raise ResponseError("the head is too large")
                self._buffer = data
                return
            head = read_usual_response(data[: end - 4]) or parse_response_head(data[:end])
            if head.status >= 200 or head.status == SWITCHING_PROTOCOLS:
                break
            if not exchange.handle_informational(head):
                raise ResponseError("too many informational answers")
            if self._exchange is not exchange:
                return
            data = data[end:]
        self._buffer = b""
        if head.status == SWITCHING_PROTOCOLS:
            self._state = _IDLE
            exchange.handle_response(head, data[end:], ended=False)
        elif len(data) - end > COPIED_BYTES_MAX and not head.chunked and not head.replay_json:
            self._take_head(exchange, head, memoryview(data)[end:])
        else:
            self._take_head(exchange, head, b"" if end == len(data) else data[end:])

    def _take_head(self, exchange: Exchange, head: ResponseHead, rest: Data) -> None:
        self._reusable = head.keep_alive
        length = head.content_length
        to_head = exchange.head.method == b"HEAD"
        if length == 0 or head.is_bodiless(to_head=to_head):
            self._end(rest=bool(rest))
            exchange.handle_response(head, b"", ended=True)
            return
        if length == len(rest):
            self._end(rest=False)
            exchange.handle_response(head, rest, ended=True)
            return
        body: Body
        data: Data = b""
        if head.chunked:
            body = ChunkedBody(bound_overhead=False)
            data = body.feed(bytes(rest)) if rest else b""
        elif length > 0:
            body = FixedBody(length)
            data = body.feed(rest)
        else:
            body = UntilClose()
            data = body.feed(rest)
            self._reusable = False
        self._body = body
        self._state = _BODY
        if body.ended:
            self._end(rest=bool(body.rest))
        else:
            self.deadline = self._loop.time() + self.pool.settings.stream_timeout_s
        exchange.handle_response(head, data, ended=body.ended)
        if type(body) is FixedBody and body.left >= SPLICED_BYTES_MIN:
            self._offer_splice(exchange)

    def _end(self, *, rest: bool) -> None:
        """The answer is complete; whatever follows it poisons the connection."""
        self._state = _IDLE
        self._body = None
        self.deadline = NEVER
        if rest:
            self._reusable = False

    def _read_body(self, data: bytes) -> None:
        body, exchange = self._body, self._exchange
        assert body is not None
        assert exchange is not None
        try:
            piece = body.feed(data)
        except BodyError as error:
            self._lose(BAD_RESPONSE, str(error))
            return
        if body.ended:
            self._end(rest=bool(body.rest))
        else:
            self.deadline = self._loop.time() + self.pool.settings.stream_timeout_s
        exchange.handle_response_body(piece, ended=body.ended)
        if type(body) is FixedBody and body.left >= SPLICED_BYTES_MIN:
            self._offer_splice(exchange)

    # The rest of a large body, see `splicing`

    def _offer_splice(self, exchange: Exchange) -> None:
        """Let the kernel move what is left, if all that was sent before has gone by the next turn."""
        transport = self.transport
        if (
            IS_POSSIBLE
            and self._exchange is exchange
            and transport is not None
            and not self._paused
            and transport.can_write_eof()
            and exchange.is_verbatim()
            and self.pool.pipes.running < SPLICES_MAX
        ):
            self.pause_reading()
            self._loop.call_soon(self._start_splice, exchange)

    def _start_splice(self, exchange: Exchange) -> None:
        body, transport = self._body, self.transport
        if self._exchange is not exchange or type(body) is not FixedBody or transport is None:
            return
        sink = exchange.client.give_socket()
        if sink is not None:
            # Where files are short the bytes are copied.
            with contextlib.suppress(OSError):
                ends = (transport.get_extra_info("socket"), sink)
                self._splice = Splice(self._loop, self.pool.pipes, ends, body.left, self)
                self.deadline = self._loop.time() + self.pool.settings.stream_timeout_s
                return
        if not exchange.client.is_blocked():
            self.resume_reading()

    def handle_spliced(self, size: int, *, waits: bool) -> None:
        """Bytes of the body went on inside the kernel."""
        body, exchange = self._body, self._exchange
        assert type(body) is FixedBody
        assert exchange is not None
        body.left -= size
        exchange.count_spliced(size, waits=waits)
        self.deadline = NEVER if waits else self._loop.time() + self.pool.settings.stream_timeout_s

    def handle_splice_ended(self, *, rest: bool) -> None:
        """All of the body is there."""
        exchange = self._exchange
        assert exchange is not None
        self._splice = None
        self._end(rest=rest)
        self.resume_reading()
        exchange.handle_response_body(b"", ended=True)

    def handle_splice_cut(self) -> None:
        """The machine has ended too early."""
        self._splice = None
        self._lose(UPSTREAM_RESET, "")

    def handle_splice_refused(self) -> None:
        """The client is gone."""
        self._splice = None
        if self._exchange is not None:
            self._exchange.client.abort()

    def _stop_splice(self) -> None:
        splice, self._splice = self._splice, None
        if splice is not None:
            splice.stop()

    def _discard_body(self, data: bytes) -> None:
        body = self._body
        assert body is not None
        self._discard_left -= len(data)
        try:
            body.feed(data)
        except BodyError:
            self._discard_left = -1
        if self._discard_left < 0:
            self.close()
        elif body.ended:
            self._end(rest=bool(body.rest))
            self.release()
