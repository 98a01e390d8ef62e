"""Requests that wait because every machine that they may go to is at its hard limit, or has to be started.

Decides who waits, in which order they are offered room, and for how long. Refuses to know machines:
whether there is room is the balancer's to say. Invariant: an exchange is in its line exactly from
`join` to `leave`, and a line holds no more than `queue_max`.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Collection

    from proxy.metrics import ProxyMetrics

# Room that the first of a line cannot use (it may want a certain machine) is offered to some behind it;
# looking through all of a long line at each end of a request would cost as much as the line is long.
OFFERED_MAX: Final = 8


class Waiting(Protocol):
    """An exchange in a line."""

    deadline: float

    def handle_room(self) -> bool:
        """Try to go on; False when there is still no room for this one."""

    def handle_deadline(self) -> None:
        """The wait is over."""


class Queue:
    """The lines of a worker, one for each app. An empty line is dropped."""

    # For the sweeper, which looks at deadlines: this one is always due, and each look is a poll.
    deadline = 0.0

    def __init__(self, max_per_app: int, metrics: ProxyMetrics) -> None:
        self.max_per_app = max_per_app  # may be changed; whoever waits already stays
        self._metrics = metrics
        self._lines: dict[str, dict[Waiting, None]] = {}
        self._waiting: dict[Waiting, None] = {}

    @property
    def waiting(self) -> Collection[Waiting]:
        """Everybody in any line."""
        return self._waiting.keys()

    def join(self, app: str, exchange: Waiting) -> bool:
        """Put an exchange at the end of its app's line; False when the line is full."""
        line = self._lines.setdefault(app, {})
        if len(line) >= self.max_per_app:
            return False
        line[exchange] = None
        self._waiting[exchange] = None
        self._metrics.queued += 1
        self._metrics.queue_waits += 1
        return True

    def leave(self, app: str, exchange: Waiting, waited_s: float) -> None:
        """Take an exchange out of its line."""
        line = self._lines[app]
        del line[exchange]
        if not line:
            del self._lines[app]
        del self._waiting[exchange]
        self._metrics.queued -= 1
        self._metrics.queue_seconds += waited_s

    def offer(self, app: str) -> bool:
        """A request of the app has ended: whoever is first and can use the room takes it. True if one did."""
        line = self._lines.get(app)
        if line is not None:
            for exchange in list(islice(line, OFFERED_MAX)):
                # One may have left meanwhile: what another does with its room can end in more room.
                if exchange in line and exchange.handle_room():
                    return True
        return False

    def handle_deadline(self) -> None:
        """Look for room that no request of this worker has made: a new machine, another node's load."""
        for app in list(self._lines):
            for _ in range(len(self._lines.get(app, ()))):
                if not self.offer(app):
                    break
