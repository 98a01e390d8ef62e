"""How long a packet takes between two places.

Decides a latency from coordinates. Knows nothing of load or loss, which are the network's. Invariant: the
matrix is symmetric and no entry is below that of light in fibre.
"""

import math

# Latitude and longitude of data centres in the places that the codes (of airports) stand for.
REGIONS: dict[str, tuple[float, float]] = {
    "ams": (52.3, 4.8),
    "iad": (38.9, -77.4),
    "sin": (1.4, 104.0),
    "gru": (-23.4, -46.5),
    "fra": (50.0, 8.6),
    "sjc": (37.4, -121.9),
    "nrt": (35.8, 140.4),
    "syd": (-33.9, 151.2),
    "jnb": (-26.1, 28.2),
    "bom": (19.1, 72.9),
}
EARTH_RADIUS_KM = 6371.0
FIBRE_KM_PER_MS = 200.0
# Cables take detours: measured round trips between data centres are 1.3 to 2 times the great circle's.
DETOUR = 1.5
LOCAL_US = 250  # one way within a region: racks apart, not cities


def compute_one_way_us(one: str, other: str) -> int:
    """Return how long a packet takes from one region to another."""
    (lat1, lon1), (lat2, lon2) = REGIONS[one], REGIONS[other]
    phi1, phi2 = math.radians(lat1), math.radians(lat2)
    haversine = (
        math.sin((phi2 - phi1) / 2) ** 2
        + math.cos(phi1) * math.cos(phi2) * math.sin(math.radians(lon2 - lon1) / 2) ** 2
    )
    km = 2 * EARTH_RADIUS_KM * math.asin(math.sqrt(haversine))
    return LOCAL_US + round(km / FIBRE_KM_PER_MS * DETOUR * 1000)


def place(index: int) -> str:
    """Return the region of a node: they are dealt out in turn."""
    return list(REGIONS)[index % len(REGIONS)]
