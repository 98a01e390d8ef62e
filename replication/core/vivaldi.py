"""Where nodes are on a map on which distance is round-trip time.

Decides where we are, from what we measured to others and where they say they are; after Dabek, Cox,
Kaashoek, Morris 2004 (Vivaldi, with heights), with the latency filter and the gravity of Ledlie, Gardner,
Seltzer 2007, as hashicorp/serf uses them. Knows nothing of messages or time. Invariant: our coordinate is
sane, whatever peers claim, and one observation moves it by `STEP_MAX_MS` at most.
"""

import math
from collections import OrderedDict, deque
from typing import NamedTuple

from replication.core.clock import SiteId
from replication.core.probe import Rng

# Round trips of the Internet fit well into two or three dimensions and a height; more buy little (Vivaldi,
# section 5.4), and each costs bytes in every probe.
DIMENSIONS = 4
# The longest round trip on earth is 0.4 s, by satellite 0.7 s. What is further out is a fault or a lie.
REACH_MS = 2_000.0
ERROR_MAX = 1.5  # serf's; a node begins there
ERROR_MIN = 0.02  # nobody is believed to be surer, or one claim would outweigh all that we measured
GAIN = 0.25  # c_c and c_e of the paper
STEP_MAX_MS = 50.0  # bounds what one liar, or one slow answer, does
HEIGHT_MIN_MS = 0.01
GRAVITY_MS = 500.0  # rho: a map that drifts off whole is pulled back by a fraction of a ms
# Below it a round trip is mostly the two event loops, and a relative error says nothing.
RTT_FLOOR_MS = 5.0
FILTER_SAMPLES = 3
# In a cluster of more members a peer is measured so rarely that its last samples are not of the same time.
FILTERED_PEERS_MAX = 64


class Coordinate(NamedTuple):
    """A place: a point, and a height above it that stands for the node's own access link; all in ms.

    `error` is the node's own estimate of how wrong its distances are, as a share: from 0 to ERROR_MAX.
    """

    vector: tuple[float, ...]
    height: float
    error: float


ORIGIN = Coordinate((0.0,) * DIMENSIONS, HEIGHT_MIN_MS, ERROR_MAX)


def estimate_rtt_ms(one: Coordinate, other: Coordinate) -> float:
    """Return the round trip between two places."""
    return math.dist(one.vector, other.vector) + one.height + other.height


def is_sane(place: Coordinate) -> bool:
    """Return whether a place can be one of this world; NaN is none."""
    return (
        len(place.vector) == DIMENSIONS
        and math.hypot(*place.vector) <= REACH_MS
        and 0 <= place.height <= REACH_MS
        and 0 <= place.error <= ERROR_MAX
    )


class Vivaldi:
    """Our own place, as it is learned."""

    def __init__(self) -> None:
        self.place = ORIGIN
        self.observations = 0
        self._samples: OrderedDict[SiteId, deque[float]] = OrderedDict()  # the peer measured last is last

    def observe(self, peer: SiteId, place: Coordinate, rtt_ms: float, rng: Rng) -> bool:
        """Take a round trip to a peer that says to be there; False when that cannot be, and is left out."""
        if not is_sane(place) or not 0 < rtt_ms <= REACH_MS:
            return False
        rtt_ms = self._filter(peer, rtt_ms)
        off_ms = rtt_ms - estimate_rtt_ms(self.place, place)
        peer_error = max(ERROR_MIN, place.error)
        weight = self.place.error / (self.place.error + peer_error)
        wrongness = min(ERROR_MAX, abs(off_ms) / max(RTT_FLOOR_MS, rtt_ms))
        error = self.place.error + GAIN * weight * (wrongness - self.place.error)
        step_ms = max(-STEP_MAX_MS, min(STEP_MAX_MS, GAIN * weight * off_ms))
        self.place = _move(self.place._replace(error=max(ERROR_MIN, error)), place, step_ms, rng)
        pull_ms = (math.hypot(*self.place.vector) / GRAVITY_MS) ** 2
        self.place = _move(self.place, ORIGIN, -pull_ms, rng, climbs=False)
        self.observations += 1
        return True

    def _filter(self, peer: SiteId, rtt_ms: float) -> float:
        """Return the median of the last samples, so that one answer that was queued moves nothing."""
        samples = self._samples.setdefault(peer, deque(maxlen=FILTER_SAMPLES))
        self._samples.move_to_end(peer)
        if len(self._samples) > FILTERED_PEERS_MAX:
            self._samples.popitem(last=False)
        samples.append(rtt_ms)
        return sorted(samples)[(len(samples) - 1) // 2]


def _move(
    place: Coordinate, other: Coordinate, step_ms: float, rng: Rng, *, climbs: bool = True
) -> Coordinate:
    """Return the place moved away from the other one, or towards it when the step is negative."""
    apart_ms = math.dist(place.vector, other.vector)
    if apart_ms > 0:
        direction = [(a - b) / apart_ms for a, b in zip(place.vector, other.vector, strict=True)]
    else:
        direction = _random_direction(rng)
    vector = [value + step_ms * part for value, part in zip(place.vector, direction, strict=True)]
    length = math.hypot(*vector)
    if length > REACH_MS:
        vector = [value * REACH_MS / length for value in vector]
    height = place.height
    if climbs:
        # The force divides between the plain and the heights as the distance does.
        share = (place.height + other.height) / max(apart_ms, HEIGHT_MIN_MS)
        height = min(REACH_MS, max(HEIGHT_MIN_MS, height + step_ms * min(1.0, share)))
    return Coordinate(tuple(vector), height, place.error)


def _random_direction(rng: Rng) -> list[float]:
    parts = [rng.random() - 0.5 for _ in range(DIMENSIONS)]
    length = math.hypot(*parts) or 1.0
    return [part / length for part in parts]
