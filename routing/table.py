"""The routing table: rows in, lookups out.

Decides which service a host, path and port lead to and which machines belong to it. Refuses to know
where rows come from, and does not choose among machines. Every change and every lookup is O(1) in
the size of the table.

Invariant: the table is a function of the rows it holds, whatever the order they came in. A row that
refers to something absent waits and takes effect when that arrives; a row that is not acceptable
counts as absent, is named in `rejected`, and touches no other row.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

from .catalog import TABLES, RowError, parse_machine, parse_row
from .geo import AREAS, Regions
from .health import Failing
from .hosts import HostIndex
from .loads import Busy
from .peering import Ways
from .target import COLD, NO_CHECKS, Bucket, Target
from .types import (
    AppRow,
    CheckRow,
    Concurrency,
    Entity,
    HostnameRow,
    LoadRow,
    NodeRow,
    Pk,
    RegionRow,
    Row,
    ServiceRow,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from .options import ServiceOptions
    from .types import MachineFields

__all__ = ["App", "RoutingTable", "Service", "Target"]

ANY_PORT: Final = 0
APPS: Final = "apps"
HOSTNAMES: Final = "hostnames"
SERVICES: Final = "services"
MACHINES: Final = "machines"
# Tables whose rows are made again from what stands for them, when somebody asks.
MADE: Final = (APPS, HOSTNAMES, SERVICES, MACHINES)
# The share of the way to its load that a trend goes each time: five seconds for most of it. That must be long
# beside the time that a load needs to get to all who look at it.
TREND_STEP: Final = 0.02


# Stands for the orders of an app that nobody has asked for; nothing is put in.
_NO_PLANS: Final[dict[object, tuple[Bucket, ...]]] = {}
# The same for services by port.
_NO_SERVICES: Final[dict[int, Service]] = {}


class App:
    """What is known under one app name, with or without its row."""

    __slots__ = ("buckets", "by_port", "home", "home_region", "name", "names", "only", "plans", "row")

    def __init__(self, name: str) -> None:
        self.name = name
        self.row: AppRow | None = None  # None while only other rows speak of it; then nothing routes to it
        # The service that takes any port, where there is no other: for most apps, which spares a dictionary.
        self.only: Service | None = None
        # Orders of buckets as balancers worked them out: that of the first region that asked, for requests
        # that say nothing of regions, and all others. Emptied when a region comes, goes or moves.
        self.home: tuple[Bucket, ...] = ()
        self.home_region = ""
        self.plans: dict[object, tuple[Bucket, ...]] = _NO_PLANS
        self.by_port: dict[int, Service] = _NO_SERVICES  # by public port; empty where there is an only one
        self.buckets: dict[str, Bucket] = {}  # by region; only regions with machines
        self.names = 0  # how many hostname rows lead to it

    @property
    def services(self) -> Mapping[int, Service]:
        """Its services by public port; not to be changed."""
        return self.by_port if self.only is None else {ANY_PORT: self.only}

    def service(self, port: int) -> Service | None:
        """Return the service that has exactly this port."""
        if self.only is not None:
            return self.only if port == ANY_PORT else None
        return self.by_port.get(port)

    def put_service(self, row: ServiceRow) -> None:
        """Add or change a service."""
        service = self.service(row.port)
        if service is not None:
            service.update(row)
            return
        if self.only is not None:
            self.by_port = {ANY_PORT: self.only}
        elif row.port == ANY_PORT and not self.by_port:
            self.only = Service(row, self)
            return
        self.only = None
        self.by_port = {**self.by_port, row.port: Service(row, self)}

    def drop_service(self, port: int) -> None:
        """Forget the service that has exactly this port."""
        left = {other: service for other, service in self.services.items() if other != port}
        self.only = left.pop(ANY_PORT) if len(left) == 1 and ANY_PORT in left else None
        self.by_port = left or _NO_SERVICES

    def forget_plans(self) -> None:
        """Forget in which order to look through regions."""
        self.home_region = ""
        self.plans = _NO_PLANS

    def is_unused(self) -> bool:
        """True when no row speaks of this app any more."""
        return self.row is None and not self.names and not self.services and not self.buckets

    def targets(self) -> Iterator[Target]:
        """Yield every machine of the app."""
        for bucket in self.buckets.values():
            yield from bucket.targets()


class Service:
    """How an app is reached on one public port; the same object as long as its row exists."""

    __slots__ = (
        "app",
        "cached_replays",
        "checks",
        "concurrency",
        "hard_limit",
        "internal_port",
        "managed_by",
        "options",
        "owner",
        "panic_percent",
        "port",
        "slow_start_s",
        "soft_limit",
    )

    def __init__(self, row: ServiceRow, owner: App) -> None:
        # What a choice looks at comes first, as in Target.
        self.owner = owner
        self.soft_limit = 0
        self.hard_limit: int | None = None
        self.panic_percent = 0  # of the options
        self.slow_start_s = 0.0  # of the options
        self.internal_port: int | None = None
        self.options: ServiceOptions | None = None  # None: all as usual
        self.app = row.app
        self.port = row.port  # ANY_PORT: any port without a service of its own
        self.concurrency = Concurrency.REQUESTS
        self.checks = ""
        self.managed_by = ""
        # Of this process; None while none is remembered. Belongs to the proxy's replay cache.
        self.cached_replays: object | None = None
        self.update(row)

    def __repr__(self) -> str:
        return f"Service({self.app!r}, port={self.port})"

    def update(self, row: ServiceRow) -> None:
        """Take over a changed row of the same service."""
        self.internal_port = row.internal_port
        self.soft_limit = row.soft_limit
        self.hard_limit = row.hard_limit
        self.concurrency = row.concurrency
        self.checks = row.checks
        self.managed_by = row.managed_by
        self.options = row.options
        self.slow_start_s = 0.0 if row.options is None else row.options.slow_start_s
        self.panic_percent = 0 if row.options is None else row.options.panic_percent

    @property
    def row(self) -> ServiceRow:
        """The row that it stands for."""
        return ServiceRow(
            app=self.app,
            port=self.port,
            internal_port=self.internal_port,
            concurrency=self.concurrency,
            soft_limit=self.soft_limit,
            hard_limit=self.hard_limit,
            checks=self.checks,
            managed_by=self.managed_by,
            options=self.options,
        )

    @property
    def network(self) -> str:
        """The network of the app; empty while the app has no row."""
        return self.owner.row.network if self.owner.row is not None else ""

    def upstream_port(self, target: Target) -> int | None:
        """Return the port to connect to at a machine; None when neither row names one."""
        return self.internal_port if target.port is None else target.port

    def targets(self) -> Iterator[Target]:
        """Yield every machine of the app, in whatever state."""
        return self.owner.targets()


class RoutingTable:
    """All rows, indexed.

    `own_node` is the node that this process belongs to: what it reports of its own load is counted in
    `Target.in_flight` and by `set_siblings`, and its rows are left out of `Target.remote_load`.
    """

    def __init__(self, own_node: str = "") -> None:
        self.own_node = own_node
        self.regions = Regions()
        self.ways = Ways(own_node)
        self.rejected: dict[tuple[str, Pk], str] = {}  # why a row that exists is not in use
        # What is accepted, by key; nothing of the tables in MADE.
        self._rows: dict[str, dict[Pk, Entity]] = {table: {} for table in TABLES}
        self._hosts: HostIndex[App] = HostIndex()
        self._apps: dict[str, App] = {}
        self._targets: dict[str, Target] = {}
        self._checks: dict[str, dict[str, CheckRow]] = {}  # by machine, then name; also of absent machines
        self._loads: dict[str, dict[str, int]] = {}  # by machine, then node; also of absent machines
        self.busy = Busy()
        self.failing = Failing()
        self._siblings: dict[str, int] = {}  # what other workers of this node have, by machine; never zero
        self._relayed: dict[
            str, int
        ] = {}  # what this process passes on for other nodes, by machine; never zero
        self._is_loading = False
        self._trends: dict[str, float] = {}  # by machine, where there is or was a remote load
        self._present: frozenset[str] | None = None  # nodes whose loads count; None: those of all
        self._region_uses: dict[str, int] = {}  # how many rows of nodes and machines name a region

    # Changes

    def apply(self, table: str, pk: Pk, row: Row | None) -> None:
        """Put, replace or (with None) delete one row; a row of a table that is not ours is ignored.

        A row that is not acceptable does not raise: it ends up in `rejected`.
        """
        rows = self._rows.get(table)
        if rows is None:
            return
        if self.rejected:
            self.rejected.pop((table, pk), None)
        if table == MACHINES:
            self._apply_machine(pk, row)
            return
        new: Entity | None = None
        if row is not None:
            try:
                new = parse_row(table, row, pk)
            except RowError as error:
                self.rejected[(table, pk)] = error.reason
        old = self._make_row(table, pk) if table in MADE else rows.get(pk)
        if new == old:
            return
        if table not in MADE:
            if new is None:
                del rows[pk]
            else:
                rows[pk] = new
        self._index(old, new)

    def _apply_machine(self, pk: Pk, row: Row | None) -> None:
        target = self.machine(pk[0]) if len(pk) == 1 and isinstance(pk[0], str) else None
        if row is not None:
            try:
                fields = parse_machine(row, pk)
            except RowError as error:
                self.rejected[(MACHINES, pk)] = error.reason
            else:
                if target is None:
                    self._add_machine(fields)
                elif fields != target.fields:
                    self._change_machine(target, fields)
                return
        if target is not None:
            self._remove_machine(target)

    def _make_row(self, table: str, pk: Pk) -> Entity | None:
        """Return the accepted row of an app, hostname or service that has this key."""
        match pk:
            case (str(name),) if table == APPS:
                app = self._apps.get(name)
                return None if app is None else app.row
            case (str(hostname), str(prefix)) if table == HOSTNAMES:
                found = self._hosts.get(hostname, prefix)
                return None if found is None else HostnameRow(hostname, prefix, found[0].name, found[1])
            case (str(name), int(port)) if table == SERVICES:
                app = self._apps.get(name)
                service = None if app is None else app.service(port)
                return None if service is None else service.row
        return None

    def load(self, rows: Iterable[tuple[str, Pk, Row | None]]) -> None:
        """Hold exactly these rows from now on; machines that stay keep their Target."""
        self._is_loading = True
        for _ in self.load_in_steps(rows, sys.maxsize):
            pass
        self._is_loading = False

    def load_in_steps(self, rows: Iterable[tuple[str, Pk, Row | None]], step: int) -> Iterator[None]:
        """Do what `load` does, and yield after each `step` rows so that the caller can do other things.

        In between the table is usable and holds some of the old rows and some of the new.
        """
        # Sets of keys that are there anyway: a million new ones would take as much memory as the table.
        stale = {table: set(self.rows(table) if table != MACHINES else ()) for table in TABLES}
        stale_machines = set(self._targets)
        for table, pk in self.rejected:
            stale[table].add(pk)
        for done, (table, pk, row) in enumerate(rows, 1):
            self.apply(table, pk, row)
            if table == MACHINES and isinstance(key := pk[0], str):
                stale_machines.discard(key)
            if table in stale:
                stale[table].discard(pk)
            if not done % step:
                yield
        stale[MACHINES] |= {(machine,) for machine in stale_machines}
        for done, (table, pk) in enumerate(((table, pk) for table, held in stale.items() for pk in held), 1):
            self.apply(table, pk, None)
            if not done % step:
                yield

    def set_siblings(self, counts: Iterable[tuple[str, int]]) -> None:
        """Take what other workers of this node have in flight at these machines."""
        for machine, count in counts:
            if count:
                self._siblings[machine] = count
            else:
                self._siblings.pop(machine, None)
            self._update_remote_load(machine)

    def follow_loads(self) -> None:
        """Bring the trends of remote loads up to now. Call it ten times a second.

        Everybody hears of a load late, and at the same time: who answered to each change would have all nodes
        turn to a machine, and away from it, again and again. Those who answer to averages do not.
        """
        for machine, before in list(self._trends.items()):
            target = self._targets.get(machine)
            load = 0 if target is None else target.remote_load
            now = before + (load - before) * TREND_STEP
            if load or now > 0.01:
                self._trends[machine] = now
            else:
                del self._trends[machine]
            if target is not None:
                target.trend = round(now)

    def set_present(self, nodes: Iterable[str]) -> None:
        """From now on only the loads that these nodes wrote count: those of others are out of date."""
        present = frozenset(nodes)
        if present != self._present:
            self._present = present
            for machine in self._loads:
                self._update_remote_load(machine)

    def is_present(self, node: str) -> bool:
        """True unless the node is known to be gone."""
        return self._present is None or node in self._present

    def set_round_trips(self, origin: str, round_trips: Iterable[tuple[str, float]]) -> None:
        """Take how many milliseconds it is from a region to others."""
        self.regions.set_round_trips(origin, round_trips)
        self._forget_orders()

    def forget_siblings(self) -> None:
        """Nobody can say any more what other workers have."""
        self.set_siblings([(machine, 0) for machine in self._siblings])

    def _index(self, old: Entity | None, new: Entity | None) -> None:
        match new if new is not None else old:
            case CheckRow(machine=machine, name=name):
                self._index_check(machine, name, new)
            case LoadRow(machine=machine, node=node):
                self._index_load(machine, node, new)
            case HostnameRow(hostname=hostname, path_prefix=prefix):
                self._index_hostname(hostname, prefix, old, new)
            case ServiceRow(app=name, port=port):
                app = self._app(name)
                if isinstance(new, ServiceRow):
                    app.put_service(new)
                else:
                    app.drop_service(port)
                    self._forget_if_unused(app)
            case AppRow(name=name):
                app = self._app(name)
                app.row = new if isinstance(new, AppRow) else None
                self._forget_if_unused(app)
            case RegionRow(code=code):
                self._index_region(code, new)
            case NodeRow(id=node):
                if isinstance(new, NodeRow):
                    self._use_region(new.region)
                if isinstance(old, NodeRow):
                    self._leave_region(old.region)
                self.ways.put(node, new if isinstance(new, NodeRow) else None)

    def _app(self, name: str) -> App:
        app = self._apps.get(name)
        if app is None:
            app = self._apps[name] = App(name)
        return app

    def _forget_if_unused(self, app: App) -> None:
        if app.is_unused():
            del self._apps[app.name]

    def _index_hostname(self, hostname: str, prefix: str, old: Entity | None, new: Entity | None) -> None:
        if isinstance(new, HostnameRow):
            app = self._app(new.app)
            app.names += 1
            self._hosts.put(hostname, prefix, app, new.managed_by)
        else:
            self._hosts.drop(hostname, prefix)
        if isinstance(old, HostnameRow):
            app = self._apps[old.app]
            app.names -= 1
            self._forget_if_unused(app)

    def _index_region(self, code: str, new: Entity | None) -> None:
        if isinstance(new, RegionRow):
            self.regions.put_own(code, new.name, new.latitude, new.longitude)
        else:
            self.regions.drop_own(code)
        self._forget_orders()

    def _forget_orders(self) -> None:
        # Rare, and the only change that is O(apps): all orders of distance may be wrong now.
        for app in self._apps.values():
            app.forget_plans()

    def _add_machine(self, fields: MachineFields) -> None:
        target = Target(fields)
        machine = target.id
        self._targets[machine] = target
        self._use_region(target.region)
        self._attach(target, target.app, target.region)
        target.foreign = target.node != self.own_node
        if machine in self._checks:
            target.set_checks(self._checks[machine])
        self._update_remote_load(machine)
        if not self._is_loading:
            target.warm_since = COLD

    def _change_machine(self, target: Target, fields: MachineFields) -> None:
        app, region = fields[1], fields[3]
        if target.app != app or target.region != region:
            self._use_region(region)
            self._leave_region(target.region)
            self._detach(target)
            self._attach(target, app, region)
        target.update(fields)
        target.foreign = target.node != self.own_node

    def _remove_machine(self, target: Target) -> None:
        self._leave_region(target.region)
        del self._targets[target.id]
        target.removed = True
        self._detach(target)

    def _attach(self, target: Target, app_name: str, region: str) -> None:
        app = self._app(app_name)
        bucket = app.buckets.get(region)
        if bucket is None:
            bucket = app.buckets[region] = Bucket(region)
            app.forget_plans()
        target.attach(app.name, bucket)

    def _detach(self, target: Target) -> None:
        app, bucket = self._apps[target.app], target.bucket
        target.detach()
        if bucket is not None and not bucket:
            del app.buckets[bucket.region]
            app.forget_plans()
            self._forget_if_unused(app)

    def _index_check(self, machine: str, name: str, new: Entity | None) -> None:
        checks = self._checks.setdefault(machine, {})
        if isinstance(new, CheckRow):
            checks[name] = new
        else:
            del checks[name]
        if not checks:
            del self._checks[machine]
        target = self._targets.get(machine)
        if target is not None:
            target.set_checks(checks or NO_CHECKS)

    def _index_load(self, machine: str, node: str, new: Entity | None) -> None:
        if node == self.own_node:
            return
        loads = self._loads.setdefault(machine, {})
        if isinstance(new, LoadRow):
            loads[node] = new.in_flight
        else:
            loads.pop(node, None)
            if not loads:
                del self._loads[machine]
        self._update_remote_load(machine)

    def count_relayed(self, machine: str, more: int) -> None:
        """Count what this process passes on to a machine for other nodes, or (below 0) no longer does.

        The others report it too, but later: it counts at once, and not twice.
        """
        relayed = self._relayed.pop(machine, 0) + more
        if relayed:
            self._relayed[machine] = relayed
        self._update_remote_load(machine)

    def _compute_remote_load(self, machine: str) -> int:
        load = 0
        if machine in self._loads:
            present = self._present
            for node, in_flight in self._loads[machine].items():
                if present is None or node in present:
                    load += in_flight
        return self._siblings.get(machine, 0) + max(load, self._relayed.get(machine, 0))

    def _update_remote_load(self, machine: str) -> None:
        target = self._targets.get(machine)
        if target is not None:
            target.remote_load = self._compute_remote_load(machine)
            if target.remote_load:
                self._trends.setdefault(machine, float(target.remote_load))

    def _use_region(self, region: str) -> None:
        self._region_uses[region] = self._region_uses.get(region, 0) + 1

    def _leave_region(self, region: str) -> None:
        self._region_uses[region] -= 1
        if not self._region_uses[region]:
            del self._region_uses[region]

    # Lookups

    def find(self, host: bytes, path: bytes, port: int) -> Service | None:
        """Return the service for a request, or None.

        `host` is as the client sent it, with or without a port; `path` may carry a query; `port` is
        the one the client connected to.
        """
        app = self._hosts.find(host, path)
        if app is None or app.row is None:
            return None
        if app.only is not None:
            return app.only
        return app.by_port.get(port) or app.by_port.get(ANY_PORT)

    def find_app(self, host: bytes, path: bytes) -> str | None:
        """Return the name of the app that a host and path lead to, whether or not the app exists."""
        app = self._hosts.find(host, path)
        return None if app is None else app.name

    def service(self, app: str, port: int) -> Service | None:
        """Return the service of an app on a public port, or None; an app without its row has none."""
        entry = self._apps.get(app)
        if entry is None or entry.row is None:
            return None
        if entry.only is not None:
            return entry.only
        return entry.by_port.get(port) or entry.by_port.get(ANY_PORT)

    def machine(self, machine: str) -> Target | None:
        """Return the machine with this id, of whatever app."""
        return self._targets.get(machine)

    def app(self, name: str) -> App | None:
        """Return what is known of an app, also when its row is missing."""
        return self._apps.get(name)

    def soft_limit(self, machine: str) -> int:
        """Return the lowest soft limit that a machine comes under; 1 where there is none, as that is near."""
        target = self._targets.get(machine)
        services = self._apps[target.app].services.values() if target is not None else ()
        return min((service.soft_limit for service in services), default=1)

    def node_regions(self) -> dict[str, str]:
        """Return the region of each node that has a row."""
        return {row.id: row.region for row in self._rows["nodes"].values() if isinstance(row, NodeRow)}

    def knows_region(self, name: str) -> bool:
        """True for a built-in or own region, an area, and a code that a node or machine uses."""
        return name in self.regions or name in AREAS or name in self._region_uses

    # Everything, for the admin

    def apps(self) -> Iterator[App]:
        """Yield every app that any row speaks of; `App.row` is None when it has none of its own."""
        return iter(self._apps.values())

    @property
    def machines_count(self) -> int:
        """How many machines there are."""
        return len(self._targets)

    def targets(self) -> Iterator[Target]:
        """Yield every machine."""
        return iter(self._targets.values())

    def routes(self) -> Iterator[tuple[str, str, str]]:
        """Yield (hostname, path prefix, app) of every route."""
        return ((hostname, prefix, app.name) for hostname, prefix, app, _ in self._hosts.routes())

    def rows(self, table: str) -> Mapping[Pk, Entity]:
        """Return the accepted rows of a table, by key; not to be changed."""
        made: dict[Pk, Entity] = {}
        if table == MACHINES:
            for target in self._targets.values():
                made[(target.id,)] = target.row
        elif table == HOSTNAMES:
            for hostname, prefix, app, managed_by in self._hosts.routes():
                made[(hostname, prefix)] = HostnameRow(hostname, prefix, app.name, managed_by)
        elif table == APPS:
            for app in self._apps.values():
                if app.row is not None:
                    made[(app.name,)] = app.row
        elif table == SERVICES:
            for app in self._apps.values():
                for service in app.services.values():
                    made[(app.name, service.port)] = service.row
        else:
            return self._rows[table]
        return made
