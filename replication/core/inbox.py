"""What was pushed to us and is not yet applied.

Decides whose changesets are applied next and whose are dropped when there are too many. Knows nothing of what
they hold. Invariant: one origin that floods delays itself, not the others: each gets its turn, and when there
is no room the one that holds most loses what comes.
"""

from collections import OrderedDict, deque
from typing import TYPE_CHECKING

from replication.core.change import EncodedChangeset

if TYPE_CHECKING:
    from replication.core.clock import SiteId

# Of each origin at once: a turn that is worth its overhead and short for those who wait.
TURN_CHANGESETS = 64


class Inbox:
    """Changesets by origin, in order of arrival."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes = 0
        self._bytes_max = bytes_max
        self._count = 0
        self._origins: OrderedDict[SiteId, deque[EncodedChangeset]] = OrderedDict()
        self._held: dict[SiteId, int] = {}  # bytes, by origin

    def __len__(self) -> int:
        return self._count

    def add(self, changeset: EncodedChangeset) -> bool:
        """Keep a changeset; False when there is no room for more of its origin."""
        site, size = changeset.site, len(changeset.payload)
        held = self._held.get(site, 0)
        share = self._bytes_max // (len(self._held) + (site not in self._held))
        # Half of the room is anybody's; the rest is shared out among those who use it.
        if self.bytes > self._bytes_max or (self.bytes > self._bytes_max // 2 and held > share):
            return False
        self._origins.setdefault(site, deque()).append(changeset)
        self._held[site] = held + size
        self.bytes += size
        self._count += 1
        return True

    def take(self, count_max: int, bytes_max: int) -> list[EncodedChangeset]:
        """Remove and return the next changesets: at least one if any, then up to the limits."""
        batch: list[EncodedChangeset] = []
        size = 0
        while self._origins and len(batch) < count_max and size < bytes_max:
            site, waiting = next(iter(self._origins.items()))
            turn = 0
            while waiting and turn < TURN_CHANGESETS and len(batch) < count_max and size < bytes_max:
                changeset = waiting.popleft()
                batch.append(changeset)
                size += len(changeset.payload)
                self._held[site] -= len(changeset.payload)
                turn += 1
            if waiting:
                self._origins.move_to_end(site)
            else:
                del self._origins[site], self._held[site]
        self.bytes -= size
        self._count -= len(batch)
        return batch
