"""Decide which of two writes is the later one.

Time is a hybrid logical clock: milliseconds of the wall clock above a 16-bit counter, so that it
stays near real time and still orders what happens within one millisecond, or while the wall clock
stands still or goes back. A write is stamped with that and the site that made it. This module
does not know what the time is: callers pass it in.

Invariant: a clock that has returned or observed a value never returns one that is not larger.
"""

from __future__ import annotations

from typing import Final, NamedTuple, NewType

SiteId = NewType("SiteId", bytes)
Hlc = NewType("Hlc", int)

SITE_BYTES: Final = 16
COUNTER_BITS: Final = 16
# SQLite's integers are signed 64-bit: 47 bits remain for milliseconds, which lasts until the year 6429.
HLC_MAX: Final = 2**63 - 1
# Before all times: where a time says up to when, it is up to nothing.
NEVER: Final = Hlc(0)
# Five seconds are far above what NTP leaves between machines and far below what a person would not notice.
MAX_DRIFT_MS: Final = 5_000


class Clock(NamedTuple):
    """When and where a value was written; compared as a tuple, so that two writes never tie."""

    hlc: Hlc
    site: SiteId


def hlc_from_ms(wall_ms: int) -> Hlc:
    """Return the earliest hybrid time within a millisecond."""
    return Hlc(wall_ms << COUNTER_BITS)


def compute_ms(hlc: Hlc) -> int:
    """Return the milliseconds of a hybrid time."""
    return hlc >> COUNTER_BITS


class HybridClock:
    """The clock of one replica."""

    __slots__ = ("last", "max_drift_ms")

    def __init__(self, last: Hlc = Hlc(0), max_drift_ms: int = MAX_DRIFT_MS) -> None:
        self.last = last  # the largest value returned or observed; only grows
        self.max_drift_ms = max_drift_ms

    def tick(self, wall_ms: int) -> Hlc:
        """Return a new time for a local write: after all that is known, and not before the wall clock.

        The counter carries into the milliseconds when it is full, which keeps the order.
        """
        self.last = max(Hlc(self.last + 1), hlc_from_ms(wall_ms))
        return self.last

    def observe(self, hlc: Hlc) -> None:
        """Note a time from elsewhere, so that later local writes come after it."""
        self.last = max(self.last, hlc)

    def is_too_far_ahead(self, hlc: Hlc, wall_ms: int) -> bool:
        """True when adopting this time would drag ours into the future."""
        return compute_ms(hlc) > wall_ms + self.max_drift_ms
