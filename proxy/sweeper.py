"""Time limits of connections.

Decides when a deadline is looked at: all of them, every quarter of a second. Refuses to know what
happens then. Invariant: setting a deadline is one attribute write, so waits of a microsecond cost no
more than a microsecond; a timer per wait would cost as much as a small exchange. The price is a pass
over all connections (0.1 us each), and limits that are late by up to one interval, or more when many end at
once: a cut costs some 100 us, and requests are not to wait for thousands of them.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Collection

NEVER: Final = float("inf")
# Handled in one turn of the loop before requests get theirs: some 0.4 ms, and a request takes a few turns.
DUE_A_TURN: Final = 4


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
        self._rest: asyncio.Handle | None = None  # set while more are due than a turn takes

    def start(self) -> None:
        """Begin to look."""
        self._timer = asyncio.get_running_loop().call_later(self._interval_s, self._sweep)

    def stop(self) -> None:
        """Stop looking; nothing is called any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._rest is not None:
            self._rest.cancel()
            self._rest = None

    def _sweep(self) -> None:
        # The next pass first: whatever a connection does, the others keep their limits.
        self.start()
        if self._rest is None:
            now = asyncio.get_running_loop().time()
            self._handle([(c, all_) for all_ in self._collections for c in all_ if c.deadline <= now], now)

    def _handle(self, due: list[tuple[Timed, Collection[Timed]]], now: float) -> None:
        rest = due[DUE_A_TURN:]
        self._rest = asyncio.get_running_loop().call_soon(self._handle, rest, now) if rest else None
        for connection, connections in due[:DUE_A_TURN]:
            # Still there and still due, as others had their turn meanwhile.
            if connection in connections and connection.deadline <= now:
                connection.handle_deadline()
