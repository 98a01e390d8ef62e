"""Who probes the machines of a node: itself, and while it is gone one of those who are there.

Decides which node probes which machine, the same on every node that sees the same members. Refuses to know
how members are found to be gone. Invariant: among nodes that agree on who is there, exactly one probes a
machine; those of its region come first, as they see what clients near it would.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

# A restart is over by then, and an owner that was only slow to answer has refuted that it is dead.
GONE_AFTER_S: Final = 10.0


class Presence:
    """Which nodes are there, as far as probing is concerned. `regions` has them, our own among them."""

    def __init__(self, node: str, region: str, now: float) -> None:
        self._node = node
        self._begun = now
        self._is_settled = False  # once who is not seen is gone, and not yet to come
        self._missed: dict[str, float] = {}  # node -> since when it is not there
        self._by_region: dict[str, list[str]] = {}
        self.regions: dict[str, str] = {node: region}
        self.set_members({node: region}, now)

    def set_members(self, regions: Mapping[str, str], now: float) -> bool:
        """Take note of who is there now; True when somebody came, went, or is gone for long enough.

        Who has just gone counts as there for another GONE_AFTER_S.
        """
        kept = {
            node: region
            for node, region in self.regions.items()
            if node not in regions and now - self._missed.setdefault(node, now) < GONE_AFTER_S
        }
        for node in [node for node in self._missed if node not in kept]:
            del self._missed[node]
        present = {**kept, **regions, self._node: self.regions[self._node]}
        settled = now - self._begun >= GONE_AFTER_S
        changed = present != self.regions or settled != self._is_settled
        self._is_settled = settled
        self.regions = present
        self._by_region = {}
        for node, region in sorted(present.items()):
            self._by_region.setdefault(region, []).append(node)
        return changed

    def find_watcher(self, machine: str, owner: str, region: str) -> str:
        """Return the node that probes a machine."""
        if owner in self.regions or not self._is_settled:
            return owner
        nodes = self._by_region.get(region) or list(self.regions)
        return max(nodes, key=lambda node: (_weigh(machine, node), node))


def _weigh(machine: str, node: str) -> int:
    """Return what the node bids for the machine: a node that goes changes only who watches its own share."""
    digest = hashlib.blake2b(f"{machine} {node}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")
