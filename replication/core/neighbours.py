"""Which members to keep a link to.

Decides the overlay on which changesets spread. Knows nothing of links or trees. Invariant: with few
members it is all of them; with many it is enough random ones that the overlay holds together.
"""

import math
from collections.abc import Collection, Mapping

from replication.core.clock import SiteId
from replication.core.probe import Rng, pick

# Up to this many peers everybody keeps a link to everybody: the cost is small and no path is shorter.
FULL_MESH_MAX = 8


def compute_degree(peers: int) -> int:
    """Return how many links to open; a random graph of log2 n links per node is connected w.h.p.

    Two more stand for those that are being replaced. Links count in both directions, so the degree that
    results is about twice this.
    """
    return peers if peers <= FULL_MESH_MAX else min(peers, math.ceil(math.log2(peers)) + 2)


def plan_neighbours(
    current: Collection[SiteId], reachable: Mapping[SiteId, float | None], rng: Rng
) -> list[SiteId]:
    """Return the members to be linked to, given those that are, and the round trip to each if known.

    Those that are linked stay while they are reachable, as a stable overlay keeps the tree. Of the new
    ones half are the nearest and half random, so that paths are short and no region becomes an island.
    """
    degree = compute_degree(len(reachable))
    if degree == len(reachable):
        return list(reachable)
    kept = [site for site in current if site in reachable][: degree + 2]
    wanted = degree - len(kept)
    if wanted <= 0:
        return kept
    others = [site for site in reachable if site not in kept]
    known = sorted((rtt, site) for site in others if (rtt := reachable[site]) is not None)
    near = [site for _, site in known[: wanted // 2]]
    rest = [site for site in others if site not in near]
    return kept + near + pick(rng, rest, wanted - len(near))
