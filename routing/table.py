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

from .catalog import TABLES, RowError, parse_row
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
    MachineRow,
    NodeRow,
    Pk,
    RegionRow,
    Row,
    ServiceRow,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from .options import ServiceOptions

__all__ = ["App", "RoutingTable", "Service", "Target"]

ANY_PORT: Final = 0
MACHINES: Final = "machines"
# The share of the way to its load that a trend goes each time: five seconds for most of it. That must be long
# beside the time that a load needs to get to all who look at it.
TREND_STEP: Final = 0.02


# Stands for the orders of an app that nobody has asked for; nothing is put in.
_NO_PLANS: Final[dict[object, tuple[Bucket, ...]]] = {}


class App:
    """What is known under one app name, with or without its row."""

    __slots__ = ("buckets", "home", "home_region", "name", "only", "plans", "row", "services")

    def __init__(self, name: str) -> None:
        self.name = name
        self.row: AppRow | None = None  # None while only other rows speak of it; then nothing routes to it
        self.services: dict[int, Service] = {}  # by public port
        self.buckets: dict[str, Bucket] = {}  # by region; only regions with machines
        # Set where it is all of `services` and takes any port: one look less into memory for most requests.
        self.only: Service | None = None
        # Orders of buckets as balancers worked them out: that of the first region that asked, for requests
        # that say nothing of regions, and all others. Emptied when a region comes, goes or moves.
        self.home: tuple[Bucket, ...] = ()
        self.home_region = ""
        self.plans: dict[object, tuple[Bucket, ...]] = _NO_PLANS

    def forget_plans(self) -> None:
        """Forget in which order to look through regions."""
        self.home_region = ""
        self.plans = _NO_PLANS

    def is_unused(self) -> bool:
        """True when no row speaks of this app any more."""
        return self.row is None and not self.services and not self.buckets

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
        "options",
        "owner",
        "panic_percent",
        "port",
        "slow_start_s",
        "soft_limit",
    )

    def __init__(self, row: ServiceRow, owner: App) -> None:
        self.app = row.app
        self.port = row.port  # ANY_PORT: any port without a service of its own
        self.owner = owner
        self.internal_port: int | None
        self.soft_limit: int
        self.hard_limit: int | None
        self.concurrency: Concurrency
        self.checks: str
        self.options: ServiceOptions | None  # None: all as usual
        self.slow_start_s: float  # of the options
        self.panic_percent: int  # of the options
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
        self.options = row.options
        self.slow_start_s = 0.0 if row.options is None else row.options.slow_start_s
        self.panic_percent = 0 if row.options is None else row.options.panic_percent

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
        # What is accepted, by key; of machines nothing, as a Target is all that their rows say.
        self._rows: dict[str, dict[Pk, Entity]] = {table: {} for table in TABLES}
        self._hosts = HostIndex()
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
        new: Entity | None = None
        if self.rejected:
            self.rejected.pop((table, pk), None)
        if row is not None:
            try:
                new = parse_row(table, row, pk)
            except RowError as error:
                self.rejected[(table, pk)] = error.reason
        if table == MACHINES:
            key = pk[0] if len(pk) == 1 else None
            target = self._targets.get(key) if isinstance(key, str) else None
            old: Entity | None = None if target is None else target.row
            if new != old:
                self._index(old, new)
            return
        old = rows.get(pk)
        if new == old:
            return
        if new is None:
            del rows[pk]
        else:
            rows[pk] = new
        self._index(old, new)

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
        stale: dict[str, set[Pk]] = {table: set(held) for table, held in self._rows.items()}
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
            case MachineRow(id=machine):
                self._index_machine(machine, old, new)
            case CheckRow(machine=machine, name=name):
                self._index_check(machine, name, new)
            case LoadRow(machine=machine, node=node):
                self._index_load(machine, node, new)
            case HostnameRow(hostname=hostname, path_prefix=prefix):
                if isinstance(new, HostnameRow):
                    self._hosts.put(hostname, prefix, new.app)
                else:
                    self._hosts.drop(hostname, prefix)
            case ServiceRow(app=name, port=port):
                self._index_service(name, port, new)
            case AppRow(name=name):
                app = self._app(name)
                app.row = new if isinstance(new, AppRow) else None
                self._forget_if_unused(app)
            case RegionRow(code=code):
                self._index_region(code, new)
            case NodeRow(id=node):
                self._count_region(old, new)
                self.ways.put(node, new if isinstance(new, NodeRow) else None)

    def _app(self, name: str) -> App:
        app = self._apps.get(name)
        if app is None:
            app = self._apps[name] = App(name)
        return app

    def _forget_if_unused(self, app: App) -> None:
        if app.is_unused():
            del self._apps[app.name]

    def _index_service(self, name: str, port: int, new: Entity | None) -> None:
        app = self._app(name)
        if not isinstance(new, ServiceRow):
            del app.services[port]
            self._forget_if_unused(app)
        elif port in app.services:
            app.services[port].update(new)
        else:
            app.services[port] = Service(new, app)
        app.only = app.services.get(ANY_PORT) if len(app.services) == 1 else None

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

    def _index_machine(self, machine: str, old: Entity | None, new: Entity | None) -> None:
        self._count_region(old, new)
        target = self._targets.get(machine)
        if not isinstance(new, MachineRow):
            assert target is not None
            del self._targets[machine]
            target.removed = True
            self._detach(target)
            return
        if target is None:
            target = self._targets[machine] = Target(new)
            self._attach(target, new.app, new.region)
            target.foreign = new.node != self.own_node
            if machine in self._checks:
                target.set_checks(self._checks[machine])
            self._update_remote_load(machine)
            if not self._is_loading:
                target.warm_since = COLD
            return
        if (target.app, target.region) != (new.app, new.region):
            self._detach(target)
            self._attach(target, new.app, new.region)
        target.update(new)
        target.foreign = new.node != self.own_node

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

    def _count_region(self, old: Entity | None, new: Entity | None) -> None:
        if isinstance(new, NodeRow | MachineRow):
            self._region_uses[new.region] = self._region_uses.get(new.region, 0) + 1
        if isinstance(old, NodeRow | MachineRow):
            self._region_uses[old.region] -= 1
            if not self._region_uses[old.region]:
                del self._region_uses[old.region]

    # Lookups

    def find(self, host: bytes, path: bytes, port: int) -> Service | None:
        """Return the service for a request, or None.

        `host` is as the client sent it, with or without a port; `path` may carry a query; `port` is
        the one the client connected to.
        """
        name = self._hosts.find(host, path)
        return None if name is None else self.service(name, port)

    def find_app(self, host: bytes, path: bytes) -> str | None:
        """Return the name of the app that a host and path lead to, whether or not the app exists."""
        return self._hosts.find(host, path)

    def service(self, app: str, port: int) -> Service | None:
        """Return the service of an app on a public port, or None; an app without its row has none."""
        entry = self._apps.get(app)
        if entry is None or entry.row is None:
            return None
        if entry.only is not None:
            return entry.only
        services = entry.services
        return services.get(port) or services.get(ANY_PORT)

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
        return self._hosts.routes()

    def rows(self, table: str) -> Mapping[Pk, Entity]:
        """Return the accepted rows of a table, by key; not to be changed."""
        if table == MACHINES:
            return {(target.id,): target.row for target in self._targets.values()}
        return self._rows[table]
