"""A heap of things to do later, for cores that have no clock.

Decides only the order. Knows nothing of what a token means; an owner that no longer cares for one
ignores it when it comes up. Invariant: tokens come up in order of their time, ties in order of setting.
"""

import heapq
from typing import Generic, TypeVar

Token = TypeVar("Token")


class Timers(Generic[Token]):
    """Tokens with the time at which they are due."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Token]] = []
        self._sequence = 0

    def __len__(self) -> int:
        return len(self._heap)

    def set(self, at_ms: float, token: Token) -> None:
        """Make the token due at that time."""
        self._sequence += 1
        heapq.heappush(self._heap, (at_ms, self._sequence, token))

    def next_at(self) -> float | None:
        """Return when the first token is due, or None if there is none."""
        return self._heap[0][0] if self._heap else None

    def pop_due(self, now_ms: float) -> Token | None:
        """Remove and return the first token that is due, or None."""
        if self._heap and self._heap[0][0] <= now_ms:
            return heapq.heappop(self._heap)[2]
        return None
