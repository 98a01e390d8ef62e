"""What the simulated nodes are set to.

Decides nothing. Times are those of the agent; sizes are smaller, so that the short life of a simulated
cluster reaches every bound. Invariant: nothing here is read by the product.
"""

from dataclasses import dataclass, field

from replication.core.plumtree import PlumtreeSettings
from replication.replica import ReplicaSettings
from replication.verifier import VerifySettings


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """The same for all nodes of a run."""

    seed: int
    replica: ReplicaSettings = field(
        default_factory=lambda: ReplicaSettings(
            plumtree=PlumtreeSettings(
                announced_max=64, missing_max=64, recent_max=64, cache_bytes_max=8 * 1024, push_bytes_max=1024
            ),
            chunk_bytes=4 * 1024,
            inbox_bytes_max=64 * 1024,
            log_versions_max=12,  # who was away for longer needs a snapshot
            log_bytes_min=1 << 30,
            maintenance_ms=5_000,
            tombstone_keep_ms=4_000,
            verify=VerifySettings(slice_rows=32, pause_ms=500, interval_ms=3_000),
        )
    )
    connect_timeout_ms: float = 3_000
    disk_ms: float = 2  # a commit, on average; what is pushed meanwhile shares the next one
    fsync_ms: float = 2_000  # between syncs of the disk, on average: what a power failure can cost
