"""Where the facts come from: the table, membership, the configuration and the host of one node.

Decides what is read, and how. Draws no conclusion. Invariant: nothing is changed, and what cannot be read is
left out; machines are asked by `probe` alone, with the requests of their checks at a path of no meaning.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import resource
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from isthmus.admin.views import PRESENT
from isthmus.checking.definition import decode_checks, read_definitions
from isthmus.config import format_address, parse_listen
from isthmus.config_machines import parse_statuses
from isthmus.doctor.facts import (
    BehindFacts,
    CertificateFacts,
    CheckFacts,
    ExerciseFacts,
    HostFacts,
    LocalFacts,
    MachineFacts,
    NodeFacts,
    ProbeFacts,
    RejectedFacts,
    ServiceFacts,
    Snapshot,
    StagedFacts,
)
from isthmus.exercises import read_exercises
from routing.balancer import ANYWHERE
from routing.explain import Verdict, judge
from routing.peering import Way
from routing.types import CheckStatus, HostnameRow, NodeRow

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from isthmus.checking.definition import Definition
    from isthmus.checking.probe import Outcome
    from isthmus.config import Config
    from isthmus.reloading import Lifecycle
    from replication.report import MemberView
    from routing.table import RoutingTable, Service
    from routing.target import Target

# One machine for each check is asked; so many at a time, and none for longer.
PROBES_MAX = 200
PROBES_AT_A_TIME = 20
PROBE_MS_MAX = 5_000
# Some milliseconds.
MACHINES_A_TURN = 500

# Of machines that take requests, the best verdict first. One that is full takes them again in a moment.
_ROUTABLE = (Verdict.CANDIDATE, Verdict.OVER_SOFT, Verdict.AT_HARD_LIMIT)


class Cluster(Protocol):
    """What is needed of the replication agent."""

    def members(self) -> Iterable[MemberView]:
        """Return all nodes that it knows of."""

    def status(self) -> dict[str, Any]:
        """Return the state of the replica."""


class Asker(Protocol):
    """Who makes probes."""

    async def probe(self, definition: Definition) -> Outcome:
        """Probe once; raises nothing."""


async def gather(
    config: Config,
    table: RoutingTable,
    cluster: Cluster,
    lifecycle: Lifecycle,
    credentials_problem: str,
    certificates: tuple[CertificateFacts, ...],
    staged: dict[str, Any],
    rollouts: dict[str, Any],
    *,
    now: float,
    now_ms: int,
) -> Snapshot:
    """Return what is known now.

    `certificates` are those of `read_certificates`; `staged` and `rollouts` are what their keepers describe.

    It pauses now and then: a table may hold a million machines, and others have to be answered meanwhile.
    """
    members = list(cluster.members())
    hosts = {member.name: member.address[0] for member in members}
    machines: list[MachineFacts] = []
    for count, target in enumerate(list(table.targets()), 1):
        machines.append(_describe_machine(table, target, hosts.get(target.node, ""), now))
        if not count % MACHINES_A_TURN:
            await asyncio.sleep(0)
    apps = sorted(app.name for app in table.apps() if app.row is not None)
    services = [service for app in table.apps() for service in app.services.values() if app.row is not None]
    return Snapshot(
        now_ms=now_ms,
        node=config.node,
        region=config.region,
        nodes=tuple(_describe_nodes(table, members)),
        apps=tuple(apps),
        hosts=tuple(
            HostFacts(row.hostname, row.path_prefix, row.app)
            for row in table.rows("hostnames").values()
            if isinstance(row, HostnameRow)
        ),
        services=tuple(map(_describe_service, services)),
        machines=tuple(machines),
        rejected=tuple(
            RejectedFacts(name, ", ".join(map(str, key)), reason)
            for (name, key), reason in table.rejected.items()
        ),
        behind=msgspec.convert(rollouts["behind"], tuple[BehindFacts, ...]),
        certificates=(*certificates, *_read_authorities(services)),
        local=msgspec.structs.replace(
            _describe_local(config, cluster.status(), members, lifecycle, credentials_problem),
            staged=tuple(map(_describe_change, staged["changes"])),
        ),
    )


# The cluster


def _describe_nodes(table: RoutingTable, members: list[MemberView]) -> Iterator[NodeFacts]:
    rows = {row.id: row for row in table.rows("nodes").values() if isinstance(row, NodeRow)}
    best: dict[str, MemberView] = {}
    addresses: dict[str, list[str]] = {}
    for member in members:  # of two of a name, the one that is there
        if member.state in PRESENT:
            addresses.setdefault(member.name, []).append(format_address(*member.address))
        if member.name not in best or member.is_self or member.state in PRESENT:
            best[member.name] = member
    for name in sorted(rows.keys() | best.keys()):
        row, found = rows.get(name), best.get(name)
        yield NodeFacts(
            name=name,
            region=row.region if row is not None else "",
            state=found.state if found is not None else "unknown",
            is_self=found is not None and found.is_self,
            software=row.software if row is not None else "",
            staleness_ms=found.staleness_ms if found is not None else None,
            clock_ahead_ms=found.clock_ahead_ms if found is not None else None,
            gossip_host=found.address[0] if found is not None else "",
            addresses=tuple(sorted(addresses.get(name, ()))),
        )


def _describe_service(service: Service) -> ServiceFacts:
    options = service.options
    try:
        checks = decode_checks(service.checks)
    except ValueError:
        checks = ()  # the checker says so
    return ServiceFacts(
        app=service.app,
        port=service.port,
        soft_limit=service.soft_limit,
        hard_limit=service.hard_limit,
        checks=tuple(
            CheckFacts(
                name=check.name or f"{check.type}-{index}",
                type=check.type,
                path=check.path,
                interval_ms=check.interval_ms,
                timeout_ms=check.timeout_ms,
                failures=check.failures,
                status=parse_statuses(check.status),
                wants_body=bool(check.body),
            )
            for index, check in enumerate(checks)
        ),
        is_raw=options is not None and options.is_raw,
        autostart=options is None or options.scaling.autostart,
        primary_region="" if options is None else options.scaling.primary_region,
    )


def _describe_machine(table: RoutingTable, target: Target, owner_host: str, now: float) -> MachineFacts:
    app = table.app(target.app)
    services = list(app.services.values()) if app is not None and app.row is not None else []
    verdicts = [judge(service, target, now, ANYWHERE, ()) for service in services]
    routable = [verdict for verdict in _ROUTABLE if verdict in verdicts]
    return MachineFacts(
        id=target.id,
        app=target.app,
        node=target.node,
        region=target.region,
        address=target.address,
        state=target.state.value,
        is_routable=bool(routable),
        verdict=(*routable, *verdicts)[0].value if verdicts else "its app has no service",
        load=target.usual_load,
        has_driver=bool(target.driver),
        since_ms=target.since_ms,
        relays=_find_relays(table, target, services, owner_host),
    )


def _find_relays(
    table: RoutingTable, target: Target, services: list[Service], owner_host: str
) -> tuple[str, ...] | None:
    if not target.foreign:
        return None
    wishes = [service.options.reach if service.options is not None else None for service in services]
    way = table.ways.find(target, wishes[0] if wishes else None)
    if way is Way.NODE:
        return tuple(relay.node for relay in table.ways.relays(target))
    # Nodes of one host, as in a demo, have one loopback.
    is_lost = is_loopback(target.host) and bool(owner_host) and not is_loopback(owner_host)
    return () if is_lost and way is Way.DIRECT else None


def is_loopback(host: str) -> bool:
    """True when every host means itself by this address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


# The node


def _describe_local(
    config: Config,
    status: dict[str, Any],
    members: list[MemberView],
    lifecycle: Lifecycle,
    credentials_problem: str,
) -> LocalFacts:
    names = {member.site: member.name for member in members}
    linked = {names.get(site, site) for site in (*status["peers"]["eager"], *status["peers"]["lazy"])}
    files_max = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # workers take all that they may have
    try:
        disk = shutil.disk_usage(config.data)
    except OSError:
        disk = None
    done = read_exercises(Path(config.data))
    twin = status["site_conflict"]
    return LocalFacts(
        workers=config.workers,
        cores=len(os.sched_getaffinity(0)),
        files_max=None if files_max == resource.RLIM_INFINITY else files_max,
        connections_max=config.proxy.connections_max,
        disk_free_bytes=None if disk is None else disk.free,
        disk_total_bytes=None if disk is None else disk.total,
        data=str(config.data),
        read_only=None if status["read_only"] is None else str(status["read_only"]),
        schema_problem=str(status["schema_problem"] or ""),
        parked=status["parked"],
        site_conflict="" if twin is None else str(twin["name"]),
        reload_problem=lifecycle.reload_problem,
        credentials_problem=credentials_problem,
        gossip_host=parse_listen(config.gossip.listen)[0],
        is_sealed=config.gossip.sealed,
        links=tuple(sorted(linked)),
        backup=None if done.backup is None else ExerciseFacts(done.backup.at_ms, done.backup.backup),
        restore=None if done.restore is None else ExerciseFacts(done.restore.at_ms, done.restore.backup),
    )


def _describe_change(change: dict[str, Any]) -> StagedFacts:
    rows = (f"{row['table']} {', '.join(map(str, row['key']))}" for row in change["rows"])
    return StagedFacts(change["id"], change["state"], tuple(rows))


def read_certificates(config: Config) -> Iterator[CertificateFacts]:
    """Yield the certificates that the configuration names, as far as they can be read. Blocks."""
    # Importing here keeps cryptography, 10 MB, out of agents that nobody asks.
    from proxy.certificates import list_files  # noqa: PLC0415 — see above

    gossip, tls = config.gossip, config.tls
    renew = "renew it; the file is read again by itself"
    named = [("clients", cert, renew) for cert, _ in list_files(tls.certificates)]
    reload = "renew it, then isthmus reload"
    named += [
        ("machines that ask for one", tls.client_certificate.partition(":")[0], reload),
        ("other nodes", gossip.tls_cert, reload),
        (
            "other nodes, the authority",
            gossip.tls_ca,
            "add the next one to the file on all nodes, then renew",
        ),
    ]
    for use, file, mend in named:
        if file:
            try:
                pem = Path(file).read_bytes()
            except OSError:
                continue
            yield from _read_pem(use, file, pem, mend)


def _read_authorities(services: list[Service]) -> Iterator[CertificateFacts]:
    for service in services:
        tls = None if service.options is None else service.options.machine_tls
        if tls is not None and tls.ca:
            mend = "set apps.machine_tls.ca to the old one and the next one, then renew the machines'"
            yield from _read_pem(
                f"machines of {service.app}, the authority", "machine_tls.ca", tls.ca.encode(), mend
            )


def _read_pem(use: str, source: str, pem: bytes, mend: str) -> Iterator[CertificateFacts]:
    from cryptography import x509  # noqa: PLC0415 — as above

    try:
        own = x509.load_pem_x509_certificates(pem)[0]
        names = [str(name.value) for name in own.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)]
        try:
            known = own.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            names = known.get_values_for_type(x509.DNSName) or names
        except x509.ExtensionNotFound:
            pass
        begins, expires = own.not_valid_before_utc, own.not_valid_after_utc
    except (ValueError, IndexError):
        return
    begins_ms, expires_ms = (round(time.timestamp() * 1000) for time in (begins, expires))
    yield CertificateFacts(use, source, tuple(names), begins_ms, expires_ms, mend)


# Machines


async def probe(table: RoutingTable, asker: Asker, node: str) -> list[ProbeFacts]:
    """Return what checks of machines of this node that pass say of a path that nothing serves."""
    room = asyncio.Semaphore(PROBES_AT_A_TIME)

    async def ask(definition: Definition, app: str) -> ProbeFacts:
        path = f"/isthmus-doctor-{secrets.token_hex(8)}"
        async with room:
            outcome = await asker.probe(move(definition, path))
        name, machine = definition.name, definition.machine
        return ProbeFacts(app, machine, name, path, outcome.passed, outcome.summary)

    asked = _choose_probes(table, node)
    return list(await asyncio.gather(*(ask(definition, app) for app, definition in asked[:PROBES_MAX])))


def _choose_probes(table: RoutingTable, node: str) -> list[tuple[str, Definition]]:
    """Return one definition for each HTTP check that passes somewhere here."""
    chosen: dict[tuple[str, str], Definition] = {}
    for target in sorted(table.targets(), key=lambda target: target.id):
        if target.node != node:
            continue
        passing = {name for name, check in target.checks.items() if check.status is CheckStatus.PASSING}
        try:
            for definition in read_definitions(table, target):
                if definition.request and definition.name in passing:
                    chosen.setdefault((target.app, definition.name), definition)
        except ValueError:
            continue  # the checker says so
    return [(app, definition) for (app, _), definition in chosen.items()]


def move(definition: Definition, path: str) -> Definition:
    """Return the same check at another path, and with a short patience."""
    check = definition.check
    old, new = (f"{check.method} {at} HTTP/1.1\r\n".encode() for at in (check.path, path))
    patience = min(check.timeout_ms, PROBE_MS_MAX)
    return definition._replace(
        request=definition.request.replace(old, new, 1),
        check=msgspec.structs.replace(check, path=path, timeout_ms=patience),
    )
