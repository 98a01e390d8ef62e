"""A machine as the proxy sees it, and the pools that it is chosen from.

Decides which machines of an app and region may be chosen, and keeps that in lists that cost O(1) to
change. Refuses to know rows, services and requests. Invariant: a target is in exactly one pool of
its bucket (`ready` or `reserve`) when it is started and not cordoned, in `asleep` when it could be started,
else in none.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from .types import CheckStatus, MachineState

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .types import CheckRow, MachineRow

NO_CHECKS: Final[Mapping[str, CheckRow]] = MappingProxyType({})


class Bucket:
    """The machines of one app in one region."""

    __slots__ = ("asleep", "members", "ready", "region", "reserve")

    def __init__(self, region: str) -> None:
        self.region = region
        self.members: dict[str, Target] = {}  # all of them, by id
        self.ready: list[Target] = []  # started, not cordoned, healthy; in no meaningful order
        self.reserve: list[Target] = []  # started, not cordoned, unhealthy: better than nobody
        self.asleep: list[Target] = []  # not started, not cordoned, with a driver that can start it


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
        "driver",
        "ejected_until",
        "failures",
        "healthy",
        "host",
        "id",
        "in_flight",
        "node",
        "pool",
        "port",
        "position",
        "region",
        "remote_load",
        "removed",
        "state",
    )

    def __init__(self, row: MachineRow) -> None:
        self.id = row.id
        self.app = row.app
        self.node = row.node
        self.region = row.region
        self.host = row.host
        self.port = row.port  # None: the service names the port
        self.state = row.state
        self.cordoned = row.cordoned
        self.driver = row.driver  # empty: nothing starts or stops it
        self.checks: Mapping[str, CheckRow] = NO_CHECKS
        self.healthy = True  # no check is critical; set by `set_checks`
        self.removed = False  # set when the row is deleted; never cleared
        # Kept by the proxy of this process, and by the table for what other nodes report.
        self.in_flight = 0  # requests (or connections) that this process has at the machine
        self.remote_load = 0  # what other nodes last said that they have there
        self.ejected_until = 0.0  # monotonic seconds; set by health.record_failure, 0 when not ejected
        self.failures = 0  # consecutive; set by health.record_failure, cleared by record_success
        # Kept by `attach`, `detach` and `_place`.
        self.bucket: Bucket | None = None
        self.pool: list[Target] | None = None  # the list of `bucket` that it is in
        self.position = -1  # its index there

    def __repr__(self) -> str:
        return f"Target({self.id!r}, app={self.app!r}, region={self.region!r}, address={self.address!r})"

    @property
    def address(self) -> str:
        """The address as its row spells it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port is None else f"{host}:{self.port}"

    @property
    def load(self) -> int:
        """What is known to be in flight at the machine, here and elsewhere."""
        return self.in_flight + self.remote_load

    def update(self, row: MachineRow) -> None:
        """Take over a changed row of the same machine, except for app and region, which `attach` sets."""
        if (row.host, row.port) != (self.host, self.port):
            # What failed was the old address.
            self.host, self.port = row.host, row.port
            self.failures = 0
            self.ejected_until = 0.0
        self.node = row.node
        self.state = row.state
        self.cordoned = row.cordoned
        self.driver = row.driver
        self._place()

    def set_checks(self, checks: Mapping[str, CheckRow]) -> None:
        """Judge the machine by the last results of all its checks; without any it is healthy."""
        self.checks = checks
        self.healthy = all(check.status is not CheckStatus.CRITICAL for check in checks.values())
        self._place()

    def attach(self, app: str, bucket: Bucket) -> None:
        """Join the machines of an app and region; the target must be detached."""
        assert self.bucket is None
        self.app = app
        self.region = bucket.region
        self.bucket = bucket
        bucket.members[self.id] = self
        self._place()

    def detach(self) -> None:
        """Leave the bucket."""
        assert self.bucket is not None
        del self.bucket.members[self.id]
        self.bucket = None
        self._place()

    def _place(self) -> None:
        pool: list[Target] | None = None
        if self.bucket is not None and not self.cordoned:
            if self.state is MachineState.STARTED:
                pool = self.bucket.ready if self.healthy else self.bucket.reserve
            elif self.driver and self.state is not MachineState.DRAINING:
                pool = self.bucket.asleep
        if pool is self.pool:
            return
        if self.pool is not None:
            last = self.pool.pop()
            if last is not self:
                self.pool[self.position] = last
                last.position = self.position
        self.pool = pool
        self.position = -1
        if pool is not None:
            self.position = len(pool)
            pool.append(self)
