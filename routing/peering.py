"""How machines of other nodes are reached: connected to from here, or through a node.

Decides that for one machine from what its owner says of itself (`nodes.peering`), what its app says
(`services.options`) and its address. Refuses to know connections and whether one failed. Invariant: where
no other node passes requests on, every machine is connected to from here, unless something says that it is
not to be.

Words: a machine's *owner* is the node in its row, and a *relay* is a node that passes requests on.
"""

from __future__ import annotations

import ipaddress
import json
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from .target import Target
    from .types import NodeRow

# Of one node: more is no description of a network but a list of machines.
NETWORKS_MAX: Final = 64
# Hosts, and owners, whose answers are kept; emptied when full.
_MEMO_MAX: Final = 65_536


class Way(Enum):
    """How a machine of another node is reached."""

    DIRECT = "direct"
    NODE = "node"
    AUTO = "auto"  # connected to from here, and through a node while that does not work


@dataclass(frozen=True, slots=True)
class Peering:
    """What a node tells the others of it."""

    host: str = ""  # where it takes requests of other nodes; empty: nowhere
    port: int = 0
    networks: tuple[
        ipaddress.IPv4Network | ipaddress.IPv6Network, ...
    ] = ()  # its machines there: no other way
    machines: Way = Way.DIRECT  # all its others


class Relay(NamedTuple):
    """A node that passes requests on, and where."""

    node: str
    host: str
    port: int


def parse_way(value: object) -> Way | None:
    """Return the way that a text names, None when it is empty. Raises ValueError."""
    if value == "":
        return None
    try:
        return Way(value)
    except ValueError:
        known = ", ".join(way.value for way in Way)
        raise ValueError(f"{ascii(value)[:64]} is no way to reach machines: {known}") from None


def parse_networks(values: object) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
    """Return networks given in CIDR form. Raises ValueError."""
    if not isinstance(values, list | tuple) or len(values) > NETWORKS_MAX:
        raise ValueError(f"networks must be a list of at most {NETWORKS_MAX}")
    if not all(isinstance(value, str) for value in values):
        raise ValueError("networks are texts")
    return tuple(ipaddress.ip_network(value) for value in values)


class Ways:
    """What is known of all other nodes. The table calls `put`."""

    __slots__ = ("_memo", "_nodes", "_own_node", "_relays", "active")

    def __init__(self, own_node: str) -> None:
        # Some node says something of itself; while none does, nobody has to ask anything here.
        self.active = False
        self._own_node = own_node
        self._nodes: dict[str, tuple[str, Peering]] = {}  # by name, with the region
        self._memo: dict[tuple[str, str], Way] = {}  # by owner and host, where the app says nothing
        self._relays: dict[tuple[str, str], tuple[Relay, ...]] = {}  # by owner and region

    def put(self, node: str, row: NodeRow | None) -> None:
        """Take over the row of a node, or that it has none."""
        if node == self._own_node:
            return
        self._memo.clear()
        self._relays.clear()
        if row is None or row.peering is None:
            self._nodes.pop(node, None)
        else:
            self._nodes[node] = row.region, row.peering
        self.active = bool(self._nodes)

    def find(self, target: Target, wish: Way | None, passed: int = 0) -> Way:
        """Return how to reach a machine; the `wish` of its app is over once a node has passed it on."""
        if not target.foreign:
            return Way.DIRECT
        if wish is not None and not passed:
            return wish
        key = target.node, target.host
        way = self._memo.get(key)
        if way is None:
            if len(self._memo) >= _MEMO_MAX:
                self._memo.clear()
            way = self._memo[key] = self._find(target)
        if passed and not (way is Way.NODE and self._nodes[target.node][1].host):
            return Way.DIRECT  # the node that was chosen to pass it on is the last one
        return way

    def _find(self, target: Target) -> Way:
        said = self._nodes.get(target.node)
        if said is None:
            return Way.DIRECT
        peering = said[1]
        try:
            address = ipaddress.ip_address(target.host)
        except ValueError:
            return Way.NODE if target.host == "localhost" and peering.host else peering.machines
        address = getattr(address, "ipv4_mapped", None) or address
        if address.is_loopback and peering.host:
            return Way.NODE
        return Way.NODE if any(address in network for network in peering.networks) else peering.machines

    def describe(self, target: Target, wish: Way | None) -> str:
        """Return how a machine is reached, for a person; empty: it is connected to."""
        way = self.find(target, wish)
        if way is Way.DIRECT:
            return ""
        relays = self.relays(target)
        if not relays:
            return "" if way is Way.AUTO else "through a node, and none passes requests on to it"
        through = f"through node {relays[0].node}"
        return f"{through} while it cannot be connected to" if way is Way.AUTO else through

    def relays(self, target: Target, passed: int = 0) -> tuple[Relay, ...]:
        """Return the nodes to go through: the owner, then others in the machine's region.

        Once a node has passed a request on, only the owner is left: so no request goes round.
        """
        key = target.node, "" if passed else target.region
        found = self._relays.get(key)
        if found is None:
            if len(self._relays) >= _MEMO_MAX:
                self._relays.clear()
            found = self._relays[key] = self._find_relays(*key)
        return found

    def _find_relays(self, owner: str, of_region: str) -> tuple[Relay, ...]:
        found = [
            Relay(node, peering.host, peering.port)
            for node, (region, peering) in self._nodes.items()
            if peering.host and (node == owner or region == of_region)
        ]
        found.sort(key=lambda relay: (relay.node != owner, relay.node))
        return tuple(found)


def parse_peering(text: str, parse_address: Callable[[str], tuple[str, int | None]]) -> Peering | None:
    """Return what a node's row says, or None when that is nothing. Raises ValueError.

    Names that are not known are passed over: a newer node may have more to say.
    """
    if text in {"{}", ""}:
        return None
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("peering is not valid JSON") from None
    if not isinstance(fields, dict):
        raise ValueError("peering must be a JSON object")  # noqa: TRY004 - all of a row's faults are ValueErrors
    address = fields.get("address", "")
    if not isinstance(address, str):
        raise ValueError("peering.address must be text")  # noqa: TRY004 - as above
    host, port = parse_address(address) if address else ("", 0)
    if port is None:
        raise ValueError("peering.address names no port")
    return Peering(
        host,
        port,
        parse_networks(fields.get("networks", [])),
        parse_way(fields.get("machines", "")) or Way.DIRECT,
    )
