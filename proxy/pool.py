"""Connections to machines: kept, made and counted.

Decides which connection an exchange gets. Refuses to know HTTP. Invariant: an idle connection is in
exactly one list of `_idle`, and no connection is made to an address that the settings forbid,
whatever name it was reached under.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import ssl
from typing import TYPE_CHECKING, Any, TypeAlias

from .admission import FILES
from .core.addresses import Address, AddressRules, parse_address
from .core.errors import CONNECT_FAILED, CONNECT_REFUSED, OVERLOADED, UPSTREAM_TIMEOUT
from .sweeper import NEVER
from .tls import has_fingerprint, make_machine_context
from .upstream import Upstream

if TYPE_CHECKING:
    from routing.machine_tls import MachineTls
    from routing.target import Target

    from .core.exchange import Exchange
    from .metrics import ProxyMetrics
    from .settings import ProxySettings

_WILDCARDS = frozenset(("", "*"))
# A connection that failed for one of these says nothing about its machine.
_OWN_SHORTAGES = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))


# Settings of services; each of their contexts takes some 20 KB, with the system's authorities a megabyte.
_MACHINE_CONTEXTS_MAX = 256

# Where a machine is and how it is spoken to: connections are shared by those who agree on all of it.
MachineAddress: TypeAlias = "tuple[str, int, MachineTls | None]"


class ForbiddenError(Exception):
    """A machine's address is one that must not be connected to."""


class Pool:
    """All connections of one worker to machines."""

    def __init__(self, settings: ProxySettings, metrics: ProxyMetrics) -> None:
        self.settings = settings
        self.loop = asyncio.get_running_loop()
        self.connections: set[Upstream] = set()  # all that are open
        self._metrics = metrics
        self._machine_contexts: dict[MachineTls, ssl.SSLContext] = {}
        self._idle: dict[MachineAddress, list[Upstream]] = {}  # the last one put back is last
        self._connecting: set[asyncio.Task[None]] = set()
        self._rules = AddressRules(settings.machine_networks, ())  # with our own listeners after `open`
        self._closed = False

    async def open(self) -> None:
        """Learn which addresses are this node's own. Call before the first exchange."""
        own: list[tuple[Address, int]] = []
        for host, port in self.settings.forbidden_addresses:
            # A name that does not resolve is one that nothing can listen on.
            with contextlib.suppress(OSError):
                own += [(address, port) for address in await self._resolve(host)]
        self._rules = AddressRules(self.settings.machine_networks, own)

    def acquire(self, target: Target, port: int, exchange: Exchange, *, fresh: bool) -> Upstream | None:
        """Return an idle connection to the machine, or None and later tell the exchange."""
        options = exchange.service.options
        address = (target.host, port, None if options is None else options.machine_tls)
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

    def close_idle(self) -> None:
        """Close all connections that nobody uses: their files are needed."""
        for idle in list(self._idle.values()):
            for upstream in list(idle):
                upstream.close()

    async def close(self) -> None:
        """Close everything; exchanges that still run are told."""
        self._closed = True
        for task in list(self._connecting):
            task.cancel()
        if self._connecting:
            await asyncio.wait(self._connecting)
        for upstream in list(self.connections):
            upstream.close()

    async def _connect(self, address: MachineAddress, exchange: Exchange) -> None:
        try:
            async with asyncio.timeout(exchange.reach_timeout_s()):
                _, upstream = await self._open(address)
        except TimeoutError:
            exchange.handle_connect_failed(UPSTREAM_TIMEOUT, f"no connection to {_show(address)} in time")
        except ConnectionRefusedError:
            exchange.handle_connect_failed(CONNECT_REFUSED, f"{_show(address)} refused the connection")
        except (OSError, ForbiddenError) as error:
            reason = _explain(error) if isinstance(error, OSError) else str(error)
            if isinstance(error, OSError) and error.errno in _OWN_SHORTAGES:
                self.close_idle()
                self._metrics.count_shed(FILES)
                exchange.handle_shortage(OVERLOADED, f"no connection to a machine: {reason}")
                return
            exchange.handle_connect_failed(CONNECT_FAILED, f"{_show(address)}: {reason}")
        else:
            upstream.deadline = NEVER
            announcement = exchange.announcement()
            if announcement:
                upstream.announce(announcement)
            exchange.handle_connected(upstream)

    async def _open(self, address: MachineAddress) -> tuple[asyncio.BaseTransport, Upstream]:
        host, port, tls = address
        secure: dict[str, Any] = {}
        if tls is not None:
            secure = {"ssl": await self._context(tls), "server_hostname": tls.server_name or host}
        error: Exception = OSError(0, "no address")
        for ip in await self._resolve(host):
            refusal = self._rules.explain_refusal(ip, port, _is_local)
            if refusal is not None:
                error = ForbiddenError(refusal)
                continue
            try:
                made = await self.loop.create_connection(
                    lambda: Upstream(self, address), str(ip), port, **secure
                )
                if tls is not None and not has_fingerprint(made[0], tls):
                    made[1].close()
                    raise ForbiddenError("the machine's certificate is not the one that its service names")
                return made  # noqa: TRY300 - what failed is told below
            except OSError as failure:
                error = failure
        raise error

    async def _context(self, tls: MachineTls) -> ssl.SSLContext:
        context = self._machine_contexts.get(tls)
        if context is None:
            # Reading the system's authorities takes tens of milliseconds.
            certificate = self.settings.client_certificate
            context = await asyncio.to_thread(make_machine_context, tls, certificate)
            if len(self._machine_contexts) >= _MACHINE_CONTEXTS_MAX:
                self._machine_contexts.clear()
            self._machine_contexts[tls] = context
        return context

    async def _resolve(self, host: str) -> list[Address]:
        if host in _WILDCARDS:
            return [parse_address("0.0.0.0")]  # noqa: S104 - as a listener to be recognised, not to be made
        try:
            return [parse_address(host)]
        except ValueError:
            try:
                infos = await self.loop.getaddrinfo(host, None, type=socket.SOCK_STREAM)
            except UnicodeError:  # a label of no or too many characters
                raise OSError(0, "not a name") from None
            return [parse_address(str(info[4][0])) for info in infos]


def _is_local(address: Address) -> bool:
    """True when this host has the address: only then can a socket be bound to it."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((str(address), 0))
        except OSError:
            return False
    return True


def _explain(error: OSError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate was not accepted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"no TLS: {error.reason}"
    return error.strerror or "the connection was lost"


def _show(address: MachineAddress) -> str:
    host, port, _ = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
