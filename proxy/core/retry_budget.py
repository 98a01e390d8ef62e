"""How many of an app's requests may be retries.

Decides whether one more may be made, so that retries do not turn an outage into a larger one: a bounded
number of attempts for each request still multiplies the load when every request fails. As in Finagle and
Linkerd, a retry costs one token, each request earns a part of one, and tokens of more than the last seconds
are worth nothing. Refuses to know what failed. Invariant: over any time long against WINDOW_S, retries of an
app are at most `retry_percent` of its requests and `retries_per_s_min` a second.

Requests pay nothing: what they have earned is worked out from counters that are there anyway, when a retry
is wanted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from proxy.metrics import ProxyMetrics
    from proxy.settings import ProxySettings

# Long enough to even out bursts, short enough that the good times before an outage do not pay for it.
WINDOW_S: Final = 10.0
# Apps that had a retry; those whose last one is longer ago than the window are dropped when there are more.
BUDGETS_MAX: Final = 1_024


class _Budget:
    """One app's, as of its last retry."""

    __slots__ = ("at", "requests", "tokens")

    def __init__(self, tokens: float, at: float) -> None:
        self.tokens = tokens
        self.requests = 0  # that had ended by then
        self.at = at


class RetryBudgets:
    """Those of all apps of one worker."""

    __slots__ = ("_budgets", "_metrics", "_per_s_min", "_share", "_since")

    def __init__(self, settings: ProxySettings, metrics: ProxyMetrics, now: float) -> None:
        self.adopt(settings)
        self._metrics = metrics
        self._since = now
        self._budgets: dict[str, _Budget] = {}

    def adopt(self, settings: ProxySettings) -> None:
        """Go on with other settings."""
        self._share = settings.retry_percent / 100
        self._per_s_min = float(settings.retries_per_s_min)

    def take(self, name: str, now: float) -> bool:
        """Count one retry of an app, or return False when it may have none now."""
        app = self._metrics.app(name)
        budget = self._budgets.get(name)
        if budget is None:
            budget = self._add(name, now)
        elapsed = max(0.0, now - budget.at)
        requests = sum(app.statuses)
        earned = self._share * (requests - budget.requests) + self._per_s_min * elapsed
        if elapsed > WINDOW_S:
            # Of a longer time only as much counts as the window holds of it on average.
            earned *= WINDOW_S / elapsed
        tokens = budget.tokens * max(0.0, 1.0 - elapsed / WINDOW_S) + earned
        budget.at, budget.requests = now, requests
        granted = tokens >= 1.0
        budget.tokens = tokens - granted
        if granted:
            app.retries += 1
        else:
            app.retries_refused += 1
        return granted

    def _add(self, name: str, now: float) -> _Budget:
        if len(self._budgets) >= BUDGETS_MAX:
            recent = {key: b for key, b in self._budgets.items() if now - b.at < WINDOW_S}
            self._budgets = recent if len(recent) < BUDGETS_MAX else {}
        # Of an app without a retry so far the whole life of this worker counts.
        budget = self._budgets[name] = _Budget(self._per_s_min * WINDOW_S, self._since)
        return budget
