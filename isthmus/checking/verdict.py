"""What the results of one check add up to.

Decides when a machine fails and when it passes again: after so many results in a row, and after more of them
when it has failed often of late. Refuses to know what a probe is. Invariant: whatever the results, a check is
written at most once for each `failures` or `successes` of them in a row, and the first one decides at once.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from routing.types import CheckStatus

# A machine that failed twice in this many intervals was restarted, or had a bad day; more is flapping.
WINDOW_INTERVALS: Final = 60
FALLS_FREE: Final = 2
# Half of the window: then some falls have left it, and less is needed again.
SUCCESSES_NEEDED_MAX: Final = 30


def compute_successes_needed(successes: int, falls: int) -> int:
    """Return successes * 2 ** (falls - FALLS_FREE), at most SUCCESSES_NEEDED_MAX or `successes`."""
    doubled = successes << min(max(0, falls - FALLS_FREE), 8)
    return max(successes, min(doubled, SUCCESSES_NEEDED_MAX))


class Verdict:
    """The state of one check. `window_s` is how long a fall is remembered."""

    __slots__ = ("_failures", "_falls", "_streak", "_successes", "_window_s", "status")

    def __init__(self, failures: int, successes: int, interval_s: float) -> None:
        self._failures = failures
        self._successes = successes
        self._window_s = WINDOW_INTERVALS * interval_s
        self._falls: deque[float] = deque(maxlen=16)  # when it became critical, not the first result
        self._streak = 0  # results in a row that speak against `status`
        self.status: CheckStatus | None = None  # None until the first result

    @property
    def is_in_doubt(self) -> bool:
        """True after a failure that is not yet enough: the next probe should come soon."""
        return self._streak > 0 and self.status is not CheckStatus.CRITICAL

    def successes_needed(self) -> int:
        """Return how many successes in a row it takes to pass again."""
        return compute_successes_needed(self._successes, len(self._falls))

    def is_flapping(self) -> bool:
        """True while it has failed so often of late that it takes more to pass again."""
        return len(self._falls) > FALLS_FREE

    def handle_result(self, *, passed: bool, now: float) -> bool:
        """Take one result; True when the status has changed."""
        while self._falls and self._falls[0] <= now - self._window_s:
            self._falls.popleft()
        before = self.status
        if before is None:
            self.status = CheckStatus.PASSING if passed else CheckStatus.CRITICAL
        elif passed is (before is not CheckStatus.CRITICAL):
            self._streak = 0
            if passed:
                self.status = self._passing()
        else:
            self._streak += 1
            self._turn(passed=passed, now=now)
        return self.status is not before

    def _turn(self, *, passed: bool, now: float) -> None:
        if passed and self._streak >= self.successes_needed():
            self.status = self._passing()
            self._streak = 0
        elif not passed and self._streak >= self._failures:
            self.status = CheckStatus.CRITICAL
            self._falls.append(now)
            self._streak = 0

    def _passing(self) -> CheckStatus:
        return CheckStatus.WARNING if self.is_flapping() else CheckStatus.PASSING
