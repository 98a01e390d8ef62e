"""Connections of clients on the port for TLS, up to the end of the handshake.

Decides who may begin a handshake and what becomes of those who cannot. Refuses to know HTTP beyond the
one answer to those who speak it here in the clear. Invariant: every connection that is not handed over
is closed within the handshake timeout, and at most `handshakes_max` are pending.

The first message is looked at before any of it is taken off the socket. So a connection that sends nothing
costs a file descriptor and no TLS state, and one for a name without a certificate costs no handshake.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections import Counter
from typing import TYPE_CHECKING, Final

from .admission import CLIENT_RATE, name_client
from .core.addresses import Networks
from .core.client_hello import HANDSHAKE_RECORD, HELLO_BYTES_MAX, ClientHelloError, parse_client_hello
from .core.errors import PLAIN_HTTP, render_error
from .tls import make_server_context

if TYPE_CHECKING:
    from collections.abc import Callable

    from .certificates import Certificates
    from .core.plane import Plane
    from .tls import TlsSettings
    from .tls_metrics import TlsMetrics

# Of one client, so that it cannot crowd out the others; a carrier's gateway stays below it.
_CLIENT_SHARE: Final = 8
# Connections taken in one turn of the loop before requests get theirs again.
_ACCEPTS_A_TURN: Final = 64
_BACKLOG: Final = 4_096
# Without file descriptors, accepting at once again would only spin.
_ACCEPT_PAUSE_S: Final = 0.5
# RFC 8446 section 6: fatal alerts, as records of their own.
_DECODE_ERROR: Final = b"\x15\x03\x03\x00\x02\x02\x32"
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


class _RefusedError(Exception):
    """The connection ends here; `answer` is sent before."""

    def __init__(self, reason: str, answer: bytes = b"") -> None:
        super().__init__(reason)
        self.reason = reason
        self.answer = answer


class TlsListener:
    """One listening socket; `make` makes the protocol of a connection once its handshake is done."""

    def __init__(
        self,
        plane: Plane,
        settings: TlsSettings,
        certificates: Certificates,
        metrics: TlsMetrics,
        make: Callable[[], asyncio.Protocol],
    ) -> None:
        self._plane = plane
        self._settings = settings
        self._metrics = metrics
        self._certificates = certificates
        self._make = make
        self._trusted = Networks(plane.settings.trusted_proxies)
        self._loop = asyncio.get_running_loop()
        self._socket: socket.socket | None = None  # from `start` to `stop_accepting`
        self._pending: dict[asyncio.Task[None], str] = {}  # with the client's address; the oldest is first
        self._clients: Counter[str] = Counter()  # of `_pending`
        # All handshakes begin in this context, which has no certificate. Its ticket keys are used
        # whatever certificate is chosen, so tickets stay good when certificates change.
        self._context = make_server_context()
        self._context.sni_callback = self._choose

    def start(self, sock: socket.socket) -> None:
        """Accept connections on a bound socket."""
        sock.setblocking(False)
        sock.listen(_BACKLOG)
        self._socket = sock
        self._loop.add_reader(sock, self._accept)

    def adopt(self, settings: TlsSettings) -> None:
        """Bound the next handshakes by other settings."""
        self._settings = settings

    @property
    def pending(self) -> int:
        """How many connections are not handed over yet."""
        return len(self._pending)

    def stop_accepting(self) -> None:
        """Take what the kernel has accepted, and no more; those that are pending go on."""
        for _ in range(_BACKLOG // _ACCEPTS_A_TURN):
            self._accept()
        if self._socket is not None:
            self._loop.remove_reader(self._socket)
            self._socket.close()
            self._socket = None

    async def close(self) -> None:
        """Cut everything that was not handed over."""
        self.stop_accepting()
        for task in self._pending:
            task.cancel()
        if self._pending:
            await asyncio.wait(list(self._pending))

    def _accept(self) -> None:
        for _ in range(_ACCEPTS_A_TURN):
            if self._socket is None:
                return
            try:
                sock, peer = self._socket.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError:
                self._loop.remove_reader(self._socket)
                self._loop.call_later(_ACCEPT_PAUSE_S, self._resume)
                return
            self._admit(sock, peer[0].partition("%")[0])

    def _resume(self) -> None:
        if self._socket is not None:
            self._loop.add_reader(self._socket, self._accept)

    def _admit(self, sock: socket.socket, peer: str) -> None:
        client = "" if self._trusted.contain(peer) else name_client(peer)
        if not self._plane.admission.arrives(client, self._plane.now()):
            sock.close()
            self._plane.metrics.count_shed(CLIENT_RATE)
            self._metrics.count_failure("client_rate")
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
        task = self._loop.create_task(self._greet(sock))
        self._pending[task] = client
        self._clients[client] += 1
        task.add_done_callback(self._forget)
        self._metrics.pending += 1

    def _forget(self, task: asyncio.Task[None]) -> None:
        client = self._pending.pop(task)
        self._metrics.pending -= 1
        self._clients[client] -= 1
        if not self._clients[client]:
            del self._clients[client]
        if task.cancelled():
            self._metrics.count_failure("limit")

    async def _greet(self, sock: socket.socket) -> None:
        """See the connection through its handshake."""
        deadline = self._loop.time() + self._settings.handshake_timeout_s
        try:
            async with asyncio.timeout_at(deadline):
                await self._await_hello(sock)
        except _RefusedError as refusal:
            self._metrics.count_failure(refusal.reason)
            await self._refuse(sock, refusal.answer)
        except asyncio.CancelledError:
            sock.close()
            raise
        except OSError as error:
            self._metrics.count_failure(_explain(error))
            sock.close()
        else:
            await self._shake_hands(sock, max(0.001, deadline - self._loop.time()))

    async def _shake_hands(self, sock: socket.socket, timeout_s: float) -> None:
        """Hand the socket to the event loop, which from here on closes it whatever happens."""
        try:
            transport, _ = await self._loop.connect_accepted_socket(
                self._make,
                sock,
                ssl=self._context,
                ssl_handshake_timeout=timeout_s,
                ssl_shutdown_timeout=self._plane.settings.linger_s,
            )
        except OSError as error:
            self._metrics.count_failure(_explain(error))
        else:
            tls: ssl.SSLObject = transport.get_extra_info("ssl_object")
            self._metrics.count_handshake(tls.version() or "", resumed=bool(tls.session_reused))

    async def _await_hello(self, sock: socket.socket) -> None:
        """Return when the first message is here, whole, and can be answered; it stays on the socket."""
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
                break
            needed = hello
        if self._certificates.find(hello.server_name) is None:
            reason = "no_name" if hello.server_name is None else "unknown_name"
            raise _RefusedError(reason, _UNRECOGNIZED_NAME)

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


def _explain(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return _REASONS.get(error.reason or "", "other")
    if isinstance(error, TimeoutError | ConnectionAbortedError):
        return "timeout"
    return "closed"
