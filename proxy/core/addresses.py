"""Which addresses may be connected to as machines.

Decides that from the address alone, after names were resolved, because rows come from anybody who may
write to the table. Refuses to know sockets; what is local to this host is asked of the caller.
Invariant: however an address is spelled (IPv4 in IPv6, the unspecified one), it is judged as what a
connection to it would reach.
"""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def parse_address(text: str) -> Address:
    """Return the address, as IPv4 when it is one inside IPv6. Raises ValueError for a name."""
    address = ipaddress.ip_address(text)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def name_peer(host: str) -> str:
    """Return how a socket's peer is named: without a zone, and an IPv4 one on a socket of both as IPv4."""
    host = host.partition("%")[0]
    return str(parse_address(host)) if host.startswith("::ffff:") else host


class AddressRules:
    """The rules of one worker. `own` are this node's listeners, resolved."""

    __slots__ = ("_everywhere", "_networks", "_own")

    def __init__(self, networks: Sequence[str], own: Iterable[tuple[Address, int]]) -> None:
        self._networks = [ipaddress.ip_network(network, strict=False) for network in networks]
        self._own = set(own)
        # Listeners on the unspecified address, of either family: they answer on every local address.
        self._everywhere = {port for address, port in self._own if address.is_unspecified}

    def explain_refusal(self, address: Address, port: int, is_local: Callable[[Address], bool]) -> str | None:
        """Return why no connection may be made, or None."""
        if address.is_unspecified:
            return "the unspecified address is no machine"  # it would reach this host
        if (address, port) in self._own or (port in self._everywhere and is_local(address)):
            return "a listener of this node is no machine"
        if self._networks:
            if not any(address in network for network in self._networks):
                return "not in the networks that machines may be in"
        elif address.is_link_local:
            return "link-local addresses are no machines"  # clouds keep their metadata there
        return None


class Networks:
    """A list of networks of peers."""

    __slots__ = ("_networks",)

    def __init__(self, networks: Sequence[str]) -> None:
        self._networks = [ipaddress.ip_network(network, strict=False) for network in networks]

    def contain(self, address: str) -> bool:
        """True when the address is in one of them; IPv4 written as IPv6 counts as IPv4."""
        if not self._networks:
            return False
        try:
            parsed = ipaddress.ip_address(address)
        except ValueError:
            return False
        mapped = getattr(parsed, "ipv4_mapped", None)
        return any((mapped or parsed) in network for network in self._networks)
