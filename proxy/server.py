"""A worker's listener, with everything behind it.

Decides what belongs together and in which order it starts and stops. Refuses to know processes and
replication. Invariant: after `close` no socket, timer or task of it is left.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
import time
from contextlib import closing, suppress
from functools import partial
from typing import TYPE_CHECKING

from .admission import Admission, compute_files_max
from .announced import AnnouncedConnection
from .core.addresses import Networks
from .core.forwarding import HTTPS_PORT, Forwarding
from .core.plane import Plane
from .core.queue import Queue
from .core.request_id import RequestIds
from .downstream import Downstream
from .peer_listener import PeerListener
from .peer_metrics import PeerMetrics
from .peer_pool import PeerPool
from .pool import Pool
from .sweeper import Sweeper
from .tls_listener import TlsListener

if TYPE_CHECKING:
    from collections.abc import Callable

    from routing.balancer import Balancer
    from routing.table import RoutingTable

    from .access_log import AccessLog
    from .certificates import Certificates
    from .core.plane import Starter
    from .metrics import ProxyMetrics
    from .peer_pool import Identity
    from .peer_session import PeerSession
    from .settings import ProxySettings
    from .tcp_relay import TcpClient
    from .tls import TlsSettings
    from .tls_metrics import TlsMetrics
    from .tracing import Tracer

# How often a drain looks whether the last exchange is over.
_DRAIN_POLL_S = 0.02
# Connections that the kernel keeps until they are accepted; it cuts this to its own limit.
_BACKLOG = 4_096


class Server:
    """Serves the apps of a routing table on one address, on another one over TLS, and raw on some more."""

    def __init__(
        self,
        settings: ProxySettings,
        table: RoutingTable,
        balancer: Balancer,
        metrics: ProxyMetrics,
        access_log: AccessLog | None = None,
        starter: Starter | None = None,
        tracer: Tracer | None = None,
        identity: Identity | None = None,
    ) -> None:
        """With an `identity`, machines of other nodes may be reached through those."""
        self._settings = settings
        self._identity = identity
        self.peer_metrics = PeerMetrics()
        self._peer_sessions: set[PeerSession] = set()  # of other nodes, for whom we pass requests on
        self._table = table
        self._balancer = balancer
        self._metrics = metrics
        self._logs = [] if access_log is None else [access_log]
        self._starter = starter
        self._tracers = [] if tracer is None else [tracer]
        self._explain_keys: tuple[bytes, ...] = ()
        self._clients: set[Downstream] = set()
        self._announcing: set[AnnouncedConnection] = set()  # accepted, and not yet told whose they are
        self._relays: set[TcpClient] = set()
        # All set by `start`.
        self.port = 0  # listened on
        self._public_port = self._tls_port = 0
        self._listener: asyncio.Server | None = None
        self._sockets: list[socket.socket] = []  # those of `_listener`, for what it leaves in their queues
        self._make: Callable[[], Downstream] = _make_none
        self._make_secure: Callable[[], Downstream] = _make_none
        self._announcers: Networks | None = None
        self._https_port = HTTPS_PORT
        self._listeners: list[TlsListener] = []  # for TLS and for raw TCP
        self._peer_listener: PeerListener | None = None
        self._plane: Plane | None = None
        self._pool: Pool | None = None
        self._admission: Admission | None = None
        self._sweeper: Sweeper | None = None

    async def start(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        sock: socket.socket | None = None,
        public_port: int | None = None,
        https_port: int = HTTPS_PORT,
    ) -> None:
        """Listen on an address, or on a socket that is bound already.

        `public_port` is the port that services are looked up by when it is not the one listened on, and
        `https_port` the one that clients are sent to when an app wants TLS.
        """
        loop = asyncio.get_running_loop()
        pool = self._pool = Pool(self._settings, self._metrics)
        await pool.open()
        if self._identity is not None:
            pool.peers = PeerPool(pool, self._table.ways, self._identity, self.peer_metrics)
        admission = self._admission = Admission(self._settings, self._metrics, compute_files_max())
        plane = self._plane = Plane(
            settings=self._settings,
            table=self._table,
            balancer=self._balancer,
            metrics=self._metrics,
            connector=pool,
            queue=Queue(self._settings.queue_max, self._metrics),
            request_ids=RequestIds(random.SystemRandom().getrandbits, self._settings.region),
            now=loop.time,
            wall_us=lambda: time.time_ns() // 1000,
            admission=admission,
            access_log=self._logs[0] if self._logs else None,
            starter=self._starter,
            tracer=self._tracers[0] if self._tracers else None,
            body_kept_max=self._settings.replay_body_bytes_max,
        )
        plane.explain_keys = self._explain_keys
        admission.watch(plane, pool.close_idle)
        accept = self._accept
        if sock is not None:
            self._listener = await loop.create_server(
                accept, sock=sock, backlog=_BACKLOG, start_serving=False
            )
        else:
            self._listener = await loop.create_server(
                accept, host, port, backlog=_BACKLOG, start_serving=False
            )
        self._sockets = [_duplicate(listening) for listening in self._listener.sockets]
        self.port = self._sockets[0].getsockname()[1]
        self._public_port, self._https_port = public_port or self.port, https_port
        self._make_makers()
        await self._listener.start_serving()
        self._sweeper = Sweeper(
            self._settings.sweep_interval_s,
            self._clients,
            self._announcing,
            self._relays,
            self._peer_sessions,
            pool.connections,
            plane.queue.waiting,
            (plane.queue, admission),
            self._logs,
            self._tracers,
        )
        self._sweeper.start()

    def start_tls(
        self,
        sock: socket.socket,
        settings: TlsSettings,
        certificates: Certificates,
        metrics: TlsMetrics,
        public_port: int | None = None,
    ) -> None:
        """Serve the same apps over TLS on a socket that is bound. Call after `start`."""
        assert self._plane is not None
        self._tls_port = public_port or sock.getsockname()[1]
        self._make_makers()
        make = self._accept_secure
        port = self._tls_port
        listener = TlsListener(self._plane, port, settings, certificates, metrics, make, self._relays)
        self._start_listener(listener, sock)

    def start_tcp(
        self,
        sock: socket.socket,
        app: str,
        settings: TlsSettings,
        certificates: Certificates | None,
        metrics: TlsMetrics,
        public_port: int | None = None,
    ) -> None:
        """Pass the connections to a socket that is bound on to an app, as they are. Call after `start`."""
        assert self._plane is not None
        port = public_port or sock.getsockname()[1]
        listener = TlsListener(
            *(self._plane, port, settings, certificates, metrics, self._accept_secure, self._relays), app=app
        )
        self._start_listener(listener, sock)

    def _start_listener(self, listener: TlsListener, sock: socket.socket) -> None:
        self._listeners.append(listener)
        listener.start(sock)

    def start_peering(self, sock: socket.socket) -> None:
        """Pass requests of other nodes on, on a socket that is bound. Call after `start`."""
        assert self._plane is not None
        assert self._pool is not None
        assert self._pool.peers is not None
        assert self._identity is not None
        self._peer_listener = PeerListener(self._plane, self._pool.peers, self._identity, self._peer_sessions)
        self._peer_listener.start(sock)

    def recheck_peers(self) -> None:
        """Cut connections of nodes that have proved themselves with what is not accepted any more."""
        if self._pool is not None and self._pool.peers is not None:
            self._pool.peers.recheck()
        if self._peer_listener is not None:
            self._peer_listener.recheck()

    def explain_to(self, keys: tuple[bytes, ...]) -> None:
        """Explain requests to those who sign with one of these keys (`core.explain_proof`), from now on."""
        self._explain_keys = keys
        if self._plane is not None:
            self._plane.explain_keys = keys

    async def adopt(
        self,
        settings: ProxySettings,
        access_log: AccessLog | None,
        tls: TlsSettings | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        """Go on with other settings and another log, which may be the same ones.

        Whom a connection comes from, and whether that one is trusted, was settled when it came.
        """
        plane, pool, admission = self._plane, self._pool, self._admission
        assert plane is not None
        assert pool is not None
        assert admission is not None
        await pool.adopt(settings)
        self._settings = plane.settings = settings
        self._logs[:] = [] if access_log is None else [access_log]
        plane.access_log = access_log
        self._tracers[:] = [] if tracer is None else [tracer]
        plane.tracer = tracer
        plane.queue.max_per_app = settings.queue_max
        plane.retries.adopt(settings)
        plane.replay_cache.adopt(settings.replay_cache_entries_max)
        admission.adopt(settings)
        self._make_makers()
        for client in self._clients:
            client.adopt_log()
        if tls is not None:
            for listener in self._listeners:
                listener.adopt(tls)

    def _make_makers(self) -> None:
        """Have the next connections made by the settings of now."""
        announcing = self._settings.proxy_protocol_from
        self._announcers = Networks(announcing) if announcing else None
        self._make = self._maker(self._public_port, secure=False, https_port=self._https_port)
        self._make_secure = self._maker(self._tls_port, secure=True, https_port=self._tls_port)

    def _accept(self) -> asyncio.Protocol:
        if self._announcers is None:
            return self._make()
        assert self._plane is not None
        return AnnouncedConnection(self._plane, self._announcers, self._make, self._announcing)

    def _accept_secure(self) -> Downstream:
        return self._make_secure()

    def _maker(self, port: int, *, secure: bool, https_port: int) -> Callable[[], Downstream]:
        """Return what makes a listener's connections."""
        assert self._plane is not None
        settings = self._settings
        forwarding = Forwarding(
            settings.trusted_proxies, settings.region, port, secure=secure, https_port=https_port
        )
        return partial(Downstream, self._plane, forwarding, port, self._clients)

    def offer_room(self) -> None:
        """A machine may have come: whoever waits looks before the sweeper has them look."""
        if self._plane is not None:
            self._plane.queue.handle_deadline()

    async def drain(self, grace_s: float, idle_s: float = 0.0) -> bool:
        """Stop accepting, let running exchanges end; True when all did in time. `close` comes after.

        Every answer from now on is the last of its connection, and says so. A connection that waits for a
        request is closed only when none has come for `idle_s`: one may be on its way, and its client
        could not know whether it was served.
        """
        plane = self._plane
        assert plane is not None
        plane.draining = True
        await self._stop_accepting()
        began = plane.now()
        while self._is_busy() and plane.now() < began + grace_s:
            if plane.now() >= began + idle_s:
                self._close_idle(idle_s)
            await asyncio.sleep(_DRAIN_POLL_S)
        self._close_idle(0.0)
        return not self._is_busy()

    def _is_busy(self) -> bool:
        handshakes = any(listener.pending for listener in self._listeners)
        passing = self._peer_listener is not None and self._peer_listener.is_busy
        return bool(self._clients or self._announcing or self._relays or handshakes or passing)

    def _close_idle(self, idle_s: float) -> None:
        for waiting in list(self._announcing):
            waiting.abort()
        for client in list(self._clients):
            client.drain(idle_s)
        if self._peer_listener is not None:
            self._peer_listener.close_idle()

    async def _stop_accepting(self) -> None:
        """Take no more connections than the kernel has accepted: it resets those that nobody takes."""
        if self._peer_listener is not None:
            self._peer_listener.drain()
        for tls_listener in self._listeners:
            tls_listener.stop_accepting()
        if self._listener is not None:
            self._listener.close()
        loop = asyncio.get_running_loop()
        for listening in self._sockets:
            with closing(listening), suppress(OSError):
                for _ in range(_BACKLOG):
                    await loop.connect_accepted_socket(self._accept, listening.accept()[0])
        self._sockets.clear()

    async def close(self) -> None:
        """Cut what is left, and free everything."""
        if self._listener is not None:
            self._listener.close()
        for listening in self._sockets:
            listening.close()
        for tls_listener in self._listeners:
            await tls_listener.close()
        if self._peer_listener is not None:
            await self._peer_listener.close()
        if self._sweeper is not None:
            self._sweeper.stop()
        for waiting in list(self._announcing):
            waiting.abort()
        for client in list(self._clients):
            client.abort()
        for relay in list(self._relays):
            relay.cut()
        if self._pool is not None:
            await self._pool.close()
        # Transports tell their protocols that they are closed in the next turns of the loop.
        while self._is_open():  # noqa: ASYNC110 - each turn is one of the loop, and there are two or three
            await asyncio.sleep(0)

    def _is_open(self) -> bool:
        return bool(self._clients or self._relays or (self._pool is not None and self._pool.connections))


def _duplicate(listening: socket.socket) -> socket.socket:
    """Return another descriptor of a listening socket, which outlives that of the event loop."""
    copy = socket.socket(fileno=os.dup(listening.fileno()))
    copy.setblocking(False)
    return copy


def _make_none() -> Downstream:
    raise AssertionError("nobody can connect before `start`")
