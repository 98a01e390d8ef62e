"""Connections of clients on a port for TLS or raw TCP, up to where it is clear what they are.

Decides who may begin a handshake, whose TLS is passed on to a machine as it is, and what becomes of those who
can have neither. Refuses to know HTTP beyond the one answer to those who speak it here in the clear.
Invariant: every connection that is not handed over is closed within the handshake timeout, and at most
`handshakes_max` are pending.

The first message is looked at before any of it is taken off the socket. So a connection that sends nothing
costs a file descriptor and no TLS state, one for a name without a certificate costs no handshake, and a
machine that ends TLS itself gets all that its client sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

from routing.options import TLS_VERSIONS

from .accepting import Acceptor
from .admission import CLIENT_RATE
from .core.addresses import Networks
from .core.client_hello import (
    HANDSHAKE_RECORD,
    HELLO_BYTES_MAX,
    ClientHello,
    ClientHelloError,
    parse_client_hello,
)
from .core.errors import NO_ROUTE, PLAIN_HTTP, render_error
from .core.proxy_protocol import ProxyHeaderError, parse_announcement
from .tcp_relay import TcpClient
from .tls import make_server_context

if TYPE_CHECKING:
    from collections.abc import Callable

    from routing.table import Service

    from .certificates import Certificates
    from .core.plane import Plane
    from .core.proxy_protocol import Announced, Endpoint
    from .downstream import Downstream
    from .tls import TlsSettings
    from .tls_metrics import TlsMetrics

# Of one client, so that it cannot crowd out the others; a carrier's gateway stays below it.
_CLIENT_SHARE: Final = 8
_BACKLOG: Final = 4_096
# RFC 8446 section 6: fatal alerts, as records of their own.
_DECODE_ERROR: Final = b"\x15\x03\x03\x00\x02\x02\x32"
_PROTOCOL_VERSION: Final = b"\x15\x03\x03\x00\x02\x02\x46"
_UNRECOGNIZED_NAME: Final = b"\x15\x03\x03\x00\x02\x02\x70"

# OpenSSL's reasons and ours; all others are "other", since clients choose them.
_REASONS: Final[dict[str, str]] = {
    "UNSUPPORTED_PROTOCOL": "version",
    "NO_SHARED_CIPHER": "cipher",
    "NO_SUITABLE_SIGNATURE_ALGORITHM": "cipher",
    "NO_SUITABLE_KEY_SHARE": "cipher",
    "TLSV1_ALERT_UNKNOWN_CA": "distrusted",
    "SSLV3_ALERT_BAD_CERTIFICATE": "distrusted",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "distrusted",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "distrusted",
}


class _Taker(NamedTuple):
    """What takes a connection over, and of which versions the TLS may be that ends here; None: none does."""

    make: Callable[[], Downstream | TcpClient]
    versions: frozenset[str] | None


class _RefusedError(Exception):
    """The connection ends here; `answer` is sent before. Without a reason it is counted elsewhere."""

    def __init__(self, reason: str, answer: bytes = b"") -> None:
        super().__init__(reason)
        self.reason = reason
        self.answer = answer


class TlsListener:
    """One listening socket.

    `make` makes the protocol of a connection with HTTP once its handshake is done, and `relays` gets those
    whose bytes are passed on as they are. With an `app`, all connections are for its service on this `port`,
    and none has HTTP. Without `certificates` no TLS can end here.
    """

    def __init__(
        self,
        plane: Plane,
        port: int,
        settings: TlsSettings,
        certificates: Certificates | None,
        metrics: TlsMetrics,
        make: Callable[[], Downstream],
        relays: set[TcpClient],
        app: str = "",
    ) -> None:
        self._plane = plane
        self._port = port
        self._metrics = metrics
        self._certificates = certificates
        self._make = make
        self._relays = relays
        self._app = app
        self.adopt(settings)
        self._loop = asyncio.get_running_loop()
        self._acceptor = Acceptor(self._admit)
        self._pending: dict[asyncio.Task[None], str] = {}  # with the client's address; the oldest is first
        self._clients: Counter[str] = Counter()  # of `_pending`
        # By the versions that are allowed. Handshakes begin in one of these, which have no certificate. Its
        # ticket keys are used whatever certificate is chosen, so tickets stay good when certificates change.
        self._contexts: dict[frozenset[str], ssl.SSLContext] = {}

    def start(self, sock: socket.socket) -> None:
        """Accept connections on a bound socket."""
        self._acceptor.start(sock, _BACKLOG)

    def adopt(self, settings: TlsSettings) -> None:
        """Treat the next connections by these settings, and by those that the plane has now."""
        self._settings = settings
        self._announcers = Networks(self._plane.settings.proxy_protocol_from)

    @property
    def pending(self) -> int:
        """How many connections are not handed over yet."""
        return len(self._pending)

    def stop_accepting(self) -> None:
        """Take what the kernel has accepted, and no more; those that are pending go on."""
        self._acceptor.stop()

    async def close(self) -> None:
        """Cut everything that was not handed over."""
        self.stop_accepting()
        for task in self._pending:
            task.cancel()
        if self._pending:
            await asyncio.wait(list(self._pending))

    def _admit(self, sock: socket.socket, peer: str) -> None:
        announces = self._announcers.contain(peer)
        client = "" if announces else self._plane.admission.name(peer)
        if not self._arrives(client):
            sock.close()
            self._metrics.count_failure(CLIENT_RATE)
            return
        most = self._settings.handshakes_max
        if client and self._clients[client] >= max(1, most // _CLIENT_SHARE):
            sock.close()
            self._metrics.count_failure("client_limit")
            return
        if len(self._pending) >= most:
            # An honest client takes two round trips: the oldest is the one least likely to be one.
            next(iter(self._pending)).cancel()
        sock.setblocking(False)
        task = self._loop.create_task(self._greet(sock, announces=announces))
        self._pending[task] = client
        self._clients[client] += 1
        task.add_done_callback(self._forget)
        self._metrics.pending += 1

    def _arrives(self, client: str) -> bool:
        secure = not self._app
        arrives = self._plane.admission.arrives(client, self._plane.now(), secure=secure)
        if not arrives:
            self._plane.metrics.count_shed(CLIENT_RATE)
        return arrives

    def _forget(self, task: asyncio.Task[None]) -> None:
        client = self._pending.pop(task)
        self._metrics.pending -= 1
        self._clients[client] -= 1
        if not self._clients[client]:
            del self._clients[client]
        if task.cancelled():
            self._metrics.count_failure("limit")

    async def _greet(self, sock: socket.socket, *, announces: bool) -> None:
        """See the connection through to whoever takes it over."""
        deadline = self._loop.time() + self._settings.handshake_timeout_s
        try:
            async with asyncio.timeout_at(deadline):
                ends = await self._read_announcement(sock) if announces else None
                taker = await self._find_taker(sock)
        except _RefusedError as refusal:
            if refusal.reason:
                self._metrics.count_failure(refusal.reason)
            await self._refuse(sock, refusal.answer)
        except asyncio.CancelledError:
            sock.close()
            raise
        except OSError as error:
            self._metrics.count_failure(_explain(error))
            sock.close()
        else:
            await self._hand_over(sock, taker, ends, max(0.001, deadline - self._loop.time()))

    async def _read_announcement(self, sock: socket.socket) -> tuple[Endpoint, Endpoint] | None:
        """Take the PROXY header off the socket and return what it says."""
        announced: Announced | None = None
        needed = 1
        try:
            while announced is None:
                data = await self._peek(sock, needed)
                announced = parse_announcement(data)
                needed = len(data) + 1
            sock.recv(announced.size)
        except ProxyHeaderError:
            raise _RefusedError("announcement") from None
        finally:
            if announced is None:
                self._plane.metrics.bad_announcements += 1
        if announced.source is None or announced.destination is None:
            return None
        if not self._arrives(self._plane.admission.name(announced.source[0])):
            raise _RefusedError(CLIENT_RATE)
        return announced.source, announced.destination

    async def _find_taker(self, sock: socket.socket) -> _Taker:
        """Return what takes the connection over, once that is clear and it may."""
        table = self._plane.table
        service: Service | None = None
        if self._app:
            service = table.service(self._app, self._port)
            if service is None:
                self._plane.metrics.count_error(NO_ROUTE)
                raise _RefusedError("")
            if not _ends_tls(service):
                return _Taker(self._maker(service, ""), None)
        hello = await self._await_hello(sock)
        name = hello.server_name
        if not self._app and name is not None:
            service = table.find(name.encode("ascii"), b"/", self._port)
        options = None if service is None else service.options
        make: Callable[[], Downstream | TcpClient] = partial(self._make_for, name or "")
        if service is not None and (self._app or (options is not None and options.is_raw)):
            make = self._maker(service, name or "")
            if not _ends_tls(service):
                return _Taker(make, None)
        if self._certificates is None or self._certificates.find(name) is None:
            reason = "no_name" if name is None else "unknown_name"
            raise _RefusedError(reason, _UNRECOGNIZED_NAME)
        versions = TLS_VERSIONS if options is None else options.tls_versions
        if not versions & hello.versions:
            raise _RefusedError("version", _PROTOCOL_VERSION)
        return _Taker(make, versions)

    def _make_for(self, name: str) -> Downstream:
        client = self._make()
        client.server_name = name.encode("ascii")
        return client

    def _maker(self, service: Service, name: str) -> Callable[[], TcpClient]:
        return partial(TcpClient, self._plane, self._port, self._relays, service, name)

    async def _hand_over(
        self, sock: socket.socket, taker: _Taker, ends: tuple[Endpoint, Endpoint] | None, timeout_s: float
    ) -> None:
        """Hand the socket to the event loop, which from here on closes it whatever happens."""

        def make() -> asyncio.Protocol:
            protocol = taker.make()
            protocol.announced = ends
            return protocol

        if taker.versions is None:
            await self._loop.connect_accepted_socket(make, sock)
            return
        try:
            transport, _ = await self._loop.connect_accepted_socket(
                make,
                sock,
                ssl=self._context(taker.versions),
                ssl_handshake_timeout=timeout_s,
                # For what is still to be sent, too; the connection itself gives up earlier where it can.
                ssl_shutdown_timeout=self._plane.settings.send_timeout_s,
            )
        except OSError as error:
            self._metrics.count_failure(_explain(error))
        else:
            tls: ssl.SSLObject = transport.get_extra_info("ssl_object")
            self._metrics.count_handshake(tls.version() or "", resumed=bool(tls.session_reused))

    def _context(self, versions: frozenset[str]) -> ssl.SSLContext:
        context = self._contexts.get(versions)
        if context is None:
            context = self._contexts[versions] = make_server_context(versions)
            context.sni_callback = self._choose
        return context

    async def _await_hello(self, sock: socket.socket) -> ClientHello:
        """Return the first message when that is here, whole; it stays on the socket."""
        needed = 1
        while True:
            data = await self._peek(sock, needed)
            if data[0] != HANDSHAKE_RECORD:
                if data[:1].isalpha():
                    raise _RefusedError("plain_http", self._plain_answer())
                raise _RefusedError("no_tls")
            try:
                hello = parse_client_hello(data)
            except ClientHelloError:
                raise _RefusedError("malformed", _DECODE_ERROR) from None
            if not isinstance(hello, int):
                return hello
            needed = hello

    async def _peek(self, sock: socket.socket, least: int) -> bytes:
        """Return what has come, once that is so much, and leave it where it is."""
        # The kernel wakes us when so much is here, and not for each part of it.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, least)
        woken = False
        while True:
            data = b""
            with contextlib.suppress(BlockingIOError):
                data = sock.recv(HELLO_BYTES_MAX, socket.MSG_PEEK)
            if len(data) >= least:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
                return data
            if woken:  # by the end of what the client sends
                raise ConnectionResetError
            await self._await_readable(sock)
            woken = True

    async def _await_readable(self, sock: socket.socket) -> None:
        ready = asyncio.Event()
        self._loop.add_reader(sock, ready.set)
        try:
            await ready.wait()
        finally:
            self._loop.remove_reader(sock)

    def _choose(self, tls: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> int | None:
        """OpenSSL has read the name: give the connection its certificate."""
        assert self._certificates is not None  # or no handshake would have begun
        pair = self._certificates.find(name.lower().removesuffix(".") if name else None)
        if pair is None:
            return ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME
        try:
            tls.context = self._certificates.context(pair)
        except ssl.SSLError:
            return ssl.ALERT_DESCRIPTION_INTERNAL_ERROR
        return None

    def _plain_answer(self) -> bytes:
        plane = self._plane
        plane.metrics.count_error(PLAIN_HTTP)
        request_id = plane.request_ids.next(plane.wall_us() // 1000)
        return render_error(PLAIN_HTTP, "", request_id, plain=True, close=True)

    async def _refuse(self, sock: socket.socket, answer: bytes) -> None:
        """Send an answer and close; what the client sent is read, lest a reset overtakes the answer."""
        with contextlib.closing(sock), contextlib.suppress(OSError):
            async with asyncio.timeout(self._plane.settings.linger_s):
                await self._loop.sock_sendall(sock, answer)
                sock.shutdown(socket.SHUT_WR)
                while await self._loop.sock_recv(sock, HELLO_BYTES_MAX):
                    pass


def _ends_tls(service: Service) -> bool:
    return service.options is not None and service.options.ends_tls


def _explain(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return _REASONS.get(error.reason or "", "other")
    if isinstance(error, TimeoutError | ConnectionAbortedError):
        return "timeout"
    return "closed"
