"""Subscriptions over HTTP: statements, lines, resuming, refusals."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from isthmus.admin import subscriptions as streams
from isthmus.admin.subscriptions import StatementError, read_statement
from isthmus.agent_role import AgentRole
from isthmus.config import AdminConfig, Config, GossipConfig, ProxyConfig
from tests.isthmus.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

SQL = "SELECT code, name FROM regions"


def config(data: Path) -> Config:
    return Config(
        node="n1",
        data=str(data),
        region="ams",
        proxy=ProxyConfig(listen="127.0.0.1:1"),
        admin=AdminConfig(listen="127.0.0.1:0"),
        gossip=GossipConfig(listen="127.0.0.1:0"),
    )


class Stream:
    """One stream of events, line by line."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response
        self.id = response.headers.get("corro-query-id", "")

    async def line(self) -> Any:
        async with asyncio.timeout(10):
            text = await self.response.content.readline()
        return json.loads(text) if text else None

    async def lines(self, count: int) -> list[Any]:
        return [await self.line() for _ in range(count)]


class Api:
    def __init__(self, role: AgentRole, session: aiohttp.ClientSession, address: str) -> None:
        self.role = role
        self.session = session
        self.url = f"http://{address}/v1/subscriptions"
        self.open: list[aiohttp.ClientResponse] = []

    async def post(self, statement: Any, **query: Any) -> Stream:
        return self._stream(await self.session.post(self.url, json=statement, params=query))

    async def get(self, id_: str, **query: Any) -> Stream:
        return self._stream(await self.session.get(f"{self.url}/{id_}", params=query))

    def _stream(self, response: aiohttp.ClientResponse) -> Stream:
        self.open.append(response)
        return Stream(response)

    async def add(self, *codes: str) -> None:
        sql = "INSERT INTO regions (code, name, latitude, longitude) VALUES (?, ?, 0, 0)"
        await self.role._agent.execute([(sql, (code, code.upper())) for code in codes])


@pytest.fixture
async def role(tmp_path: Path) -> AsyncIterator[AgentRole]:
    role = AgentRole(config(tmp_path))
    yield role
    await role.stop()


@pytest.fixture
async def api(role: AgentRole) -> AsyncIterator[Api]:
    addresses = await role.start()
    async with aiohttp.ClientSession() as session:
        made = Api(role, session, addresses["admin"])
        yield made
        for response in made.open:
            response.close()


FORMS = [
    (b'"SELECT 1"', ("SELECT 1", ())),
    (b'["SELECT 1"]', ("SELECT 1", ())),
    (b'["SELECT ?, ?", [1, null]]', ("SELECT ?, ?", (1, None))),
    (b'["SELECT :id", {":id": "a"}]', ("SELECT :id", {"id": "a"})),
    (b'{"query": "SELECT 1"}', ("SELECT 1", ())),
    (b'{"query": "SELECT ?", "params": [true], "named_params": null}', ("SELECT ?", (1,))),
    (b'{"query": "SELECT @a", "named_params": {"@a": 1.5}}', ("SELECT @a", {"a": 1.5})),
    (
        b'["SELECT ?, ?, ?", [[0, 255], [256], {"a": 1}]]',
        ("SELECT ?, ?, ?", (b"\x00\xff", "[256]", '{"a":1}')),
    ),
]


@pytest.mark.parametrize(("body", "statement"), FORMS)
def test_each_form_of_a_statement_is_understood(body: bytes, statement: Any) -> None:
    found = read_statement(body)
    assert found == statement
    assert [type(value) for value in found[1]] == [type(value) for value in statement[1]]


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"", "truncated"),
        (b"7", "not a statement"),
        (b"[]", "not a statement"),
        (b'["SELECT ?", 1]', "not a statement"),
        (b'{"query": "SELECT 1", "parms": []}', "not a statement"),
        (b'{"query": "SELECT 1", "params": 1}', "an array or an object"),
        (b'{"query": "SELECT 1", "params": [1], "named_params": {":a": 1}}', "exclude each other"),
        (b'["SELECT :id", {"id": 1}]', "`:id`"),
        (b'["SELECT ?", [9223372036854775808]]', "beyond 64 bits"),
    ],
)
def test_what_is_no_statement_is_refused(body: bytes, problem: str) -> None:
    with pytest.raises(StatementError, match=problem):
        read_statement(body)


async def test_rows_come_first_and_then_changes(api: Api) -> None:
    await api.add("aaa")
    stream = await api.post(SQL + " WHERE name = 'AAA' OR code > 'zz'")
    assert stream.response.status == 200
    assert stream.response.headers["content-type"] == "application/x-ndjson"
    assert len(stream.response.headers["corro-query-hash"]) == 16
    assert await stream.lines(2) == [{"columns": ["code", "name"]}, {"row": [1, ["aaa", "AAA"]]}]
    end = (await stream.line())["eoq"]
    assert end["change_id"] == 0
    assert end["time"] > 0
    await api.add("zzy", "zzz")
    assert await stream.lines(2) == [
        {"change": ["insert", 2, ["zzy", "ZZY"], 1]},
        {"change": ["insert", 3, ["zzz", "ZZZ"], 2]},
    ]
    await api.role._agent.execute([("DELETE FROM regions WHERE code = 'aaa'", ())])
    assert await stream.line() == {"change": ["delete", 1, ["aaa", "AAA"], 3]}


async def test_blob_is_an_array_of_bytes(api: Api) -> None:
    stream = await api.post("SELECT count(*), x'00ff' FROM regions WHERE code = 'none'")
    assert (await stream.lines(2))[1] == {"row": [1, [0, [0, 255]]]}


async def test_same_statement_is_the_same_subscription(api: Api) -> None:
    first, second = await asyncio.gather(api.post(SQL), api.post([SQL, []]))
    other = await api.post(SQL + " WHERE code = 'x'")
    assert first.id == second.id != other.id
    assert first.response.headers["corro-query-hash"] == second.response.headers["corro-query-hash"]
    async with api.session.get(api.url) as response:
        shown = {item["id"]: item for item in await response.json()}
    assert {id_: item["listeners"] for id_, item in shown.items()} == {first.id: 2, other.id: 1}
    assert shown[first.id]["tables"] == ["regions"]


async def test_stream_goes_on_after_a_number_and_after_a_restart_of_the_agent(
    tmp_path: Path, api: Api
) -> None:
    stream = await api.post(SQL + " WHERE code > 'zz'")
    await api.add("zza")
    assert (await stream.lines(3))[-1]["change"][3] == 1
    stream.response.close()
    await api.add("zzb")
    again = await api.get(stream.id, **{"from": 1})
    assert await again.line() == {"change": ["insert", 2, ["zzb", "ZZB"], 2]}
    same = await api.post(SQL + " WHERE code > 'zz'", **{"from": 2})
    assert same.id == stream.id
    async with asyncio.timeout(10):
        await api.role.stop()
        assert await again.response.content.read() == b""  # an end without an error
    role = AgentRole(config(tmp_path))
    try:
        restarted = Api(role, api.session, (await role.start())["admin"])
        resumed = await restarted.get(stream.id, **{"from": 1})
        await restarted.add("zzc")
        assert [line["change"][3] for line in await resumed.lines(2)] == [2, 3]
        resumed.response.close()
    finally:
        await role.stop()


async def test_rows_can_be_skipped(api: Api) -> None:
    stream = await api.post(SQL, skip_rows="true")
    await api.add("zzz")
    assert (await stream.line())["change"][3] == 1


async def test_heartbeats_come_when_asked_for(api: Api) -> None:
    stream = await api.post(SQL, skip_rows="true", heartbeat_ms=100)
    assert await stream.line() == {"heartbeat": {"change_id": 0}}


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "write": ("DELETE FROM regions", {}, "only a query"),
    "syntax": ("SELEC 1", {}, "syntax error"),
    "missing parameter": ("SELECT * FROM regions WHERE code = ?", {}, "binding"),
    "side table": ("SELECT * FROM _repl_state", {}, "`_repl_state` is no replicated table"),
    "no statement": ({}, {}, "not a statement"),
    "from without subscription": (SQL, {"from": 1}, "no existing subscription found"),
    "from that is no number": (SQL, {"from": "-1"}, "`from` is not a number"),
    "heartbeat that is no number": (SQL, {"heartbeat_ms": "x"}, "`heartbeat_ms` is not a number"),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_what_cannot_be_subscribed_to_is_refused_with_a_reason(api: Api, case: str) -> None:
    statement, query, problem = REFUSED[case]
    stream = await api.post(statement, **query)
    assert stream.response.status == 400
    assert problem in (await stream.response.json())["error"]


async def test_unknown_subscription_is_not_found(api: Api) -> None:
    stream = await api.get("no-such")
    assert stream.response.status == 404
    assert await stream.response.json() == {"error": "could not find subscription with id no-such"}


async def test_number_that_was_never_given_ends_the_stream_with_a_reason(api: Api) -> None:
    stream = await api.post(SQL)
    wrong = await api.get(stream.id, **{"from": 7})
    assert wrong.response.status == 200
    assert await wrong.lines(2) == [{"error": "there is no change 7 yet, the newest is 0"}, None]


async def test_client_that_left_is_noticed_although_nothing_changes(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "_LOOK_S", 0.01)
    stream = await api.post(SQL, skip_rows="true")
    stream.response.close()
    await eventually("nobody listens", lambda: nobody_listens(api))


async def nobody_listens(api: Api) -> bool:
    return [item["listeners"] for item in api.role._subscriptions.describe()] == [0]


async def test_client_that_takes_nothing_is_cut_off(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_STALL_S", 0.05)
    await api.add(*(f"r{number}" for number in range(100)))
    # Connections have this from the socket that listens: else one could grow until it takes all.
    (site,) = api.role._admin._runner.sites
    for listening in site._server.sockets:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
    # Three megabytes: more than the sockets take, less than the limit.
    sql = f"SELECT code, '{'x' * 30_000}' FROM regions WHERE code LIKE 'r%'"
    subscription = await api.role._subscriptions.subscribe(sql)
    body = json.dumps(sql).encode()
    since = subscription.quiet_since_ms
    host, port = api.url.removeprefix("http://").partition("/")[0].split(":")
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((host, int(port)))
        head = b"POST /v1/subscriptions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
        client.sendall(head % len(body) + body)
        await eventually("it is cut off", lambda: subscription.quiet_since_ms != since)
        server = api.role._admin._runner.server
        await eventually("its connection is closed", lambda: not server.connections)
        client.settimeout(10)
        received = await asyncio.to_thread(read_all, client)
    assert received.startswith(b"HTTP/1.1 200 OK")
    assert b"eoq" not in received


def read_all(client: socket.socket) -> bytes:
    received = bytearray()
    while data := client.recv(1 << 20):
        received += data
    return bytes(received)
