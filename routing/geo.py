"""Where regions are and how far apart.

Decides which regions a name stands for and which of two is nearer: by round trips where they were measured,
else by distance. Refuses to know machines. Invariant: an operator's own region wins over the built-in one
of the same code, and removing it brings the built-in one back.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

EARTH_RADIUS_KM: Final = 6371.0
# A region without coordinates is farther than any other, but still reachable as the last choice.
UNKNOWN_KM: Final = math.inf
# Distances are asked for pairs (own region, region of some machine): a few hundred at most, unless rows
# are hostile, and then forgetting is cheaper than growing.
_CACHE_PAIRS_MAX: Final = 65_536

# Light in fibre needs 1 ms there and back for 100 km; cables are about half as long again as the way
# through the air, and what stands at their ends takes its time too.
RTT_MS_PER_KM: Final = 0.015
RTT_MS_LEAST: Final = 2.0

ANY: Final = "any"
# Names that stand for several regions; `any` is every region, also one without coordinates.
AREAS: Final[dict[str, frozenset[str]]] = {
    "any": frozenset(("africa", "apac", "eu", "na", "sa", "us")),
    "apac": frozenset(("apac",)),
    "eu": frozenset(("eu",)),
    "na": frozenset(("na", "us")),
    "sa": frozenset(("sa",)),
    "us": frozenset(("us",)),
    "usa": frozenset(("us",)),
}


@dataclass(frozen=True, slots=True)
class Region:
    """A place; `area` is the smallest named area it lies in."""

    code: str
    name: str
    latitude: float
    longitude: float
    area: str


def _built_in(*rows: tuple[str, str, float, float, str]) -> dict[str, Region]:
    return {row[0]: Region(*row) for row in rows}


# Coordinates of the airports that the codes come from; a degree more or less changes no order that matters.
BUILT_IN: Final = _built_in(
    ("ams", "Amsterdam, Netherlands", 52.31, 4.76, "eu"),
    ("arn", "Stockholm, Sweden", 59.65, 17.92, "eu"),
    ("ath", "Athens, Greece", 37.94, 23.95, "eu"),
    ("atl", "Atlanta, Georgia (US)", 33.64, -84.43, "us"),
    ("bkk", "Bangkok, Thailand", 13.69, 100.75, "apac"),
    ("bog", "Bogotá, Colombia", 4.70, -74.15, "sa"),
    ("bom", "Mumbai, India", 19.09, 72.87, "apac"),
    ("bos", "Boston, Massachusetts (US)", 42.36, -71.01, "us"),
    ("cdg", "Paris, France", 49.01, 2.55, "eu"),
    ("cph", "Copenhagen, Denmark", 55.62, 12.66, "eu"),
    ("del", "Delhi, India", 28.56, 77.10, "apac"),
    ("den", "Denver, Colorado (US)", 39.86, -104.67, "us"),
    ("dfw", "Dallas, Texas (US)", 32.90, -97.04, "us"),
    ("dub", "Dublin, Ireland", 53.42, -6.27, "eu"),
    ("dxb", "Dubai, United Arab Emirates", 25.25, 55.36, "apac"),
    ("ewr", "Secaucus, New Jersey (US)", 40.69, -74.17, "us"),
    ("eze", "Ezeiza, Argentina", -34.82, -58.54, "sa"),
    ("fra", "Frankfurt, Germany", 50.03, 8.56, "eu"),
    ("gdl", "Guadalajara, Mexico", 20.52, -103.31, "na"),
    ("gig", "Rio de Janeiro, Brazil", -22.81, -43.25, "sa"),
    ("gru", "São Paulo, Brazil", -23.44, -46.47, "sa"),
    ("hel", "Helsinki, Finland", 60.32, 24.96, "eu"),
    ("hkg", "Hong Kong", 22.31, 113.92, "apac"),
    ("iad", "Ashburn, Virginia (US)", 38.94, -77.46, "us"),
    ("icn", "Seoul, South Korea", 37.46, 126.44, "apac"),
    ("jnb", "Johannesburg, South Africa", -26.14, 28.25, "africa"),
    ("kix", "Osaka, Japan", 34.43, 135.24, "apac"),
    ("lax", "Los Angeles, California (US)", 33.94, -118.41, "us"),
    ("lhr", "London, United Kingdom", 51.47, -0.45, "eu"),
    ("lim", "Lima, Peru", -12.02, -77.11, "sa"),
    ("los", "Lagos, Nigeria", 6.58, 3.32, "africa"),
    ("mad", "Madrid, Spain", 40.49, -3.57, "eu"),
    ("mel", "Melbourne, Australia", -37.67, 144.84, "apac"),
    ("mia", "Miami, Florida (US)", 25.79, -80.29, "us"),
    ("mxp", "Milan, Italy", 45.63, 8.72, "eu"),
    ("nbo", "Nairobi, Kenya", -1.32, 36.93, "africa"),
    ("nrt", "Tokyo, Japan", 35.76, 140.39, "apac"),
    ("ord", "Chicago, Illinois (US)", 41.98, -87.90, "us"),
    ("osl", "Oslo, Norway", 60.19, 11.10, "eu"),
    ("otp", "Bucharest, Romania", 44.57, 26.09, "eu"),
    ("phx", "Phoenix, Arizona (US)", 33.43, -112.01, "us"),
    ("prg", "Prague, Czechia", 50.10, 14.26, "eu"),
    ("qro", "Querétaro, Mexico", 20.62, -100.19, "na"),
    ("scl", "Santiago, Chile", -33.39, -70.79, "sa"),
    ("sea", "Seattle, Washington (US)", 47.45, -122.31, "us"),
    ("sin", "Singapore", 1.36, 103.99, "apac"),
    ("sjc", "San Jose, California (US)", 37.36, -121.93, "us"),
    ("syd", "Sydney, Australia", -33.94, 151.18, "apac"),
    ("tpe", "Taipei, Taiwan", 25.08, 121.23, "apac"),
    ("vie", "Vienna, Austria", 48.11, 16.57, "eu"),
    ("waw", "Warsaw, Poland", 52.17, 20.97, "eu"),
    ("yul", "Montreal, Canada", 45.47, -73.74, "na"),
    ("yvr", "Vancouver, Canada", 49.19, -123.18, "na"),
    ("yyz", "Toronto, Canada", 43.68, -79.63, "na"),
    ("zrh", "Zurich, Switzerland", 47.46, 8.55, "eu"),
)


def compute_distance_km(a: Region, b: Region) -> float:
    """Return the great-circle distance (haversine formula)."""
    phi_a, phi_b = math.radians(a.latitude), math.radians(b.latitude)
    half_phi = (phi_b - phi_a) / 2
    half_lambda = math.radians(b.longitude - a.longitude) / 2
    h = math.sin(half_phi) ** 2 + math.cos(phi_a) * math.cos(phi_b) * math.sin(half_lambda) ** 2
    return 2 * EARTH_RADIUS_KM * math.asin(min(1.0, math.sqrt(h)))


class Regions:
    """The built-in regions and the operator's own."""

    __slots__ = ("_cache", "_known", "_measured_ms")

    def __init__(self) -> None:
        self._known = dict(BUILT_IN)
        self._measured_ms: dict[tuple[str, str], float] = {}  # by (from, to)
        self._cache: dict[tuple[str, str], float] = {}  # emptied when a region moves

    def __contains__(self, code: object) -> bool:
        return code in self._known

    def get(self, code: str) -> Region | None:
        """Return the region with this code, or None."""
        return self._known.get(code)

    def codes(self) -> list[str]:
        """Return all codes, sorted."""
        return sorted(self._known)

    def put_own(self, code: str, name: str, latitude: float, longitude: float) -> None:
        """Add or move a region; it belongs to the area of the nearest built-in one."""
        placed = Region(code, name, latitude, longitude, area="")
        nearest = min(BUILT_IN.values(), key=lambda region: compute_distance_km(region, placed))
        self._known[code] = Region(code, name, latitude, longitude, nearest.area)
        self._cache.clear()

    def drop_own(self, code: str) -> None:
        """Forget an own region."""
        del self._known[code]
        if code in BUILT_IN:
            self._known[code] = BUILT_IN[code]
        self._cache.clear()

    def distance_km(self, a: str, b: str) -> float:
        """Return how far two regions are apart; UNKNOWN_KM when one of them has no known place."""
        if a == b:
            return 0.0
        pair = (a, b) if a < b else (b, a)
        distance = self._cache.get(pair)
        if distance is None:
            one, other = self._known.get(a), self._known.get(b)
            distance = UNKNOWN_KM if one is None or other is None else compute_distance_km(one, other)
            if len(self._cache) >= _CACHE_PAIRS_MAX:
                self._cache.clear()
            self._cache[pair] = distance
        return distance

    def set_round_trips(self, origin: str, round_trips_ms: Iterable[tuple[str, float]]) -> None:
        """Take the measured ways from a region; those not given are as they were."""
        for code, rtt_ms in round_trips_ms:
            self._measured_ms[origin, code] = rtt_ms

    def is_measured(self, origin: str, code: str) -> bool:
        """True when the way from one region to the other was measured."""
        return (origin, code) in self._measured_ms

    def rtt_ms(self, origin: str, code: str) -> float:
        """Return the round trip between two regions: as measured, or else as the distance suggests.

        A region is nearest to itself, whatever was measured, and one without a known place the farthest.
        """
        if origin == code:
            return 0.0
        measured = self._measured_ms.get((origin, code))
        if measured is not None:
            return measured
        return RTT_MS_LEAST + self.distance_km(origin, code) * RTT_MS_PER_KM

    def name_source(self, origin: str, code: str) -> str:
        """Return where `rtt_ms` is from: here, measured, distance or unknown."""
        if code == origin:
            return "here"
        if self.is_measured(origin, code):
            return "measured"
        return "distance" if math.isfinite(self.rtt_ms(origin, code)) else "unknown"

    def covers(self, name: str, code: str) -> bool:
        """True when the region `code` is what `name` (a code or an area) stands for."""
        if name in (code, ANY):
            return True
        areas = AREAS.get(name)
        region = self._known.get(code)
        return areas is not None and region is not None and region.area in areas

    def suggest(self, code: str) -> str | None:
        """Return the known code or area that is spelled most like this one, or None."""
        matches = difflib.get_close_matches(code, [*self.codes(), *AREAS], n=1, cutoff=0.5)
        return matches[0] if matches else None
