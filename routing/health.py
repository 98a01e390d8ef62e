"""Passive health: machines that just failed are left out for a while.

Decides how long; refuses to know what a failure was. Invariant: an ejection ends by itself, and
the balancer may overrule it when nobody else is left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from .target import Target

# One refused connection is proof enough, because the price of a wrong ejection is small: others serve
# meanwhile, and if there are none the ejected one is tried all the same.
EJECTION_FIRST_S: Final = 1.0
# A check of the owning node takes a dead machine out for good long before this.
EJECTION_MAX_S: Final = 30.0
_DOUBLINGS_MAX: Final = 16  # keeps the power small; the longest ejection is reached well before


def record_failure(target: Target, now: float) -> None:
    """Eject a machine after a failed connection: 1 s, then 2, 4, … up to 30, until one succeeds.

    Failures during an ejection do not count: a burst of requests that fail together is one failure.
    """
    if target.ejected_until > now:
        return
    target.ejected_until = now + compute_ejection_s(target.failures)
    target.failures += 1


def record_success(target: Target) -> None:
    """Take a machine back at once after a connection that worked."""
    if target.failures:
        target.failures = 0
        target.ejected_until = 0.0


class Failing:
    """The machines that have failed and not worked since, for people to see."""

    __slots__ = ("_targets",)

    def __init__(self) -> None:
        self._targets: dict[str, Target] = {}

    def record(self, target: Target, now: float) -> None:
        """Eject a machine as `record_failure` does, and remember it."""
        record_failure(target, now)
        self._targets[target.id] = target

    def collect(self, now: float) -> list[tuple[str, int, float]]:
        """Return (machine, failures in a row, seconds for which it is left out); forget who works again."""
        for machine in [m for m, target in self._targets.items() if not target.failures or target.removed]:
            del self._targets[machine]
        return [
            (machine, target.failures, max(0.0, target.ejected_until - now))
            for machine, target in self._targets.items()
        ]


def compute_ejection_s(failures_before: int) -> float:
    """Return EJECTION_FIRST_S * 2 ** failures_before, at most EJECTION_MAX_S."""
    return min(EJECTION_FIRST_S * 2.0 ** min(failures_before, _DOUBLINGS_MAX), EJECTION_MAX_S)
