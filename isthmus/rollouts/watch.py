"""How a node fares while it tries something.

Decides from what its workers count, how they end, and what its checks find. Refuses to know what is
tried. Invariant: what a node did before is the measure, so a node that fares badly is not blamed for what
it had no part in.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from replication.metrics import Sample

# Of fewer requests a share says little.
REQUESTS_MIN: Final = 20
# A share of failures that is so much above twice that before is no chance.
TOLERANCE: Final = 0.05
# What is counted: answers of the class 5xx, and those that the proxy made itself.
_REQUESTS: Final = "isthmus_requests_total"
_ERRORS: Final = "isthmus_errors_total"


class Watch:
    """Looks at a node from its construction on."""

    def __init__(
        self,
        samples: Callable[[], Iterable[Sample]],
        deaths: Callable[[], int],
        checked: Callable[[], Mapping[str, bool]],
    ) -> None:
        """`checked`: whether each machine that serves, and that this node checks, passes."""
        self._samples = samples
        self._deaths = deaths
        self._checked = checked
        self._passed_before = {machine for machine, passes in checked().items() if passes}
        self._deaths_before = deaths()
        self._before = self._count()

    def _count(self) -> Counter[str]:
        counted: Counter[str] = Counter()
        for name, labels, value in self._samples():
            if name == _REQUESTS:
                counted["requests"] += int(value)
                counted["answered with 5xx"] += int(value) * (("status", "5xx") in labels)
            elif name == _ERRORS:
                counted["answered by the proxy itself"] += int(value)
                if not any(label == "app" for label, _ in labels):
                    counted["requests"] += int(value)  # of no app, and so not among those above
        return counted

    def find_problem(self) -> str:
        """Return what goes badly, or nothing."""
        if self._deaths() > self._deaths_before:
            return "a worker died"
        checked = self._checked()
        watched = sorted(self._passed_before & checked.keys())
        failing = [machine for machine in watched if not checked[machine]]
        # More than half: one that dies of itself meanwhile is no sign, unless it is the only one.
        if 2 * len(failing) > len(watched):
            many = f"{len(failing)} of {len(watched)}"
            return f"{many} machines that passed their checks fail them: {failing[0]}"
        since = self._since()
        for what in sorted(since.keys() - {"requests"}):
            before = _share(self._before, what)
            now = _share(since, what)
            if since["requests"] >= REQUESTS_MIN and now > 2 * before + TOLERANCE:
                return f"{now:.0%} of {since['requests']} requests were {what}, {before:.0%} before"
        return ""

    def describe(self) -> str:
        """Return what was seen."""
        since = self._since()
        failed = since["answered with 5xx"]
        return f"{since['requests']} requests, {failed} {'of them ' if failed else ''}failed"

    def _since(self) -> Counter[str]:
        now = self._count()
        return Counter({what: now[what] - self._before[what] for what in now})


def _share(counted: Counter[str], what: str) -> float:
    return counted[what] / counted["requests"] if counted["requests"] else 0.0
