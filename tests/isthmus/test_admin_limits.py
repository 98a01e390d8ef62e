"""What the admin API says to who writes too much."""

from __future__ import annotations

from typing import TYPE_CHECKING

import aiohttp

from isthmus.agent_role import AgentRole
from isthmus.config import AdminConfig, Config, GossipConfig, ProxyConfig, ReplicationConfig

if TYPE_CHECKING:
    from pathlib import Path


async def test_who_writes_too_much_is_told_when_to_come_again(tmp_path: Path) -> None:
    role = AgentRole(
        Config(
            node="n1",
            data=str(tmp_path),
            proxy=ProxyConfig(listen="127.0.0.1:1"),
            admin=AdminConfig(listen="127.0.0.1:0"),
            gossip=GossipConfig(listen="127.0.0.1:0"),
            replication=ReplicationConfig(table_writes_per_s={"apps": 1}),
        )
    )
    admin = (await role.start())["admin"]
    try:
        async with aiohttp.ClientSession() as session:
            sql = "INSERT INTO apps (name) VALUES ('a'), ('b'), ('c'), ('d')"
            body = {"statements": [{"sql": sql}]}
            async with session.post(f"http://{admin}/v1/db/exec", json=body) as response:
                assert response.status == 200
            for path, given in (("db/exec", body), ("apps", {"name": "e"})):
                async with session.post(f"http://{admin}/v1/{path}", json=given) as response:
                    answer = await response.json()
                    assert (response.status, answer["code"]) == (429, "rate_limited")
                    assert "into apps; try again in" in answer["error"]
                    assert 1 <= int(response.headers["Retry-After"]) <= 4
    finally:
        await role.stop()
