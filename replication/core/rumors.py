"""Which membership updates still need telling.

Decides what rides on the next datagram. Knows nothing of what the updates mean. Invariant: at most one
rumor per member, the last one told to it, and each is told a bounded number of times.
"""

import math
from dataclasses import dataclass

from replication.core.clock import SiteId
from replication.core.member import Update
from replication.core.wire import compute_update_bytes


def compute_retransmits(members: int, factor: int) -> int:
    """Return how often an update is told: `factor * ceil(log10(n + 1))`, enough to reach all w.h.p."""
    return factor * math.ceil(math.log10(members + 1))


@dataclass(slots=True)
class _Rumor:
    update: Update
    told: int = 0


class Rumors:
    """The updates that are still being told, least told first."""

    def __init__(self, factor: int) -> None:
        self._factor = factor
        self._rumors: dict[SiteId, _Rumor] = {}

    def __len__(self) -> int:
        return len(self._rumors)

    def add(self, update: Update) -> None:
        """Tell an update from now on, in place of what was told of that member."""
        self._rumors[update.info.site] = _Rumor(update)

    def drop(self, site: SiteId) -> None:
        """Stop telling about a member."""
        self._rumors.pop(site, None)

    def take(self, budget_bytes: int, members: int, *, but: SiteId | None = None) -> list[Update]:
        """Return the updates for one datagram and count them as told; those told often enough are dropped."""
        limit = compute_retransmits(members, self._factor)
        taken = []
        for site, rumor in sorted(self._rumors.items(), key=lambda item: item[1].told):
            if site == but:
                continue
            budget_bytes -= compute_update_bytes(rumor.update)
            if budget_bytes < 0:
                break
            taken.append(rumor.update)
            rumor.told += 1
            if rumor.told >= limit:
                del self._rumors[site]
        return taken
