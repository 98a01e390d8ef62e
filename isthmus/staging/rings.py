"""Which region gets a change first, which next, and how long the others wait.

Decides by names alone, so that all nodes come to the same order without asking each other. Refuses to know
who is in reach: if a region lost its place when its nodes die, what killed them would be tried on the next.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# The first region, a second one, and then all others together.
RINGS: Final = ("canary", "early", "rest")


def order_regions(configured: Sequence[str], known: Iterable[str]) -> tuple[str, ...]:
    """Return regions in the order in which they get changes; those that are not named come last."""
    if configured:
        return tuple(configured)
    return tuple(sorted(set(known), key=lambda code: hashlib.sha256(code.encode()).digest()))


def find_ring(order: Sequence[str], region: str) -> int:
    """Return the index of a region's ring in RINGS."""
    place = order.index(region) if region in order else len(order)
    return min(place, len(RINGS) - 1)
