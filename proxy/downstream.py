"""One connection of a client.

Decides where requests begin and end on the wire, and that they are answered one after the other in
their order. Refuses to know machines and answers. Invariant: at any time at most one exchange, and
no byte of the next request is parsed before its answer is complete.
"""

from __future__ import annotations

import asyncio
from enum import Enum
from typing import TYPE_CHECKING, Final, cast

from routing.balancer import ANYWHERE
from routing.hosts import normalise_host
from routing.options import TLS_VERSIONS

from .admission import CLIENT_CONNECTIONS, CLIENT_RATE, MEMORY, name_client
from .core.addresses import name_peer
from .core.errors import (
    BAD_BODY,
    BAD_HEAD,
    BODY_OVER_LIMIT,
    HEAD_TOO_LARGE,
    MISDIRECTED,
    NO_ROUTE,
    OVERLOADED,
    REQUEST_TIMEOUT,
    TOO_MANY_CONNECTIONS,
    URL_TOO_LONG,
    RequestError,
)
from .core.exchange import Exchange
from .core.explain_proof import take_proof
from .core.explained_exchange import ExplainedExchange
from .core.forwarding import INSECURE, read_client
from .core.framing import Body, BodyError, BodyTooLargeError, ChunkedBody, Data, FixedBody
from .core.logged_exchange import LoggedExchange
from .core.plane import Client
from .core.proxy_protocol import announce_client
from .core.refusals import redirect, refuse
from .core.request_head import RequestHead, parse_request_head
from .core.traced_exchange import TracedExchange
from .core.usual_heads import Fields, read_usual_request
from .core.wishes import take_wishes
from .sweeper import NEVER
from .transports import bound_unsent, go_on_reading, hold_reading, reset

if TYPE_CHECKING:
    import socket

    from routing.table import Service

    from .core.forwarding import Forwarding
    from .core.plane import Machine, Plane
    from .core.proxy_protocol import Endpoint
    from .upstream import Upstream


class State(Enum):
    """What the next byte on the wire would be."""

    HEAD = 1
    BODY = 2
    BUSY = 3  # of a request whose turn has not come
    DISCARD = 4  # of a body that nobody wants
    TUNNEL = 5
    LINGER = 6  # nothing: the last answer is on its way


_HEAD: Final = State.HEAD
_BODY: Final = State.BODY
_BUSY: Final = State.BUSY
_DISCARD: Final = State.DISCARD
_TUNNEL: Final = State.TUNNEL
_LINGER: Final = State.LINGER

# Room for the method and the space behind it; no registered method is half as long.
_METHOD_BYTES_MAX: Final = 32


class Downstream(asyncio.Protocol, Client):
    """An accepted connection; `clients` is where the server finds it."""

    def __init__(self, plane: Plane, forwarding: Forwarding, port: int, clients: set[Downstream]) -> None:
        self.port = port
        self.deadline = NEVER
        # Source and destination as a trusted proxy in front told them; set before `connection_made`.
        self.announced: tuple[Endpoint, Endpoint] | None = None
        # Asked for in the TLS handshake, in lower case; empty: no name; None: no TLS. Set like `announced`.
        self.server_name: bytes | None = None
        self._plane = plane
        self._forwarding = forwarding
        self._clients = clients
        self._transport: asyncio.Transport | None = None  # from connection_made to connection_lost
        self._state = _HEAD
        self._exchange: Exchange | None = None  # set from the end of a head to the end of its answer
        self._machine: Upstream | None = None  # the other side of a tunnel
        self._buffer = b""  # bytes whose turn has not come, or the part of a head that is here
        self._body: Body | None = None  # of the request being read
        self._said: Fields | None = None  # by the last request, to compare the next one with
        self._discard_left = 0
        self._paused = False  # not reading
        self._reading = False  # heads are being taken off the buffer further up the stack
        self._blocked = False  # from pause_writing to resume_writing: no next request meanwhile
        self._half_closed = False  # it has said all that it will say, and waits for the rest of its answers
        self._begun = False  # the first bytes of the current head are here
        self._blank_seen = False  # an empty line before the current head was forgiven
        self._peer = ""
        self._trusted = False
        self._admitted: str | None = None  # what the connection is counted under; None when it is not
        self.adopt_log()
        self._requests_left = plane.settings.requests_per_connection_max
        self._forwarded = b""  # lines about this client for machines; for trusted peers made per request

    # What the event loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport."""
        self._transport = transport = cast("asyncio.Transport", transport)
        plane = self._plane
        transport.set_write_buffer_limits(plane.settings.write_buffer_bytes_max)
        peer = transport.get_extra_info("peername")
        if isinstance(peer, tuple):
            if self.announced is not None:
                peer = self.announced[0]
            self._peer = name_peer(peer[0])
            bound_unsent(transport, plane.settings.write_buffer_bytes_max)
        else:
            self._peer = "127.0.0.1"
        self._trusted = self._forwarding.trusts(self._peer)
        self._forwarded = self._forwarding.lines_for_peer(self._peer)
        self._clients.add(self)
        plane.metrics.connections += 1
        plane.metrics.connections_open += 1
        counted = "" if self._trusted else name_client(self._peer)
        # Over TLS that was counted before the handshake.
        arrives = self._forwarding.secure or plane.admission.arrives(counted, plane.now(), secure=False)
        refusal = plane.admission.admit(counted) if arrives else CLIENT_RATE
        if refusal is None:
            self._admitted = counted
            self.deadline = plane.now() + plane.settings.head_timeout_s
        else:
            self._turn_away(refusal)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the reason changes nothing
        """Stop whatever was going on."""
        self._transport = None
        self.deadline = NEVER
        self._clients.discard(self)
        self._plane.metrics.connections_open -= 1
        if self._admitted is not None:
            self._plane.admission.leave(self._admitted)
        exchange, self._exchange = self._exchange, None
        if self._machine is not None:
            machine, self._machine = self._machine, None
            machine.end_tunnel()
            if exchange is not None:
                exchange.handle_tunnel_closed()
        elif exchange is not None:
            exchange.handle_client_lost()

    def data_received(self, data: bytes) -> None:
        """Take bytes of requests."""
        state = self._state
        if state is _HEAD:
            self._buffer = self._buffer + data if self._buffer else data
            if self._blocked:
                self._limit_buffer()
            else:
                self._read_heads()
        elif state is _BODY:
            self._read_body(data)
        elif state is _BUSY:
            self._buffer += data
            self._limit_buffer()
        elif state is _TUNNEL:
            if self._machine is not None and self._exchange is not None:
                self._exchange.count_tunnelled(len(data), 0)
                self._machine.write_tunnelled(data)
        elif state is _DISCARD:
            self._discard_body(data)

    def eof_received(self) -> bool:
        """The client sends no more; True if it may still want an answer. Over TLS it gets nothing more."""
        transport = self._transport
        if transport is not None and self._state is not _LINGER and not transport.can_write_eof():
            transport.abort()
        # An incomplete request stays incomplete; others may wait for the client to read.
        waits = self._state is _BUSY or (self._blocked and bool(self._buffer))
        self._half_closed = waits and self._plane.settings.half_close
        return self._half_closed

    def _limit_buffer(self) -> None:
        if len(self._buffer) > self._plane.settings.head_bytes_max:
            self.pause_reading()

    def pause_writing(self) -> None:
        """The client does not read: stop the machine, and wait only so long."""
        self._blocked = True
        if self._machine is not None:
            self._machine.pause_reading()
        elif self._exchange is not None:
            self._exchange.handle_client_slow(slow=True)
        self.deadline = self._plane.now() + self._plane.settings.send_timeout_s

    def resume_writing(self) -> None:
        """The client reads again."""
        self._blocked = False
        settings = self._plane.settings
        if self._machine is not None:
            self._machine.resume_reading()
            self.deadline = NEVER
        elif self._exchange is not None:
            self._exchange.handle_client_slow(slow=False)
            reading = self._state is _BODY and not self._paused
            self.deadline = self._plane.now() + settings.body_timeout_s if reading else NEVER
        elif self._state is _HEAD:
            self._await_head()
            self._read_heads()

    def handle_deadline(self) -> None:
        """A wait took too long."""
        if self._blocked or self._transport is None:
            self.abort()
        elif self._state is _HEAD and self._buffer:
            self._refuse(RequestError(REQUEST_TIMEOUT))
        elif self._state is _BODY:
            self._fail_body(RequestError(REQUEST_TIMEOUT))
        elif self._state is _HEAD:
            self._close_gently(unread=False)
        else:
            self.abort()

    # What an exchange calls

    def write(self, data: Data) -> None:
        """Send bytes of the answer."""
        transport = self._transport
        if transport is not None and not (transport.is_closing() and self._is_gone(transport)):
            transport.write(data)

    def writelines(self, pieces: tuple[Data, ...]) -> None:
        """Send bytes of the answer, not joined, in one system call."""
        transport = self._transport
        if transport is not None and not (transport.is_closing() and self._is_gone(transport)):
            transport.writelines(pieces)

    def _is_gone(self, transport: asyncio.Transport) -> bool:
        """True, and cut, if a closing connection takes nothing more, as with TLS."""
        if transport.can_write_eof():
            return False
        transport.abort()
        return True

    def give_socket(self) -> socket.socket | None:
        """Return the socket, for bytes of the answer that go past `write`; None while others wait."""
        transport = self._transport
        if transport is None or transport.get_write_buffer_size() or not transport.can_write_eof():
            return None
        return cast("socket.socket", transport.get_extra_info("socket"))

    def is_blocked(self) -> bool:
        """Return True while more waits to be sent than should."""
        return self._blocked

    def await_reader(self, *, waits: bool) -> None:
        """Give the client its time to take what goes past `write`; not `waits`: it took all there was."""
        self.deadline = self._plane.now() + self._plane.settings.send_timeout_s if waits else NEVER

    def pause_body(self) -> None:
        """Stop reading the request body."""
        if self._state is _BODY:
            self.pause_reading()
            self.deadline = NEVER

    def resume_body(self) -> None:
        """Go on reading the request body."""
        if self._state is _BODY and self._paused:
            self.resume_reading()
            self.deadline = self._plane.now() + self._plane.settings.body_timeout_s

    def finish(self, *, keep: bool) -> None:
        """End the exchange; go on with the next request, or close."""
        self._exchange = None
        state = self._state
        if self._transport is None:
            return
        if not keep or (self._half_closed and not self._buffer):
            self._close_gently(unread=state is _BODY)
        elif state is _BODY:
            self._state = _DISCARD
            self._discard_left = self._plane.settings.discard_bytes_max
            self.resume_reading()
            self.deadline = self._plane.now() + self._plane.settings.linger_s
        else:
            self._await_head()
            if self._buffer and not self._reading:
                self._read_heads()

    def abort(self) -> None:
        """Cut the connection."""
        transport, exchange = self._transport, self._exchange
        if transport is not None:
            if exchange is not None and exchange.head.minor == 0:
                # To HTTP/1.0 an end in good order may be that of the answer.
                reset(transport)
            else:
                transport.abort()

    def announce(self, version: str, forwarded: bytes) -> bytes:
        """Return the PROXY header for the client of a request that has these lines about it."""
        transport, ends = self._transport, self.announced
        if ends is None and transport is not None:
            peer, own = transport.get_extra_info("peername"), transport.get_extra_info("sockname")
            if isinstance(peer, tuple) and isinstance(own, tuple):
                ends = (self._peer, peer[1]), (name_peer(own[0]), own[1])
        return announce_client(version, read_client(forwarded).decode("ascii"), ends, self.port)

    def start_tunnel(self, machine: Machine, data: bytes) -> None:
        """Pass bytes between the client and the machine from now on."""
        # The only machines that there are outside of tests of the core.
        self._machine = upstream = cast("Upstream", machine)
        self._state = _TUNNEL
        self.deadline = NEVER
        upstream.start_tunnel(self)
        if data:
            self.write_tunnelled(data)
        early, self._buffer = self._buffer, b""
        self.resume_reading()
        if early:
            self.data_received(early)

    # What the other side of a tunnel calls

    def write_tunnelled(self, data: bytes) -> None:
        """Send bytes of the machine."""
        if self._exchange is not None:
            self._exchange.count_tunnelled(0, len(data))
        transport = self._transport
        if transport is not None and not (transport.is_closing() and self._is_gone(transport)):
            transport.write(data)

    def end_tunnel(self) -> None:
        """The machine's side has ended: send what is left, then close."""
        self._machine = None
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.handle_tunnel_closed()
        self._close_gently(unread=False)

    def pause_reading(self) -> None:
        """Stop reading from the client."""
        if not self._paused and self._transport is not None:
            self._paused = True
            hold_reading(self._transport)

    def resume_reading(self) -> None:
        """Go on reading from the client."""
        if self._paused and self._transport is not None:
            self._paused = False
            go_on_reading(self._transport)

    # What the server calls

    def drain(self, idle_s: float) -> None:
        """Close if no request has come for so long; the next answer will be the last one anyway."""
        transport = self._transport
        if self._state is _HEAD and not self._buffer and transport is not None:
            settings = self._plane.settings
            idle_since = self.deadline - max(settings.keepalive_timeout_s, settings.head_timeout_s)
            if self._plane.now() - idle_since >= idle_s:
                transport.close()

    def adopt_log(self) -> None:
        """Log the next request if there is a log now."""
        plane = self._plane
        self._exchange_type = None if plane.access_log is None else LoggedExchange
        if plane.tracer is not None:
            self._exchange_type = TracedExchange

    # Requests

    def _await_head(self) -> None:
        self._state = _HEAD
        self._begun = self._blank_seen = False
        if not self._blocked:
            self.deadline = self._plane.now() + self._plane.settings.keepalive_timeout_s
        if self._paused:
            self.resume_reading()

    def _read_heads(self) -> None:
        """Take requests off the buffer until one is not answered at once."""
        self._reading = True
        try:
            while self._state is _HEAD and self._buffer and not self._blocked:
                data = self._buffer
                settings = self._plane.settings
                if data.endswith(b"\r\n\r\n") and len(data) <= settings.head_bytes_max:
                    usual = read_usual_request(data, settings, self._said)
                    if usual is not None:
                        self._buffer = b""
                        head, self._said = usual
                        self._take_head(head)
                        continue
                if data[0] <= 32:
                    data = self._forgive_blank(data)
                end = data.find(b"\r\n\r\n") + 4
                if end < 4 or end > settings.head_bytes_max:
                    self._await_rest(data)
                    return
                self._buffer = data[end:]
                self._take_head(parse_request_head(data[:end], settings))
        except RequestError as error:
            self._refuse(error)
        finally:
            self._reading = False

    def _forgive_blank(self, data: bytes) -> bytes:
        """RFC 9112 section 2.2: one empty line before a request is ignored; old clients send it."""
        if data.startswith(b"\r\n") and not self._blank_seen:
            self._blank_seen = True
            data = data[2:]
        if data and data[0] <= 32 and not (data == b"\r" and not self._blank_seen):
            raise RequestError(BAD_HEAD, "the request begins with white space")
        return data

    def _await_rest(self, data: bytes) -> None:
        """Keep an incomplete head, unless it is clear already that it will not do."""
        settings = self._plane.settings
        if len(data) > settings.url_bytes_max + _METHOD_BYTES_MAX and b"\n" not in data:
            raise RequestError(URL_TOO_LONG, f"more than {settings.url_bytes_max} bytes")
        if len(data) > settings.head_bytes_max:
            raise RequestError(HEAD_TOO_LARGE, f"more than {settings.head_bytes_max} bytes")
        if data.count(b"\n") != data.count(b"\r\n"):
            raise RequestError(BAD_HEAD, "bare LF in the head")
        if not self._begun:
            # From here on the head has its own limit, however its bytes trickle.
            self._begun = True
            self.deadline = self._plane.now() + settings.head_timeout_s
        self._buffer = data

    def _take_head(self, head: RequestHead) -> None:
        plane = self._plane
        self.deadline = NEVER
        self._requests_left -= 1
        if not self._requests_left:
            head.keep_alive = False
        if head.chunked:
            self._body = ChunkedBody(bound_overhead=True)
        elif head.content_length > 0:
            self._body = FixedBody(head.content_length)
        else:
            self._body = None
        service = self._find_service(head)
        if service is None:
            return
        make = self._exchange_type if head.routing is None else self._find_type(head)
        want = ANYWHERE if head.routing is None else take_wishes(head, service, plane.settings)
        forwarded = self._forwarded
        if self._trusted and head.forwarded is not None:
            forwarded = self._forwarding.lines_for_trusted(self._peer, head.forwarded)
        if service.options is not None and self._answer_by_options(head, service, forwarded):
            return
        if head.minor == 0:
            forwarded = forwarded.replace(b"Via: 1.1 ", b"Via: 1.0 ")
        if make is None:
            exchange = Exchange(plane, self, head, service, want, forwarded)
        else:
            exchange = make(plane, self, head, service, want, forwarded)
        self._exchange = exchange
        if self._body is None:
            self._state = _BUSY
            exchange.start(b"", ended=True)
        else:
            self._start_with_body(exchange, self._body)

    def _find_type(self, head: RequestHead) -> type[Exchange] | None:
        plane = self._plane
        is_proved = take_proof(head, plane.explain_keys, plane.wall_us() // 1_000_000)
        return ExplainedExchange if is_proved else self._exchange_type

    def _find_service(self, head: RequestHead) -> Service | None:
        """Return who serves the request; None when nobody does, and that was answered."""
        plane = self._plane
        if plane.shedding:
            plane.metrics.count_shed(MEMORY)
            self._respond(OVERLOADED, "its memory is short", head, keep=False)
            return None
        service = plane.table.find(head.host, head.target, self.port)
        if service is None:
            self._answer_unrouted(head)
        elif self.server_name is not None and not self._is_meant(head, service):
            self._respond(MISDIRECTED, "", head, keep=False)
            return None
        return service

    def _is_meant(self, head: RequestHead, service: Service) -> bool:
        """False when the connection was opened for another app (RFC 9110 section 7.4)."""
        name, options = self.server_name, service.options
        if self._trusted:
            return True
        if options is not None and options.tls_versions != TLS_VERSIONS:
            transport = self._transport
            if (
                transport is None
                or transport.get_extra_info("ssl_object").version() not in options.tls_versions
            ):
                return False
        if not name or normalise_host(head.host) == name:
            return True
        named = self._plane.table.find(name, head.target, self.port)
        return named is None or named.app == service.app

    def _start_with_body(self, exchange: Exchange, body: Body) -> None:
        data: Data = b""
        options = exchange.service.options
        limit = (options.body_bytes_max if options is not None else 0) or self._plane.settings.body_bytes_max
        if limit:
            if exchange.head.content_length > limit:
                self._exchange = None
                raise RequestError(BODY_OVER_LIMIT, f"more than {limit} bytes")
            if isinstance(body, ChunkedBody):
                body.bytes_max = limit
        self._state = _BODY
        if self._buffer:
            try:
                data = body.feed(self._buffer)
            except BodyError as error:
                self._exchange = None
                raise _blame(error) from error
            self._buffer = body.rest
        if body.ended:
            self._state = _BUSY
        else:
            self.deadline = self._plane.now() + self._plane.settings.body_timeout_s
        exchange.start(data, ended=body.ended)

    def _read_body(self, data: bytes) -> None:
        body, exchange = self._body, self._exchange
        assert body is not None
        assert exchange is not None
        try:
            piece = body.feed(data)
        except BodyError as error:
            self._fail_body(_blame(error))
            return
        if body.ended:
            self._state = _BUSY
            self._buffer = body.rest
            self.deadline = NEVER
        elif not self._paused:
            settings = self._plane.settings
            # Each byte buys its time at the least rate, and no silence is longer than the limit.
            self.deadline = min(
                self.deadline + len(data) / settings.body_bytes_per_s_min,
                self._plane.now() + settings.body_timeout_s,
            )
        try:
            exchange.handle_request_body(piece, ended=body.ended)
        except BodyTooLargeError as error:
            self._fail_body(_blame(error))

    def _fail_body(self, error: RequestError) -> None:
        """The body will never be complete: answer if nothing was answered yet, and close."""
        exchange, self._exchange = self._exchange, None
        answered = exchange is not None and exchange.has_answered()
        if exchange is not None:
            exchange.handle_client_lost(error.code)
        if answered:
            self.abort()
        else:
            self._respond(error.code, error.detail, None, keep=False, logged=exchange is not None)

    def _discard_body(self, data: bytes) -> None:
        body = self._body
        assert body is not None
        self._discard_left -= len(data)
        try:
            body.feed(data)
        except BodyError:
            self._discard_left = -1
        if self._discard_left < 0:
            self.abort()
        elif body.ended:
            self._buffer = body.rest
            self._await_head()
            self._read_heads()

    # Answers without an exchange

    def _turn_away(self, reason: str) -> None:
        plane = self._plane
        plane.metrics.count_shed(reason)
        if not plane.admission.tells():
            self.abort()
        elif reason == CLIENT_CONNECTIONS:
            limit = plane.settings.connections_per_client_max
            self._respond(TOO_MANY_CONNECTIONS, f"more than {limit}", None, keep=False)
        elif reason == CLIENT_RATE:
            limit = plane.settings.connections_per_client_per_s
            self._respond(TOO_MANY_CONNECTIONS, f"more than {limit} a second", None, keep=False)
        else:
            self._respond(OVERLOADED, "too many connections", None, keep=False)

    def _answer_unrouted(self, head: RequestHead) -> None:
        self._respond(NO_ROUTE, "", head, keep=head.keep_alive and self._body is None)

    def _answer_by_options(self, head: RequestHead, service: Service, forwarded: bytes) -> bool:
        """Answer a request that no machine of the service is to see; False for any other."""
        options, plane = service.options, self._plane
        assert options is not None
        if options.force_https and INSECURE in forwarded:
            keep = head.keep_alive and self._body is None and not plane.draining
            port = self._forwarding.https_port
            self._answer(redirect(plane, self._peer, head, service.app, port, close=not keep), keep=keep)
        elif options.is_raw:
            self._answer_unrouted(head)
        else:
            return False
        return True

    def _refuse(self, error: RequestError) -> None:
        """Answer, and close: where the next request would begin cannot be known."""
        self._respond(error.code, error.detail, None, keep=False)

    def _respond(
        self, code: str, detail: str, head: RequestHead | None, *, keep: bool, logged: bool = False
    ) -> None:
        keep = keep and not self._plane.draining
        answer = refuse(self._plane, self._peer, code, detail, head, close=not keep, logged=logged)
        self._answer(answer, keep=keep)

    def _answer(self, answer: bytes, *, keep: bool) -> None:
        self.write(answer)
        if keep:
            self._await_head()
        else:
            self._close_gently(unread=True)

    def _close_gently(self, *, unread: bool) -> None:
        """Close once everything is sent.

        With bytes of the client still unread, closing at once would reset the connection, and the
        reset may overtake the answer: then only our side is closed, and the rest is read to nowhere.
        """
        transport = self._transport
        if transport is None:
            return
        # What waits for a slow client has the time that it always has. Over TLS not all of it can be seen.
        waits = transport.get_write_buffer_size() > 0
        waits = waits or (self._state is not _HEAD and not transport.can_write_eof())
        self._state = _LINGER
        self._buffer = b""
        settings = self._plane.settings
        self.deadline = self._plane.now() + (settings.send_timeout_s if waits else settings.linger_s)
        # TLS cannot close one side alone; its transport reads to nowhere by itself until the client is done.
        if unread and transport.can_write_eof():
            self.resume_reading()
            transport.write_eof()
        else:
            transport.close()


def _blame(error: BodyError) -> RequestError:
    return RequestError(BODY_OVER_LIMIT if isinstance(error, BodyTooLargeError) else BAD_BODY, str(error))
