"""Which link leads to whom.

Decides which of several links to a peer is used, and when a peer counts as up. Knows nothing of how links
are made or of what flows over them. Invariant: a peer is up from its first lasting link, in either
direction, to the loss of its last one.
"""

from collections import Counter
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from replication.core.clock import SiteId
from replication.core.member import MemberInfo


class AnyLink(Protocol):
    """What is used of a link."""

    @property
    def peer(self) -> MemberInfo:
        """Who is at the other end."""

    @property
    def lasting(self) -> bool:
        """Whether it is meant to be kept."""

    def send(self, frame: bytes, /) -> bool:
        """Queue a frame; False when it was dropped."""

    def close(self) -> None:
        """Close at once."""


L = TypeVar("L", bound=AnyLink)


class LinkTable(Generic[L]):
    """The links of one node, by peer."""

    def __init__(
        self, *, on_peer_up: Callable[[SiteId], None], on_peer_down: Callable[[SiteId], None]
    ) -> None:
        self.counters: Counter[str] = Counter()
        self._on_peer_up = on_peer_up
        self._on_peer_down = on_peer_down
        self._links: dict[SiteId, list[L]] = {}  # all that are up, the best first

    def handle_link_up(self, link: L) -> None:
        """Take note of a link, whoever dialled it."""
        site = link.peer.site
        was_up = self.is_up(site)
        links = self._links.setdefault(site, [])
        links.insert(0, link)
        # The newest worked last: an older one may be half open, left from before a cut.
        links.sort(key=lambda other: not other.lasting)
        if not was_up and self.is_up(site):
            self._on_peer_up(site)

    def handle_link_down(self, link: L) -> None:
        """Take note that a link is gone."""
        site = link.peer.site
        was_up = self.is_up(site)
        links = self._links.get(site, [])
        if link in links:
            links.remove(link)
        if not links:
            self._links.pop(site, None)
        if was_up and not self.is_up(site):
            self._on_peer_down(site)

    def is_up(self, site: SiteId) -> bool:
        """Return whether there is a lasting link to the peer."""
        return any(link.lasting for link in self._links.get(site, ()))

    def get(self, site: SiteId) -> L | None:
        """Return the best link to a peer, or None."""
        links = self._links.get(site)
        return links[0] if links else None

    def send(self, site: SiteId, frame: bytes) -> bool:
        """Send a frame to a peer; False when there is no link or it is too slow."""
        link = self.get(site)
        sent = link is not None and link.send(frame)
        if not sent:
            self.counters["frames_dropped"] += 1
        return sent

    def close(self, site: SiteId) -> None:
        """Close all links to a peer: it is dead, and what is queued would be stale when it is back."""
        for link in list(self._links.get(site, ())):
            link.close()
