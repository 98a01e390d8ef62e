"""Time limits of connections.

Decides when a deadline is looked at: all of them, every quarter of a second. Refuses to know what
happens then. Invariant: setting a deadline is one attribute write, so waits of a microsecond cost no
more than a microsecond; a timer per wait would cost as much as a small exchange. The price is a pass
over all connections (0.1 us each), and limits that are late by up to one interval, or more when many end at
once: a cut costs some 20 us, and requests are not to wait for thousands of them. Ten thousand take 2.5 s.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Collection

NEVER: Final = float("inf")
# Handled in one turn of the loop before requests get theirs: some 0.1 ms.
DUE_A_TURN: Final = 4
# Requests have the loop to themselves between such turns.
PAUSE_S: Final = 0.001


class Timed(Protocol):
    """A connection with a time limit."""

    deadline: float

    def handle_deadline(self) -> None:
        """The deadline has passed."""


class Sweeper:
    """Looks at the deadlines of collections that others fill."""

    def __init__(self, interval_s: float, *collections: Collection[Timed]) -> None:
        self._interval_s = interval_s
        self._collections = collections
        self._timer: asyncio.TimerHandle | None = None  # set from `start` to `stop`
        self._due: deque[tuple[Timed, Collection[Timed]]] = deque()
        self._turn: asyncio.Handle | None = None  # set while some are due

    def start(self) -> None:
        """Begin to look."""
        self._timer = asyncio.get_running_loop().call_later(self._interval_s, self._sweep)

    def stop(self) -> None:
        """Stop looking; nothing is called any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None
        self._due.clear()

    def _sweep(self) -> None:
        # The next pass first: whatever a connection does, the others keep their limits.
        self.start()
        if self._turn is None:
            now = asyncio.get_running_loop().time()
            self._due.extend((c, all_) for all_ in self._collections for c in all_ if c.deadline <= now)
            self._handle(now)

    def _handle(self, now: float) -> None:
        due = self._due
        turn = [due.popleft() for _ in range(min(DUE_A_TURN, len(due)))]
        self._turn = asyncio.get_running_loop().call_later(PAUSE_S, self._handle, now) if due else None
        for connection, connections in turn:
            # Still there and still due, as others had their turn meanwhile.
            if connection in connections and connection.deadline <= now:
                connection.handle_deadline()
