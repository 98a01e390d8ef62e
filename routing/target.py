"""A machine as the proxy sees it, and the pools that it is chosen from.

Decides which machines of an app and region may be chosen, and keeps that in lists that cost O(1) to
change. Refuses to know rows, services and requests. Invariant: a target is in exactly one pool of
its bucket: `ready` or `reserve` when it is started and not cordoned, `asleep` when it could be started, else
`out`.

There may be as many buckets as machines, so one takes little memory: a pool is made when somebody joins it.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from .types import WEIGHT_USUAL, CheckStatus, MachineRow, MachineState

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from .types import CheckRow, MachineFields

NO_CHECKS: Final[Mapping[str, CheckRow]] = MappingProxyType({})


COLD: Final = -1.0

# Stands for a pool that nobody has joined yet; nobody does.
_EMPTY: Final[list[Target]] = []


class Bucket:
    """The machines of one app in one region; none of the lists has an order that means anything."""

    __slots__ = ("asleep", "out", "ready", "region", "reserve", "uneven")

    def __init__(self, region: str) -> None:
        self.region = region
        self.ready = _EMPTY  # started, not cordoned, healthy
        self.reserve = _EMPTY  # started, not cordoned, unhealthy: better than nobody
        self.asleep = _EMPTY  # not started, not cordoned, with a driver that can start it
        self.out = _EMPTY  # all others
        self.uneven = 0  # how many have a weight of their own

    def __len__(self) -> int:
        return len(self.ready) + len(self.reserve) + len(self.asleep) + len(self.out)

    def targets(self) -> Iterator[Target]:
        """Yield all of them."""
        yield from self.ready
        yield from self.reserve
        yield from self.asleep
        yield from self.out


class Upkeep:
    """What no choice looks at, and most machines of an app have in common."""

    __slots__ = ("driver", "managed_by", "problem", "version")

    def __init__(self, managed_by: str, driver: str, problem: str, version: int) -> None:
        self.managed_by = managed_by
        self.driver = driver  # empty: nothing starts or stops it
        self.problem = problem
        self.version = version  # of the release that its driver last started it with; 0: none


# For the next machine that is alike. Where there are too many kinds, some are in memory more than once.
_upkeeps: Final[dict[tuple[str, str, str, int], Upkeep]] = {}
UPKEEPS_MAX: Final = 4_096


def share_upkeep(managed_by: str, driver: str, problem: str, version: int) -> Upkeep:
    """Return the same object for the same values, as a rule."""
    key = (managed_by, driver, problem, version)
    known = _upkeeps.get(key)
    if known is None:
        if len(_upkeeps) >= UPKEEPS_MAX:
            _upkeeps.clear()
        known = _upkeeps[key] = Upkeep(managed_by, driver, problem, version)
    return known


def pack_v4(host: str) -> int:
    """Return an IPv4 address as the number that it is, -1 for anything else."""
    parts = host.split(".")
    packed = 0
    for part in parts:
        if len(parts) != 4 or not (part.isascii() and part.isdigit()) or (part[0] == "0" and part != "0"):
            return -1
        number = int(part)
        if number > 255:
            return -1
        packed = packed << 8 | number
    return packed


def unpack_v4(packed: int) -> str:
    """Return an IPv4 address as it is written."""
    return f"{packed >> 24}.{packed >> 16 & 255}.{packed >> 8 & 255}.{packed & 255}"


class Target:
    """One machine; the same object as long as its row exists, so exchanges may hold on to it.

    Descriptive attributes follow the row. Whoever pools connections compares `host` and `port`
    before reuse, because an update may move a machine.
    """

    __slots__ = (
        "app",
        "bucket",
        "checks",
        "cordoned",
        "ejected_until",
        "failures",
        "foreign",
        "healthy",
        "id",
        "in_flight",
        "named_host",
        "node",
        "pool",
        "port",
        "position",
        "region",
        "remote_load",
        "removed",
        "since_ms",
        "state",
        "trend",
        "upkeep",
        "v4",
        "warm_since",
        "watched",
        "weight",
    )

    def __init__(self, fields: MachineFields) -> None:
        # What a choice looks at comes first, side by side in memory: most of its cost is waiting for that.
        self.in_flight = 0  # requests (or connections) that this process has at the machine
        self.trend = 0  # `remote_load` as it was on average lately; set by the table
        self.remote_load = 0  # what other workers and nodes last said that they have there
        self.ejected_until = 0.0  # monotonic seconds; set by health.record_failure, 0 when not ejected
        self.bucket: Bucket | None = None  # kept by `attach` and `detach`
        self.port: int | None = None  # None: the service names the port
        self.id = fields[0]
        # As the row says.
        self.weight = WEIGHT_USUAL
        # An IPv4 address takes no memory of its own until it is asked for.
        self.v4 = -1
        self.named_host = ""
        self.app = fields[1]
        self.node = ""
        self.region = fields[3]
        self.state = MachineState.STOPPED
        self.upkeep = share_upkeep("", "", "", 0)
        self.since_ms = 0
        self.cordoned = False
        self.removed = False  # set when the row is deleted; never cleared
        self.foreign = False  # another node owns it; set by the table
        self.healthy = True  # no check is critical; set by `set_checks`
        self.watched = False  # `loads.Busy` looks at it; set and cleared there
        self.checks: Mapping[str, CheckRow] = NO_CHECKS
        self.failures = 0  # consecutive; set by health.record_failure, cleared by record_success
        # When it joined the ready: 0 for those that were there when the table was loaded, COLD until the
        # balancer, who has a clock, sees it for the first time.
        self.warm_since = 0.0
        # Kept by `attach`, `detach` and `_place`.
        self.pool: list[Target] = _EMPTY  # the list of `bucket` that it is in; empty while detached
        self.position = -1  # its index there
        self._take(fields)

    def __repr__(self) -> str:
        return f"Target({self.id!r}, app={self.app!r}, region={self.region!r}, address={self.address!r})"

    @property
    def host(self) -> str:
        """Where it is: a name, or an address without brackets."""
        if not self.named_host and self.v4 >= 0:
            self.named_host = unpack_v4(self.v4)
        return self.named_host

    @property
    def managed_by(self) -> str:
        """Who wrote its row, as in `machines`."""
        return self.upkeep.managed_by

    @property
    def driver(self) -> str:
        """What starts and stops it; empty for nothing."""
        return self.upkeep.driver

    @property
    def problem(self) -> str:
        """Why it is not in the state that it should be in; empty where it is."""
        return self.upkeep.problem

    @property
    def version(self) -> int:
        """Of the release that its driver last started it with; 0 for none."""
        return self.upkeep.version

    @property
    def address(self) -> str:
        """The address as its row spells it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port is None else f"{host}:{self.port}"

    @property
    def load(self) -> int:
        """What is known to be in flight at the machine, here and elsewhere."""
        return self.in_flight + self.remote_load

    @property
    def usual_load(self) -> int:
        """What is in flight here now, and elsewhere on average: what machines are compared by."""
        return self.in_flight + self.trend

    @property
    def fields(self) -> MachineFields:
        """What its row says."""
        return (
            self.id,
            self.app,
            self.node,
            self.region,
            self.named_host if self.named_host or self.v4 < 0 else unpack_v4(self.v4),
            self.port,
            self.state,
            self.cordoned,
            self.upkeep.managed_by,
            self.upkeep.driver,
            self.since_ms,
            self.upkeep.problem,
            self.weight,
            self.upkeep.version,
        )

    @property
    def row(self) -> MachineRow:
        """The row that it stands for; rows themselves would take as much memory again."""
        return MachineRow(*self.fields)

    def _take(self, fields: MachineFields) -> None:
        self.node = fields[2]
        self.v4 = pack_v4(fields[4])
        self.named_host = "" if self.v4 >= 0 else fields[4]
        self.port = fields[5]
        self.state = fields[6]
        self.cordoned = fields[7]
        self.upkeep = share_upkeep(fields[8], fields[9], fields[11], fields[13])
        self.since_ms = fields[10]
        self.weight = fields[12]

    def update(self, fields: MachineFields) -> None:
        """Take over a changed row of the same machine, except for app and region, which `attach` sets."""
        assert self.bucket is not None
        if fields[4] != self.host or fields[5] != self.port:
            # What failed was the old address.
            self.failures = 0
            self.ejected_until = 0.0
        self.bucket.uneven += (fields[12] != WEIGHT_USUAL) - (self.weight != WEIGHT_USUAL)
        self._take(fields)
        self._place()

    def set_checks(self, checks: Mapping[str, CheckRow]) -> None:
        """Judge the machine by the last results of all its checks; without any it is healthy."""
        self.checks = checks
        self.healthy = not checks or all(c.status is not CheckStatus.CRITICAL for c in checks.values())
        self._place()

    def attach(self, app: str, bucket: Bucket) -> None:
        """Join the machines of an app and region; the target must be detached."""
        assert self.bucket is None
        self.app = app
        self.region = bucket.region
        self.bucket = bucket
        bucket.uneven += self.weight != WEIGHT_USUAL
        self._place()

    def detach(self) -> None:
        """Leave the bucket."""
        assert self.bucket is not None
        self.bucket.uneven -= self.weight != WEIGHT_USUAL
        self.bucket = None
        self._leave()

    def _leave(self) -> None:
        if self.pool:
            last = self.pool.pop()
            if last is not self:
                self.pool[self.position] = last
                last.position = self.position
        self.pool = _EMPTY
        self.position = -1

    def _place(self) -> None:
        """Be in the pool in which a machine like this belongs."""
        bucket = self.bucket
        assert bucket is not None
        if self.cordoned:
            pool = bucket.out = bucket.out or []
        elif self.state is MachineState.STARTED:
            if self.healthy:
                pool = bucket.ready = bucket.ready or []
            else:
                pool = bucket.reserve = bucket.reserve or []
        elif self.driver:
            pool = bucket.asleep = bucket.asleep or []
        else:
            pool = bucket.out = bucket.out or []
        if pool is not self.pool:
            if self.pool and pool is bucket.ready:
                self.warm_since = COLD
            self._leave()
            self.pool = pool
            self.position = len(pool)
            pool.append(self)
