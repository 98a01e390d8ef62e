"""What an agent tells people about itself.

Decides names and shapes. Changes nothing. Invariant: all of it can be written as JSON.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from replication.core.clock import compute_ms
from replication.core.member import Address, MemberInfo
from replication.replica import Replica
from replication.transport import Transport


@dataclass(frozen=True, slots=True)
class MemberView:
    """A node as this one sees it; times are None while they are not known.

    The round trip is an estimate from coordinates where none was measured.
    """

    name: str
    site: str
    address: Address
    state: str
    incarnation: int
    rtt_ms: float | None
    heard_ms_ago: float | None
    is_self: bool
    staleness_ms: int | None = None  # of our view of what it writes
    clock_ahead_ms: int | None = None  # of ours; those that are much ahead take others along


@dataclass(frozen=True, slots=True)
class Parts:
    """What an agent is made of, as far as it is reported on."""

    replica: Replica
    transport: Transport
    agent: Counter[str]

    def counters(self) -> dict[str, Mapping[str, int]]:
        """Return all counters, by part."""
        return {
            "agent": self.agent,
            "freshness": self.replica.freshness.counters,
            "swim": self.replica.swim.counters,
            "broadcast": self.replica.tree.counters,
            "sync": self.replica.sync_counters,
            "links": self.replica.links.counters,
            "verification": self.replica.verifier.counters,
            "transport": self.transport.compute_counters(),
        }


def view_members(replica: Replica, now_ms: float, wall_ms: int) -> list[MemberView]:
    """Return all nodes that this one knows of, itself first."""
    swim, me = replica.swim, replica.swim.me
    own = MemberView(me.name, me.site.hex(), me.address, "alive", me.incarnation, 0.0, 0.0, is_self=True)
    views = [replace(own, staleness_ms=0)]
    for member in sorted(swim.members.values(), key=lambda member: (member.info.name, member.info.site)):
        info = member.info
        heard = now_ms - member.heard_ms if member.heard_ms is not None else None
        state = member.state.name.lower()
        views.append(
            MemberView(
                info.name,
                info.site.hex(),
                info.address,
                state,
                info.incarnation,
                swim.estimate_rtt_ms(info.site),
                heard,
                is_self=False,
                staleness_ms=replica.freshness.compute_staleness_ms(info.site, wall_ms),
                clock_ahead_ms=replica.freshness.compute_ahead_ms(info.site),
            )
        )
    return views


def describe_parts(parts: Parts, now_ms: float, wall_ms: int) -> dict[str, Any]:
    """Return what an operator wants to know of the parts, fit for JSON."""
    replica = parts.replica
    return {
        "local_health": replica.swim.health.score,
        "stable_ms_ago": compute_stable_ms_ago(replica, wall_ms),
        "site_conflict": _describe_twin(replica.swim.get_twin(now_ms)),
        "own_versions_lost": replica.puller.own_versions_lost,
        "peers": {
            "eager": [site.hex() for site in replica.tree.eager],
            "lazy": [site.hex() for site in replica.tree.lazy],
        },
        "counters": {
            **{part: dict(counters) for part, counters in parts.counters().items()},
            "dropped": {f"{kind}:{why}": count for (kind, why), count in parts.transport.dropped.items()},
        },
    }


def compute_stable_ms_ago(replica: Replica, wall_ms: int) -> int | None:
    """Return how long ago everything had reached every member; None while that is not known."""
    stable = replica.freshness.compute_stable_hlc()
    return max(0, wall_ms - compute_ms(stable)) if stable else None


def _describe_twin(twin: MemberInfo | None) -> dict[str, Any] | None:
    """Return who else runs with our site id."""
    return None if twin is None else {"name": twin.name, "address": list(twin.address)}
