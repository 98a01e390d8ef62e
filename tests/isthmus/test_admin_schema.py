"""`POST /v1/db/schema` of a real agent: what is added is there at once, for all that know the tables."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from isthmus.agent_role import AgentRole
from isthmus.config import AdminConfig, Config, GossipConfig, ProxyConfig

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

NOTES = "CREATE TABLE notes (id INTEGER PRIMARY KEY, text TEXT);"

Post = Any


@pytest.fixture
async def post(tmp_path: Path) -> AsyncIterator[Post]:
    role = AgentRole(
        Config(
            node="n1",
            data=str(tmp_path),
            proxy=ProxyConfig(listen="127.0.0.1:1"),
            admin=AdminConfig(listen="127.0.0.1:0"),
            gossip=GossipConfig(listen="127.0.0.1:0"),
        )
    )
    admin = (await role.start())["admin"]
    async with aiohttp.ClientSession() as session:

        async def send(path: str, body: Any) -> tuple[int, Any]:
            async with session.post(f"http://{admin}/v1/{path}", json=body) as response:
                if response.content_type == "application/json":
                    return response.status, await response.json()
                return response.status, await response.content.readline()

        yield send
    await role.stop()


async def insert(post: Post, sql: str) -> tuple[int, Any]:
    return await post("db/exec", {"statements": [{"sql": sql}]})


async def test_a_table_that_is_added_can_be_written_and_subscribed_to_at_once(post: Post) -> None:
    assert (await insert(post, "INSERT INTO notes VALUES (1, 'x')"))[0] == 400
    status, answer = await post("db/schema", {"sql": NOTES})
    assert status == 200
    assert {"notes", "machines"} <= set(answer["tables"])
    status, written = await insert(post, "INSERT INTO notes VALUES (1, 'x')")
    assert (status, written["version"] is None) == (200, False)
    async with asyncio.timeout(5):
        assert (await post("subscriptions", "SELECT text FROM notes"))[0] == 200


@pytest.mark.parametrize(
    ("sql", "reason"),
    [
        ("CREATE TABLE notes (id INTEGER PRIMARY KEY, text INT);", "plan"),
        ("CREATE TABLE notes (id INTEGER PRIMARY KEY);", "what became of it"),
        ("-- dropped: notes", "plan"),
        ("", "what became of it"),
        ("CREATE TABLE apps (name TEXT NOT NULL PRIMARY KEY);", "own"),
        ("CREATE TABLE", "line 1"),
    ],
)
async def test_what_is_more_than_an_addition_is_refused_and_changes_nothing(
    post: Post, sql: str, reason: str
) -> None:
    await post("db/schema", {"sql": NOTES})
    status, answer = await post("db/schema", {"sql": sql})
    assert status == 400
    assert reason in answer["error"]
    assert (await insert(post, "INSERT INTO notes VALUES (1, 'x')"))[0] == 200
