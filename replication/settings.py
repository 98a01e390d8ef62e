"""What an agent is told when it starts.

Decides which combinations are safe to start with. Knows nothing of files or the environment.
Invariant: an agent without keys is reached from this machine only, and reaches no other.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

from replication.core.limits import OriginSettings
from replication.core.member import NAME_CHARS_MAX, Address
from replication.core.plumtree import PlumtreeSettings
from replication.core.swim import SwimSettings
from replication.core.sync import SyncSettings
from replication.core.wire import CLUSTER_CHARS_MAX
from replication.errors import ReplicationError
from replication.seal import KEY_BYTES, KEYS_MAX
from replication.store import Synchronous
from replication.tls import StreamTls
from replication.verifier import VerifySettings


class SettingsError(ReplicationError, ValueError):
    """A setting that the agent refuses to start with."""


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach the address; names count as reachable."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_wildcard(host: str) -> bool:
    """Return whether the address stands for all of the machine's."""
    try:
        return ip_address(host).is_unspecified
    except ValueError:
        return False


def parse_address(text: str) -> Address:
    """Return host and port of `host:port` or `[v6]:port`; raises SettingsError."""
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise SettingsError(f"{text!r}: an IPv6 address goes in brackets, like [fdaa::3]:7946")
    if not colon or not host or not port.isdecimal() or not port.isascii() or not 0 < int(port) < 65_536:
        raise SettingsError(f"{text!r} is not host:port")
    return (host, int(port))


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """The settings of one agent; what has a default fits both a loopback test and a world-wide cluster."""

    name: str
    path: Path
    bind: Address  # port 0 lets the system choose
    advertise: Address | None = None  # what others are told; needed when binding to all addresses
    join: tuple[str, ...] = ()  # "host:port"; a name stands for all its addresses
    keys: tuple[bytes, ...] = ()  # the first seals, any opens
    tls: StreamTls | None = None  # around streams; datagrams have the keys alone
    cluster: str = "isthmus"
    swim: SwimSettings = field(default_factory=SwimSettings)
    plumtree: PlumtreeSettings = field(default_factory=PlumtreeSettings)
    sync: SyncSettings = field(default_factory=SyncSettings)
    # SQLite's: with "full" a commit is on the disk when it is acknowledged, at the cost of a sync for each.
    synchronous: Synchronous = "normal"
    # How long a write of another process can go unnoticed; a look costs about 50 µs.
    poll_interval_ms: float = 25
    # Half a second more than two round trips across the world, with one lost packet.
    connect_timeout_ms: float = 3_000
    redial_ms: float = 200  # first wait before a lost link is dialled again, doubled up to the next
    redial_max_ms: float = 10_000
    # Without progress for this long a session is given up, and its link with it.
    session_timeout_ms: float = 10_000
    sessions_served_max: int = 4  # each holds a chunk in memory and shares the disk
    resolve_interval_ms: float = 30_000  # join names are looked up again, as addresses change
    look_interval_ms: float = 5_000  # who is alone for this long, and was to join others, says so
    # How many changesets per site the log keeps for repair; who lacks more gets a snapshot.
    log_versions_max: int = 100_000
    # Deletions are remembered for this long at least: who was away for longer starts from a snapshot.
    tombstone_keep_ms: int = 24 * 3600 * 1000
    verify: VerifySettings = field(default_factory=VerifySettings)
    # Rows per second that may be written here, by table, and under "" into all together; 0 is no limit. What
    # other clients write to the file has the same limits of its own: it is not refused, but leaves later.
    writes_per_s: Mapping[str, float] = field(default_factory=dict)
    origins: OriginSettings = field(default_factory=OriginSettings)
    # What is written to these tables is held back from those who follow, until it is released.
    staged: frozenset[str] = frozenset()
    query_rows_max: int = 10_000
    query_timeout_ms: float = 5_000

    def __post_init__(self) -> None:
        """Refuse what is unsafe or cannot work."""
        if not 0 < len(self.name) <= NAME_CHARS_MAX or not self.name.isprintable():
            raise SettingsError(f"name: 1 to {NAME_CHARS_MAX} printable characters, not {self.name!r}")
        if not 0 < len(self.cluster) <= CLUSTER_CHARS_MAX or not self.cluster.isprintable():
            raise SettingsError(f"cluster: 1 to {CLUSTER_CHARS_MAX} printable characters")
        if len(self.keys) > KEYS_MAX or any(len(key) != KEY_BYTES for key in self.keys):
            raise SettingsError(f"keys: at most {KEYS_MAX}, of {KEY_BYTES} bytes each")
        for host, _ in (self.bind, self.advertise or self.bind):
            if not self.keys and not is_loopback(host):
                raise SettingsError(f"without a cluster key the agent stays on loopback, not on {host}")
        if is_wildcard(self.bind[0]) and self.advertise is None:
            raise SettingsError(f"advertise: needed when binding to {self.bind[0]}")
        if self.advertise is not None and not 0 < self.advertise[1] < 65_536:
            raise SettingsError("advertise: needs a port")
        if any(per_s < 0 for per_s in self.writes_per_s.values()):
            raise SettingsError("writes_per_s: rows per second, or 0 for no limit")
        for text in self.join:
            parse_address(text)
