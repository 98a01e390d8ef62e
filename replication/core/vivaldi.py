"""Where nodes are on a map on which distance is round-trip time.

Decides where we are, from what we measured to others and where they say they are; after Dabek, Cox,
Kaashoek, Morris 2004 (Vivaldi, with heights), with gravity and the latency filter that Ledlie, Gardner,
Seltzer 2007 and hashicorp/serf found necessary outside a laboratory. Knows nothing of messages or time.
Invariant: our coordinate is finite and within reach of the origin, whatever peers claim.
"""

from typing import NamedTuple


# Round trips of the Internet fit well into two or three dimensions and a height; more buy little (Vivaldi,
# section 5.4), and each costs bytes in every probe.
DIMENSIONS = 4
# The earth's longest round trip is 0.4 s. A coordinate that is further out, or a round trip that is longer,
# is a fault or a lie.
REACH_MS = 10_000.0


class Coordinate(NamedTuple):
    """A place: a point, and a height above it that stands for the node's own access link; all in ms.

    `error` is the node's own estimate of how wrong its distances are, as a share: from 0 to 1.5.
    """

    vector: tuple[float, ...]
    height: float
    error: float
