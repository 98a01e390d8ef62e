"""The places of all members, as one node knows them.

Decides whose word on a place is the newest, and what round trip two places make. Knows nothing of messages
or of who is a member. Invariant: every place that is kept is sane, and is the newest of those that came.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

from replication.core.clock import SiteId
from replication.core.probe import Rng
from replication.core.vivaldi import Coordinate, Vivaldi, estimate_rtt_ms, is_sane
from replication.core.wire import AGE_S_MAX, Whereabouts

# A node that says so of itself has measured too little to be anywhere; it takes about ten probes.
_ERROR_TRUSTED = 1.0


class _Sighting(NamedTuple):
    place: Coordinate
    said_ms: float  # when the member itself said so


class Atlas:
    """Our own place, and those of others."""

    def __init__(self, me: SiteId, rng: Rng) -> None:
        self._me = me
        self._rng = rng
        self._vivaldi = Vivaldi()
        self._sightings: dict[SiteId, _Sighting] = {}

    @property
    def place(self) -> Coordinate:
        """Where we are."""
        return self._vivaldi.place

    def note(self, site: SiteId, place: Coordinate, said_ms: float) -> bool:
        """Keep where a site says to be, unless a newer word is there; False when it cannot be."""
        if not is_sane(place):
            return False
        known = self._sightings.get(site)
        if known is None or said_ms > known.said_ms:
            self._sightings[site] = _Sighting(place, said_ms)
        return True

    def observe(self, site: SiteId, place: Coordinate, rtt_ms: float) -> None:
        """Learn from a round trip to a site."""
        self._vivaldi.observe(site, place, rtt_ms, self._rng)

    def forget(self, site: SiteId) -> None:
        """Let go of a site that is no member."""
        self._sightings.pop(site, None)

    def estimate_rtt_ms(self, one: SiteId, other: SiteId) -> float | None:
        """Return the round trip between two sites, or None when one of them is not known well enough."""
        here, there = self._find(one), self._find(other)
        return estimate_rtt_ms(here, there) if here is not None and there is not None else None

    def export(self, sites: Iterable[SiteId], now_ms: float) -> tuple[Whereabouts, ...]:
        """Return what is known of these sites."""
        found = [Whereabouts(self._me, self.place, 0)]
        for site in sites:
            sighting = self._sightings.get(site)
            # Rounded up, or a word would get younger with each node that passes it on.
            age_s = math.ceil((now_ms - sighting.said_ms) / 1000) if sighting is not None else AGE_S_MAX
            if sighting is not None and age_s < AGE_S_MAX:
                found.append(Whereabouts(site, sighting.place, age_s))
        return tuple(found)

    def _find(self, site: SiteId) -> Coordinate | None:
        if site == self._me:
            place = self.place
        elif site in self._sightings:
            place = self._sightings[site].place
        else:
            return None
        return place if place.error < _ERROR_TRUSTED else None
