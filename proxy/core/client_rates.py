"""How often each client may connect.

Decides by a token bucket for each client: so many connections a second, and so many at once after a silence.
Refuses to know what a client is. Invariant: a client that keeps to its rate is never refused, and no more
than CLIENTS_MAX are remembered: with more at a time the oldest are forgotten, which forgives them.

Kept as GCRA: for each client only the time at which its bucket is full again.
"""

from __future__ import annotations

from itertools import islice
from typing import Final

# After a silence: a page that opens its connections at once, or everybody behind a gateway after a restart.
BURST_S: Final = 4.0
# Some 3 MB. A flood of more addresses than that is none that a limit for each of them ends.
CLIENTS_MAX: Final = 16_384


class ClientRates:
    """The buckets of one worker; a rate of 0 is no limit."""

    __slots__ = ("_full_at", "_interval_s")

    def __init__(self, per_s: int) -> None:
        self._interval_s = 1.0 / per_s if per_s else 0.0
        self._full_at: dict[str, float] = {}  # in the order of the last connection

    def __len__(self) -> int:
        return len(self._full_at)

    def take(self, client: str, now: float) -> bool:
        """Count a connection; False, and not counted, when it is one too many."""
        if not self._interval_s:
            return True
        full_at = max(self._full_at.get(client, 0.0), now)
        if full_at - now > BURST_S - self._interval_s:
            return False
        self._full_at.pop(client, None)
        if len(self._full_at) >= CLIENTS_MAX:
            self._forget(now)
        self._full_at[client] = full_at + self._interval_s
        return True

    def _forget(self, now: float) -> None:
        """Make room: whose bucket is full is as one never seen; if that is nobody, the older half goes."""
        kept = {client: full_at for client, full_at in self._full_at.items() if full_at > now}
        if len(kept) > CLIENTS_MAX // 2:
            kept = dict(islice(kept.items(), len(kept) - CLIENTS_MAX // 2, None))
        self._full_at = kept
