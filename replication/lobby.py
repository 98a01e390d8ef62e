"""Keeps count of those at the door: connections that have not yet shown that they belong here.

Decides which of them is turned away when there are too many. Knows nothing of sockets or keys. Invariant:
no more wait than `WAITING_MAX`, nor from one network than `WAITING_PER_NETWORK_MAX`, so a flood of strangers
costs a bounded amount and keeps out nobody who comes from elsewhere and is quick.
"""

from collections import Counter
from collections.abc import Callable
from ipaddress import IPv6Address, ip_address

# A handshake takes a round trip or two, and a member dials a few peers at a time: this is for a cluster that
# starts behind one address.
WAITING_PER_NETWORK_MAX = 64
# All networks together. Beyond it the one that has waited longest goes: a member is done within a second, but
# a stranger waits until its time runs out.
WAITING_MAX = 256


def compute_network(host: str) -> str:
    """Return what counts as one: an IPv4 address, or the /64 out of which an IPv6 host may take any."""
    address = ip_address(host.partition("%")[0])
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(IPv6Address(int(address) >> 64 << 64))
    return host


class Lobby:
    """Who waits, in order of arrival, with what turns each away."""

    def __init__(self) -> None:
        self._waiting: dict[int, tuple[str, Callable[[], object]]] = {}
        self._per_network: Counter[str] = Counter()
        self._next = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def enter(self, host: str, turn_away: Callable[[], object]) -> int | None:
        """Return a ticket, or None when the network has too many here; may turn away who came first."""
        network = compute_network(host)
        if self._per_network[network] >= WAITING_PER_NETWORK_MAX:
            return None
        if len(self._waiting) >= WAITING_MAX:
            oldest = next(iter(self._waiting))
            _, turn_oldest_away = self._waiting[oldest]
            self.leave(oldest)
            turn_oldest_away()
        ticket = self._next
        self._next += 1
        self._waiting[ticket] = (network, turn_away)
        self._per_network[network] += 1
        return ticket

    def leave(self, ticket: int) -> None:
        """Forget a ticket; does nothing for one that was turned away."""
        if ticket not in self._waiting:
            return
        network, _ = self._waiting.pop(ticket)
        self._per_network[network] -= 1
        if not self._per_network[network]:
            del self._per_network[network]
