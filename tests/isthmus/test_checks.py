from __future__ import annotations

import asyncio
import json
import random
import sqlite3
import ssl
import time
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from isthmus.checking.checker import Checker
from isthmus.checking.probe import OUTPUT_CHARS_MAX, Prober
from isthmus.checking.watchers import GONE_AFTER_S, Presence
from proxy.reach import Reach
from tests.fakes.machine import FakeMachine
from tests.fakes.site_certificates import SiteAuthority
from tests.fakes.table import TableDatabase
from tests.isthmus.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

FAST = {"interval_ms": 100}


class Machine:
    """Answers every request as it is told to, and records the requests. `answer` None: never."""

    def __init__(self) -> None:
        self.answer: bytes | None = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
        self.requests: list[bytes] = []
        self.connections = 0
        self.abandoned = 0
        self.address = ""
        self._server: asyncio.Server | None = None

    async def start(self, host: str = "127.0.0.1") -> None:
        port = int(self.address.rsplit(":", 1)[1]) if self.address else 0
        self._server = await asyncio.start_server(self._serve, host, port)
        bound = self._server.sockets[0].getsockname()
        self.address = f"[{bound[0]}]:{bound[1]}" if ":" in host else f"{bound[0]}:{bound[1]}"

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()
            self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            self.requests.append(await reader.readuntil(b"\r\n\r\n"))
            if self.answer is None:
                await reader.read()
                self.abandoned += 1
            else:
                writer.write(self.answer)
                await writer.drain()
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            writer.close()


@pytest.fixture
async def machine() -> AsyncIterator[Machine]:
    machine = Machine()
    await machine.start()
    yield machine
    await machine.stop()


@pytest.fixture
def database() -> Iterator[TableDatabase]:
    database = TableDatabase()
    yield database
    database.close()


@asynccontextmanager
async def checking(
    database: TableDatabase, members: dict[str, str] | None = None, node: str = "n1"
) -> AsyncIterator[Checker]:
    """Run the checks of a node that sees these members, long after it started."""
    seen = members if members is not None else {node: "ams"}
    reach = Reach((), "")
    await reach.open(())
    now = asyncio.get_running_loop().time()
    checker = Checker(
        database.table,
        database,
        Prober(reach),
        Presence(node, "ams", now - GONE_AFTER_S),
        lambda: seen,
        node=node,
        rng=random.Random(1),
        clock_ms=lambda: time.time_ns() // 1_000_000,
    )
    database.on_commit = checker.handle_commit
    await checker.start()
    try:
        yield checker
    finally:
        await checker.stop()


def put(database: TableDatabase, address: str, *checks: dict[str, Any], **columns: Any) -> None:
    database.put("services", app="web", checks=json.dumps(checks))
    database.put(
        "machines", **{"id": "m1", "app": "web", "node": "n1", "region": "ams", "address": address, **columns}
    )


def results(database: TableDatabase) -> list[tuple[str, str, str]]:
    return database.rows("SELECT machine, name, status FROM checks ORDER BY 1, 2")


def output(database: TableDatabase) -> str:
    ((text,),) = database.rows("SELECT output FROM checks")
    return str(text)


def running(checker: Checker) -> dict[str, float]:
    """How many checks run, by status."""
    return {
        labels[0][1]: value
        for name, labels, value in checker.samples()
        if name == "isthmus_checks_running" and value
    }


async def settle(database: TableDatabase, *expected: tuple[str, str, str]) -> None:
    await eventually(f"checks are {expected}", lambda: results(database) == list(expected))


async def test_machine_that_answers_is_passing(database: TableDatabase, machine: Machine) -> None:
    put(database, machine.address, {**FAST, "path": "/up?x=1"})
    async with checking(database) as checker:
        await settle(database, ("m1", "http-0", "passing"))
        assert output(database) == "200 OK"
        assert machine.requests[0].startswith(b"GET /up?x=1 HTTP/1.1\r\n")
        assert b"User-Agent: isthmus-check\r\n" in machine.requests[0]
        assert running(checker) == {"passing": 1.0}
        ((node, updated_ms),) = database.rows("SELECT node, updated_ms FROM checks")
        assert node == "n1"
        assert updated_ms > 1_500_000_000_000


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS"])
async def test_method_is_the_one_of_the_check(database: TableDatabase, machine: Machine, method: str) -> None:
    put(database, machine.address, {**FAST, "method": method})
    async with checking(database):
        await settle(database, ("m1", "http-0", "passing"))
    assert machine.requests[0].startswith(method.encode())


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b"HTTP/1.1 503 Out to lunch\r\nContent-Length: 0\r\n\r\n", "503 Out to lunch"),
        (b"HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n", "302 Found"),
        (b"HTTP/1.1 404 \r\nContent-Length: 0\r\n\r\n", "404"),
        (b"HTTP/1.1 500 " + b"x" * 5_000 + b"\r\nContent-Length: 0\r\n\r\n", "500 xxx"),
        (b"SSH-2.0-OpenSSH\r\n", ""),
        (b"", ""),
    ],
)
async def test_other_answers_are_critical_and_redirects_are_not_followed(
    database: TableDatabase, machine: Machine, answer: bytes, told: str
) -> None:
    machine.answer = answer
    put(database, machine.address, FAST)
    async with checking(database):
        await settle(database, ("m1", "http-0", "critical"))
    assert output(database).startswith(told)
    assert 0 < len(output(database)) <= OUTPUT_CHARS_MAX
    assert {request.split(b" ")[1] for request in machine.requests} == {b"/"}


async def test_machine_that_is_silent_is_critical(database: TableDatabase, machine: Machine) -> None:
    machine.answer = None
    put(database, machine.address, {**FAST, "timeout_ms": 30})
    async with checking(database):
        await settle(database, ("m1", "http-0", "critical"))
    assert output(database) == "no answer within 30 ms"


async def test_machine_that_refuses_connections_is_critical_until_it_is_back(
    database: TableDatabase, machine: Machine
) -> None:
    await machine.stop()
    put(database, machine.address, FAST, {**FAST, "type": "tcp", "name": "port"})
    async with checking(database):
        await settle(database, ("m1", "http-0", "critical"), ("m1", "port", "critical"))
        await machine.start()
        await settle(database, ("m1", "http-0", "passing"), ("m1", "port", "passing"))


async def test_open_port_is_enough_for_a_tcp_check(database: TableDatabase, machine: Machine) -> None:
    put(database, machine.address, {**FAST, "type": "tcp"})
    async with checking(database):
        await settle(database, ("m1", "tcp-0", "passing"))
    assert machine.requests == []


async def test_steady_machine_is_written_once(database: TableDatabase, machine: Machine) -> None:
    put(database, machine.address, FAST)
    async with checking(database) as checker:
        await eventually("four probes", lambda: machine.connections >= 4)
        samples = {
            labels: value for name, labels, value in checker.samples() if name == "isthmus_checks_total"
        }
    assert samples[("status", "passing"),] >= 3
    assert len(database.transactions) == 1


async def test_every_probe_makes_a_connection_of_its_own(database: TableDatabase, machine: Machine) -> None:
    put(database, machine.address, FAST)
    async with checking(database):
        await eventually("three probes", lambda: len(machine.requests) >= 3)
    assert machine.connections >= 3


async def test_machines_of_ipv6_are_probed(database: TableDatabase) -> None:
    machine = Machine()
    try:
        await machine.start("::1")
    except OSError:
        pytest.skip("this machine has no IPv6")
    try:
        put(database, machine.address, FAST)
        async with checking(database):
            await settle(database, ("m1", "http-0", "passing"))
    finally:
        await machine.stop()


async def test_address_without_a_port_is_probed_at_the_port_of_its_service(
    database: TableDatabase, machine: Machine
) -> None:
    host, port = machine.address.split(":")
    put(database, host, FAST)
    database.put("services", app="web", checks=json.dumps([FAST]), internal_port=int(port))
    async with checking(database):
        await settle(database, ("m1", "http-0", "passing"))


async def test_only_started_machines_of_this_node_are_probed(
    database: TableDatabase, machine: Machine
) -> None:
    put(database, machine.address, FAST)
    put(database, machine.address, FAST, id="m2", node="n2")
    put(database, machine.address, FAST, id="m3", state="stopped")
    async with checking(database, {"n1": "ams", "n2": "ams"}):
        await settle(database, ("m1", "http-0", "passing"))


async def test_what_is_probed_follows_the_table(database: TableDatabase, machine: Machine) -> None:
    async with checking(database) as checker:
        put(database, machine.address, FAST)
        await settle(database, ("m1", "http-0", "passing"))

        put(database, machine.address, {**FAST, "name": "a"}, {**FAST, "name": "b"})
        await settle(database, ("m1", "a", "passing"), ("m1", "b", "passing"))

        put(database, machine.address, state="stopped")
        await settle(database)
        assert running(checker) == {}


async def test_results_that_an_earlier_life_left_are_removed_and_those_of_others_stay(
    database: TableDatabase, machine: Machine
) -> None:
    database.put("checks", machine="gone", name="c", node="n1", status="critical")
    database.put("checks", machine="m9", name="c", node="n2", status="critical")
    put(database, machine.address, FAST)
    async with checking(database):
        await settle(database, ("m1", "http-0", "passing"), ("m9", "c", "critical"))


@pytest.mark.parametrize(
    ("address", "checks"),
    [
        ("nowhere", "[{}]"),
        ("127.0.0.1", "[{}]"),
        (None, "[{"),
        (None, '[{"type": "ping"}]'),
        (None, '[{"interval_ms": 0}]'),
        (None, "{}"),
    ],
)
async def test_check_that_cannot_be_read_does_not_stop_the_others(
    database: TableDatabase, machine: Machine, address: Any, checks: Any, caplog: pytest.LogCaptureFixture
) -> None:
    put(database, machine.address, FAST)
    database.put("machines", id="bad", app="bad", node="n1", region="ams", address=address or machine.address)
    database.put("services", app="bad", checks=checks)
    async with checking(database):
        await settle(database, ("m1", "http-0", "passing"))
    assert [record.machine for record in caplog.records if record.msg == "a check cannot be read"] == ["bad"]


async def test_two_checks_of_one_name_do_not_fight_over_their_result(
    database: TableDatabase, machine: Machine
) -> None:
    put(database, machine.address, {**FAST, "name": "up"}, {**FAST, "name": "up", "type": "tcp"})
    async with checking(database) as checker:
        await settle(database, ("m1", "up", "passing"))
        assert running(checker) == {"passing": 1.0}


async def test_result_that_could_not_be_written_is_written_next_time(
    database: TableDatabase, machine: Machine
) -> None:
    put(database, machine.address, FAST)
    async with checking(database):
        await settle(database, ("m1", "http-0", "passing"))
        machine.answer = b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n"
        database.failures = [sqlite3.OperationalError("disk full")]
        await settle(database, ("m1", "http-0", "critical"))
        assert database.failures == []


async def test_grace_holds_the_first_probe_back(database: TableDatabase, machine: Machine) -> None:
    put(database, machine.address, {**FAST, "grace_ms": 60_000}, {**FAST, "name": "now"})
    async with checking(database):
        await eventually("two probes", lambda: machine.connections >= 2)
        assert results(database) == [("m1", "now", "passing")]


async def test_stop_ends_probes_that_wait_for_an_answer(database: TableDatabase, machine: Machine) -> None:
    machine.answer = None
    put(database, machine.address, {**FAST, "timeout_ms": 60_000})
    async with checking(database):
        await eventually("a probe waits", lambda: machine.requests)
    assert results(database) == []
    await eventually("the probe is cut", lambda: machine.abandoned == 1)


async def test_expected_status_headers_and_text_are_those_of_the_check(
    database: TableDatabase, machine: Machine
) -> None:
    machine.answer = b"HTTP/1.1 301 Moved\r\nContent-Length: 8\r\n\r\nall well"
    asked = {**FAST, "status": [200, "301-302"], "headers": {"Host": "a.test", "X-Forwarded-Proto": "https"}}
    put(
        database,
        machine.address,
        {**asked, "body": "well", "name": "a"},
        {**asked, "body": "ill", "name": "b"},
    )
    async with checking(database):
        await settle(database, ("m1", "a", "passing"), ("m1", "b", "critical"))
    head = machine.requests[0]
    assert (head.count(b"Host:"), b"\r\nHost: a.test\r\n" in head) == (1, True)
    assert b"\r\nX-Forwarded-Proto: https\r\n" in head
    assert database.rows("SELECT output FROM checks WHERE name = 'b'") == [
        ("301 Moved without `ill`: all well",)
    ]


async def test_a_piece_of_the_answer_is_kept_when_it_fails_and_nothing_in_it_drives_a_terminal(
    database: TableDatabase, machine: Machine
) -> None:
    machine.answer = b'HTTP/1.1 500 No\r\n\r\n{"db":\n "down\x1b[2J"}' + b"x" * 9_000
    put(database, machine.address, FAST)
    async with checking(database):
        await settle(database, ("m1", "http-0", "critical"))
    assert output(database).startswith('500 No: {"db": "down [2J"}xxx')
    assert len(output(database)) == OUTPUT_CHARS_MAX


async def test_one_failure_is_not_enough_and_is_looked_into_soon(
    database: TableDatabase, machine: Machine
) -> None:
    put(database, machine.address, {"interval_ms": 60_000, "failures": 2, "name": "slow"})
    async with checking(database) as checker:
        await settle(database, ("m1", "slow", "passing"))
        check = checker._running["m1", "slow"]
        check.verdict.handle_result(passed=False, now=0.0)
        assert check.verdict.is_in_doubt
        await settle(database, ("m1", "slow", "passing"))


async def test_many_results_share_a_transaction(database: TableDatabase, machine: Machine) -> None:
    put(database, machine.address, *({**FAST, "name": f"c{i}"} for i in range(20)))
    async with checking(database):
        await eventually("all are there", lambda: len(results(database)) == 20)
    assert len(database.transactions) <= 5


async def test_result_that_stands_is_not_written_again_after_a_restart(
    database: TableDatabase, machine: Machine
) -> None:
    put(database, machine.address, FAST)
    async with checking(database):
        await settle(database, ("m1", "http-0", "passing"))
    before, database.transactions = database.rows("SELECT * FROM checks"), []
    async with checking(database) as checker:
        await eventually("a probe", checker.last_probes)
        assert checker._to_write == {}
    assert (database.transactions, database.rows("SELECT * FROM checks")) == ([], before)


async def test_address_that_must_not_be_reached_is_not_probed(
    database: TableDatabase, machine: Machine
) -> None:
    put(database, "169.254.169.254:80", FAST)
    async with checking(database):
        await settle(database, ("m1", "http-0", "critical"))
    assert output(database) == "link-local addresses are no machines"


async def test_machines_of_a_node_that_is_gone_are_probed_by_one_of_those_who_are_there(
    database: TableDatabase, machine: Machine
) -> None:
    members = {"n1": "ams", "n2": "ams"}
    database.put("checks", machine="m1", name="http-0", node="n2", status="critical", output="dead")
    put(database, machine.address, FAST, node="n2")
    async with checking(database, members) as checker:
        assert running(checker) == {}
        assert results(database) == [("m1", "http-0", "critical")]
        del members["n2"]
        checker._presence._missed["n2"] = asyncio.get_running_loop().time() - GONE_AFTER_S
        checker._presence.set_members(members, asyncio.get_running_loop().time())
        checker._review_all()
        await settle(database, ("m1", "http-0", "passing"))
        assert database.rows("SELECT node FROM checks") == [("n1",)]
        assert ("isthmus_checks_adopted", (), 1.0) in list(checker.samples())

        # It is back: we stop, and leave the row, which is its own to write again.
        members["n2"] = "ams"
        checker._presence.set_members(members, asyncio.get_running_loop().time())
        checker._review_all()
        await eventually("nothing runs", lambda: not running(checker))
        assert checker._to_write == {}
        assert results(database) == [("m1", "http-0", "passing")]


async def test_machines_that_only_their_node_reaches_are_not_probed_in_its_place(
    database: TableDatabase, machine: Machine
) -> None:
    members = {"n1": "ams", "n2": "ams"}
    peering = json.dumps({"address": "127.0.0.1:9"})  # so its loopback is its own
    database.put("nodes", id="n2", region="ams", peering=peering)
    database.put("checks", machine="m1", name="http-0", node="n2", status="passing")
    put(database, machine.address, FAST, node="n2")
    async with checking(database, members) as checker:
        del members["n2"]
        checker._presence._missed["n2"] = asyncio.get_running_loop().time() - GONE_AFTER_S
        checker._presence.set_members(members, asyncio.get_running_loop().time())
        checker._review_all()
        await eventually("the review", lambda: checker._reviewing is None or checker._reviewing.done())
        assert running(checker) == {}
        assert results(database) == [("m1", "http-0", "passing")]


async def test_the_owner_writes_its_own_result_over_that_of_a_stand_in(
    database: TableDatabase, machine: Machine
) -> None:
    put(database, machine.address, FAST)
    async with checking(database):
        await settle(database, ("m1", "http-0", "passing"))
        database.put("checks", machine="m1", name="http-0", node="n2", status="critical", output="cut off")
        await settle(database, ("m1", "http-0", "passing"))
        assert database.rows("SELECT node, output FROM checks") == [("n1", "200 OK")]


async def test_draining_machine_is_still_probed(database: TableDatabase, machine: Machine) -> None:
    put(database, machine.address, FAST, state="draining")
    async with checking(database):
        await settle(database, ("m1", "http-0", "passing"))


@pytest.mark.parametrize(("version", "begins"), [("v1", b"PROXY UNKNOWN\r\nGET "), ("v2", b"\r\n\r\n\x00")])
async def test_machine_that_wants_a_proxy_header_gets_one(
    database: TableDatabase, version: str, begins: bytes
) -> None:
    machine = await FakeMachine().start()
    put(database, f"127.0.0.1:{machine.port}", FAST)
    options = json.dumps({"proxy_protocol": version})
    database.put("services", app="web", checks=json.dumps([FAST]), options=options)
    async with checking(database):
        await eventually("a probe", lambda: machine.received)
    assert machine.received.startswith(begins)
    await machine.stop()


async def test_machine_is_probed_over_tls_where_its_service_has_it(
    database: TableDatabase, tmp_path: Path
) -> None:
    authority = SiteAuthority()
    path = authority.write(tmp_path, "m.test")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path, path.with_suffix(".key"))
    machine = await FakeMachine(context=context).start()
    put(database, f"127.0.0.1:{machine.port}", FAST)
    options = json.dumps({"machine_tls": {"server_name": "m.test", "ca": authority.pem}})
    clear = {**FAST, "clear": True, "name": "clear"}
    database.put("services", app="web", checks=json.dumps([FAST, clear]), options=options)
    async with checking(database):
        await settle(database, ("m1", "clear", "critical"), ("m1", "http-0", "passing"))
        other = json.dumps({"machine_tls": {"server_name": "other.test", "ca": authority.pem}})
        database.put("services", app="web", checks=json.dumps([FAST]), options=other)
        await settle(database, ("m1", "http-0", "critical"))
    assert output(database).startswith("its certificate was not accepted")
    await machine.stop()


async def test_of_several_nodes_one_takes_over_and_gives_back(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three nodes that share a table, as far as this test goes; one of them is gone for a while."""
    monkeypatch.setattr("isthmus.checking.watchers.GONE_AFTER_S", 0.1)
    monkeypatch.setattr("isthmus.checking.checker.PRESENCE_S", 0.01)
    database = TableDatabase()
    members = {"n1": "ams", "n2": "ams", "n3": "ams"}
    put(database, machine.address, FAST)

    def prober() -> list[tuple[Any, ...]]:
        return database.rows("SELECT node, status FROM checks")

    async with AsyncExitStack() as stack:
        checkers = [await stack.enter_async_context(checking(database, members, node)) for node in members]
        database.on_commit = lambda commit: [checker.handle_commit(commit) for checker in checkers]
        owner, *others = checkers
        await eventually("the owner probes", lambda: prober() == [("n1", "passing")])
        assert [running(checker) for checker in others] == [{}, {}]

        await owner.stop()
        del members["n1"]
        await machine.stop()
        await eventually(
            "one of the others finds it dead",
            lambda: prober() in ([("n2", "critical")], [("n3", "critical")]),
        )
        assert sum(bool(running(checker)) for checker in others) == 1

        await machine.start()
        members["n1"] = "ams"
        await stack.enter_async_context(checking(database, members, "n1"))
        await eventually("the owner probes again", lambda: prober() == [("n1", "passing")])
        await eventually("the others do not", lambda: not any(running(checker) for checker in others))
    database.close()
