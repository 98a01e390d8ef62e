"""Which link leads to whom, and which links are kept.

Decides which of several links to a peer is used, when a peer counts as up, and when to dial again. Knows
nothing of how links are made or of what flows over them. Invariant: a peer is up from its first lasting link,
in either direction, to the loss of its last one; to a peer that is wanted there is a link of ours, or one is
being dialled, or the wait for that runs.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Protocol

from replication.core.clock import SiteId
from replication.core.member import Address, MemberInfo
from replication.core.probe import Rng, jitter


class Link(Protocol):
    """What is used of a stream to a peer; compared by identity."""

    @property
    def peer(self) -> MemberInfo:
        """Who is at the other end."""

    @property
    def lasting(self) -> bool:
        """Whether it is meant to be kept."""

    @property
    def is_writable(self) -> bool:
        """Whether the peer keeps up, so that something large may be sent."""

    def send(self, frame: bytes, /) -> bool:
        """Queue a frame; False when it was dropped, as the link is gone or the peer too slow."""

    def when_writable(self, act: Callable[[], None], /) -> None:
        """Call `act` when the link is writable; never when it closes first."""

    def pause(self) -> None:
        """Hand in no more frames for now."""

    def resume(self) -> None:
        """Go on handing in frames."""

    def close(self) -> None:
        """Close at once; what was queued may be lost."""

    def retire(self) -> None:
        """Close when what was queued is out."""


class Dialler(Protocol):
    """What makes links."""

    def now_ms(self) -> float:
        """Return the monotonic time."""

    def call_later(self, delay_ms: float, act: Callable[[], None], /) -> None:
        """Call `act` after a while, if we still run."""

    def dial(self, address: Address, *, lasting: bool, done: Callable[[Link | None], None]) -> None:
        """Open a link; `done` gets it, after it was reported as up, or None when nobody answered."""


class Links:
    """The links of one node, by peer."""

    def __init__(
        self,
        dialler: Dialler,
        rng: Rng,
        *,
        on_peer_up: Callable[[SiteId], None],
        on_peer_down: Callable[[SiteId], None],
        redial_ms: float,
        redial_max_ms: float,
    ) -> None:
        self.counters: Counter[str] = Counter()
        self._dialler = dialler
        self._rng = rng
        self._on_peer_up = on_peer_up
        self._on_peer_down = on_peer_down
        self._redial_ms = redial_ms
        self._redial_max_ms = redial_max_ms
        self._links: dict[SiteId, list[Link]] = {}  # all that are up, the best first
        self._wanted: dict[SiteId, Address] = {}
        self._dialling: dict[SiteId, None] = {}  # from the call to its answer
        self._dialled: dict[SiteId, tuple[Link, Address, float]] = {}  # ours that are up, and since when
        self._failures: dict[SiteId, int] = {}  # in a row

    # --- which links there are ------------------------------------------------------------------------

    def handle_link_up(self, link: Link) -> None:
        """Take note of a link, whoever dialled it."""
        site = link.peer.site
        was_up = self.is_up(site)
        links = self._links.setdefault(site, [])
        links.insert(0, link)
        # The newest worked last: an older one may be half open, left from before a cut.
        links.sort(key=lambda other: not other.lasting)
        if not was_up and self.is_up(site):
            self._on_peer_up(site)

    def handle_link_down(self, link: Link) -> None:
        """Take note that a link is gone; dial again if it was ours and is wanted."""
        site = link.peer.site
        was_up = self.is_up(site)
        links = self._links.get(site, [])
        if link in links:
            links.remove(link)
        if not links:
            self._links.pop(site, None)
        if was_up and not self.is_up(site):
            self._on_peer_down(site)
        ours = self._dialled.get(site)
        if ours is not None and ours[0] is link:
            del self._dialled[site]
            # One that breaks at once, time and again, counts as failing.
            lasted = self._dialler.now_ms() - ours[2] > self._redial_max_ms
            self._redial(site, failures=1 if lasted else self._failures.get(site, 0) + 1)

    def is_up(self, site: SiteId) -> bool:
        """Return whether there is a lasting link to the peer."""
        return any(link.lasting for link in self._links.get(site, ()))

    def get(self, site: SiteId) -> Link | None:
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

    # --- which links are wanted -----------------------------------------------------------------------

    def want(self, wanted: Mapping[SiteId, Address]) -> None:
        """Keep a link dialled to each of these peers and to no others."""
        for site in list(self._failures):
            if wanted.get(site) != self._wanted.get(site):
                del self._failures[site]
        self._wanted = dict(wanted)
        for site, (link, address, _) in list(self._dialled.items()):
            if wanted.get(site) != address:
                # The other side may keep its own link.
                link.close()
        for site in wanted:
            if site not in self._failures:
                self._dial(site)

    def borrow(self, site: SiteId, address: Address, done: Callable[[Link | None, bool], None]) -> None:
        """Hand out a link to a peer, and whether it was dialled for this and is to be retired after."""
        link = self.get(site)
        if link is not None:
            done(link, False)
            return

        def dialled(link: Link | None) -> None:
            if link is not None and link.peer.site != site:
                link.close()
                link = None
            done(link, link is not None)

        self._dialler.dial(address, lasting=False, done=dialled)

    def _dial(self, site: SiteId) -> None:
        address = self._wanted.get(site)
        if address is None or site in self._dialling or site in self._dialled:
            return
        self._dialling[site] = None

        def done(link: Link | None) -> None:
            del self._dialling[site]
            if link is not None and link.peer.site == site and self._wanted.get(site) == address:
                self.counters["dials"] += 1
                self._dialled[site] = (link, address, self._dialler.now_ms())
                return
            if link is not None:
                # Somebody else lives there now, or nobody wants it any more.
                link.close()
            self.counters["dials_failed"] += 1
            self._redial(site, failures=self._failures.get(site, 0) + 1)

        self._dialler.dial(address, lasting=True, done=done)

    def _redial(self, site: SiteId, *, failures: int) -> None:
        if site not in self._wanted:
            return
        self._failures[site] = failures
        wait_ms = min(self._redial_max_ms, self._redial_ms * 2 ** min(failures - 1, 16))
        self._dialler.call_later(jitter(self._rng, wait_ms), lambda: self._dial(site))
