"""Each rule with a snapshot that it finds something in, and one that is like it in which it does not."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec
import pytest

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
from isthmus.doctor.finding import Finding, Severity, diagnose
from isthmus.doctor.rules import RULES

DAY_MS = 86_400_000
NOW_MS = 1_000 * DAY_MS
C, W, N = Severity.CRITICAL, Severity.WARNING, Severity.NOTICE

CHECK = CheckFacts("alive", path="/healthz")


def node(name: str, region: str = "ams", **said: Any) -> NodeFacts:
    return NodeFacts(name, region, software="isthmus 1", staleness_ms=100, clock_ahead_ms=-3, **said)


def machine(name: str, owner: str, region: str, **said: Any) -> MachineFacts:
    return MachineFacts(name, said.pop("app", "web"), owner, region, "10.0.0.1:80", **said)


LOCAL = LocalFacts(
    workers=4,
    cores=4,
    files_max=1 << 20,
    connections_max=32_768,
    disk_free_bytes=50 << 30,
    disk_total_bytes=100 << 30,
    data="/data",
    is_sealed=True,
    links=("a2", "g1"),
    backup=ExerciseFacts(NOW_MS - DAY_MS, "/b.db"),
    restore=ExerciseFacts(NOW_MS - DAY_MS, "/b.db"),
)

# Two regions of two nodes each, an app with checks and two machines in each region: nothing to be said of it.
WELL = Snapshot(
    NOW_MS,
    "a1",
    "ams",
    nodes=(
        node("a1", is_self=True),
        node("a2"),
        node("g1", "gru"),
        node("g2", "gru"),
    ),
    apps=("web",),
    hosts=(HostFacts("web.test", "/", "web"),),
    services=(ServiceFacts("web", checks=(CHECK,)),),
    machines=(
        machine("m1", "a1", "ams"),
        machine("m2", "a2", "ams"),
        machine("m3", "g1", "gru"),
        machine("m4", "g2", "gru"),
    ),
    certificates=(
        CertificateFacts(
            "clients", "/c.pem", ("web.test",), NOW_MS - 30 * DAY_MS, NOW_MS + 60 * DAY_MS, "renew it"
        ),
    ),
    local=LOCAL,
)


def but(**changes: Any) -> Snapshot:
    return msgspec.structs.replace(WELL, **changes)


def locally(**changes: Any) -> Snapshot:
    return but(local=msgspec.structs.replace(LOCAL, **changes))


def machines(**changes: Any) -> tuple[MachineFacts, ...]:
    return tuple(msgspec.structs.replace(one, **changes) for one in WELL.machines)


def nodes(**changes: dict[str, Any]) -> tuple[NodeFacts, ...]:
    return tuple(msgspec.structs.replace(one, **changes.get(one.name, {})) for one in WELL.nodes)


def service(**changes: Any) -> tuple[ServiceFacts, ...]:
    return (ServiceFacts(**{"app": "web", "checks": (CHECK,), **changes}),)


def checked(**changes: Any) -> tuple[ServiceFacts, ...]:
    return service(checks=(msgspec.structs.replace(CHECK, **changes),))


def certificate(begins_days: int, expires_days: float) -> tuple[CertificateFacts, ...]:
    begins_ms, expires_ms = NOW_MS + begins_days * DAY_MS, round(NOW_MS + expires_days * DAY_MS)
    return (CertificateFacts("clients", "/c.pem", ("web.test",), begins_ms, expires_ms, "renew it"),)


class Case(NamedTuple):
    """What a rule is to say: of whom, how bad, and a word of the problem; and where it says nothing."""

    rule: str
    bad: Snapshot
    subject: str
    severity: Severity
    problem: str
    good: Snapshot = WELL


M1, M2, M3, M4 = WELL.machines
CASES = [
    # Apps
    Case("one-place", but(machines=(M1,)), "web", W, "one machine, m1"),
    Case(
        "one-place",
        but(machines=(M1, machine("m5", "a1", "gru"))),
        "web",
        W,
        "all 2 machines belong to node a1",
    ),
    Case("one-place", but(machines=(M1, M2)), "web", W, "all 2 machines are in ams", but(machines=(M1, M3))),
    Case(
        "one-place",
        but(machines=(M1, machine("m3", "g1", "gru", is_routable=False, state="stopped"))),
        "web",
        W,
        "one machine, m1",
        but(machines=(M1, machine("m3", "g1", "gru", is_routable=False, state="stopped", has_driver=True))),
    ),
    Case(
        "lost-region",
        but(services=service(soft_limit=5, hard_limit=10), machines=machines(load=6)),
        "web",
        W,
        "without ams, 2 machines would be given 24 at a time and may take 20",
        but(services=service(soft_limit=5, hard_limit=10), machines=machines(load=2)),
    ),
    Case(
        "lost-region",
        but(services=service(soft_limit=5), machines=machines(load=6)),
        "web",
        N,
        "over their soft limit: 24 of 10",
    ),
    Case("lost-region", but(machines=(M1, M2, M3)), "web", N, "without ams, one machine is left: m3"),
    Case(
        "nowhere",
        but(hosts=(HostFacts("x.test", "/a", "gone"),)),
        "x.test/a",
        C,
        "app gone, which there is not",
    ),
    Case("nowhere", but(services=()), "web.test", C, "its app web has no service"),
    Case("nowhere", but(machines=()), "web", W, "it has no machines"),
    Case("nowhere", but(machines=(), hosts=()), "web", N, "it has no machines"),
    Case(
        "nowhere",
        but(machines=machines(is_routable=False, verdict="unhealthy: alive critical")),
        "web",
        C,
        "of its 4 machines none takes requests: 4 unhealthy",
    ),
    Case(
        "nowhere",
        but(machines=machines(verdict="at hard limit")),
        "web",
        C,
        "all that it has, 4 machines, are at their hard limit",
    ),
    Case(
        "shadowed",
        but(hosts=(HostFacts("a.b.test", "/api", "web"), HostFacts("*.b.test", "/", "web"))),
        "a.b.test",
        W,
        "*.b.test does not catch the rest",
        but(hosts=(HostFacts("a.b.test", "/", "web"), HostFacts("*.b.test", "/", "web"))),
    ),
    Case(
        "shadowed",
        but(hosts=(HostFacts("*.b.test", "/api", "web"), HostFacts("*", "/", "web"))),
        "*.b.test",
        W,
        "* does not catch the rest",
        but(hosts=(HostFacts("*.b.test", "/api", "web"), HostFacts("*", "/other", "web"))),
    ),
    Case("unchecked", but(services=service(checks=())), "web", W, "it has no checks"),
    Case(
        "unchecked",
        but(services=checked(type="tcp")),
        "web",
        N,
        "its checks only connect",
        but(services=service(checks=(msgspec.structs.replace(CHECK, type="tcp"),), is_raw=True)),
    ),
    Case(
        "check-cannot-fail",
        but(services=checked(status=((200, 499),))),
        "web",
        W,
        "alive takes 404 for a pass",
    ),
    Case(
        "check-cannot-fail", but(services=checked(status=((200, 599),))), "web", W, "takes 503 and the like"
    ),
    Case(
        "check-cannot-fail",
        but(services=checked(path="/")),
        "web",
        N,
        "asks for /",
        but(services=checked(path="/", wants_body=True)),
    ),
    Case(
        "check-cannot-fail",
        but(probes=(ProbeFacts("web", "m1", "alive", "/x", passed=True, output="200 OK"),)),
        "web",
        W,
        "alive also passes at /x, which nothing serves (200 OK)",
        but(
            services=checked(path="/"),
            probes=(ProbeFacts("web", "m1", "alive", "/x", passed=False, output="404"),),
        ),
    ),
    Case("check-interval", but(services=checked(interval_ms=200)), "web", N, "every 200 ms"),
    Case("check-interval", but(services=checked(interval_ms=60_000)), "web", N, "up to 122 s"),
    Case(
        "check-interval",
        but(services=checked(interval_ms=3_000, timeout_ms=9_000)),
        "web",
        N,
        "waits 9000 ms",
    ),
    Case(
        "primary-region",
        but(services=service(primary_region="syd")),
        "web",
        W,
        "primary region syd has none",
        but(services=service(primary_region="ams")),
    ),
    Case(
        "primary-region",
        but(services=service(primary_region="gru"), machines=(M1, M2, M3)),
        "web",
        W,
        "one machine, m3, is all of its primary region gru",
    ),
    Case(
        "primary-region",
        but(
            machines=(
                *WELL.machines,
                machine("m5", "a1", "ams", state="stopped", since_ms=NOW_MS - 45 * DAY_MS),
            )
        ),
        "web/m5",
        N,
        "stopped for 45 days",
        but(
            machines=(
                *WELL.machines,
                machine("m5", "a1", "ams", state="stopped", since_ms=NOW_MS - 2 * DAY_MS),
            )
        ),
    ),
    Case(
        "unreachable",
        but(machines=(M1, msgspec.structs.replace(M3, relays=()))),
        "web/m3",
        C,
        "that no other node reaches",
        but(machines=(M1, msgspec.structs.replace(M3, relays=("g1", "g2")))),
    ),
    Case(
        "unreachable",
        but(
            machines=(
                M1,
                msgspec.structs.replace(M3, relays=("g1",)),
                msgspec.structs.replace(M4, relays=("g1",)),
            )
        ),
        "gru",
        W,
        "2 machines there can only be reached through node g1",
    ),
    # Nodes
    Case("few-nodes", but(nodes=(node("a1", is_self=True),)), "cluster", N, "a1 is its only node"),
    Case("few-nodes", but(nodes=WELL.nodes[:2]), "cluster", N, "all 2 nodes are in ams"),
    Case("few-nodes", but(nodes=WELL.nodes[:3]), "gru", N, "g1 is its only node", but(nodes=WELL.nodes)),
    Case("gone-nodes", but(nodes=nodes(g2={"state": "dead"})), "g2", W, "it is dead and owns 1 machine"),
    Case("gone-nodes", but(nodes=WELL.nodes[:3]), "g2", W, "it is unknown and owns 1 machine"),
    Case(
        "namesakes",
        but(nodes=nodes(g1={"addresses": ("10.0.0.1:1", "10.0.0.2:1")})),
        "g1",
        C,
        "2 nodes have this name: 10.0.0.1:1, 10.0.0.2:1",
        but(nodes=nodes(g1={"addresses": ("10.0.0.1:1",)})),
    ),
    Case("stale-nodes", but(nodes=nodes(g1={"staleness_ms": 40_000})), "g1", W, "in the last 40 s"),
    Case(
        "stale-nodes",
        but(nodes=nodes(g1={"staleness_ms": 600_000})),
        "g1",
        C,
        "in the last 600 s",
        but(nodes=nodes(g1={"staleness_ms": None}, g2={"staleness_ms": 900_000, "state": "left"})),
    ),
    Case(
        "skewed-clocks",
        but(nodes=nodes(g1={"clock_ahead_ms": 900}, g2={"clock_ahead_ms": 850})),
        "g1",
        W,
        "0.9 s ahead",
        but(nodes=nodes(g1={"clock_ahead_ms": 200}, a1={"clock_ahead_ms": None})),
    ),
    Case("skewed-clocks", but(nodes=nodes(g2={"clock_ahead_ms": 60_000})), "g2", C, "60.0 s ahead"),
    Case(
        "skewed-clocks",
        but(
            nodes=nodes(
                a1={"clock_ahead_ms": None},
                **{name: {"clock_ahead_ms": 2_000} for name in ("a2", "g1", "g2")},
            )
        ),
        "a1",
        W,
        "2.0 s behind",
    ),
    Case(
        "versions",
        but(nodes=nodes(g2={"software": "isthmus 2"})),
        "g2",
        W,
        "isthmus 2, where 3 nodes run isthmus 1",
    ),
    Case("links", locally(links=("a2",)), "a1", W, "through a2 alone", locally(links=None)),
    Case("links", locally(links=()), "a1", C, "from nobody", but(local=LOCAL, nodes=WELL.nodes[:2])),
    Case(
        "unsealed",
        locally(is_sealed=False, gossip_host="10.0.0.1"),
        "a1",
        C,
        "goes to 10.0.0.1",
        locally(is_sealed=False, gossip_host="::1"),
    ),
    Case(
        "expiring",
        but(certificates=certificate(-80, 10)),
        "web.test",
        W,
        "expires in 10.0 days",
        but(certificates=certificate(-1, 6)),  # of a week: it is renewed when two days are left
    ),
    Case("expiring", but(certificates=certificate(-80, -1)), "web.test", C, "expired 1.0 days ago"),
    Case("expiring", but(certificates=certificate(-88, 2)), "web.test", C, "expires in 2.0 days"),
    Case("backups", locally(backup=None), "a1", N, "no backup was made"),
    Case("backups", locally(backup=ExerciseFacts(NOW_MS - 9 * DAY_MS)), "a1", W, "is 9 days old"),
    Case(
        "backups",
        locally(restore=None),
        "a1",
        W,
        "no backup was ever put back",
        but(apps=(), machines=(), local=LocalFacts()),
    ),
    Case("backups", locally(restore=ExerciseFacts(NOW_MS - 100 * DAY_MS)), "a1", N, "100 days ago"),
    Case("local-trouble", locally(read_only="disk full"), "a1", C, "takes no writes: disk full"),
    Case("local-trouble", locally(site_conflict="copy"), "a1", C, "copy writes as the same site"),
    Case("local-trouble", locally(schema_problem="x"), "a1", W, "altered behind its back: x"),
    Case("local-trouble", locally(reload_problem="x"), "a1", W, "configuration was refused: x"),
    Case("local-trouble", locally(credentials_problem="x"), "a1", W, "certificates were refused: x"),
    Case("local-trouble", locally(parked=2), "a1", W, "2 changesets could not be applied"),
    Case(
        "quarantined",
        locally(staged=(StagedFacts("a:1", "quarantined", ("apps web",)), StagedFacts("a:2", "waiting"))),
        "apps web",
        W,
        "a change of it is quarantined",
        locally(staged=(StagedFacts("a:1", "trying", ("apps web",)),)),
    ),
    Case("quarantined", locally(staged=(StagedFacts("a:1", "suspect"),)), "a:1", N, "a worker died"),
    Case(
        "unusable-rows",
        but(rejected=(RejectedFacts("machines", "m9", "no address"),)),
        "machines m9",
        W,
        "cannot use the row: no address",
    ),
    Case(
        "behind",
        but(behind=(BehindFacts("3-x", "config", "b1", "the port is taken"),)),
        "b1",
        W,
        "the settings of rollout 3-x: the port is taken",
    ),
    Case("behind", but(behind=(BehindFacts("3-x", "schema", "b1"),)), "b1", W, "the tables of rollout 3-x: "),
    Case("resources", locally(disk_free_bytes=5 << 30), "a1", W, "5.0 GiB are free"),
    Case(
        "resources",
        locally(disk_free_bytes=100 << 20),
        "a1",
        C,
        "0.1 GiB are free",
        locally(disk_free_bytes=None),
    ),
    Case("resources", locally(files_max=1_024), "a1", N, "may open 1024 files", locally(files_max=None)),
    Case(
        "resources", locally(workers=1, cores=8), "a1", N, "1 worker on 8 cores", locally(workers=1, cores=2)
    ),
]


def find(snapshot: Snapshot, rule: str) -> list[Finding]:
    return [one.finding for one in diagnose(snapshot, RULES) if one.rule == rule]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.rule}: {case.problem}")
def test_rule_finds_what_is_wrong_and_nothing_where_it_is_not(case: Case) -> None:
    found = find(case.bad, case.rule)
    told = [(one.subject, one.severity) for one in found if case.problem in one.problem]
    assert told == [(case.subject, case.severity)], found
    assert find(case.good, case.rule) == []


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.rule}: {case.problem}")
def test_a_finding_says_why_what_is_hit_and_what_mends_it(case: Case) -> None:
    for one in find(case.bad, case.rule):
        for text in (one.subject, one.problem, one.why, one.blast, one.mend):
            assert text, one
            assert "{" not in text, one  # a text that was to be filled in


def test_every_rule_is_tried() -> None:
    assert {rule.name for rule in RULES} == {case.rule for case in CASES}


def test_names_of_rules_are_unique() -> None:
    assert len({rule.name for rule in RULES}) == len(RULES)


def test_of_a_cluster_that_is_well_nothing_is_said() -> None:
    assert diagnose(WELL, RULES) == []


def test_of_what_is_not_known_nothing_is_said() -> None:
    assert diagnose(Snapshot(NOW_MS, "a1"), RULES) == []
    assert diagnose(but(local=None, certificates=(), hosts=()), RULES) == []


def test_the_worst_comes_first() -> None:
    snapshot = but(
        services=service(checks=()), local=msgspec.structs.replace(LOCAL, read_only="full", workers=1)
    )
    severities = [one.finding.severity for one in diagnose(snapshot, RULES)]
    assert severities == [C, W, N]


def test_a_snapshot_survives_the_way_over_the_api() -> None:
    for case in CASES:
        assert msgspec.convert(msgspec.json.decode(msgspec.json.encode(case.bad)), Snapshot) == case.bad


def test_machines_that_fail_their_checks_are_not_mended_by_a_start() -> None:
    for verdict, mend in (("unhealthy: alive critical", "isthmus checks"), ("not started", "machine start")):
        (found,) = find(but(machines=machines(is_routable=False, verdict=verdict)), "nowhere")
        assert mend in found.mend


def test_what_a_driver_can_start_is_mended_by_scaling() -> None:
    (found,) = find(but(machines=(M1,)), "one-place")
    assert found.mend == "isthmus machine add web HOST:PORT --region gru"
    (found,) = find(but(machines=(msgspec.structs.replace(M1, has_driver=True),)), "one-place")
    assert found.mend == "isthmus scale count 2 --app web --region ams,gru"
