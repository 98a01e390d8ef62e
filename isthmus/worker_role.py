"""A worker process: the data plane over a routing table that follows the agent.

Builds the proxy and its table, and owns their order of start and stop. Invariant: a worker never waits for
the agent; it starts from the file, and goes on with its last table when nobody feeds it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import time
from typing import TYPE_CHECKING, Any

from isthmus import __version__
from isthmus.config import Config, ConfigError, parse_listen
from isthmus.credentials import compute_explain_keys
from isthmus.feed import FeedFollower
from isthmus.peer_identity import PeerIdentity
from isthmus.role import RefusedError
from isthmus.route_feed import RouteFeed
from isthmus.starting import MachineStarter
from proxy.access_log import AccessLog
from proxy.admission import compute_memory_max, raise_files_limit
from proxy.core.forwarding import HTTPS_PORT
from proxy.metrics import ProxyMetrics
from proxy.server import Server
from proxy.settings import ProxySettings
from proxy.tls import TlsSettings
from proxy.tls_metrics import TlsMetrics
from routing.balancer import Balancer
from routing.table import RoutingTable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from proxy.certificates import Certificates
    from proxy.metrics import Sample
    from proxy.tracing import Tracer
    from replication.core.change import RowChange

# Looking at a file takes 2 us: little even for thousands, and soon enough for a certificate.
CERTIFICATES_POLL_S = 5.0
# How long a stopping node waits for requests on connections that are idle: one may be on its way, and takes
# no longer than a round trip around the world.
IDLE_GRACE_S = 1.0
# As a follower looks for an agent each second.
AGENT_WAIT_S = 3.0


def proxy_settings(config: Config) -> ProxySettings:
    """Return what the data plane needs to know of the configuration."""
    proxy = config.proxy
    own = (*config.listeners.values(), config.admin.listen, config.gossip.listen)
    return ProxySettings(
        node=config.node,
        region=config.region,
        trusted_proxies=proxy.trusted_proxies,
        proxy_protocol_from=proxy.proxy_protocol_from,
        machine_networks=proxy.machine_networks,
        forbidden_addresses=tuple(parse_listen(address) for address in own),
        client_certificate=config.tls.client_certificate,
        client_routing=proxy.client_routing,
        half_close=proxy.half_close,
        head_bytes_max=proxy.head_bytes_max,
        header_count_max=proxy.header_count_max,
        url_bytes_max=proxy.url_bytes_max,
        connections_max=proxy.connections_max,
        connections_per_client_max=proxy.connections_per_client_max,
        connections_per_client_per_s=proxy.connections_per_client_per_s,
        handshakes_per_client_per_s=config.tls.handshakes_per_client_per_s,
        requests_per_connection_max=proxy.requests_per_connection_max,
        memory_bytes_max=proxy.memory_bytes_max or compute_memory_max(config.workers),
        body_bytes_max=proxy.body_bytes_max,
        compressions_max=proxy.compressions_max,
        replay_body_bytes_max=proxy.replay_body_bytes_max,
        replays_max=proxy.replays_max,
        attempts_max=proxy.attempts_max,
        retry_percent=proxy.retry_percent,
        retries_per_s_min=proxy.retries_per_s_min,
        replay_cache_entries_max=proxy.replay_cache_entries_max,
        queue_max=proxy.queue_max,
        queue_timeout_s=proxy.queue_timeout_ms / 1000,
        start_timeout_s=proxy.start_timeout_ms / 1000,
        connect_timeout_s=proxy.connect_timeout_ms / 1000,
        head_timeout_s=proxy.head_timeout_ms / 1000,
        keepalive_timeout_s=proxy.keepalive_timeout_ms / 1000,
        body_timeout_s=proxy.body_timeout_ms / 1000,
        body_bytes_per_s_min=proxy.body_bytes_per_s_min,
        send_timeout_s=proxy.send_timeout_ms / 1000,
        response_timeout_s=proxy.response_timeout_ms / 1000,
        stream_timeout_s=proxy.stream_timeout_ms / 1000,
        tunnel_timeout_s=proxy.tunnel_timeout_ms / 1000,
    )


def _open_access_log(config: Config, metrics: ProxyMetrics) -> AccessLog | None:
    log = config.access_log
    if not log.file:
        return None
    try:
        return AccessLog(log.file, log.format, log.one_in, metrics)
    except OSError as error:
        raise RefusedError(f"access_log.file: cannot write {log.file}: {error.strerror}") from None


def tls_settings(config: Config) -> TlsSettings:
    """Return what the listener for TLS needs to know of the configuration."""
    return TlsSettings(config.tls.handshakes_max, config.tls.handshake_timeout_ms / 1000)


def _open_tracer(config: Config, metrics: ProxyMetrics, index: int) -> Tracer | None:
    tracing = config.tracing
    if not tracing.endpoint:
        return None
    # Importing here keeps http.client out of workers that trace nothing.
    from proxy.tracing import Tracer, TracingSettings  # noqa: PLC0415 - see above

    resource: dict[str, str | int] = {
        "service.name": tracing.service_name,
        "service.version": __version__,
        "service.instance.id": f"{config.node}/{index}",
        "isthmus.node": config.node,
        "isthmus.region": config.region,
        "process.pid": os.getpid(),
        **tracing.attributes,
    }
    settings = TracingSettings(
        tracing.endpoint, tracing.ratio, tracing.believe_clients, tracing.headers, resource
    )
    return Tracer(settings, metrics)


class WorkerRole:
    """One worker of a node. `_tasks` run from start to stop.

    `listeners` are the descriptors of its bound sockets by setting; it closes them.
    """

    def __init__(self, config: Config, index: int, listeners: Mapping[str, int]) -> None:
        self._config = config
        self._listeners = listeners
        self._table = RoutingTable(config.node)
        self._routes = RouteFeed(self._table, config.database)
        self._metrics = ProxyMetrics()
        balancer = Balancer(self._table, config.region, random.Random())
        self._access_log = _open_access_log(config, self._metrics)
        self._tracer = _open_tracer(config, self._metrics, index)
        try:
            self._identity = PeerIdentity(config.gossip, config.node)
        except ConfigError as error:
            raise RefusedError(str(error)) from error
        self._server = Server(
            proxy_settings(config),
            self._table,
            balancer,
            self._metrics,
            self._access_log,
            tracer=self._tracer,
            starter=MachineStarter(self._ask, time.monotonic),
            identity=self._identity,
        )
        self._follower = FeedFollower(
            config.feed_socket,
            f"worker-{index}/{os.getpid()}",
            load=self._routes.reload,
            apply=self._apply,
            samples=self._samples,
            hints=self._table,
        )
        self._tasks: list[asyncio.Task[None]] = []
        self._index = index
        self._tls_metrics = TlsMetrics()
        self._certificates: Certificates | None = None  # set by `start` if there is a listener for TLS

    def _ask(self, message: list[Any]) -> bool:
        return self._follower.ask(message)

    def _apply(self, change: RowChange) -> None:
        self._routes.apply(change)
        if change.table == "machines":
            self._server.offer_room()

    async def start(self) -> dict[str, str]:
        """Load the table from the file, begin to follow, and serve."""
        raise_files_limit()
        self._explain_to_operators()
        self._follower.seq = self._routes.load()
        self._tasks.append(asyncio.create_task(self._follower.run()))
        tls = self._config.tls
        certificates = self._load_certificates() if self._config.ends_tls else None
        https_port = parse_listen(tls.listen)[1] if tls.listen else HTTPS_PORT
        sock = socket.socket(fileno=self._listeners["proxy.listen"])
        await self._server.start(sock=sock, https_port=https_port)
        settings = tls_settings(self._config)
        if certificates is not None and tls.listen:
            sock = socket.socket(fileno=self._listeners["tls.listen"])
            self._server.start_tls(sock, settings, certificates, self._tls_metrics)
        for i, tcp in enumerate(self._config.tcp):
            sock = socket.socket(fileno=self._listeners[f"tcp[{i}].listen"])
            self._server.start_tcp(sock, tcp.app, settings, certificates, self._tls_metrics)
        if certificates is not None:
            self._tasks.append(asyncio.create_task(certificates.watch(CERTIFICATES_POLL_S)))
        if self._config.peering.listen:
            await asyncio.to_thread(self._identity.contexts)
            self._server.start_peering(socket.socket(fileno=self._listeners["peering.listen"]))
        self._tasks.append(asyncio.create_task(self._watch_identity()))
        return {}

    async def _watch_identity(self) -> None:
        """Follow changes of the cluster's keys and certificates, by whoever makes them."""
        while True:
            await asyncio.sleep(CERTIFICATES_POLL_S)
            self._refresh_identity()

    def _refresh_identity(self) -> None:
        if self._identity.refresh():
            self._server.recheck_peers()
        self._explain_to_operators()

    def _explain_to_operators(self) -> None:
        self._server.explain_to(compute_explain_keys(self._identity.keys, self._config.admin.token))

    def _load_certificates(self) -> Certificates:
        # Importing here keeps cryptography, 10 MB, out of workers without TLS.
        from proxy.certificates import Certificates  # noqa: PLC0415 — see above

        self._certificates = Certificates(self._config.tls.certificates, time.time)
        problem = self._certificates.load()
        if problem is not None:
            raise RefusedError(f"tls.certificates: {problem}")
        return self._certificates

    async def adopt(self, config: Config) -> None:
        """Go on with other settings, another access log and other certificates."""
        before, log = self._config, self._access_log
        if config.access_log != before.access_log:
            log = _open_access_log(config, self._metrics)
        old_tracer = self._tracer
        if config.tracing != before.tracing:
            self._tracer = _open_tracer(config, self._metrics, self._index)
        await self._server.adopt(proxy_settings(config), log, tls_settings(config), self._tracer)
        if old_tracer is not None and old_tracer is not self._tracer:
            await asyncio.to_thread(old_tracer.close)
        if self._certificates is not None:
            self._certificates.adopt(config.tls.certificates)
        self._identity.adopt(config.gossip)
        self._config, old, self._access_log = config, self._access_log, log
        self._refresh_identity()
        if old is not None and old is not log:
            await asyncio.to_thread(old.close)

    def refresh(self) -> None:
        """Read the certificates again; go on in a new access log, when the old one was moved away."""
        self._refresh_identity()
        if self._certificates is not None:
            self._certificates.reload()
        if self._access_log is not None:
            self._access_log.reopen()

    async def stop(self) -> None:
        """Let requests in flight finish within the drain time, then close."""
        await self._server.drain(self._config.proxy.drain_ms / 1000, IDLE_GRACE_S)
        await self._end()

    async def retire(self) -> None:
        """Let connections end by themselves while a successor takes the new ones, for as long as is set."""
        within_s = self._config.proxy.upgrade_drain_ms / 1000
        await self._server.drain(within_s, within_s)
        # The agent was replaced as well, and is to know what was counted meanwhile.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._follower.linked.wait(), AGENT_WAIT_S)
        await self._end()

    async def _end(self) -> None:
        self._follower.report()
        self._follower.leave()
        await self._server.close()
        if self._access_log is not None:
            await asyncio.to_thread(self._access_log.close)
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.close)
        for task in self._tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    def _samples(self) -> Iterator[Sample]:
        self._metrics.forget_apps(lambda name: self._table.app(name) is not None)
        yield from self._metrics.samples()
        yield from self._server.peer_metrics.samples()
        if self._certificates is not None:
            yield from self._tls_metrics.samples()
            if self._index == 0:  # all have the same, and gauges of workers are added up
                yield from self._certificates.samples()
        yield "isthmus_feed_connected", (), float(self._follower.connected)
        yield "isthmus_routing_rows_rejected", (), float(len(self._table.rejected))
        failing = self._table.failing.collect(asyncio.get_running_loop().time())
        yield "isthmus_machines_ejected", (), float(sum(left_s > 0 for _, _, left_s in failing))
