from __future__ import annotations

import asyncio
import json
import sqlite3
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from isthmus.checks import Checker
from tests.fakes.database import FakeDatabase
from tests.isthmus.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

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
def database() -> Iterator[FakeDatabase]:
    database = FakeDatabase()
    yield database
    database.close()


@asynccontextmanager
async def checking(database: FakeDatabase) -> AsyncIterator[Checker]:
    checker = Checker(database, "n1")
    await checker.start()
    try:
        yield checker
    finally:
        await checker.stop()


def put(database: FakeDatabase, address: str, *checks: dict[str, Any], **columns: Any) -> None:
    database.put("services", app="web", checks=json.dumps(checks))
    database.put(
        "machines", **{"id": "m1", "app": "web", "node": "n1", "region": "ams", "address": address, **columns}
    )


def results(database: FakeDatabase) -> list[tuple[str, str, str]]:
    return database.rows("SELECT machine, name, status FROM checks ORDER BY 1, 2")


def output(database: FakeDatabase) -> str:
    ((text,),) = database.rows("SELECT output FROM checks")
    return str(text)


async def settle(database: FakeDatabase, *expected: tuple[str, str, str]) -> None:
    await eventually(f"checks are {expected}", lambda: results(database) == list(expected))


async def test_machine_that_answers_is_passing(database: FakeDatabase, machine: Machine) -> None:
    put(database, machine.address, {**FAST, "path": "/up?x=1"})
    async with checking(database) as checker:
        await settle(database, ("m1", "http-0", "passing"))
        assert output(database) == "200 OK"
        assert machine.requests[0].startswith(b"GET /up?x=1 HTTP/1.1\r\n")
        assert b"User-Agent: isthmus-check\r\n" in machine.requests[0]
        assert checker.samples()[0] == ("isthmus_checks_running", (), 1.0)
        ((node, updated_ms),) = database.rows("SELECT node, updated_ms FROM checks")
        assert node == "n1"
        assert updated_ms > 1_500_000_000_000


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS"])
async def test_method_is_the_one_of_the_check(database: FakeDatabase, machine: Machine, method: str) -> None:
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
    database: FakeDatabase, machine: Machine, answer: bytes, told: str
) -> None:
    machine.answer = answer
    put(database, machine.address, FAST)
    async with checking(database):
        await settle(database, ("m1", "http-0", "critical"))
    assert output(database).startswith(told)
    assert 0 < len(output(database)) <= 200
    assert {request.split(b" ")[1] for request in machine.requests} == {b"/"}


async def test_machine_that_is_silent_is_critical(database: FakeDatabase, machine: Machine) -> None:
    machine.answer = None
    put(database, machine.address, {**FAST, "timeout_ms": 30})
    async with checking(database):
        await settle(database, ("m1", "http-0", "critical"))
    assert output(database) == "no answer within 30 ms"


async def test_machine_that_refuses_connections_is_critical_until_it_is_back(
    database: FakeDatabase, machine: Machine
) -> None:
    await machine.stop()
    put(database, machine.address, FAST, {**FAST, "type": "tcp", "name": "port"})
    async with checking(database):
        await settle(database, ("m1", "http-0", "critical"), ("m1", "port", "critical"))
        await machine.start()
        await settle(database, ("m1", "http-0", "passing"), ("m1", "port", "passing"))


async def test_open_port_is_enough_for_a_tcp_check(database: FakeDatabase, machine: Machine) -> None:
    put(database, machine.address, {**FAST, "type": "tcp"})
    async with checking(database):
        await settle(database, ("m1", "tcp-0", "passing"))
    assert machine.requests == []


async def test_steady_machine_is_written_once(database: FakeDatabase, machine: Machine) -> None:
    put(database, machine.address, FAST)
    async with checking(database) as checker:
        await eventually("four probes", lambda: machine.connections >= 4)
        samples = {
            labels: value for name, labels, value in checker.samples() if name == "isthmus_checks_total"
        }
    assert samples[("status", "passing"),] >= 3
    assert len(database.transactions) == 1


async def test_every_probe_makes_a_connection_of_its_own(database: FakeDatabase, machine: Machine) -> None:
    put(database, machine.address, FAST)
    async with checking(database):
        await eventually("three probes", lambda: len(machine.requests) >= 3)
    assert machine.connections >= 3


async def test_machines_of_ipv6_are_probed(database: FakeDatabase) -> None:
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
    database: FakeDatabase, machine: Machine
) -> None:
    host, port = machine.address.split(":")
    put(database, host, FAST)
    database.put("services", app="web", checks=json.dumps([FAST]), internal_port=int(port))
    async with checking(database):
        await settle(database, ("m1", "http-0", "passing"))


async def test_only_started_machines_of_this_node_are_probed(
    database: FakeDatabase, machine: Machine
) -> None:
    put(database, machine.address, FAST)
    put(database, machine.address, FAST, id="m2", node="n2")
    put(database, machine.address, FAST, id="m3", state="stopped")
    async with checking(database):
        await settle(database, ("m1", "http-0", "passing"))


async def test_what_is_probed_follows_the_table(database: FakeDatabase, machine: Machine) -> None:
    async with checking(database) as checker:
        put(database, machine.address, FAST)
        checker.on_tables_changed(["machines"])
        await settle(database, ("m1", "http-0", "passing"))

        put(database, machine.address, {**FAST, "name": "a"}, {**FAST, "name": "b"})
        checker.on_tables_changed(["services"])
        await settle(database, ("m1", "a", "passing"), ("m1", "b", "passing"))

        put(database, machine.address, state="stopped")
        checker.on_tables_changed(["machines"])
        await settle(database)
        await eventually("nothing runs", lambda: checker.samples()[0][2] == 0)


async def test_own_results_do_not_make_the_checker_look_again(
    database: FakeDatabase, machine: Machine
) -> None:
    put(database, machine.address, FAST)
    async with checking(database) as checker:
        await settle(database, ("m1", "http-0", "passing"))
        before = len(database.queries)
        checker.on_tables_changed(["checks", "loads"])
        await eventually("another probe", lambda: machine.connections >= 2)
        assert len(database.queries) == before


async def test_results_that_an_earlier_life_left_are_removed_and_those_of_others_stay(
    database: FakeDatabase, machine: Machine
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
        (b"\xff", "[{}]"),
        (None, "[{"),
        (None, '[{"type": "ping"}]'),
        (None, '[{"interval_ms": 0}]'),
        (None, "{}"),
        (None, b"[]"),
    ],
)
async def test_check_that_cannot_be_read_does_not_stop_the_others(
    database: FakeDatabase, machine: Machine, address: Any, checks: Any, caplog: pytest.LogCaptureFixture
) -> None:
    put(database, machine.address, FAST)
    database.put("machines", id="bad", app="bad", node="n1", region="ams", address=address or machine.address)
    database.put("services", app="bad", checks=checks)
    async with checking(database):
        await settle(database, ("m1", "http-0", "passing"))
    assert [record.machine for record in caplog.records if record.msg == "a check cannot be read"] == ["bad"]


async def test_two_checks_of_one_name_do_not_fight_over_their_result(
    database: FakeDatabase, machine: Machine
) -> None:
    put(database, machine.address, {**FAST, "name": "up"}, {**FAST, "name": "up", "type": "tcp"})
    async with checking(database) as checker:
        await settle(database, ("m1", "up", "passing"))
        assert checker.samples()[0] == ("isthmus_checks_running", (), 1.0)


async def test_result_that_could_not_be_written_is_written_next_time(
    database: FakeDatabase, machine: Machine
) -> None:
    put(database, machine.address, FAST)
    async with checking(database):
        await settle(database, ("m1", "http-0", "passing"))
        machine.answer = b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n"
        database.failures = [sqlite3.OperationalError("disk full")]
        await settle(database, ("m1", "http-0", "critical"))
        assert database.failures == []


async def test_checks_begin_when_the_database_can_be_read_again(
    database: FakeDatabase, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isthmus.checks.RETRY_S", 0.01)
    put(database, machine.address, FAST)
    database.failures = [sqlite3.OperationalError("locked")] * 2
    async with checking(database):
        await settle(database, ("m1", "http-0", "passing"))
    assert database.failures == []


async def test_grace_holds_the_first_probe_back(database: FakeDatabase, machine: Machine) -> None:
    put(database, machine.address, {**FAST, "grace_ms": 60_000}, {**FAST, "name": "now"})
    async with checking(database):
        await eventually("two probes", lambda: machine.connections >= 2)
        assert results(database) == [("m1", "now", "passing")]


async def test_stop_ends_probes_that_wait_for_an_answer(database: FakeDatabase, machine: Machine) -> None:
    machine.answer = None
    put(database, machine.address, {**FAST, "timeout_ms": 60_000})
    async with checking(database):
        await eventually("a probe waits", lambda: machine.requests)
    assert results(database) == []
    await eventually("the probe is cut", lambda: machine.abandoned == 1)
