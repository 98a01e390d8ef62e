"""When each check is due.

Decides the order of probes and spreads them. Refuses to know the clock. Invariant: a check is due once for
each time that it was put in, and never after it was taken out.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Final, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Hashable

    from routing.balancer import Rng

K = TypeVar("K", bound="Hashable")

# New checks begin over so long that no more than this many do in a second.
NEW_PER_S: Final = 1_000
# Probes of many nodes and machines must not come in step.
JITTER: Final = 0.1
# After a failure that is not yet enough, the next probe comes after this share of the interval.
DOUBT_SHARE: Final = 0.2
INTERVAL_S_MIN: Final = 0.1


class Timetable(Generic[K]):
    """A heap of who is due when. An entry that was taken out stays in it until its time, and is skipped."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, K]] = []
        self._number: dict[K, int] = {}  # of the entry that counts
        self._entries = 0

    def __len__(self) -> int:
        return len(self._number)

    def put(self, key: K, due: float) -> None:
        """Have the key due at a time, in place of any earlier one."""
        self._entries += 1
        self._number[key] = self._entries
        heapq.heappush(self._heap, (due, self._entries, key))

    def drop(self, key: K) -> None:
        """Have it due no more."""
        self._number.pop(key, None)

    def pop_due(self, now: float) -> K | None:
        """Take out the first that is due."""
        while self._heap and self._heap[0][0] <= now:
            _, number, key = heapq.heappop(self._heap)
            if self._number.get(key) == number:
                del self._number[key]
                return key
        return None


def compute_first_delay_s(interval_s: float, checks: int, rng: Rng) -> float:
    """Return when a check begins of `checks` that begin together."""
    return rng.random() * min(interval_s, (checks - 1) / NEW_PER_S)


def compute_delay_s(interval_s: float, rng: Rng, *, in_doubt: bool) -> float:
    """Return when the next probe comes: an interval, give or take JITTER."""
    if in_doubt:
        interval_s = max(INTERVAL_S_MIN, interval_s * DOUBT_SHARE)
    return interval_s * (1 + JITTER * (2 * rng.random() - 1))
