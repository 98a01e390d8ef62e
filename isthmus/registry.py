"""Changes to the routing table that people and configuration files ask for.

Decides what is a sensible change and turns it into SQL. Knows nothing of HTTP or of how rows spread.
Invariant: what is refused has changed nothing, because every change is one transaction.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Annotated, Any, Protocol, TypeVar

import msgspec

from isthmus import __version__
from isthmus.config import (
    AppConfig,
    CheckConfig,
    Config,
    MachineConfig,
    PeeringConfig,
    ServiceConfig,
    is_loopback,
    is_wildcard,
    parse_listen,
    unknown_region,
)
from routing.catalog import WEIGHT_MAX, canonical_hostname, canonical_prefix, parse_address
from routing.options import HANDLERS, TLS_VERSIONS, parse_options
from routing.scaling import NAMES as SCALING
from routing.types import WEIGHT_USUAL

Value = None | int | float | str | bytes
Statement = tuple[str, Sequence[Value]]
Rows = list[tuple[Any, ...]]
T = TypeVar("T")

_USUAL_APP = AppConfig(name="usual")

# The actions on a machine: what it is to be, or whether it is cordoned.
_STATES: Mapping[str, str] = {
    "start": "started",
    "stop": "stopped",
    "suspend": "suspended",
    "drain": "draining",
}
_CORDONS: Mapping[str, int] = {"cordon": 1, "uncordon": 0}
ACTIONS = (*_STATES, *_CORDONS)

_NOW_MS = "CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)"
_PUT_GOAL = (
    "INSERT INTO goals (machine, state, asked_by, reason, asked_ms)"  # noqa: S608 — only our own words
    f" VALUES (?, ?, ?, ?, {_NOW_MS}) ON CONFLICT "
)
_REPLACE_GOAL = (
    "DO UPDATE SET state = excluded.state, asked_by = excluded.asked_by, reason = excluded.reason,"
    " asked_ms = excluded.asked_ms"
)

_PUT_FIRST_GOAL = (
    "INSERT INTO goals (machine, state, asked_by, reason, asked_ms, version, release)"  # noqa: S608 — see above
    f" SELECT ?, ?, ?, ?, {_NOW_MS}, current.version, coalesce(current.release, '')"
    " FROM (SELECT 1) LEFT JOIN (SELECT version, release FROM releases"
    " WHERE app = ? AND status = 'complete' ORDER BY version DESC LIMIT 1) AS current"
    " WHERE TRUE ON CONFLICT DO NOTHING"
)


class RegistryError(Exception):
    """A change is refused; `found` is false when what it is about does not exist."""

    def __init__(self, message: str, *, found: bool = True) -> None:
        super().__init__(message)
        self.found = found


class Database(Protocol):
    """What the registry needs of the replicated database."""

    async def execute(self, statements: Sequence[Statement]) -> Any:
        """Run all statements in one transaction."""

    async def query(self, sql: str, params: Sequence[Value] = ()) -> Any:
        """Run a reading statement; the answer has `rows`."""


class NewMachine(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What `machine add` asks for."""

    app: str
    address: str
    id: str = ""
    region: str = ""
    driver: str = ""
    weight: Annotated[int, msgspec.Meta(ge=1, le=WEIGHT_MAX)] = WEIGHT_USUAL


def put_goal(machine: str, state: str, node: str, reason: str) -> Statement:
    """Return what writes down what a machine with a driver is to be."""
    return (_PUT_GOAL + _REPLACE_GOAL, (machine, state, node, reason))


class Registry:
    """Writes the rows of one node.

    `own_listeners` are the addresses that this node itself listens on: no machine may have one, or a
    request could be sent to the admin API or round in a circle. `drivers` are those of this node.
    """

    def __init__(
        self,
        database: Database,
        node: str,
        region: str,
        own_listeners: Collection[str],
        drivers: Collection[str] = (),
    ) -> None:
        self._database = database
        self._node = node
        self._region = region
        self._own_listeners = own_listeners
        self._drivers = drivers

    async def announce(self, config: Config, address: str, now_ms: int) -> None:
        """Write this node's own row, its regions, and what its configuration declares."""
        statements: list[Statement] = [
            (
                (
                    "INSERT INTO nodes (id, region, address, started_ms, software, peering)"
                    " VALUES (?, ?, ?, ?, ?, ?)"
                    " ON CONFLICT DO UPDATE SET region = excluded.region, address = excluded.address,"
                    " started_ms = excluded.started_ms, software = excluded.software,"
                    " peering = excluded.peering"
                ),
                (
                    *(self._node, self._region, address, now_ms, f"isthmus {__version__}"),
                    encode_peering(config.peering),
                ),
            )
        ]
        await self._database.execute(statements + self._declared(config))

    async def declare(self, config: Config) -> None:
        """Write the regions and apps that a configuration declares, and remove what it declares no more."""
        await self._database.execute(self._declared(config))

    def _declared(self, config: Config) -> list[Statement]:
        statements: list[Statement] = []
        for code, region in config.regions.items():
            statements.append(
                (
                    (
                        "INSERT INTO regions (code, name, latitude, longitude) VALUES (?, ?, ?, ?)"
                        " ON CONFLICT DO UPDATE SET name = excluded.name, latitude = excluded.latitude,"
                        " longitude = excluded.longitude"
                    ),
                    (code, region.name, region.latitude, region.longitude),
                )
            )
        owner = f"config:{self._node}"
        for app in config.apps:
            statements += self._app_statements(app, owner)
        declared = [machine for app in config.apps for machine in self.name_machines(app.name, app.machines)]
        ids = [machine.id for machine in declared]
        gone = f"SELECT id FROM machines WHERE managed_by = ? AND id NOT IN ({_marks(ids)})"  # noqa: S608 — only marks
        statements += [(f"DELETE FROM goals WHERE machine IN ({gone})", (owner, *ids))]  # noqa: S608 — see above
        statements += _forget("machines", "id", ids, owner)
        statements += _forget("apps", "name", [app.name for app in config.apps], owner)
        for table in ("hostnames", "services"):
            statements += _forget(table, "app", [app.name for app in config.apps], owner)
        for app in config.apps:
            statements += [_keep_hosts(app, owner), _keep_services(app, owner)]
        return statements

    async def add_app(self, app: AppConfig, *, exact: bool = False, dry_run: bool = False) -> list[str]:
        """Create the app or change it to what is given; returns the ids of its machines given here.

        `exact`: services that are not given are removed. `dry_run`: only refuse what would be refused.
        """
        for host in app.hosts:
            await self._refuse_taken_route(app, host)
        machines = self.name_machines(app.name, app.machines)
        for machine in machines:
            await self._refuse_misfit(app.name, machine)
        statements = self._app_statements(app, "")
        if exact:
            ports = [0, *(service.port for service in app.services)]
            sql = f"DELETE FROM services WHERE app = ? AND port NOT IN ({_marks(ports)})"  # noqa: S608 — only marks
            statements.append((sql, (app.name, *ports)))
        if not dry_run:
            await self._database.execute(statements)
        return [machine.id for machine in machines]

    async def compare_app(self, app: AppConfig) -> tuple[list[dict[str, Any]], list[str]]:
        """Return what would change if services and hosts were as given, and all hosts of the app then."""
        names = ", ".join(_COMPARED)
        sql = f"SELECT port, {names} FROM services WHERE app = ? ORDER BY port"  # noqa: S608 — our own names
        rows = (await self._database.query(sql, (app.name,))).rows
        before = {row[0]: _flatten(dict(zip(_COMPARED, row[1:], strict=True))) for row in rows}
        services: list[AppConfig | ServiceConfig] = [app, *app.services]
        after = {port: _flatten(fields) for port, fields in (_service_fields(app, s) for s in services)}
        changes = []
        for port in sorted(before.keys() | after.keys()):
            old, new = before.get(port, {}), after.get(port, {})
            what = f"service on port {port}" if port else "service"
            changes += [
                {"what": f"{what}: {key}", "before": old.get(key), "after": new.get(key)}
                for key in sorted(old.keys() | new.keys())
                if old.get(key) != new.get(key)
            ]
        sql = "SELECT hostname, path_prefix FROM hostnames WHERE app = ? ORDER BY 1, 2"
        held = [tuple(row) for row in (await self._database.query(sql, (app.name,))).rows]
        wanted = [(canonical_hostname(host), canonical_prefix(app.path_prefix)) for host in app.hosts]
        changes += [
            {"what": f"host {host}{prefix.rstrip('/')}", "before": None, "after": app.name}
            for host, prefix in wanted
            if (host, prefix) not in held
        ]
        return changes, [host for host, _ in {**dict.fromkeys(held), **dict.fromkeys(wanted)}]

    async def set_options(self, app: str, changes: Mapping[str, Any]) -> None:
        """Change options of all services of an app, its limits and checks; null takes one back (RFC 7396)."""
        await self._require("apps", "name", app, "app")
        columns = [name for name in _SET if name in changes]
        statements = self._column_statements(app, {name: changes[name] for name in columns})
        patch = msgspec.json.encode({k: v for k, v in changes.items() if k not in columns}).decode()
        sql = "SELECT json_patch(options, ?) FROM services WHERE app = ?"
        for (options,) in (await self._database.query(sql, (patch, app))).rows:
            try:
                parse_options(options)
            except ValueError as error:
                raise RegistryError(str(error)) from None
        update = "UPDATE services SET options = json_patch(options, ?) WHERE app = ?"
        await self._database.execute([*statements, (update, (patch, app))])

    def _column_statements(self, app: str, changes: Mapping[str, Any]) -> list[Statement]:
        """Return what sets limits and checks, as a configuration would say them."""
        try:
            said = {name: value for name, value in changes.items() if value is not None}
            config = msgspec.convert({"name": app, **said}, AppConfig)
            _, fields = _service_fields(config, config)
        except (msgspec.ValidationError, ValueError) as error:
            raise RegistryError(str(error)) from None
        return [
            (f"UPDATE services SET {name} = ? WHERE app = ? AND {_SET[name]}", (fields[name], app))  # noqa: S608 — our own names
            for name in changes
        ]

    async def remove_app(self, name: str) -> None:
        """Remove an app with all that belongs to it."""
        await self._require("apps", "name", name, "app")
        await self._database.execute(
            [
                ("DELETE FROM checks WHERE machine IN (SELECT id FROM machines WHERE app = ?)", (name,)),
                ("DELETE FROM loads WHERE machine IN (SELECT id FROM machines WHERE app = ?)", (name,)),
                ("DELETE FROM goals WHERE machine IN (SELECT id FROM machines WHERE app = ?)", (name,)),
                ("DELETE FROM machines WHERE app = ?", (name,)),
                ("DELETE FROM services WHERE app = ?", (name,)),
                ("DELETE FROM hostnames WHERE app = ?", (name,)),
                ("DELETE FROM apps WHERE name = ?", (name,)),
            ]
        )

    async def add_machine(self, new: NewMachine) -> str:
        """Add a machine that this node owns and checks; returns its id. Twice is as once."""
        await self._require("apps", "name", new.app, "app")
        try:
            machine = MachineConfig(
                address=new.address, id=new.id, region=new.region, driver=new.driver, weight=new.weight
            )
        except ValueError as error:
            raise RegistryError(str(error)) from None
        (machine,) = self.name_machines(new.app, (machine,))
        await self._refuse_misfit(new.app, machine)
        goals = self._first_goals(AppConfig(name=new.app), (machine,))
        await self._database.execute([self._machine_statement(new.app, machine, ""), *goals])
        return machine.id

    async def plan_machines(
        self, app: str, machines: Iterable[MachineConfig], owner: str
    ) -> tuple[list[str], list[Statement]]:
        """Return the ids of new machines of this node, and what adds them; raises RegistryError."""
        await self._require("apps", "name", app, "app")
        named = self.name_machines(app, machines)
        for machine in named:
            await self._refuse_misfit(app, machine)
        return [machine.id for machine in named], [self._machine_statement(app, m, owner) for m in named]

    async def remove_machine(self, machine: str) -> None:
        """Remove a machine with its checks and loads."""
        await self._require("machines", "id", machine, "machine")
        await self._database.execute(
            [
                ("DELETE FROM checks WHERE machine = ?", (machine,)),
                ("DELETE FROM loads WHERE machine = ?", (machine,)),
                ("DELETE FROM goals WHERE machine = ?", (machine,)),
                ("DELETE FROM machines WHERE id = ?", (machine,)),
            ]
        )

    async def change_machine(self, machine: str, action: str) -> str:
        """Apply one of ACTIONS to a machine.

        Returns the node that is asked to carry it out, for one with a driver; empty when it is done.
        """
        await self._require("machines", "id", machine, "machine")
        if action in _CORDONS:
            cordon = "UPDATE machines SET cordoned = ? WHERE id = ?"
            await self._database.execute([(cordon, (_CORDONS[action], machine))])
            return ""
        state = _STATES[action]
        sql = "SELECT driver, node FROM machines WHERE id = ?"
        driver, owner = (await self._database.query(sql, (machine,))).rows[0]
        if driver:
            await self._database.execute([put_goal(machine, state, self._node, "command")])
            return str(owner)
        if state == "suspended":
            raise RegistryError(f"nothing can suspend `{machine}`: it has no driver; stop it")
        change = f"UPDATE machines SET state = ?, since_ms = {_NOW_MS} WHERE id = ? AND state != ?"  # noqa: S608 — our own words
        await self._database.execute([(change, (state, machine, state))])
        return ""

    async def _require(self, table: str, column: str, value: str, what: str) -> None:
        sql = f"SELECT 1 FROM {table} WHERE {column} = ?"  # noqa: S608 — both names are ours
        if not (await self._database.query(sql, (value,))).rows:
            raise RegistryError(f"there is no {what} `{value}`", found=False)

    async def _refuse_taken_route(self, app: AppConfig, host: str) -> None:
        sql = "SELECT app FROM hostnames WHERE hostname = ? AND path_prefix = ? AND app != ?"
        route = (canonical_hostname(host), canonical_prefix(app.path_prefix))
        rows: Rows = (await self._database.query(sql, (*route, app.name))).rows
        if rows:
            raise RegistryError(f"host `{host}` at {app.path_prefix} already leads to app `{rows[0][0]}`")

    async def _refuse_misfit(self, app: str, machine: MachineConfig) -> None:
        """Refuse a machine without a port, in a region that nobody knows, and one that another app has.

        And one that is started by what only the configuration of a node may say: a command, a driver.
        """
        if machine.command:
            raise RegistryError(
                "a command is only taken from the configuration file of the node that runs it"
            )
        if machine.driver and machine.driver not in self._drivers:
            raise RegistryError(f"this node has no driver `{machine.driver}`")
        if parse_address(machine.address)[1] is None:
            sql = "SELECT 1 FROM services WHERE app = ? AND internal_port IS NULL"
            if (await self._database.query(sql, (app,))).rows:
                raise RegistryError(f"`{machine.address}` names no port, and the app has no internal_port")
        if machine.region:
            await self.refuse_unknown_region(machine.region)
        sql = "SELECT app FROM machines WHERE id = ?"
        rows: Rows = (await self._database.query(sql, (machine.id,))).rows
        if rows and rows[0][0] != app:
            raise RegistryError(f"machine `{machine.id}` already belongs to app `{rows[0][0]}`")

    async def refuse_unknown_region(self, code: str) -> None:
        """Raise RegistryError for a region that nobody knows."""
        own = {row[0] for row in (await self._database.query("SELECT code FROM regions")).rows}
        problem = unknown_region(code, own | {self._region})
        if problem:
            raise RegistryError(problem)

    async def doubt_primary_region(self, code: object) -> list[str]:
        """Return what is to be said of a primary region that nobody knows and where no node is."""
        if not isinstance(code, str) or not code:
            return []
        sql = "SELECT code FROM regions UNION SELECT region FROM nodes"
        known = {row[0] for row in (await self._database.query(sql)).rows}
        problem = unknown_region(code, known | {self._region})
        return [f"primary_region: {problem} (taken all the same: a node may come there)"] if problem else []

    def _app_statements(self, app: AppConfig, owner: str) -> list[Statement]:
        statements: list[Statement] = [
            ("INSERT INTO apps (name, managed_by) VALUES (?, ?) ON CONFLICT DO NOTHING", (app.name, owner)),
            _service_statement(app, app, owner),
            *(_service_statement(app, service, owner) for service in app.services),
        ]
        route = (
            "INSERT INTO hostnames (hostname, path_prefix, app, managed_by) VALUES (?, ?, ?, ?)"
            " ON CONFLICT DO UPDATE SET app = excluded.app"
        )
        prefix = canonical_prefix(app.path_prefix)
        statements += [(route, (canonical_hostname(h), prefix, app.name, owner)) for h in app.hosts]
        machines = self.name_machines(app.name, app.machines)
        statements += [self._machine_statement(app.name, machine, owner) for machine in machines]
        return statements + self._first_goals(app, machines)

    def name_machines(self, app: str, machines: Iterable[MachineConfig]) -> list[MachineConfig]:
        """Return machines of an app, each with an id; one that is not named gets one from what it is."""
        named = []
        for machine in machines:
            if any(_reaches(machine.address, listener) for listener in self._own_listeners):
                raise RegistryError(f"{machine.address} is a listener of this node itself, not a machine")
            if not machine.id:
                identity = f"{self._node} {app} {machine.address}".encode()
                machine = msgspec.structs.replace(machine, id=hashlib.sha256(identity).hexdigest()[:14])  # noqa: PLW2901 — the same machine, named
            named.append(machine)
        return named

    def _first_goals(self, app: AppConfig, machines: Iterable[MachineConfig]) -> list[Statement]:
        """Return what gives new machines with a driver a goal: to run, unless requests are to start them.

        What they run is the current release of their app.
        """
        state = "stopped" if app.autostart and app.autostop != "off" else "started"
        return [
            (_PUT_FIRST_GOAL, (machine.id, state, self._node, "declared", app.name))
            for machine in machines
            if machine.driver_name
        ]

    def _machine_statement(self, app: str, machine: MachineConfig, owner: str) -> Statement:
        region, driver = machine.region or self._region, machine.driver_name
        # What has a driver is found out, and started, by it.
        state = "stopped" if driver else "started"
        return (
            (
                "INSERT INTO machines (id, app, node, region, address, managed_by, driver, state, weight)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
                " ON CONFLICT DO UPDATE SET app = excluded.app, node = excluded.node,"
                " region = excluded.region, address = excluded.address, managed_by = excluded.managed_by,"
                " driver = excluded.driver, weight = excluded.weight"
            ),
            (machine.id, app, self._node, region, machine.address, owner, driver, state, machine.weight),
        )


# Columns that can be set beside the options, and of which services. Checks are of the app, on no port.
_SET = {"soft_limit": "1", "hard_limit": "1", "checks": "port = 0"}
# The columns of a service that a configuration says.
_COMPARED = ("internal_port", "concurrency", "soft_limit", "hard_limit", "checks", "options")


def _service_fields(app: AppConfig, service: AppConfig | ServiceConfig) -> tuple[int, dict[str, Value]]:
    """Return the port and the columns of a service; that for all ports is the app itself."""
    port, checks, options = 0, encode_checks(app.checks), encode_options(app)
    if isinstance(service, ServiceConfig):
        port, checks, options = service.port, "[]", encode_service_options(app, service)
    concurrency = "requests" if "http" in service.handlers else "connections"
    limits = (service.internal_port, concurrency, service.soft_limit, service.hard_limit)
    return port, dict(zip(_COMPARED, (*limits, checks, options), strict=True))


def _service_statement(app: AppConfig, service: AppConfig | ServiceConfig, owner: str) -> Statement:
    port, fields = _service_fields(app, service)
    return (
        (
            "INSERT INTO services"  # noqa: S608 — our own names
            f" (app, port, managed_by, {', '.join(fields)})"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET "
            + ", ".join(f"{name} = excluded.{name}" for name in fields)
        ),
        (app.name, port, owner, *fields.values()),
    )


def _flatten(fields: dict[str, Value]) -> dict[str, Any]:
    """Return the columns of a service with its options beside them, and its checks by number."""
    flat: dict[str, Any] = {name: value for name, value in fields.items() if value is not None}
    options: dict[str, Any] = _decode(flat.pop("options"), {})
    checks: list[dict[str, Any]] = _decode(flat.pop("checks"), [])
    flat |= options
    for i, check in enumerate(checks):
        if isinstance(check, dict):
            flat |= {f"checks[{i}].{key}": value for key, value in check.items()}
    return flat


def _decode(text: object, usual: T) -> T:
    """Return what JSON in a row says; any client may have written anything."""
    try:
        value = msgspec.json.decode(str(text))
    except msgspec.DecodeError:
        return usual
    return value if isinstance(value, type(usual)) else usual


def _reaches(address: str, listener: str) -> bool:
    """True when a connection to the address, made on this machine, ends at the listener."""
    host, port = parse_address(address)
    own_host, own_port = parse_listen(listener)
    if port != own_port:
        return False
    local = is_loopback(host) or is_wildcard(host)
    return host == own_host or (local and (is_loopback(own_host) or is_wildcard(own_host)))


def encode_checks(checks: Iterable[CheckConfig]) -> str:
    """Return check definitions as the JSON that `services.checks` holds."""
    return msgspec.json.encode(list(checks)).decode()


def encode_peering(peering: PeeringConfig) -> str:
    """Return what `nodes.peering` holds: what others have to know, and nothing that is as usual."""
    said = {"address": peering.address, "networks": peering.networks, "machines": peering.machines}
    usual = PeeringConfig()
    return msgspec.json.encode(
        {name: value for name, value in said.items() if value != getattr(usual, name)}
    ).decode()


def encode_options(app: AppConfig) -> str:
    """Return what `services.options` holds for an app: what it says, and nothing that is as usual."""
    options = {
        "proxy_protocol": app.proxy_protocol,
        "response_headers": app.response_headers,
        "maintenance": app.maintenance,
        "force_https": app.force_https,
        "machine_tls": app.machine_tls,
        "pristine": app.pristine,
        "replay_from": app.replay_from,
        "replay_cache": app.replay_cache,
        "compression": app.compression,
        "reach": app.reach,
    }
    said = {name: value for name, value in options.items() if value}
    said |= _raw_options(app) | _scaling_options(app) | _balancing_options(app, app)
    if not app.client_routing:
        said["client_routing"] = False
    return msgspec.json.encode(said).decode()


def encode_service_options(app: AppConfig, service: ServiceConfig) -> str:
    """Return what `services.options` holds for one port of an app."""
    protocol = {"proxy_protocol": service.proxy_protocol} if service.proxy_protocol else {}
    said = protocol | _raw_options(service) | _scaling_options(app) | _balancing_options(app, service)
    return msgspec.json.encode(said).decode()


def _scaling_options(app: AppConfig) -> dict[str, Any]:
    """Return how machines are started and stopped by themselves, where that is not as usual."""
    return {name: getattr(app, name) for name in SCALING if getattr(app, name) != getattr(_USUAL_APP, name)}


def _balancing_options(app: AppConfig, service: AppConfig | ServiceConfig) -> dict[str, Any]:
    """Return how requests are shared out, the same on all ports; bytes have no cookies and headers."""
    names = (*(("sticky",) if "http" in service.handlers else ()), "slow_start_ms", "panic_percent")
    return {name: getattr(app, name) for name in names if getattr(app, name)}


def _raw_options(service: AppConfig | ServiceConfig) -> dict[str, Any]:
    said: dict[str, Any] = {
        name: getattr(service, name)
        for name in ("idle_timeout_ms", "body_bytes_max")
        if getattr(service, name)
    }
    if set(service.handlers) != HANDLERS:
        said["handlers"] = service.handlers
    if set(service.tls_versions) != TLS_VERSIONS:
        said["tls_versions"] = service.tls_versions
    return said


def _marks(values: Sequence[Value]) -> str:
    return ", ".join("?" * len(values))


def _forget(table: str, column: str, keep: Sequence[str], owner: str) -> list[Statement]:
    """Remove what this node's configuration declared earlier and no longer does."""
    marks = ", ".join("?" * len(keep))
    sql = f"DELETE FROM {table} WHERE managed_by = ? AND {column} NOT IN ({marks})"  # noqa: S608 — names are ours
    return [(sql, (owner, *keep))]


def _keep_hosts(app: AppConfig, owner: str) -> Statement:
    marks = ", ".join("?" * len(app.hosts))
    sql = (
        "DELETE FROM hostnames WHERE managed_by = ? AND app = ?"  # noqa: S608 — only marks are put in
        f" AND (path_prefix != ? OR hostname NOT IN ({marks}))"
    )
    return (sql, (owner, app.name, canonical_prefix(app.path_prefix), *map(canonical_hostname, app.hosts)))


def _keep_services(app: AppConfig, owner: str) -> Statement:
    marks = ", ".join("?" * len(app.services))
    sql = (
        "DELETE FROM services WHERE managed_by = ? AND app = ?"  # noqa: S608 — only marks are put in
        f" AND port != 0 AND port NOT IN ({marks})"
    )
    return (sql, (owner, app.name, *(service.port for service in app.services)))
