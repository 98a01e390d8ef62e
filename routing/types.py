"""The rows of the routing table as typed values.

Decides what a row means once it has been read; refuses to know how rows are stored, spread or
indexed. Invariant: a value that exists is valid, since only `catalog.parse_row` makes them from
foreign data.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:
    from .options import ServiceOptions
    from .peering import Peering

SqlValue: TypeAlias = int | float | str | bytes | None
Pk: TypeAlias = tuple[SqlValue, ...]
Row: TypeAlias = tuple[SqlValue, ...]
# What a MachineRow says, in its order: a million pass by when a worker starts, and to make rows of them would
# take most of the time.
MachineFields: TypeAlias = tuple[
    str, str, str, str, str, int | None, "MachineState", bool, str, str, int, str, int, int
]


# A machine that has twice as much of it gets twice the requests.
WEIGHT_USUAL: Final = 100


class MachineState(Enum):
    """What the owner of a machine says of its life; only `STARTED` takes new requests."""

    STARTED = "started"
    STOPPED = "stopped"
    SUSPENDED = "suspended"
    DRAINING = "draining"
    STARTING = "starting"


class CheckStatus(Enum):
    """The result of a probe; only `CRITICAL` takes a machine out."""

    PASSING = "passing"
    WARNING = "warning"
    CRITICAL = "critical"


class Concurrency(Enum):
    """What the limits of a service count."""

    REQUESTS = "requests"
    CONNECTIONS = "connections"


@dataclass(frozen=True, slots=True)
class NodeRow:
    """One running isthmus."""

    id: str
    region: str
    address: str
    started_ms: int
    software: str
    peering: Peering | None = None  # None: it says nothing of how its machines are reached


@dataclass(frozen=True, slots=True)
class RegionRow:
    """A region of the operator's own, or a correction of a built-in one."""

    code: str
    name: str
    latitude: float
    longitude: float


@dataclass(frozen=True, slots=True)
class AppRow:
    """Something served; apps of one network may replay to each other."""

    name: str
    network: str
    managed_by: str


@dataclass(frozen=True, slots=True)
class HostnameRow:
    """A route: a name ('a.b', '*.b' or '*') and a path prefix lead to an app."""

    hostname: str
    path_prefix: str
    app: str
    managed_by: str


@dataclass(frozen=True, slots=True)
class ServiceRow:
    """How an app is reached on one public port; port 0 stands for any other port."""

    app: str
    port: int
    internal_port: int | None
    concurrency: Concurrency
    soft_limit: int
    hard_limit: int | None
    checks: str
    managed_by: str
    options: ServiceOptions | None


@dataclass(frozen=True, slots=True)
class MachineRow:
    """One instance of an app; `port` is None when its address names none."""

    id: str
    app: str
    node: str
    region: str
    host: str
    port: int | None
    state: MachineState
    cordoned: bool
    managed_by: str
    driver: str = ""
    since_ms: int = 0
    problem: str = ""
    weight: int = WEIGHT_USUAL
    version: int = 0


@dataclass(frozen=True, slots=True)
class GoalRow:
    """What somebody wants a machine with a driver to be."""

    machine: str
    state: MachineState
    asked_by: str
    reason: str
    asked_ms: int
    version: int | None = None  # None: whichever it has
    release: str = ""


@dataclass(frozen=True, slots=True)
class CheckRow:
    """The last result of one probe of a machine."""

    machine: str
    name: str
    node: str
    status: CheckStatus
    output: str
    updated_ms: int
    since_ms: int = 0


@dataclass(frozen=True, slots=True)
class LoadRow:
    """What one node has in flight at one machine."""

    machine: str
    node: str
    in_flight: int
    updated_ms: int


Entity: TypeAlias = (
    NodeRow | RegionRow | AppRow | HostnameRow | ServiceRow | MachineRow | GoalRow | CheckRow | LoadRow
)
