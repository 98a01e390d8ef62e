"""Whom to probe next, and how much to trust one's own probes.

Decides the order of probing and the local health score. Knows nothing of messages or time. Invariant:
each member is probed once before any is probed twice, so detection time is bounded (SWIM, section 4.3).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from replication.core.clock import SiteId
from replication.core.member import Address

T = TypeVar("T")

# Lifeguard's S is 8: at worst probes are that many times slower and more patient. Half of it lets a node
# that is cut off find out about ten others within a minute.
HEALTH_SCORE_MAX = 4


class Rng(Protocol):
    """What the cores use of `random.Random`; it comes from outside so that a seed replays a run."""

    def random(self) -> float:
        """Return a float in [0, 1)."""

    def randrange(self, stop: int, /) -> int:
        """Return an int in [0, stop)."""


def pick(rng: Rng, items: Sequence[T], count: int) -> list[T]:
    """Return up to `count` different items in random order."""
    pool = list(items)
    chosen: list[T] = []
    while pool and len(chosen) < count:
        index = rng.randrange(len(pool))
        pool[index], pool[-1] = pool[-1], pool[index]
        chosen.append(pool.pop())
    return chosen


def jitter(rng: Rng, base_ms: float) -> float:
    """Return the base plus or minus a quarter, so that nodes that started together drift apart."""
    return base_ms * (0.75 + 0.5 * rng.random())


@dataclass(slots=True)
class LocalHealth:
    """Lifeguard's local health multiplier: 0 is healthy; missed answers raise it, answers lower it."""

    score: int = 0

    def worsen(self, by: int = 1) -> None:
        """Note that we may be the slow one."""
        self.score = min(HEALTH_SCORE_MAX - 1, self.score + by)

    def improve(self) -> None:
        """Note that a probe went well."""
        self.score = max(0, self.score - 1)

    def scale(self, duration_ms: float) -> float:
        """Return the duration stretched by the score."""
        return duration_ms * (self.score + 1)


@dataclass(slots=True)
class ProbeOrder:
    """Round robin over a shuffled list, reshuffled when it has been walked through."""

    urgent: list[SiteId] = field(default_factory=list)  # filled by `hurry`, emptied by `next`
    queue: list[SiteId] = field(default_factory=list)  # what is left of this round

    def hurry(self, site: SiteId) -> None:
        """Probe this member next: there is reason to think that it went away."""
        if site not in self.urgent:
            self.urgent.append(site)

    def next(self, rng: Rng, sites: Iterable[SiteId], is_probed: Callable[[SiteId], bool]) -> SiteId | None:
        """Return the next site that `is_probed` accepts, starting a new round over `sites` when needed."""
        while self.urgent:
            site = self.urgent.pop(0)
            if is_probed(site):
                return site
        for round_ in range(2):
            while self.queue:
                site = self.queue.pop()
                if is_probed(site):
                    return site
            if round_ == 0:
                candidates = list(sites)
                self.queue = pick(rng, candidates, len(candidates))
        return None


@dataclass(slots=True)
class Probe:
    """A probe of ours from its Ping to the end of its interval."""

    site: SiteId
    sent_ms: float
    relays: set[SiteId] = field(default_factory=set)
    nacks: set[SiteId] = field(default_factory=set)
    streamed: bool = False


@dataclass(slots=True)
class Relay:
    """A probe that we make for another member."""

    origin: Address
    number: int
    target: SiteId
    nacked: bool = False
