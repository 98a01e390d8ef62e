"""How long the way to each region is, as far as it was measured.

Decides when a measurement is believed over the one before; refuses to know who measures and what time it is.
Invariant: a round trip that is in use changes only after the measurements have differed from it by a margin,
all the time, for a while, so that jitter never changes which region comes next.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

# Less makes no difference that anybody notices, and a round trip varies by so much from one day to another.
MARGIN_MS: Final = 3.0
MARGIN_SHARE: Final = 0.2
# Longer than a link takes to find another way after a failure, and than a burst of traffic lasts.
HOLD_S: Final = 30.0


class Nearness:
    """The round trips from this node to other regions. `round_trips_ms` are those in use."""

    def __init__(self) -> None:
        self.round_trips_ms: dict[str, float] = {}
        self._differing: dict[str, float] = {}  # since when the measurements differ from what is in use

    def observe(self, now: float, measured: Iterable[tuple[str, float]]) -> bool:
        """Take what was measured to the nodes of each region, one pair a node; True when anything changes.

        A region's median counts: one node with a slow link does not make the region far. What is no longer
        measured stays as it is, as its machines may still answer.
        """
        by_region: dict[str, list[float]] = {}
        for region, rtt_ms in measured:
            by_region.setdefault(region, []).append(rtt_ms)
        changed = False
        for region, of_region in by_region.items():
            rtt_ms = statistics.median(of_region)
            before_ms = self.round_trips_ms.get(region)
            if before_ms is not None and abs(rtt_ms - before_ms) <= max(MARGIN_MS, before_ms * MARGIN_SHARE):
                self._differing.pop(region, None)
            elif before_ms is None or now - self._differing.setdefault(region, now) >= HOLD_S:
                self._differing.pop(region, None)
                self.round_trips_ms[region] = rtt_ms
                changed = True
        return changed
