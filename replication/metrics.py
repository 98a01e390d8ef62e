"""What an agent tells metrics about itself.

Decides names. Changes nothing. Invariant: what `collect_samples` yields is in METRICS.
"""

from collections import Counter
from collections.abc import Iterable

from replication.core.member import MemberState
from replication.report import Parts, compute_stable_ms_ago

Sample = tuple[str, tuple[tuple[str, str], ...], float]

METRICS: dict[str, tuple[str, str]] = {
    "isthmus_members": ("gauge", "Other nodes as this one sees them, by state."),
    "isthmus_member_staleness_seconds": ("gauge", "Time since this node last heard from a member itself."),
    "isthmus_view_staleness_seconds": ("gauge", "Age of this node's view of what a member writes."),
    "isthmus_stable_staleness_seconds": ("gauge", "How long ago everything had reached every member."),
    "isthmus_freshness_events_total": ("counter", "Heartbeats: new, old, refused."),
    "isthmus_swim_events_total": ("counter", "Membership: probes, failures, refutations, refused claims."),
    "isthmus_broadcast_events_total": (
        "counter",
        "Spreading: pushes, duplicates, grafts, prunes.",
    ),
    "isthmus_sync_events_total": ("counter", "Repair: sessions, changesets and snapshots moved, refusals."),
    "isthmus_verification_events_total": (
        "counter",
        "Tables compared with peers: slices, ranges that differed, rows healed or left to their writer.",
    ),
    "isthmus_link_events_total": ("counter", "Links to peers: dials, failures, frames dropped."),
    "isthmus_transport_events_total": ("counter", "Datagrams, and bytes on streams, by what happened."),
    "isthmus_gossip_dropped_total": ("counter", "Input that was dropped, by kind and reason."),
    "isthmus_agent_events_total": ("counter", "Commits, captures, failed applies and restarted loops."),
    "isthmus_apply_queue_changesets": ("gauge", "Changesets that arrived and are not yet applied."),
    "isthmus_parked_changesets": ("gauge", "Changesets that are held but could not be applied."),
    "isthmus_tables_deferred": ("gauge", "Tables of which what other clients wrote waits to be captured."),
    "isthmus_writes_refused_total": ("counter", "Writes above a limit, by table; * is all tables together."),
    "isthmus_origin_pushes_refused_total": (
        "counter",
        "Pushed changesets above what is taken in of one origin, by its site.",
    ),
    "isthmus_own_versions_lost": (
        "gauge",
        "Own versions that only peers still had: the file was set back.",
    ),
    "isthmus_site_conflict": ("gauge", "1 while another node runs with the site id of this one."),
    "isthmus_commit_seq": ("gauge", "Commits to the local file that changed rows."),
    "isthmus_database_read_only": ("gauge", "1 while the disk is full or fails and takes no writes."),
}

_EVENTS = {
    "agent": "isthmus_agent_events_total",
    "freshness": "isthmus_freshness_events_total",
    "swim": "isthmus_swim_events_total",
    "broadcast": "isthmus_broadcast_events_total",
    "sync": "isthmus_sync_events_total",
    "links": "isthmus_link_events_total",
    "verification": "isthmus_verification_events_total",
    "transport": "isthmus_transport_events_total",
}


def collect_samples(parts: Parts, now_ms: float, wall_ms: int) -> Iterable[Sample]:
    """Yield the samples of all parts."""
    members = parts.replica.swim.members.values()
    states = Counter(member.state for member in members)
    for state in MemberState:
        yield ("isthmus_members", (("state", state.name.lower()),), states[state])
    for member in members:
        age_ms = parts.replica.freshness.compute_staleness_ms(member.info.site, wall_ms)
        if age_ms is not None and member.state is not MemberState.LEFT:
            labels = (("member", member.info.name), ("site", member.info.site.hex()))
            yield ("isthmus_view_staleness_seconds", labels, age_ms / 1000)
        if member.heard_ms is not None and member.state is not MemberState.LEFT:
            labels = (("member", member.info.name), ("site", member.info.site.hex()))
            yield ("isthmus_member_staleness_seconds", labels, (now_ms - member.heard_ms) / 1000)
    stable_ms_ago = compute_stable_ms_ago(parts.replica, wall_ms)
    if stable_ms_ago is not None:
        yield ("isthmus_stable_staleness_seconds", (), stable_ms_ago / 1000)
    for part, counters in parts.counters().items():
        for event, count in counters.items():
            yield (_EVENTS[part], (("event", event),), count)
    for (kind, reason), count in parts.transport.dropped.items():
        yield ("isthmus_gossip_dropped_total", (("kind", kind), ("reason", reason)), count)
    for site, count in parts.replica.origins.refused.items():
        origin = site.hex() if site else "others"
        yield ("isthmus_origin_pushes_refused_total", (("site", origin),), count)
    yield ("isthmus_own_versions_lost", (), parts.replica.puller.own_versions_lost)
    yield ("isthmus_site_conflict", (), float(parts.replica.swim.get_twin(now_ms) is not None))
    yield ("isthmus_apply_queue_changesets", (), len(parts.replica.inbox))
    yield ("isthmus_parked_changesets", (), parts.replica.parked)
