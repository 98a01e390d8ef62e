"""How long a suspected member has to speak up before it is declared dead.

Lifeguard's rule (Dadgar, Phillips, Currey 2018, section IV-B): start patient, and lose patience as
independent members confirm. Knows nothing of messages. Invariant: the deadline never moves later.
"""

import math
from dataclasses import dataclass, field

from replication.core.clock import SiteId


def compute_suspicion_bounds_ms(
    members: int, probe_interval_ms: float, *, factor: float, patience: float
) -> tuple[float, float]:
    """Return the shortest and the longest: `factor * max(1, log10 n) * interval`, and `patience` times it."""
    shortest = factor * max(1.0, math.log10(max(1, members))) * probe_interval_ms
    return shortest, patience * shortest


def compute_confirmations_wanted(members: int, indirect_probes: int) -> int:
    """Return how many others must agree before patience is at its shortest.

    With fewer members than could confirm there is nobody to wait for, so none are wanted.
    """
    return indirect_probes if members - 2 >= indirect_probes else 0


@dataclass(slots=True)
class Suspicion:
    """One member's case, from the first accusation until it is refuted or due."""

    started_ms: float
    shortest_ms: float
    longest_ms: float
    wanted: int
    accusers: set[SiteId] = field(default_factory=set)

    def confirm(self, accuser: SiteId) -> bool:
        """Count an accuser; return whether it was a new one that counts."""
        if accuser in self.accusers or len(self.accusers) > self.wanted:
            return False
        self.accusers.add(accuser)
        return True

    def compute_deadline_ms(self) -> float:
        """Return when the member is dead: patience falls with the log of the confirmations."""
        if self.wanted <= 0:
            return self.started_ms + self.shortest_ms
        confirmations = max(0, len(self.accusers) - 1)
        fraction = math.log(confirmations + 1) / math.log(self.wanted + 1)
        patience_ms = self.longest_ms - (self.longest_ms - self.shortest_ms) * min(1.0, fraction)
        return self.started_ms + patience_ms
