"""How a connection to a machine is made, for requests and for checks alike.

Decides which of a machine's addresses may be connected to, and speaks TLS where the service wants it. Refuses
to know what the connection is for. Invariant: no connection is made to an address that is forbidden, whatever
name it was reached under.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from typing import TYPE_CHECKING, Any, TypeVar

from .core.addresses import Address, AddressRules, parse_address
from .tls import has_fingerprint, make_machine_context

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from routing.machine_tls import MachineTls

P = TypeVar("P", bound=asyncio.Protocol)

_WILDCARDS = frozenset(("", "*"))
# Settings of services; each of their contexts takes some 20 KB, with the system's authorities a megabyte.
_MACHINE_CONTEXTS_MAX = 256


class ForbiddenError(Exception):
    """A machine's address is one that must not be connected to, or its certificate is another one."""


class Reach:
    """Makes the connections of one process to machines.

    `machine_networks` are those that machines may be in, in CIDR form, and `certificate` is what machines are
    shown that ask for one, as `make_machine_context` takes it.
    """

    def __init__(self, machine_networks: Sequence[str], certificate: str) -> None:
        self._networks = machine_networks
        self._certificate = certificate
        self._contexts: dict[MachineTls, ssl.SSLContext] = {}
        self._rules = AddressRules(machine_networks, ())  # with our own listeners after `open`

    async def open(self, forbidden_addresses: Sequence[tuple[str, int]]) -> None:
        """Learn which addresses are this node's own. Call before the first connection."""
        own: list[tuple[Address, int]] = []
        for host, port in forbidden_addresses:
            # A name that does not resolve is one that nothing can listen on.
            with contextlib.suppress(OSError):
                own += [(address, port) for address in await resolve(host)]
        self._rules = AddressRules(self._networks, own)

    async def adopt(
        self,
        machine_networks: Sequence[str],
        certificate: str,
        forbidden_addresses: Sequence[tuple[str, int]],
    ) -> None:
        """Make the next connections by other settings."""
        self._networks, self._certificate = machine_networks, certificate
        self._contexts.clear()
        await self.open(forbidden_addresses)

    async def connect(
        self, make: Callable[[], P], host: str, port: int, tls: MachineTls | None
    ) -> tuple[asyncio.Transport, P]:
        """Connect to the first address of the machine that answers. Raises OSError or ForbiddenError."""
        loop = asyncio.get_running_loop()
        secure: dict[str, Any] = {}
        if tls is not None:
            secure = {"ssl": await self._context(tls), "server_hostname": tls.server_name or host}
        error: Exception = OSError(0, "no address")
        for ip in await resolve(host):
            refusal = self._rules.explain_refusal(ip, port, is_local)
            if refusal is not None:
                error = ForbiddenError(refusal)
                continue
            try:
                transport, protocol = await loop.create_connection(make, str(ip), port, **secure)
            except OSError as failure:
                error = failure
                continue
            if tls is not None and not has_fingerprint(transport, tls):
                transport.abort()
                raise ForbiddenError("the machine's certificate is not the one that its service names")
            return transport, protocol
        raise error

    async def _context(self, tls: MachineTls) -> ssl.SSLContext:
        context = self._contexts.get(tls)
        if context is None:
            # Reading the system's authorities takes tens of milliseconds.
            context = await asyncio.to_thread(make_machine_context, tls, self._certificate)
            if len(self._contexts) >= _MACHINE_CONTEXTS_MAX:
                self._contexts.clear()
            self._contexts[tls] = context
        return context


async def resolve(host: str) -> list[Address]:
    """Return the addresses of a host. Raises OSError when it has none."""
    if host in _WILDCARDS:
        return [parse_address("0.0.0.0")]  # noqa: S104 - as a listener to be recognised, not to be made
    try:
        return [parse_address(host)]
    except ValueError:
        loop = asyncio.get_running_loop()
        try:
            infos = await loop.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except UnicodeError:  # a label of no or too many characters
            raise OSError(0, "not a name") from None
        return [parse_address(str(info[4][0])) for info in infos]


def is_local(address: Address) -> bool:
    """True when this host has the address: only then can a socket be bound to it."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((str(address), 0))
        except OSError:
            return False
    return True


def explain(error: OSError) -> str:
    """Return why a connection could not be made."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate was not accepted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"no TLS: {error.reason}"
    return error.strerror or "the connection was lost"
