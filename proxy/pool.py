"""Connections to machines: kept, made and counted.

Decides which connection an exchange gets. Refuses to know HTTP. Invariant: an idle connection is in
exactly one list of `_idle`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
from typing import TYPE_CHECKING, Any, TypeAlias

from .admission import FILES
from .core.errors import CONNECT_FAILED, CONNECT_REFUSED, OVERLOADED, UPSTREAM_TIMEOUT
from .core.plane import Connector
from .reach import ForbiddenError, Reach, explain
from .splicing import Pipes
from .sweeper import NEVER
from .upstream import Upstream

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from routing.machine_tls import MachineTls
    from routing.target import Target

    from .core.exchange import Exchange
    from .core.plane import Reaching, Seeker
    from .metrics import ProxyMetrics
    from .peer_pool import PeerPool
    from .settings import ProxySettings

# A connection that failed for one of these says nothing about its machine.
_OWN_SHORTAGES = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))


# Where a machine is and how it is spoken to: connections are shared by those who agree on all of it.
MachineAddress: TypeAlias = "tuple[str, int, MachineTls | None]"


class Pool(Connector):
    """All connections of one worker to machines."""

    def __init__(self, settings: ProxySettings, metrics: ProxyMetrics) -> None:
        self.settings = settings
        self.loop = asyncio.get_running_loop()
        self.connections: set[Upstream] = set()  # all that are open
        self.peers: PeerPool | None = None  # for machines that are reached through other nodes
        self._metrics = metrics
        self._idle: dict[MachineAddress, list[Upstream]] = {}  # the last one put back is last
        self._connecting: set[asyncio.Task[None]] = set()
        self._reach = Reach(settings.machine_networks, settings.client_certificate)
        self._closed = False
        self.pipes = Pipes()

    async def open(self) -> None:
        """Learn which addresses are this node's own. Call before the first exchange."""
        await self._reach.open(self.settings.forbidden_addresses)

    async def adopt(self, settings: ProxySettings) -> None:
        """Make connections by other settings from now on; those that are there stay."""
        self.settings = settings
        await self._reach.adopt(
            settings.machine_networks, settings.client_certificate, settings.forbidden_addresses
        )

    def acquire(self, target: Target, port: int, exchange: Exchange, *, fresh: bool) -> Upstream | None:
        """Return an idle connection to the machine, or None and later tell the exchange."""
        if target.foreign and self.peers is not None and self.peers.ways.active:
            return self.peers.acquire(
                target, port, exchange.service, exchange, fresh=fresh, eager=exchange.may_send_early()
            )
        options = exchange.service.options
        address = (target.host, port, None if options is None else options.machine_tls)
        upstream = None if fresh else self.take(address)
        if upstream is None:
            self.begin(address, exchange)
        return upstream

    def take(self, address: MachineAddress) -> Upstream | None:
        """Return an idle connection."""
        idle = self._idle.get(address)
        while idle:
            # The one used last is the least likely to be closed by the machine, and lets the rest expire.
            upstream = idle.pop()
            if upstream.transport is not None and not upstream.transport.is_closing():
                return upstream
        return None

    def connect(self, target: Target, port: int, session: Reaching, make: Callable[[], Any]) -> None:
        """Make a connection for this session alone, and later tell it; `make` makes its protocol."""
        if target.foreign and self.peers is not None and self.peers.ways.active:
            self.peers.connect(target, port, session, make)
            return
        options = session.service.options
        address = (target.host, port, None if options is None else options.machine_tls)
        self.begin(address, session, make)

    def begin(self, address: MachineAddress, seeker: Seeker, make: Callable[[], Any] | None = None) -> None:
        """Make a connection, and later tell the seeker; without `make` it is kept afterwards."""
        self.run(self._connect(address, seeker, make or (lambda: Upstream(self, address))))

    def run(self, connecting: Coroutine[Any, Any, None]) -> None:
        """Have a connection made; `close` ends that."""
        task = self.loop.create_task(connecting)
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

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

    def close_idle(self) -> None:
        """Close all connections that nobody uses: their files are needed."""
        for idle in list(self._idle.values()):
            for upstream in list(idle):
                upstream.close()
        if self.peers is not None:
            self.peers.close_idle()

    async def close(self) -> None:
        """Close everything; exchanges that still run are told."""
        self._closed = True
        if self.peers is not None:
            self.peers.closed = True
        for task in list(self._connecting):
            task.cancel()
        if self._connecting:
            await asyncio.wait(self._connecting)
        for upstream in list(self.connections):
            upstream.close()
        self.pipes.close()

    async def _connect(self, address: MachineAddress, seeker: Seeker, make: Callable[[], Any]) -> None:
        try:
            async with asyncio.timeout(seeker.reach_timeout_s()):
                host, port, tls = address
                _, upstream = await self._reach.connect(make, host, port, tls)
        except (OSError, ForbiddenError) as error:  # TimeoutError is an OSError
            self.tell_failure(seeker, _show(address), error)
        else:
            upstream.deadline = NEVER
            announcement = seeker.announcement()
            if announcement:
                upstream.announce(announcement)
            seeker.handle_connected(upstream)

    def tell_failure(self, seeker: Seeker, where: str, error: OSError | ForbiddenError) -> None:
        """Tell a seeker why it gets no connection to a machine or node."""
        if isinstance(error, TimeoutError):
            seeker.handle_connect_failed(UPSTREAM_TIMEOUT, f"no connection to {where} in time")
        elif isinstance(error, ConnectionRefusedError):
            seeker.handle_connect_failed(CONNECT_REFUSED, f"{where} refused the connection")
        elif isinstance(error, OSError) and error.errno in _OWN_SHORTAGES:
            self.close_idle()
            self._metrics.count_shed(FILES)
            seeker.handle_shortage(OVERLOADED, f"no connection to a machine: {explain(error)}")
        else:
            reason = explain(error) if isinstance(error, OSError) else str(error)
            seeker.handle_connect_failed(CONNECT_FAILED, f"{where}: {reason}")


def _show(address: MachineAddress) -> str:
    host, port, _ = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
