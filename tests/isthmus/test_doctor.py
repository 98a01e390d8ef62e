"""Where a doctor's facts are from, what checks say of nonsense, and how findings are told."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from aiohttp import ClientSession

from isthmus.agent_role import AgentRole
from isthmus.checking.probe import Outcome
from isthmus.cli import main
from isthmus.commands import doctor
from isthmus.config import AdminConfig, Config, GossipConfig, TlsConfig
from isthmus.doctor.facts import (
    BehindFacts,
    LocalFacts,
    NodeFacts,
    ProbeFacts,
    ServiceFacts,
    Snapshot,
    StagedFacts,
)
from isthmus.doctor.gather import PROBE_MS_MAX, PROBES_MAX, gather, probe, read_certificates
from isthmus.exercises import Exercise, note_exercise
from isthmus.reloading import Lifecycle
from replication.report import MemberView
from tests.fakes.certificates import Authority
from tests.isthmus.waiting import eventually
from tests.routing.rows import put, row, table_with

if TYPE_CHECKING:
    from pathlib import Path

    from isthmus.checking.definition import Definition
    from routing.table import RoutingTable

CHANGE = {
    "id": "a:1",
    "state": "quarantined",
    "rows": [{"table": "services", "key": ["web", 0], "change": "update"}],
}
STAGED = {"changes": [CHANGE]}
ROLLOUTS = {"behind": [{"id": "3-x", "kind": "config", "node": "n2", "detail": "why"}]}
PEERING = '{"address": "10.0.0.2:7000", "machines": "node"}'


class FakeCluster:
    """Membership and a status as the replication agent tells them."""

    def __init__(self, *members: MemberView, **status: Any) -> None:
        self._members = members
        self._status = {
            "peers": {"eager": ["02" * 16], "lazy": ["02" * 16, "07" * 16]},
            "site_conflict": None,
            "read_only": None,
            "schema_problem": None,
            "parked": 0,
            **status,
        }

    def members(self) -> tuple[MemberView, ...]:
        return self._members

    def status(self) -> dict[str, Any]:
        return self._status


def member(name: str, number: int, host: str = "10.0.0.9", state: str = "alive", **said: Any) -> MemberView:
    site = f"{number:02}" * 16
    return MemberView(name, site, (host, 1), state, 1, None, 5.0, is_self=number == 1, **said)


CLUSTER = FakeCluster(member("n1", 1), member("n2", 2, staleness_ms=400, clock_ahead_ms=7))


def gathered(
    table: RoutingTable, cluster: FakeCluster = CLUSTER, data: str = "/nowhere", **said: Any
) -> Snapshot:
    config = Config(node="n1", region="ams", data=data, **said)
    return asyncio.run(
        gather(config, table, cluster, Lifecycle(), "", (), STAGED, ROLLOUTS, now=5.0, now_ms=1_000)
    )


# Facts


def test_nodes_are_told_with_what_membership_and_replication_know_of_them() -> None:
    table = table_with(row("nodes", software="isthmus 1"), row("nodes", id="n3", region="gru"))
    one, two, three = gathered(table).nodes
    assert (one.name, one.region, one.is_self, one.software) == ("n1", "ams", True, "isthmus 1")
    assert (two.name, two.region, two.staleness_ms, two.clock_ahead_ms) == ("n2", "", 400, 7)
    assert (three.name, three.state, three.is_present) == ("n3", "unknown", False)


def test_of_two_members_of_a_name_the_one_that_is_there_is_told() -> None:
    for members in (
        (member("n2", 2, state="left"), member("n2", 3)),
        (member("n2", 3), member("n2", 2, state="left")),
    ):
        (two,) = (node for node in gathered(table_with(), FakeCluster(*members)).nodes if node.name == "n2")
        assert two.state == "alive"
        assert two.addresses == ("10.0.0.9:1",)


def test_of_two_that_are_there_under_one_name_both_addresses_are_told() -> None:
    cluster = FakeCluster(member("n1", 1), member("n1", 2, "10.0.0.8"))
    (one,) = gathered(table_with(), cluster).nodes
    assert one.addresses == ("10.0.0.8:1", "10.0.0.9:1")


def test_machines_are_told_with_what_routing_makes_of_them() -> None:
    table = table_with(
        row("machines", since_ms=7, driver="process"),
        row("machines", id="m2", state="stopped"),
        row("machines", id="m3", app="orphan"),
        row("loads", in_flight=4),
    )
    for _ in range(300):
        table.follow_loads()
    told = {machine.id: machine for machine in gathered(table).machines}
    assert (told["m1"].is_routable, told["m1"].load, told["m1"].has_driver, told["m1"].since_ms) == (
        True,
        4,
        True,
        7,
    )
    assert (told["m2"].is_routable, told["m2"].verdict) == (False, "not started")
    assert (told["m3"].is_routable, told["m3"].verdict) == (False, "its app has no service")


def test_machine_at_its_hard_limit_still_counts_as_one_that_takes_requests() -> None:
    table = table_with(row("machines"), row("services", hard_limit=1), row("loads", in_flight=4))
    (full,) = gathered(table).machines
    assert (full.is_routable, full.verdict) == (True, "at hard limit")


def test_how_machines_of_other_nodes_are_reached_is_told() -> None:
    table = table_with(
        row("nodes", id="n2", peering=PEERING),
        row("machines", id="own", address="127.0.0.1:80"),
        row("machines", id="through", node="n2"),
        row("machines", id="lost", node="n3", address="127.0.0.1:80"),
        row("machines", id="direct", node="n3"),
        row("machines", id="same-host", node="n4", address="127.0.0.1:80"),
    )
    cluster = FakeCluster(member("n3", 3), member("n4", 4, host="127.0.0.1"))
    relays = {machine.id: machine.relays for machine in gathered(table, cluster).machines}
    assert relays == {"own": None, "through": ("n2",), "lost": (), "direct": None, "same-host": None}


def test_services_are_told_with_their_checks() -> None:
    checks = (
        '[{"path": "/up", "status": ["200-204", 301]}, {"type": "tcp", "name": "port", "interval_ms": 900}]'
    )
    table = table_with(row("services", checks=checks, options='{"primary_region": "ams", "handlers": []}'))
    (service,) = gathered(table).services
    assert [(one.name, one.path, one.status) for one in service.checks] == [
        ("http-0", "/up", ((200, 204), (301, 301))),
        ("port", "/", ((200, 299),)),
    ]
    assert (service.is_raw, service.primary_region, service.checks[1].interval_ms) == (True, "ams", 900)
    (service,) = gathered(table_with(row("services", checks="nonsense"))).services
    assert service.checks == ()


def test_the_node_tells_of_itself(tmp_path: Path) -> None:
    note_exercise(tmp_path, "backup", Exercise(500, "/b.db"))
    status = {"read_only": "disk full", "parked": 3, "site_conflict": {"name": "n9"}}
    cluster = FakeCluster(member("n1", 1), member("n2", 2), **status)
    local = gathered(table_with(), cluster, str(tmp_path), workers=3).local
    assert local is not None
    assert (local.workers, local.read_only, local.parked, local.site_conflict) == (3, "disk full", 3, "n9")
    assert local.staged == (StagedFacts("a:1", "quarantined", ("services web, 0",)),)
    assert gathered(table_with()).behind == (BehindFacts("3-x", "config", "n2", "why"),)
    assert local.links == ("07" * 16, "n2")
    assert local.backup is not None
    assert (local.backup.at_ms, local.restore) == (500, None)
    assert local.disk_total_bytes
    away = gathered(table_with()).local
    assert away is not None
    assert (away.disk_total_bytes, away.backup) == (None, None)


def test_certificates_are_read_as_far_as_they_can_be(tmp_path: Path) -> None:
    files = Authority(tmp_path).issue("n1", days=9)
    (tmp_path / "broken.pem").write_bytes(b"nonsense")
    config = Config(
        node="n1",
        data="/nowhere",
        tls=TlsConfig(
            listen="127.0.0.1:1",
            certificates=(
                f"{files.cert}:{files.key}",
                str(tmp_path / "broken.pem"),
                str(tmp_path / "away.pem"),
            ),
        ),
        gossip=GossipConfig(tls_cert=str(files.cert), tls_key=str(files.key), tls_ca=str(files.ca)),
    )
    found = list(read_certificates(config))
    uses = ["clients", "other nodes", "other nodes, the authority"]
    assert [(one.use, one.names) for one in found] == list(
        zip(uses, (("n1",), ("n1",), ("authority",)), strict=True)
    )
    left_days = (found[0].expires_ms / 1000 - dt.datetime.now(dt.UTC).timestamp()) / 86_400
    assert 7 < left_days < 10
    assert found[0].begins_ms < found[0].expires_ms
    tls = {"ca": files.ca.read_text("utf-8")}
    table = table_with(row("services", options=json.dumps({"machine_tls": tls})))
    assert [one.use for one in gathered(table).certificates] == ["machines of web, the authority"]


# Probes


class FakeProber:
    """Records what it is to ask, and passes for those of one machine."""

    def __init__(self) -> None:
        self.asked: list[Definition] = []

    async def probe(self, definition: Definition) -> Outcome:
        self.asked.append(definition)
        return Outcome(definition.machine == "m1", "200 OK")


def with_checks(check: str, *machines: str) -> RoutingTable:
    table = table_with(row("services", checks=f"[{check}]"))
    for machine in machines:
        put(table, "machines", id=machine)
        put(table, "checks", machine=machine, name="up")
    return table


async def test_each_check_that_passes_is_asked_once_for_what_nothing_serves() -> None:
    table = with_checks(
        '{"name": "up", "path": "/up", "timeout_ms": 60000, "headers": {"X-A": "/up"}}', "m1", "m2"
    )
    prober = FakeProber()
    (told,) = await probe(table, prober, "n1")
    (asked,) = prober.asked
    assert (told.app, told.machine, told.check, told.passed, told.output) == (
        "web",
        "m1",
        "up",
        True,
        "200 OK",
    )
    assert told.path.startswith("/isthmus-doctor-")
    line, _, rest = asked.request.partition(b"\r\n")
    assert line == f"GET {told.path} HTTP/1.1".encode()
    assert b"X-A: /up\r\n" in rest
    assert asked.check.timeout_ms == PROBE_MS_MAX


async def test_machines_of_others_checks_that_fail_and_those_of_tcp_are_not_asked() -> None:
    prober = FakeProber()
    table = with_checks('{"name": "up", "path": "/up"}', "m1")
    assert await probe(table, prober, "n2") == []
    put(table, "checks", machine="m1", name="up", status="critical")
    assert await probe(table, prober, "n1") == []
    assert await probe(with_checks('{"name": "up", "type": "tcp"}', "m1"), prober, "n1") == []
    assert await probe(with_checks("nonsense", "m1"), prober, "n1") == []
    assert prober.asked == []


async def test_no_more_than_a_bounded_number_is_asked() -> None:
    table = table_with()
    for number in range(PROBES_MAX + 5):
        app, machine = f"a{number}", f"m{number}"
        put(table, "apps", name=app)
        put(table, "services", app=app, checks='[{"name": "up"}]')
        put(table, "machines", id=machine, app=app)
        put(table, "checks", machine=machine, name="up")
    assert len(await probe(table, FakeProber(), "n1")) == PROBES_MAX


# Over the admin API


async def test_a_node_tells_its_facts_and_tries_its_checks(tmp_path: Path) -> None:
    config = Config(
        node="n1",
        region="ams",
        data=str(tmp_path),
        admin=AdminConfig(listen="127.0.0.1:0"),
        gossip=GossipConfig(listen="127.0.0.1:0"),
    )
    role = AgentRole(config)
    addresses = await role.start()
    try:
        async with ClientSession() as session:

            async def has_itself() -> Any:
                async with session.get(f"http://{addresses['admin']}/v1/facts") as answer:
                    told = msgspec.json.decode(await answer.read(), type=Snapshot)
                return told if told.nodes and told.nodes[0].region else None

            told = await eventually("own row is in the table", has_itself)
            async with session.post(f"http://{addresses['admin']}/v1/facts/probe") as answer:
                assert await answer.json() == []
    finally:
        await role.stop()
    assert [(node.name, node.region, node.is_self) for node in told.nodes] == [("n1", "ams", True)]
    assert told.local is not None
    assert (told.local.links, told.local.data) == ((), str(tmp_path))


# The command

WELL = Snapshot(1_000, "n1", local=LocalFacts())
BARE = Snapshot(
    1_000, "n1", apps=("web",), services=(ServiceFacts("web"),), nodes=(NodeFacts("n1", is_self=True),)
)


class FakeNode:
    """Tells these facts."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.probes = (ProbeFacts("web", "m1", "up", "/x", passed=True, output="200"),)

    def get(self, path: str, wait_s: float) -> Any:
        assert path == "/v1/facts"
        assert wait_s > 0
        return msgspec.to_builtins(self.snapshot)

    def post(self, path: str, wait_s: float) -> Any:
        assert path == "/v1/facts/probe"
        assert wait_s > 0
        return msgspec.to_builtins(self.probes)


def run(monkeypatch: pytest.MonkeyPatch, snapshot: Snapshot, *args: str) -> int:
    monkeypatch.setattr(doctor, "make_client", lambda _args: FakeNode(snapshot))
    return main(["doctor", *args])


@pytest.mark.parametrize(
    ("snapshot", "args", "expected"),
    [
        (WELL, (), 0),
        (BARE, (), 0),  # notices: it has no machines, and the cluster no second node
        (BARE, ("--fail-on", "notice"), 1),
        (BARE, ("--probe",), 1),  # a check that cannot fail is a warning
        (BARE, ("--probe", "--fail-on", "critical"), 0),
        (BARE, ("--probe", "--fail-on", "never"), 0),
        (BARE, ("--probe", "--ignore", "check-cannot-fail"), 0),
        (BARE, ("--probe", "--ignore", "check-cannot-fail:web"), 0),
        (BARE, ("--probe", "--ignore", "check-cannot-fail:other"), 1),
        (BARE, ("--ignore", "chekc"), 1),
    ],
)
def test_exit_code_says_whether_anything_is_bad_enough(
    monkeypatch: pytest.MonkeyPatch, snapshot: Snapshot, args: tuple[str, ...], expected: int
) -> None:
    assert run(monkeypatch, snapshot, *args) == expected


def test_findings_as_json_name_rule_and_severity(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, BARE, "--json", "--probe")
    told = json.loads(capsys.readouterr().out)
    first = told["findings"][0]
    assert (told["node"], first["rule"], first["severity"], first["subject"]) == (
        "n1",
        "check-cannot-fail",
        "warning",
        "web",
    )
    assert {"problem", "why", "blast", "mend", "guess"} <= first.keys()


def test_findings_are_told_in_lines_that_drive_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    snapshot = msgspec.structs.replace(BARE, apps=("web\x1b[2J",), services=(), probes=None)
    assert run(monkeypatch, snapshot) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text
    for said in (
        "NOTICE",
        "it has no machines",
        "  why ",
        "  hits ",
        "  mend ",
        "--probe",
        "found: 2 notice",
    ):
        assert said in text, text


def test_of_a_cluster_that_is_well_that_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, WELL)
    assert "found: nothing" in capsys.readouterr().out


def test_facts_of_another_version_are_told_apart_from_trouble(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class OtherNode(FakeNode):
        def get(self, path: str, wait_s: float) -> Any:
            return {"node": 5}

    monkeypatch.setattr(doctor, "make_client", lambda _args: OtherNode(WELL))
    assert main(["doctor"]) == 1
    assert "another version" in capsys.readouterr().err
