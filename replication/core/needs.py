"""What one replica lacks that another has.

Decides, from two views of which versions were seen, what to ask for. Knows nothing of sessions, logs or
bytes. Invariant: a need never covers a version that we have or that the peer has not.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from replication.core.clock import SiteId
from replication.core.versions import VersionRanges
from replication.core.wire import RANGES_MAX, Range

Need = tuple[SiteId, int, int]
Seen = Mapping[SiteId, VersionRanges]
WireSeen = Mapping[SiteId, tuple[Range, ...]]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do about a peer: ask its log for `needs`, or ask for a snapshot, or nothing."""

    needs: tuple[Need, ...]
    snapshot: bool


def has_seen(seen: Seen, site: SiteId, version: int) -> bool:
    """Return whether a version is in a view."""
    ranges = seen.get(site)
    return ranges is not None and ranges.contains(version)


def get_head(seen: Seen, site: SiteId) -> int:
    """Return up to which version all that a site wrote is in a view."""
    ranges = seen.get(site)
    return 0 if ranges is None else ranges.head


def encode_seen(seen: Seen) -> dict[SiteId, tuple[Range, ...]]:
    """Return a view as it travels; of a site with very many gaps only the lower ones."""
    return {site: tuple(ranges.encode()[:RANGES_MAX]) for site, ranges in seen.items() if ranges}


def subtract(wanted: Iterable[Range], held: Iterable[Range]) -> list[Range]:
    """Return the parts of the wanted ranges that are not held; both in order and without overlap."""
    missing: list[Range] = []
    remaining = iter(held)
    hold = next(remaining, None)
    for first, last in wanted:
        start = first
        while hold is not None and hold[1] < start:
            hold = next(remaining, None)
        while hold is not None and hold[0] <= last:
            if hold[0] > start:
                missing.append((start, hold[0] - 1))
            start = hold[1] + 1
            if hold[1] > last:
                break
            hold = next(remaining, None)
        if start <= last:
            missing.append((start, last))
    return missing


def compute_missing(ours: Seen, theirs: WireSeen) -> dict[SiteId, list[Range]]:
    """Return what the peer has seen and we have not, per site in a fixed order."""
    missing = {}
    for site in sorted(theirs):
        held = ours.get(site)
        ranges = subtract(theirs[site], held or ())
        if ranges:
            missing[site] = ranges
    return missing


def plan_needs(ours: Seen, theirs: WireSeen, floors: Mapping[SiteId, int], *, needs_max: int) -> Plan:
    """Return what to ask a peer for; what is below its log's floor only a snapshot can bring."""
    needs: list[Need] = []
    for site, ranges in compute_missing(ours, theirs).items():
        for first, last in ranges:
            if first < floors.get(site, 1):
                return Plan((), snapshot=True)
            if len(needs) < needs_max:
                needs.append((site, first, last))
    return Plan(tuple(needs), snapshot=False)


def is_ahead(ours: Seen, theirs: WireSeen) -> bool:
    """Return whether the peer has seen something that we have not."""
    return bool(compute_missing(ours, theirs))
