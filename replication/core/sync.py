"""When to sync, and with whom.

Decides the pace of repair: at once after joining or when something is known to be missing, slower while
all is quiet. Knows nothing of what a session transfers. Invariant: a peer that was not tried for the
longest time is never passed over for ever, and one that failed waits, so no single peer blocks repair.
"""

from collections.abc import Collection
from dataclasses import dataclass

from replication.core.clock import SiteId
from replication.core.probe import Rng, jitter


@dataclass(frozen=True, slots=True)
class SyncSettings:
    """The knobs; a session in which nothing is missing costs two frames of about 30 bytes per site."""

    busy_interval_ms: float = 500  # after a session that brought something: there may be more to find
    quiet_interval_ms: float = 5_000  # bounds how long a change that no push brought can be missing
    soon_ms: float = 50  # lets what is on its way along the tree arrive first
    failed_wait_ms: float = 3_000  # before a peer that failed is tried again, unless it asks for it


class SyncSchedule:
    """One node's plan of sessions; it runs one at a time."""

    def __init__(self, settings: SyncSettings, rng: Rng) -> None:
        self._settings = settings
        self._rng = rng
        self._at_ms = 0.0  # when the next session is due
        self._wanted: dict[SiteId, None] = {}  # peers that have what we lack or have just come; in order
        self._tried_ms: dict[SiteId, float] = {}
        self._failed_ms: dict[SiteId, float] = {}

    def next_at(self) -> float:
        """Return when the next session is due."""
        return self._at_ms

    def want(self, peer: SiteId, now_ms: float) -> None:
        """Sync with this peer soon: it is new, or has what we lack."""
        self._wanted[peer] = None
        self._failed_ms.pop(peer, None)
        self._at_ms = min(self._at_ms, now_ms + jitter(self._rng, self._settings.soon_ms))

    def forget(self, peer: SiteId) -> None:
        """Let go of a peer that is gone."""
        self._wanted.pop(peer, None)
        self._tried_ms.pop(peer, None)
        self._failed_ms.pop(peer, None)

    def choose(self, peers: Collection[SiteId], now_ms: float) -> SiteId | None:
        """Return the peer to sync with now, out of those that are reachable, and count it as tried.

        Wanted peers go first, then a random one of the longer-untried half.
        """
        self._wanted = {site: None for site in self._wanted if site in peers}
        peer = next(iter(self._wanted), None)
        if peer is None:
            fit = [
                site
                for site in peers
                if now_ms - self._failed_ms.get(site, float("-inf")) >= self._settings.failed_wait_ms
            ]
            fit.sort(key=lambda site: self._tried_ms.get(site, float("-inf")))
            older = fit[: (len(fit) + 1) // 2]
            peer = older[self._rng.randrange(len(older))] if older else None
        if peer is not None:
            self._wanted.pop(peer, None)
            self._tried_ms[peer] = now_ms
        self._at_ms = now_ms + jitter(self._rng, self._settings.quiet_interval_ms)
        return peer

    def handle_result(self, peer: SiteId, now_ms: float, *, ok: bool, received: int) -> None:
        """Take the outcome of a session and set the next one."""
        if not ok:
            self._failed_ms[peer] = now_ms
        if self._wanted:
            interval = self._settings.soon_ms
        elif received or not ok:
            interval = self._settings.busy_interval_ms
        else:
            interval = self._settings.quiet_interval_ms
        self._at_ms = now_ms + jitter(self._rng, interval)
