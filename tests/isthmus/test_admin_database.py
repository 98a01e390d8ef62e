"""`/v1/db/…` of a real agent: what comes back, what is refused and how."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from isthmus.agent_role import AgentRole
from isthmus.config import AdminConfig, Config, GossipConfig, ProxyConfig
from replication.core.change import EncodedChangeset
from replication.core.clock import SiteId
from replication.errors import BusyError, ReadOnlyError, StoreError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

ENDLESS = "WITH RECURSIVE n (x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) "

Post = Any


@pytest.fixture
async def role(tmp_path: Path) -> AsyncIterator[AgentRole]:
    role = AgentRole(
        Config(
            node="n1",
            data=str(tmp_path),
            proxy=ProxyConfig(listen="127.0.0.1:1"),
            admin=AdminConfig(listen="127.0.0.1:0"),
            gossip=GossipConfig(listen="127.0.0.1:0"),
        )
    )
    yield role
    await role.stop()


@pytest.fixture
async def post(role: AgentRole) -> AsyncIterator[Post]:
    admin = (await role.start())["admin"]
    async with aiohttp.ClientSession() as session:

        async def send(path: str, body: Any) -> tuple[int, Any]:
            async with session.post(f"http://{admin}/v1/db/{path}", json=body) as response:
                assert response.content_type == "application/json"
                return response.status, await response.json()

        yield send


def statements(*sqls: str) -> dict[str, Any]:
    return {"statements": [{"sql": sql} for sql in sqls]}


async def names(post: Post) -> list[str]:
    status, found = await post("query", {"sql": "SELECT name FROM apps ORDER BY name"})
    assert status == 200
    return [name for (name,) in found["rows"]]


async def test_exec_is_one_transaction_and_says_its_version(post: Post) -> None:
    status, first = await post(
        "exec", statements("INSERT INTO apps (name) VALUES ('a'), ('b')", "DELETE FROM apps WHERE name = 'a'")
    )
    assert (status, first["rows_affected"]) == (200, [2, 1])
    _, second = await post("exec", statements("INSERT INTO apps (name) VALUES ('c')"))
    assert second["version"] == first["version"] + 1
    assert second["site"] == first["site"]
    assert await names(post) == ["b", "c"]


async def test_exec_without_a_change_has_no_version(post: Post) -> None:
    status, done = await post("exec", statements("UPDATE apps SET network = 'x' WHERE name = 'none'"))
    assert (status, done["rows_affected"], done["version"]) == (200, [0], None)


async def test_a_failing_statement_undoes_all_and_is_named(post: Post) -> None:
    status, answer = await post(
        "exec", statements("INSERT INTO apps (name) VALUES ('a')", "INSERT INTO no VALUES (1)")
    )
    assert (status, answer) == (400, {"error": "statement 2: no such table: no"})
    assert await names(post) == []


@pytest.mark.parametrize(
    "sql",
    [
        "DELETE FROM _repl_state",
        'UPDATE "_REPL_site" SET site = 1',
        "DELETE FROM sqlite_master",
        "DROP TABLE apps",
        "PRAGMA journal_mode = DELETE",
        "ATTACH 'x' AS y",
        "BEGIN",
        "SELECT 1",
        "",
    ],
)
async def test_exec_only_writes_rows_of_tables_that_are_not_its_own(post: Post, sql: str) -> None:
    status, answer = await post("exec", statements(sql))
    assert status == 400
    assert answer["error"].startswith("statement 1: ")


@pytest.mark.parametrize(
    ("sql", "said"),
    [
        ("DELETE FROM apps", "a query only reads"),
        ("PRAGMA journal_mode", "a query only reads"),
        ("ATTACH 'x' AS y", "a query only reads"),
        ("SELECT 1; SELECT 2", "one statement at a time"),
        (f"{ENDLESS} SELECT x FROM n", "more than 10000 rows"),
        ("SELECT missing", "no such column: missing"),
    ],
)
async def test_a_query_that_is_refused_says_why(post: Post, sql: str, said: str) -> None:
    status, answer = await post("query", {"sql": sql})
    assert status == 400
    assert said in answer["error"]


async def test_a_query_that_takes_too_long_says_how_long_it_had(role: AgentRole, post: Post) -> None:
    role._agent._database._timeout_s = 0.05
    status, answer = await post("query", {"sql": f"{ENDLESS} SELECT sum(x) FROM n"})
    assert (status, answer["error"][:37]) == (400, "the query took longer than 0.05 s; as")


async def test_values_of_every_type_go_in_and_come_out(post: Post) -> None:
    blob = {"blob": base64.b64encode(b"\x00\xff").decode()}
    values = [None, -(2**63), 2**63 - 1, 0.5, "ü\n", blob, {"blob": ""}, {"real": "-inf"}]
    marks = ", ".join("?" * len(values))
    status, found = await post("query", {"sql": f"SELECT {marks}", "params": values})
    assert (status, found["rows"]) == (200, [values])
    _, found = await post("query", {"sql": "SELECT typeof(:a), typeof(:b)", "params": {"a": blob, "b": True}})
    assert found["rows"] == [["blob", "integer"]]


@pytest.mark.parametrize("value", [[1], {"blob": "?"}, {"blob": 1}, {"blob": "", "x": 1}, {"real": "nan"}])
async def test_a_parameter_that_is_no_value_is_refused(post: Post, value: Any) -> None:
    status, _ = await post("query", {"sql": "SELECT ?", "params": [value]})
    assert status == 400


@pytest.mark.parametrize("value", [2**70, "\ud800"])
async def test_a_parameter_that_sqlite_cannot_hold_is_refused(post: Post, value: Any) -> None:
    assert (await post("query", {"sql": "SELECT ?", "params": [value]}))[0] == 400
    insert = {"sql": "INSERT INTO apps (name) VALUES (?)", "params": [value]}
    assert (await post("exec", {"statements": [insert]}))[0] == 400


@pytest.mark.parametrize("body", [{}, [], {"sql": 1}, {"sql": "", "more": 1}, {"statements": [1]}])
async def test_a_body_that_does_not_fit_is_refused(post: Post, body: Any) -> None:
    for path in ("query", "exec"):
        assert (await post(path, body))[0] == 400 or body == {"sql": ""}


@pytest.mark.parametrize(
    ("error", "status"),
    [(BusyError("held"), 503), (ReadOnlyError("disk is full"), 503), (StoreError("damaged"), 507)],
)
async def test_trouble_with_the_file_is_not_the_callers_fault(
    role: AgentRole, post: Post, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
) -> None:
    async def fail(_statements: Any) -> None:
        raise error

    monkeypatch.setattr(role._agent, "execute", fail)
    answered, answer = await post("exec", statements("INSERT INTO apps (name) VALUES ('a')"))
    assert answered == status
    assert str(error) in answer["error"]


async def test_the_schema_is_shown_as_the_node_has_it(role: AgentRole, post: Post) -> None:
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://{role._admin.address}/v1/db/schema") as response,
    ):
        tables = {table["name"]: table for table in (await response.json())["tables"]}
    assert {"apps", "hostnames", "machines", "services"} <= set(tables)
    assert tables["apps"]["sql"].startswith("CREATE TABLE apps (")
    assert tables["apps"]["merge"] == "row"
    assert not [name for name in tables if name.startswith("_repl_")]


async def test_what_is_parked_is_listed_tried_again_and_given_up(role: AgentRole, post: Post) -> None:
    junk = [EncodedChangeset(SiteId(b"j" * 16), version, b"\x00") for version in (1, 2)]
    await role._agent._database.run(lambda store: store.apply(junk, 1))
    base = f"http://{role._admin.address}/v1/db/parked"
    async with aiohttp.ClientSession() as session:
        assert await post("parked/retry", None) == (200, {"parked": 2})
        async with session.delete(f"{base}/{'6a' * 16}/1") as response:
            assert (response.status, await response.json()) == (200, {"site": "6a" * 16, "version": 1})
        for unknown in (f"{'6a' * 16}/1", "zz/1", f"{'6a' * 16}/x", f"{'6a' * 16}/{2**70}"):
            async with session.delete(f"{base}/{unknown}") as response:
                assert response.status == 404
                assert "is not parked" in (await response.json())["error"]
        async with session.get(base) as response:
            (entry,) = (await response.json())["parked"]
    assert entry == {"site": "6a" * 16, "version": 2, "bytes": 1, "reason": "not a changeset"}
    assert role._agent.status()["parked"] == 1
