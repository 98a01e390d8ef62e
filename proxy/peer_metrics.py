"""What is counted of requests that go through other nodes, on both sides.

Decides names and labels; refuses to know how they are shown. Invariant: every sample but the gauges only
grows, and labels come from the routing table and from code, never from who connects.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .metrics import Sample

METRICS: Final[dict[str, tuple[str, str]]] = {
    "isthmus_peer_requests_total": (
        "counter",
        "Requests and tunnels that went through another node, by node.",
    ),
    "isthmus_peer_connections_total": ("counter", "Connections to other nodes for that, by node."),
    "isthmus_peer_connections_open": ("gauge", "Those that are open, by node."),
    "isthmus_peer_failures_total": ("counter", "What other nodes did not do, by node and kind."),
    "isthmus_relayed_total": ("counter", "Requests and tunnels passed on for other nodes."),
    "isthmus_relayed_in_flight": ("gauge", "Those that are being passed on."),
    "isthmus_relay_refusals_total": ("counter", "Those that were not passed on, by code."),
    "isthmus_relay_connections_open": ("gauge", "Connections of other nodes that are open."),
    "isthmus_relay_strangers_total": (
        "counter",
        "Connections to the listener for nodes that were cut, by reason.",
    ),
}

# Kinds of failures: no connection; one that broke, or spoke nonsense; a machine that it did not reach.
CONNECT: Final = "connect"
LOST: Final = "lost"
REFUSED: Final = "refused"


class NodeCounts:
    """What one other node did for us."""

    __slots__ = ("connections", "failures", "opened", "requests")

    def __init__(self) -> None:
        self.requests = 0
        self.connections = 0
        self.opened = 0  # connections that are open
        self.failures: dict[str, int] = {}

    def fail(self, kind: str) -> None:
        """Count a failure."""
        self.failures[kind] = self.failures.get(kind, 0) + 1


class PeerMetrics:
    """The counters of one worker."""

    __slots__ = ("nodes", "refusals", "relay_connections", "relayed", "relaying", "strangers")

    def __init__(self) -> None:
        self.nodes: dict[str, NodeCounts] = {}
        self.relayed = 0
        self.relaying = 0
        self.relay_connections = 0
        self.refusals: dict[str, int] = {}
        self.strangers: dict[str, int] = {}

    def node(self, name: str) -> NodeCounts:
        """Return the counters of a node; the name must come from the routing table."""
        counts = self.nodes.get(name)
        if counts is None:
            counts = self.nodes[name] = NodeCounts()
        return counts

    def refuse(self, code: str) -> None:
        """Count a session that did not begin."""
        self.refusals[code] = self.refusals.get(code, 0) + 1

    def turn_away(self, reason: str) -> None:
        """Count a connection of somebody who is no node of ours."""
        self.strangers[reason] = self.strangers.get(reason, 0) + 1

    def samples(self) -> Iterator[Sample]:
        """Yield all of it as (name, labels, value)."""
        for name, counts in self.nodes.items():
            label = ("node", name)
            yield "isthmus_peer_requests_total", (label,), counts.requests
            yield "isthmus_peer_connections_total", (label,), counts.connections
            yield "isthmus_peer_connections_open", (label,), counts.opened
            for kind, count in counts.failures.items():
                yield "isthmus_peer_failures_total", (label, ("kind", kind)), count
        yield "isthmus_relayed_total", (), self.relayed
        yield "isthmus_relayed_in_flight", (), self.relaying
        yield "isthmus_relay_connections_open", (), self.relay_connections
        for code, count in self.refusals.items():
            yield "isthmus_relay_refusals_total", (("code", code),), count
        for reason, count in self.strangers.items():
            yield "isthmus_relay_strangers_total", (("reason", reason),), count
