"""Rules about apps: where they run, what is left when something goes, and what their checks would notice.

Decides what of it is a single point of failure. Refuses to know where facts come from. Invariant: of one app
only the worst of `one machine`, `one node` and `one region` is told, since each is the next one as well.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from isthmus.doctor.finding import Finding, Rule, Severity
from isthmus.wording import count_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from isthmus.doctor.facts import CheckFacts, MachineFacts, ServiceFacts, Snapshot

CRITICAL, WARNING, NOTICE = Severity.CRITICAL, Severity.WARNING, Severity.NOTICE

# Faster says no more, and every probe costs the app something.
INTERVAL_MS_LEAST = 1_000
# Users notice in less.
NOTICED_MS_MOST = 60_000
# A machine that has not run for so long may have been forgotten by whoever changed what it needs.
ASLEEP_MS_MOST = 30 * 86_400_000
# What any path that nothing serves is answered with.
_NOT_FOUND = 404


def _usable(snapshot: Snapshot, app: str) -> list[MachineFacts]:
    """Return the machines that take requests, or would after a start."""
    starts = any(service.autostart for service in snapshot.services_of(app))
    return [
        machine
        for machine in snapshot.machines_of(app)
        if machine.is_routable
        or (starts and machine.has_driver and machine.state in {"stopped", "suspended"})
    ]


def _elsewhere(snapshot: Snapshot, regions: set[str]) -> str:
    """Return a region with a node, other than these, to propose; else a word for one."""
    others = sorted({node.region for node in snapshot.present if node.region} - regions)
    return others[0] if others else "REGION"


def _add_machine(app: str, region: str) -> str:
    return f"isthmus machine add {app} HOST:PORT --region {region}"


def _spread(app: str, machines: list[MachineFacts], region: str) -> str:
    """Return what gives an app a machine in another region; a driver can start one."""
    if not any(machine.has_driver for machine in machines):
        return _add_machine(app, region)
    regions = sorted({machine.region for machine in machines} | {region})
    return f"isthmus scale count {max(len(machines), len(regions))} --app {app} --region {','.join(regions)}"


def find_one_place(snapshot: Snapshot) -> Iterator[Finding]:
    """One machine, one node, or one region that an app stands or falls with."""
    for app in snapshot.apps:
        machines = _usable(snapshot, app)
        nodes = {machine.node for machine in machines}
        regions = {machine.region for machine in machines}
        if not machines:
            continue
        other = _elsewhere(snapshot, regions)
        if len(machines) == 1:
            (only,) = machines
            yield Finding(
                WARNING,
                app,
                f"one machine, {only.id}, is all that can serve it",
                "nothing takes over while it restarts, is deployed or fails",
                f"all requests for {app}",
                _spread(app, machines, other),
            )
        elif len(nodes) == 1:
            (node,) = nodes
            yield Finding(
                WARNING,
                app,
                f"all {len(machines)} machines belong to node {node}",
                "when that host goes, no machine of the app is left",
                f"all requests for {app}",
                f"{_add_machine(app, other)} --admin ADMIN-OF-ANOTHER-NODE",
            )
        elif len(regions) == 1:
            (region,) = regions
            yield Finding(
                WARNING,
                app,
                f"all {len(machines)} machines are in {region}",
                "a region fails as a whole: its power, its network, or the provider's control of it",
                f"all requests for {app}, from everywhere",
                _spread(app, machines, other),
            )


def find_lost_region(snapshot: Snapshot) -> Iterator[Finding]:
    """A region whose loss the others could not carry."""
    for app in snapshot.apps:
        machines = [machine for machine in snapshot.machines_of(app) if machine.is_routable]
        load = sum(machine.load for machine in machines)
        services = [service for service in snapshot.services_of(app) if not service.is_raw]
        of_region = Counter(machine.region for machine in machines)
        if services and len(of_region) > 1:
            # The one whose loss leaves the fewest: limits are those of the service, and the same everywhere.
            region = min(of_region, key=lambda code: (-of_region[code], code))
            left = [machine for machine in machines if machine.region != region]
            yield from _judge_loss(app, region, left, load, services)


def _judge_loss(
    app: str, region: str, left: list[MachineFacts], load: int, services: list[ServiceFacts]
) -> Iterator[Finding]:
    soft = len(left) * min(service.soft_limit for service in services)
    hard_limits = [service.hard_limit for service in services if service.hard_limit is not None]
    hard = len(left) * min(hard_limits) if hard_limits else None
    add = _add_machine(app, left[0].region)
    those = count_of(len(left), "machine")
    if hard is not None and load > hard:
        yield Finding(
            WARNING,
            app,
            f"without {region}, {those} would be given {load} at a time and may take {hard}",
            "what is over the hard limit waits in the queue and is then refused",
            f"about {100 * (load - hard) // load} % of the requests for {app} when {region} goes",
            f"{add}, or isthmus app set {app} --hard-limit N",
        )
    elif load > soft:
        yield Finding(
            NOTICE,
            app,
            f"without {region}, {those} would be over their soft limit: {load} of {soft}",
            "nothing is refused for that, but every request gets slower at once",
            f"all requests for {app} when {region} goes",
            add,
        )
    elif len(left) == 1:
        yield Finding(
            NOTICE,
            app,
            f"without {region}, one machine is left: {left[0].id}",
            "the fault of a region takes long, and any restart in that time is an outage",
            f"all requests for {app}",
            add,
        )


def find_nowhere(snapshot: Snapshot) -> Iterator[Finding]:
    """Hosts and apps that lead to nothing."""
    known = set(snapshot.apps)
    for host in snapshot.hosts:
        where = f"{host.hostname}{host.path.rstrip('/')}"
        if host.app not in known:
            problem = f"it leads to the app {host.app}, which there is not"
        elif not snapshot.services_of(host.app):
            problem = f"its app {host.app} has no service"
        else:
            continue
        where_row = f"hostname = '{host.hostname}' AND path_prefix = '{host.path}'"
        mend = f'isthmus db exec "DELETE FROM hostnames WHERE {where_row}", or add the app'  # noqa: S608 - it is shown, and not run
        yield Finding(
            CRITICAL,
            where,
            problem,
            "requests for it are answered with 404",
            f"all requests for {where}",
            mend,
        )
    reached = {host.app for host in snapshot.hosts}
    for app in snapshot.apps:
        machines = snapshot.machines_of(app)
        if not machines:
            yield Finding(
                WARNING if app in reached else NOTICE,
                app,
                "it has no machines",
                "there is nobody to send its requests to",
                f"all requests for {app}: PR01",
                _add_machine(app, snapshot.region or "REGION"),
            )
        elif all(machine.verdict.startswith("at hard limit") for machine in machines):
            yield Finding(
                CRITICAL,
                app,
                f"all that it has, {count_of(len(machines), 'machine')}, are at their hard limit",
                "requests wait in the queue, and are refused when that takes too long",
                f"new requests for {app}",
                f"{_add_machine(app, machines[0].region)}, or isthmus app set {app} --hard-limit N",
            )
        elif not _usable(snapshot, app):
            verdicts = Counter(machine.verdict.partition(":")[0] for machine in machines)
            told = ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items()))
            yield Finding(
                CRITICAL,
                app,
                f"of its {count_of(len(machines), 'machine')} none takes requests: {told}",
                "unhealthy ones are still tried, others are not",
                f"all requests for {app}",
                "isthmus checks says what they fail on; mend the app"
                if any(machine.verdict.startswith("unhealthy") for machine in machines)
                else f"isthmus machines, then isthmus machine start {machines[0].id}",
            )


def _share(machines: Sequence[MachineFacts]) -> str:
    return "all" if len(machines) == 1 else f"1 in {len(machines)}"


def find_shadowed(snapshot: Snapshot) -> Iterator[Finding]:
    """Names for which some paths lead nowhere, though a wildcard would serve them."""
    paths: dict[str, set[str]] = {}
    for host in snapshot.hosts:
        paths.setdefault(host.hostname, set()).add(host.path)
    apps = {(host.hostname, host.path): host.app for host in snapshot.hosts}
    for name, of_name in sorted(paths.items()):
        if "/" in of_name:
            continue
        for wildcard in _wildcards_of(name):
            if "/" in paths.get(wildcard, ()):
                app = apps[wildcard, "/"]
                yield Finding(
                    WARNING,
                    name,
                    f"only {', '.join(sorted(of_name))} lead somewhere; {wildcard} does not catch the rest",
                    "the most specific name decides alone, and its other paths are answered with 404",
                    f"all other paths of {name}, which look as if {app} served them",
                    f"isthmus db exec \"INSERT INTO hostnames (hostname, app) VALUES ('{name}', '{app}')\"",  # noqa: S608 - as above
                    guess=True,
                )
                break


def _wildcards_of(name: str) -> Iterator[str]:
    labels = name.removeprefix("*.").split(".")
    for index in range(1, len(labels)):
        yield "*." + ".".join(labels[index:])
    if name != "*":
        yield "*"


def find_unchecked(snapshot: Snapshot) -> Iterator[Finding]:
    """Apps whose faults nobody would notice."""
    for app in snapshot.apps:
        services, machines = snapshot.services_of(app), snapshot.machines_of(app)
        checks = [check for service in services for check in service.checks]
        if not services or not machines:
            continue
        if not checks:
            yield Finding(
                WARNING,
                app,
                "it has no checks",
                "a machine that accepts connections and answers with errors, or not at all, keeps its share",
                f"{_share(machines)} requests for {app} for each machine that fails so",
                f"isthmus app set {app} --check /healthz, or [[apps.checks]] where its configuration says it",
            )
        elif all(check.type == "tcp" for check in checks) and not all(service.is_raw for service in services):
            yield Finding(
                NOTICE,
                app,
                "its checks only connect",
                "the kernel accepts connections for a process that hangs",
                f"{_share(machines)} requests for {app} for each machine that hangs",
                f"isthmus app set {app} --check /healthz, or [[apps.checks]] where its configuration says it",
                guess=True,
            )


def find_check_that_cannot_fail(snapshot: Snapshot) -> Iterator[Finding]:
    """Checks that pass whatever happens."""
    told: set[tuple[str, str]] = set()
    for probe in snapshot.probes or ():
        if probe.passed and (probe.app, probe.check) not in told:
            told.add((probe.app, probe.check))
            problem = (
                f"check {probe.check} also passes at {probe.path}, which nothing serves ({probe.output})"
            )
            yield _cannot_fail(probe.app, problem)
    for service in snapshot.services:
        for check in service.checks:
            if check.type != "http" or check.wants_body or (service.app, check.name) in told:
                continue
            takes_not_found = any(least <= _NOT_FOUND <= most for least, most in check.status)
            takes_errors = any(least <= 500 <= most for least, most in check.status)
            if takes_not_found or takes_errors:
                what = "503 and the like" if takes_errors else "404"
                yield _cannot_fail(service.app, f"check {check.name} takes {what} for a pass", guess=False)
            elif check.path == "/" and not _was_probed(snapshot, service.app, check.name):
                yield Finding(
                    NOTICE,
                    service.app,
                    f"check {check.name} asks for /, which often is a page that needs nothing",
                    "a check that touches neither database nor cache passes when these are gone",
                    f"all requests for {service.app} while a dependency is down",
                    "isthmus doctor --probe; then have it ask for a path that uses what requests use",
                    guess=True,
                )


def _was_probed(snapshot: Snapshot, app: str, check: str) -> bool:
    return any((probe.app, probe.check) == (app, check) for probe in snapshot.probes or ())


def _cannot_fail(app: str, problem: str, *, guess: bool = True) -> Finding:
    return Finding(
        WARNING,
        app,
        problem,
        "a check that passes always takes no machine out, and hides that there is none",
        f"the requests for {app} that a broken machine gets",
        "have it ask for a path that fails when the app cannot serve, or look for a text (body)",
        guess=guess,
    )


def find_check_interval(snapshot: Snapshot) -> Iterator[Finding]:
    """Checks that are too eager, or too slow to be of use."""
    for service in snapshot.services:
        for check in service.checks:
            slow_ms = _compute_noticed_ms(check)
            problem = ""
            if check.interval_ms < INTERVAL_MS_LEAST:
                problem = f"check {check.name} probes every {check.interval_ms} ms"
                why = "that is load on every machine, for a fault noticed a moment earlier"
                blast, mend = f"the machines of {service.app}", "set interval_ms = 5000"
            elif slow_ms > NOTICED_MS_MOST:
                problem = (
                    f"check {check.name} needs up to {slow_ms / 1000:.0f} s to notice a machine that hangs"
                )
                why = "until then it gets its share of requests"
                blast = f"the requests for {service.app} that the machine gets meanwhile"
                mend = "set interval_ms, timeout_ms and failures so that it takes 15 s or so"
            elif check.timeout_ms > check.interval_ms:
                problem = f"check {check.name} waits {check.timeout_ms} ms, longer than its interval"
                why = "a machine that answers so late has long been too slow for users"
                blast, mend = f"the slow requests of {service.app}", "set timeout_ms below interval_ms"
            if problem:
                yield Finding(NOTICE, service.app, problem, why, blast, mend)


def _compute_noticed_ms(check: CheckFacts) -> int:
    return check.failures * check.interval_ms + check.timeout_ms


def find_primary_region(snapshot: Snapshot) -> Iterator[Finding]:
    """Primary regions without machines, or with nobody who could take over; and stand-ins that never run."""
    for app in snapshot.apps:
        machines = snapshot.machines_of(app)
        for primary in sorted({service.primary_region for service in snapshot.services_of(app)} - {""}):
            inside = [machine for machine in machines if machine.region == primary]
            if machines and not inside:
                yield Finding(
                    WARNING,
                    app,
                    f"its primary region {primary} has none of its machines",
                    "writes that an app replays there have nobody to take them",
                    f"the writes of {app}",
                    _add_machine(app, primary),
                )
            elif len(inside) == 1 and len(machines) > 1:
                yield Finding(
                    WARNING,
                    app,
                    f"one machine, {inside[0].id}, is all of its primary region {primary}",
                    "reads go on elsewhere when it fails, writes that are replayed to it do not",
                    f"the writes of {app}",
                    _add_machine(app, primary),
                )
    for machine in snapshot.machines:
        asleep_ms = snapshot.now_ms - machine.since_ms
        if machine.state in {"stopped", "suspended"} and machine.since_ms and asleep_ms > ASLEEP_MS_MOST:
            yield Finding(
                NOTICE,
                f"{machine.app}/{machine.id}",
                f"it has been {machine.state} for {asleep_ms // 86_400_000} days",
                "a stand-in that never runs is one of which nobody knows whether it still does",
                f"the requests for {machine.app} that it would take over",
                f"isthmus machine start {machine.id}",
                guess=True,
            )


def find_unreachable(snapshot: Snapshot) -> Iterator[Finding]:
    """Machines of other nodes that cannot be reached from here, or through one node only."""
    single: dict[tuple[str, str], list[MachineFacts]] = {}
    for machine in snapshot.machines:
        if machine.relays is not None and len(machine.relays) == 1:
            single.setdefault((machine.region, machine.relays[0]), []).append(machine)
        elif machine.relays == ():
            yield Finding(
                CRITICAL,
                f"{machine.app}/{machine.id}",
                f"{machine.address} is an address of node {machine.node} that no other node reaches",
                f"{machine.node} takes no requests of other nodes, and its loopback is not that of others",
                f"the requests for {machine.app} that come in elsewhere and are sent there",
                f"set peering.listen on {machine.node}, or give the machine an address that others reach",
            )
    for (region, relay), machines in sorted(single.items()):
        yield Finding(
            WARNING,
            region,
            f"{count_of(len(machines), 'machine')} there can only be reached through node {relay}",
            "when that node or the way to it fails, they run on and nobody gets to them",
            f"requests from other regions for {', '.join(sorted({machine.app for machine in machines}))}",
            f"set peering.listen on another node in {region}",
        )


RULES = (
    Rule("one-place", "an app on one machine, on one node, or in one region", find_one_place),
    Rule(
        "lost-region",
        "what is left of an app when a region goes is too little for its load",
        find_lost_region,
    ),
    Rule(
        "nowhere",
        "hosts without an app, apps without machines or with none that takes requests",
        find_nowhere,
    ),
    Rule("shadowed", "paths of a name that a wildcard does not catch", find_shadowed),
    Rule("unchecked", "apps without checks, or with checks that only connect", find_unchecked),
    Rule("check-cannot-fail", "checks that pass whatever happens", find_check_that_cannot_fail),
    Rule("check-interval", "checks that are too eager, or too slow", find_check_interval),
    Rule(
        "primary-region",
        "primary regions with too few machines, stand-ins that never run",
        find_primary_region,
    ),
    Rule("unreachable", "machines that other nodes cannot reach, or through one node only", find_unreachable),
)
