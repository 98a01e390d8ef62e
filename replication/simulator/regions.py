"""How long a packet takes between two places.

Decides a latency from coordinates and from where oceans are crossed. Knows nothing of load or loss, which are
the network's. Invariant: the matrix is symmetric and no entry is below that of light in fibre.
"""

import math
from functools import cache
from itertools import product

# Latitude and longitude of data centres in the places that the codes (of airports) stand for, by continent:
# on one continent cables lead more or less straight from each to each.
CONTINENTS: dict[str, dict[str, tuple[float, float]]] = {
    "europe": {
        "ams": (52.3, 4.8), "fra": (50.0, 8.6), "lhr": (51.5, -0.5), "cdg": (49.0, 2.5), "mad": (40.5, -3.6),
        "waw": (52.2, 21.0), "arn": (59.6, 17.9), "otp": (44.6, 26.1), "mxp": (45.6, 8.7), "mrs": (43.4, 5.2),
    },
    "north america": {
        "iad": (38.9, -77.4), "sjc": (37.4, -121.9), "ewr": (40.7, -74.2), "ord": (42.0, -87.9),
        "dfw": (32.9, -97.0), "lax": (33.9, -118.4), "sea": (47.4, -122.3), "mia": (25.8, -80.3),
        "atl": (33.6, -84.4), "den": (39.9, -104.7), "phx": (33.4, -112.0), "yyz": (43.7, -79.6),
        "yul": (45.5, -73.7), "bos": (42.4, -71.0), "qro": (20.6, -100.2),
    },
    "south america": {
        "gru": (-23.4, -46.5), "gig": (-22.8, -43.2), "eze": (-34.8, -58.5), "scl": (-33.4, -70.8),
        "bog": (4.7, -74.1),
    },
    "asia": {
        "sin": (1.4, 104.0), "nrt": (35.8, 140.4), "bom": (19.1, 72.9), "hkg": (22.3, 113.9),
        "icn": (37.5, 126.5), "maa": (13.0, 80.2),
    },
    "middle east": {"dxb": (25.3, 55.4)},
    "oceania": {"syd": (-33.9, 151.2), "akl": (-37.0, 174.8)},
    "africa": {"jnb": (-26.1, 28.2)},
}  # fmt: skip
# Where cables lead from one continent to another; what has to go farther goes on from there.
CROSSINGS = (
    ("lhr", "ewr"), ("cdg", "iad"), ("mad", "gru"), ("mad", "mia"),
    ("mia", "gru"), ("mia", "bog"), ("lax", "scl"),
    ("sea", "nrt"), ("sjc", "nrt"), ("lax", "hkg"), ("lax", "syd"), ("lax", "akl"),
    ("mrs", "bom"), ("mrs", "sin"), ("mrs", "dxb"), ("dxb", "bom"),
    ("syd", "sin"), ("syd", "nrt"),
    ("lhr", "jnb"), ("jnb", "dxb"),
)  # fmt: skip
COORDINATES = {code: at for codes in CONTINENTS.values() for code, at in codes.items()}
# In the order in which nodes are dealt out: the first ones are all over the world.
REGIONS = tuple(
    dict.fromkeys(("ams", "iad", "sin", "gru", "fra", "sjc", "nrt", "syd", "jnb", "bom", *COORDINATES))
)
EARTH_RADIUS_KM = 6371.0
FIBRE_KM_PER_MS = 200.0
# Cables take detours, and routers take time: round trips between data centres on one continent, or on two
# shores, are 1.3 to 2 times what light in fibre would take along the great circle.
DETOUR = 1.5
LOCAL_US = 250  # one way within a region: racks apart, not cities


def compute_km(one: str, other: str) -> float:
    """Return the great circle's length."""
    (lat1, lon1), (lat2, lon2) = COORDINATES[one], COORDINATES[other]
    phi1, phi2 = math.radians(lat1), math.radians(lat2)
    haversine = (
        math.sin((phi2 - phi1) / 2) ** 2
        + math.cos(phi1) * math.cos(phi2) * math.sin(math.radians(lon2 - lon1) / 2) ** 2
    )
    return 2 * EARTH_RADIUS_KM * math.asin(math.sqrt(haversine))


@cache
def compute_cables_km() -> dict[tuple[str, str], float]:
    """Return the shortest way by cable between any two regions (Floyd and Warshall)."""
    km = dict.fromkeys(product(REGIONS, REGIONS), math.inf)
    ashore = [pair for codes in CONTINENTS.values() for pair in product(codes, codes)]
    for one, other in (*ashore, *CROSSINGS):
        km[one, other] = km[other, one] = compute_km(one, other)
    for middle, one, other in product(REGIONS, REGIONS, REGIONS):
        km[one, other] = min(km[one, other], km[one, middle] + km[middle, other])
    return km


def compute_one_way_us(one: str, other: str) -> int:
    """Return how long a packet takes from one region to another."""
    return LOCAL_US + round(compute_cables_km()[one, other] / FIBRE_KM_PER_MS * DETOUR * 1000)
