"""Which connections and requests a worker takes when there are too many.

Decides by counting: connections in total, by client and by second, file descriptors, resident memory.
Refuses to know what is asked for. Invariant: a connection that is admitted finds a file descriptor for its
machine, and with nothing in flight a request is taken however much memory is in use, since refusing
it would free nothing.
"""

from __future__ import annotations

import ipaddress
import mmap
import os
import resource
from pathlib import Path
from typing import TYPE_CHECKING, Final

from .core.addresses import Networks
from .core.client_rates import ClientRates

if TYPE_CHECKING:
    from collections.abc import Callable

    from .core.plane import Plane
    from .metrics import ProxyMetrics
    from .settings import ProxySettings

# Kept free of connections: the table's file, logs, names being resolved, and clients being turned away.
RESERVED_FILES: Final = 96
# Clients that are told why they are turned away, at a time; beyond it they are cut at once.
TOLD_MAX: Final = 48
# From this share of a bound on, what is only kept for comfort goes: bodies for replays, idle connections.
COMFORT_SHARE: Final = 7 / 8
# Memory is short until it is below this share of the bound, lest a worker changes its mind at each look.
RECOVERED_SHARE: Final = 15 / 16

CONNECTIONS: Final = "connections"
CLIENT_CONNECTIONS: Final = "client_connections"
CLIENT_RATE: Final = "client_rate"
MEMORY: Final = "memory"
FILES: Final = "files"


class Admission:
    """The counts of one worker. The sweeper calls `handle_deadline` at each of its passes."""

    # For the sweeper: always due.
    deadline = 0.0

    def __init__(self, settings: ProxySettings, metrics: ProxyMetrics, files_max: int) -> None:
        self._files_max = files_max
        self.adopt(settings)
        self._metrics = metrics
        self._by_client: dict[str, int] = {}
        self._admitted = 0
        self._plane: Plane | None = None  # set, with the next, by `watch`
        self._close_idle: Callable[[], None] | None = None

    def adopt(self, settings: ProxySettings) -> None:
        """Go on with other limits; what is admitted already stays."""
        # Each client may have a machine at the other end.
        self._connections_max = max(1, min(settings.connections_max, self._files_max // 2))
        self._per_client_max = settings.connections_per_client_max
        self._rates = ClientRates(settings.connections_per_client_per_s)
        self._handshakes = ClientRates(settings.handshakes_per_client_per_s)
        self._trusted = Networks(settings.trusted_proxies)
        self._memory_max = settings.memory_bytes_max
        self._body_kept_max = settings.replay_body_bytes_max

    def watch(self, plane: Plane, close_idle: Callable[[], None]) -> None:
        """Begin to tell a worker when its memory is short, and when to close idle connections."""
        self._plane = plane
        self._close_idle = close_idle

    def name(self, address: str) -> str:
        """Return what a client is counted under; empty for a trusted proxy."""
        return "" if self._trusted.contain(address) else name_client(address)

    def arrives(self, client: str, now: float, *, secure: bool) -> bool:
        """Count a connection that this client opens; False when it opens too many a second."""
        return not client or (self._handshakes if secure else self._rates).take(client, now)

    def admit(self, client: str) -> str | None:
        """Count a connection of this client (as `name_client` has it), or return why it must not be.

        Without a name it only counts in total.
        """
        if self._admitted >= self._connections_max:
            return CONNECTIONS
        if client:
            count = self._by_client.get(client, 0)
            if count >= self._per_client_max:
                return CLIENT_CONNECTIONS
            self._by_client[client] = count + 1
        self._admitted += 1
        return None

    def leave(self, client: str) -> None:
        """Forget an admitted connection."""
        self._admitted -= 1
        if client:
            count = self._by_client[client]
            if count == 1:
                del self._by_client[client]
            else:
                self._by_client[client] = count - 1

    def tells(self) -> bool:
        """True while a client that is turned away can be told so: being told takes a while and a file."""
        return self._metrics.connections_open - self._admitted <= TOLD_MAX

    def handle_deadline(self) -> None:
        """Look at what is in use."""
        metrics, plane = self._metrics, self._plane
        assert plane is not None
        assert self._close_idle is not None
        if metrics.connections_open + metrics.upstreams_open > self._files_max * COMFORT_SHARE:
            self._close_idle()
        if not self._memory_max:
            plane.body_kept_max, plane.shedding = self._body_kept_max, False
            return
        used = read_memory()
        tight = used > self._memory_max * COMFORT_SHARE
        plane.body_kept_max = 0 if tight else self._body_kept_max
        bound = self._memory_max * (RECOVERED_SHARE if plane.shedding else 1)
        plane.shedding = used > bound and metrics.in_flight > 0


def name_client(address: str) -> str:
    """Return what stands for a client's address: itself, or the /64 that an IPv6 client has as its own."""
    if ":" not in address:
        return address
    parsed = ipaddress.IPv6Address(address)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return parsed.exploded[:19]


def compute_files_max() -> int:
    """Return how many descriptors connections may have in this process, beside what is open now."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        opened = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names alone, of a directory that is no file
    except OSError:
        opened = RESERVED_FILES
    return max(2, soft - opened - RESERVED_FILES)


def raise_files_limit() -> None:
    """Let this process open as many files as its user may: the usual 1024 is for programs that use select."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def read_memory() -> int:
    """Return the resident bytes of this process; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * mmap.PAGESIZE
    except OSError:
        return 0


def compute_memory_max(workers: int) -> int:
    """Return what each worker may use when nobody said: together three quarters of what there is."""
    limits = [os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(file).read_text("ascii")))
        except (OSError, ValueError):  # not there, or `max`
            continue
    return min(limits) * 3 // 4 // max(1, workers)
