"""Virtual time: what happens next.

Decides only the order. Knows nothing of nodes or networks. Invariant: time never goes back, and what is
due at one microsecond happens in the order in which it was asked for.
"""

import heapq
from collections.abc import Callable

Act = Callable[[], None]


class EventQueue:
    """A heap of (time in whole microseconds, sequence number, what to do)."""

    def __init__(self) -> None:
        self.now_us = 0
        self._heap: list[tuple[int, int, Act]] = []
        self._sequence = 0

    def at(self, when_us: int, act: Act) -> None:
        """Do something at that time, or now if it has passed."""
        self._sequence += 1
        heapq.heappush(self._heap, (max(when_us, self.now_us), self._sequence, act))

    def after(self, delay_us: int, act: Act) -> None:
        """Do something so much later."""
        self.at(self.now_us + delay_us, act)

    def run_until(self, end_us: int) -> None:
        """Do all that is due up to and including that time."""
        while self._heap and self._heap[0][0] <= end_us:
            self.now_us, _, act = heapq.heappop(self._heap)
            act()
        self.now_us = max(self.now_us, end_us)
