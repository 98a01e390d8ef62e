"""A write through one node's admin listener, read through another's."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from isthmus.agent_role import AgentRole
from isthmus.config import AdminConfig, Config, GossipConfig, ProxyConfig
from replication.core.change import EncodedChangeset
from replication.core.clock import SiteId

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

QUERY = {"sql": "SELECT name FROM apps ORDER BY name"}
NOBODY = "00" * 16
WRONG = ("x", "", "-1", "60001")


class Node:
    """A node's admin API."""

    def __init__(self, role: AgentRole, session: aiohttp.ClientSession, admin: str) -> None:
        self.role = role
        self._session = session
        self._base = f"http://{admin}/v1"

    async def post(self, path: str, body: Any) -> tuple[int, Any]:
        async with self._session.post(f"{self._base}/{path}", json=body) as response:
            return response.status, await response.json()

    async def add(self, name: str) -> str:
        sql = "INSERT INTO apps (name) VALUES (?)"
        status, done = await self.post("db/exec", {"statements": [{"sql": sql, "params": [name]}]})
        assert (status, done["token"]) == (200, f"{done['site']}:{done['version']}")
        return str(done["token"])


@pytest.fixture
async def nodes(tmp_path: Path) -> AsyncIterator[list[Node]]:
    nodes: list[Node] = []
    join: tuple[str, ...] = ()
    async with aiohttp.ClientSession() as session:
        for name in ("n1", "n2"):
            role = AgentRole(
                Config(
                    node=name,
                    data=str(tmp_path / name),
                    proxy=ProxyConfig(listen="127.0.0.1:1"),
                    admin=AdminConfig(listen="127.0.0.1:0"),
                    gossip=GossipConfig(listen="127.0.0.1:0", join=join),
                )
            )
            (tmp_path / name).mkdir()
            addresses = await role.start()
            join = (addresses["gossip"],)
            nodes.append(Node(role, session, addresses["admin"]))
        yield nodes
        for node in nodes:
            await node.role.stop()


async def test_a_read_on_another_node_has_the_write_whose_token_it_brings(nodes: list[Node]) -> None:
    here, there = nodes
    for number in range(20):
        token = await here.add(f"app{number:02}")
        status, found = await there.post(f"db/query?after={token}&wait_ms=20000", QUERY)
        assert (status, len(found["rows"])) == (200, number + 1)


async def test_a_write_that_is_not_there_in_time_is_told_by_a_code(nodes: list[Node]) -> None:
    here, there = nodes
    token = await here.add("app")
    assert (await there.post(f"db/query?after={token}&wait_ms=20000", QUERY))[0] == 200
    site, _, version = token.partition(":")
    status, answer = await there.post(f"db/query?after={site}:{int(version) + 1}&wait_ms=20", QUERY)
    assert (status, answer["code"]) == (504, "behind")
    assert f"up to version {version}" in answer["error"]
    status, answer = await there.post(f"subscriptions?after={NOBODY}:1&wait_ms=20", "SELECT name FROM apps")
    assert (status, answer["code"]) == (504, "behind")


async def test_a_subscription_begins_with_the_write_whose_token_it_brings(nodes: list[Node]) -> None:
    here, there = nodes
    token = await here.add("app")
    url = f"{there._base}/subscriptions?after={token}&wait_ms=20000"
    async with there._session.post(url, json="SELECT name FROM apps") as response:
        lines = [await asyncio.wait_for(response.content.readline(), 10) for _ in range(2)]
    assert lines[1] == b'{"row":[1,["app"]]}\n'


async def test_a_parked_write_is_told_by_a_code(nodes: list[Node]) -> None:
    node = nodes[0]
    parked = EncodedChangeset(SiteId(bytes(16)), 1, b"\x00")
    node.role._agent._replica._apply([parked], lambda _: None, lambda _: None)
    status, answer = await node.post(f"db/query?after={NOBODY}:1&wait_ms=20000", QUERY)
    assert (status, answer["code"]) == (409, "parked")


@pytest.mark.parametrize(
    "query",
    ["after=", "after=x", f"after={NOBODY}:0", *(f"after={NOBODY}:1&wait_ms={wait}" for wait in WRONG)],
)
async def test_what_is_no_token_is_refused(nodes: list[Node], query: str) -> None:
    for path, body in (("db/query", QUERY), ("subscriptions", "SELECT name FROM apps")):
        status, answer = await nodes[0].post(f"{path}?{query}", body)
        assert (status, answer["code"]) == (400, "token")


async def test_exec_without_a_change_has_no_token(nodes: list[Node]) -> None:
    _, done = await nodes[0].post("db/exec", {"statements": [{"sql": "DELETE FROM apps"}]})
    assert done["token"] is None
