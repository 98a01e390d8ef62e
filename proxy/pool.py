"""Connections to machines: kept, made and counted.

Decides which connection an exchange gets. Refuses to know HTTP. Invariant: an idle connection is in
exactly one list of `_idle`, and no connection is made to an address that the settings forbid,
whatever name it was reached under.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from typing import TYPE_CHECKING, Final

from .core.errors import CONNECT_FAILED, CONNECT_REFUSED, UPSTREAM_TIMEOUT
from .sweeper import NEVER
from .upstream import Upstream

if TYPE_CHECKING:
    from routing.target import Target

    from .core.exchange import Exchange
    from .metrics import ProxyMetrics
    from .settings import ProxySettings

_LINK_LOCAL: Final = (ipaddress.ip_network("169.254.0.0/16"), ipaddress.ip_network("fe80::/10"))


class ForbiddenError(Exception):
    """A machine's address is one that must not be connected to."""


class Pool:
    """All connections of one worker to machines."""

    def __init__(self, settings: ProxySettings, metrics: ProxyMetrics) -> None:
        self.settings = settings
        self.loop = asyncio.get_running_loop()
        self.connections: set[Upstream] = set()  # all that are open
        self._metrics = metrics
        self._idle: dict[tuple[str, int], list[Upstream]] = {}  # the last one put back is last
        self._connecting: set[asyncio.Task[None]] = set()
        self._allowed = [ipaddress.ip_network(n, strict=False) for n in settings.machine_networks]
        self._forbidden = {(ipaddress.ip_address(h), p) for h, p in settings.forbidden_addresses}
        self._closed = False

    def acquire(self, target: Target, port: int, exchange: Exchange, *, fresh: bool) -> Upstream | None:
        """Return an idle connection to the machine, or None and later tell the exchange."""
        address = (target.host, port)
        idle = self._idle.get(address)
        while idle and not fresh:
            # The one used last is the least likely to be closed by the machine, and lets the rest expire.
            upstream = idle.pop()
            if upstream.transport is not None and not upstream.transport.is_closing():
                return upstream
        task = self.loop.create_task(self._connect(address, exchange))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)
        return None

    def put(self, upstream: Upstream) -> None:
        """Take back a connection that can carry another exchange."""
        idle = self._idle.get(upstream.address)
        if idle is None:
            idle = self._idle[upstream.address] = []
        if self._closed or len(idle) >= self.settings.pool_idle_max:
            upstream.close()
        else:
            upstream.deadline = self.loop.time() + self.settings.pool_idle_timeout_s
            idle.append(upstream)

    def add(self, upstream: Upstream) -> None:
        """Count a connection that was made."""
        self.connections.add(upstream)
        self._metrics.upstreams += 1
        self._metrics.upstreams_open += 1

    def remove(self, upstream: Upstream) -> None:
        """Forget a connection that is closed."""
        self.connections.discard(upstream)
        self._metrics.upstreams_open -= 1
        idle = self._idle.get(upstream.address)
        if idle is not None:
            with contextlib.suppress(ValueError):
                idle.remove(upstream)
            if not idle:
                del self._idle[upstream.address]

    async def close(self) -> None:
        """Close everything; exchanges that still run are told."""
        self._closed = True
        for task in list(self._connecting):
            task.cancel()
        if self._connecting:
            await asyncio.wait(self._connecting)
        for upstream in list(self.connections):
            upstream.close()

    async def _connect(self, address: tuple[str, int], exchange: Exchange) -> None:
        try:
            async with asyncio.timeout(exchange.reach_timeout_s()):
                _, upstream = await self._open(address)
        except TimeoutError:
            exchange.handle_connect_failed(UPSTREAM_TIMEOUT, f"no connection to {_show(address)} in time")
        except ConnectionRefusedError:
            exchange.handle_connect_failed(CONNECT_REFUSED, f"{_show(address)} refused the connection")
        except (OSError, ForbiddenError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            exchange.handle_connect_failed(CONNECT_FAILED, f"{_show(address)}: {reason}")
        else:
            upstream.deadline = NEVER
            exchange.handle_connected(upstream)

    async def _open(self, address: tuple[str, int]) -> tuple[asyncio.BaseTransport, Upstream]:
        host, port = address
        try:
            resolved = [ipaddress.ip_address(host)]
        except ValueError:
            infos = await self.loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            resolved = [ipaddress.ip_address(info[4][0]) for info in infos]
        error: Exception = OSError(0, "no address")
        for ip in resolved:
            try:
                self._check(ip, port)
                return await self.loop.create_connection(lambda: Upstream(self, address), str(ip), port)
            except (OSError, ForbiddenError) as failure:
                error = failure
        raise error

    def _check(self, ip: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int) -> None:
        if (ip, port) in self._forbidden:
            raise ForbiddenError("a listener of this node is no machine")
        if self._allowed:
            if not any(ip in network for network in self._allowed):
                raise ForbiddenError("not in the networks that machines may be in")
        elif any(ip in network for network in _LINK_LOCAL):
            raise ForbiddenError("link-local addresses are no machines")


def _show(address: tuple[str, int]) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
