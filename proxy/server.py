"""A worker's listener, with everything behind it.

Decides what belongs together and in which order it starts and stops. Refuses to know processes and
replication. Invariant: after `close` no socket, timer or task of it is left.
"""

from __future__ import annotations

import asyncio
import random
import time
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
from .pool import Pool
from .sweeper import Sweeper
from .tls_listener import TlsListener

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from routing.balancer import Balancer
    from routing.table import RoutingTable

    from .access_log import AccessLog
    from .certificates import Certificates
    from .metrics import ProxyMetrics
    from .settings import ProxySettings
    from .tls import TlsSettings
    from .tls_metrics import TlsMetrics

# How often a drain looks whether the last exchange is over.
_DRAIN_POLL_S = 0.02
# Connections that the kernel keeps until they are accepted; it cuts this to its own limit.
_BACKLOG = 4_096


class Server:
    """Serves the apps of a routing table on one address, and on another one over TLS."""

    def __init__(
        self,
        settings: ProxySettings,
        table: RoutingTable,
        balancer: Balancer,
        metrics: ProxyMetrics,
        access_log: AccessLog | None = None,
    ) -> None:
        self._settings = settings
        self._table = table
        self._balancer = balancer
        self._metrics = metrics
        self._access_log = access_log
        self._clients: set[Downstream] = set()
        self._announcing: set[AnnouncedConnection] = set()  # accepted, and not yet told whose they are
        # All set by `start`.
        self.port = 0  # listened on
        self._listener: asyncio.Server | None = None
        self._tls_listener: TlsListener | None = None
        self._plane: Plane | None = None
        self._pool: Pool | None = None
        self._sweeper: Sweeper | None = None

    async def start(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        reuse_port: bool = False,
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
        admission = Admission(self._settings, self._metrics, compute_files_max())
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
            access_log=self._access_log,
            body_kept_max=self._settings.replay_body_bytes_max,
        )
        admission.watch(plane, pool.close_idle)
        accepting: list[Callable[[], Downstream]] = []

        def make_downstream() -> Downstream:
            return accepting[0]()

        make: Callable[[], asyncio.Protocol] = make_downstream
        if self._settings.proxy_protocol_from:
            announcers = Networks(self._settings.proxy_protocol_from)
            make = partial(AnnouncedConnection, plane, announcers, make_downstream, self._announcing)

        if sock is not None:
            self._listener = await loop.create_server(make, sock=sock, backlog=_BACKLOG, start_serving=False)
        else:
            self._listener = await loop.create_server(
                make, host, port, backlog=_BACKLOG, reuse_port=reuse_port or None, start_serving=False
            )
        self.port = self._listener.sockets[0].getsockname()[1]
        accepting.append(self._maker(public_port or self.port, secure=False, https_port=https_port))
        await self._listener.start_serving()
        self._sweeper = Sweeper(
            self._settings.sweep_interval_s,
            self._clients,
            self._announcing,
            pool.connections,
            plane.queue.waiting,
            (plane.queue, admission),
            () if self._access_log is None else (self._access_log,),
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
        port = public_port or sock.getsockname()[1]
        make = self._maker(port, secure=True, https_port=port)
        self._tls_listener = TlsListener(self._plane, settings, certificates, metrics, make)
        self._tls_listener.start(sock)

    def _maker(self, port: int, *, secure: bool, https_port: int) -> Callable[[], Downstream]:
        """Return what makes a listener's connections."""
        assert self._plane is not None
        settings = self._settings
        forwarding = Forwarding(
            settings.trusted_proxies, settings.region, port, secure=secure, https_port=https_port
        )
        return partial(Downstream, self._plane, forwarding, port, self._clients)

    async def drain(self, grace_s: float) -> bool:
        """Stop accepting, let running exchanges end; True when all did in time. `close` comes after."""
        assert self._plane is not None
        self._plane.draining = True
        if self._listener is not None:
            self._listener.close()
        for waiting in list(self._announcing):
            waiting.abort()
        if self._tls_listener is not None:
            self._tls_listener.stop_accepting()
        for client in list(self._clients):
            client.drain()
        deadline = self._plane.now() + grace_s
        while self._clients and self._plane.now() < deadline:  # noqa: ASYNC110 - an event would cost each request
            await asyncio.sleep(_DRAIN_POLL_S)
        return not self._clients

    async def close(self) -> None:
        """Cut what is left, and free everything."""
        if self._listener is not None:
            self._listener.close()
        if self._tls_listener is not None:
            await self._tls_listener.close()
        if self._sweeper is not None:
            self._sweeper.stop()
        for waiting in list(self._announcing):
            waiting.abort()
        for client in list(self._clients):
            client.abort()
        if self._pool is not None:
            await self._pool.close()
        # Transports tell their protocols that they are closed in the next turns of the loop.
        while self._clients or (  # noqa: ASYNC110 - each turn is one of the loop, and there are two or three
            self._pool is not None and self._pool.connections
        ):
            await asyncio.sleep(0)
