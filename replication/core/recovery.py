"""When a database that was put back may write under its former identity again.

Decides from who is known and who has told what it has. Knows nothing of how either is found out. Invariant:
it is never over while a member that may hold versions of ours has not told, or while nobody has.

One that has left is not waited for: what it had came from the others or went to them before it said goodbye.
"""

from collections.abc import Iterable
from typing import Final

from .clock import SiteId
from .member import MemberState, Update, is_newer

# The first peer tells of all others within one session, and gossip of the rest of a very large cluster in a
# few rounds of a second each.
SETTLE_MS: Final = 2_000


class Recovery:
    """The wait for our own versions, from the start of a node until it is over."""

    def __init__(self) -> None:
        self._claimed: dict[SiteId, Update] = {}  # the latest that peers said of each member
        self._told: dict[SiteId, None] = {}  # members that a session with us has brought up to date
        self._known: tuple[SiteId, ...] = ()
        self._settled_ms = float("inf")  # when the members known will have been the same for long enough

    def handle_claims(self, updates: Iterable[Update]) -> None:
        """Take what a peer says of the members; nothing else tells a node that starts of the dead ones."""
        for update in updates:
            known = self._claimed.get(update.info.site)
            if known is None or is_newer(update, known):
                self._claimed[update.info.site] = update

    def compute_known(self, us: SiteId) -> dict[SiteId, str]:
        """Return the names of all other members that have not left, by site."""
        return {
            site: update.info.name
            for site, update in sorted(self._claimed.items())
            if site != us and update.state is not MemberState.LEFT
        }

    def handle_synced(self, site: SiteId) -> None:
        """Take note that we have all that this member had."""
        self._told[site] = None

    def compute_missing(self, known: Iterable[SiteId]) -> list[SiteId]:
        """Return the members that have not told yet."""
        return [site for site in known if site not in self._told]

    def is_over(self, known: Iterable[SiteId], now_ms: float) -> bool:
        """Return whether all members known, and known for a while, have told."""
        members = tuple(sorted(known))
        if members != self._known:
            self._known = members
            self._settled_ms = now_ms + SETTLE_MS
        return bool(members) and now_ms >= self._settled_ms and not self.compute_missing(members)
