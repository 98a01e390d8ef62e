"""The names under which an agent's counters are published, and what each means.

Decides names only. Invariant: what `samples` yields is in METRICS.
"""

from collections.abc import Iterable, Mapping

Sample = tuple[str, tuple[tuple[str, str], ...], float]

METRICS: dict[str, tuple[str, str]] = {
    "isthmus_members": ("gauge", "Other nodes as this one sees them, by state."),
    "isthmus_member_staleness_seconds": ("gauge", "Time since this node last heard from a member itself."),
    "isthmus_swim_events_total": ("counter", "Membership: probes, failures, refutations, refused claims."),
    "isthmus_broadcast_events_total": (
        "counter",
        "Spreading of changesets: pushes, duplicates, grafts, prunes.",
    ),
    "isthmus_sync_events_total": ("counter", "Repair: sessions, changesets and snapshots moved, refusals."),
    "isthmus_link_events_total": ("counter", "Links to peers: dials, failures, frames dropped."),
    "isthmus_transport_events_total": ("counter", "Datagrams and bytes on closed links, by what happened."),
    "isthmus_gossip_dropped_total": (
        "counter",
        "Input that was dropped unread or unread further, by reason.",
    ),
    "isthmus_agent_events_total": ("counter", "Commits, captures, failed applies and restarted tasks."),
    "isthmus_apply_queue_changesets": ("gauge", "Changesets that arrived and are not yet applied."),
    "isthmus_parked_changesets": ("gauge", "Changesets that are held but could not be applied."),
    "isthmus_own_versions_lost": (
        "gauge",
        "Own versions that only peers still had: the file went back in time.",
    ),
    "isthmus_commit_seq": ("gauge", "Commits to the local file that changed rows."),
}


def sample_events(metric: str, counters: Mapping[str, int]) -> Iterable[Sample]:
    """Return one sample per event of a counter."""
    for event, count in counters.items():
        yield (metric, (("event", event),), count)
