"""Agents that lost their file, tables of it, or their identity to another node."""

import shutil
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from pathlib import Path

import pytest

from replication.agent import Agent
from replication.core.clock import SiteId
from replication.errors import ReplacedError
from replication.settings import AgentSettings
from replication.store import Store
from replication.verifier import VerifySettings
from tests.replication.test_agent import (
    KEY,
    QUICK,
    SCHEMA,
    Cluster,
    alive,
    digest,
    eventually,
    ids,
    insert,
    linked,
)

VERIFY = VerifySettings(pause_ms=20, interval_ms=100)
TWIN = SiteId(b"twin" * 4)


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    cluster = Cluster(tmp_path)
    yield cluster
    for agent in list(cluster.agents):
        await cluster.stop(agent)


class Losing(Cluster):
    """Agents that say why they are lost."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.lost: dict[str, list[ReplacedError]] = {}

    async def start(self, name: str, join: tuple[str, ...] | None = None, **options: object) -> Agent:
        if join is None:
            join = tuple(f"127.0.0.1:{agent.address[1]}" for agent in self.agents)
        settings = AgentSettings(
            name=name,
            path=self.folder / f"{name}.db",
            join=join,
            bind=("127.0.0.1", 0),
            keys=(KEY,),
            swim=QUICK,
            verify=VERIFY,
            **options,
        )
        told = self.lost.setdefault(name, [])
        agent = Agent(settings, SCHEMA, on_commit=lambda _: None, on_lost=told.append)
        await agent.start()
        self.agents.append(agent)
        return agent


@pytest.fixture
async def losing(tmp_path: Path) -> AsyncIterator[Losing]:
    cluster = Losing(tmp_path)
    yield cluster
    for agent in list(cluster.agents):
        await cluster.stop(agent)


def shell(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        for sql in statements:
            other.execute(sql)


async def are_equal(agents: list[Agent], count: int) -> bool:
    try:
        digests = {await digest(agent) for agent in agents}
    except sqlite3.OperationalError:  # a table that somebody has dropped a moment ago
        return False
    return len(digests) == 1 and len(await ids(agents[0])) == count


def overwrite(older: Path, path: Path) -> None:
    shutil.copyfile(older, path)


def put_in_place(older: Path, path: Path) -> None:
    older.replace(path)


def remove(_: Path, path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("act", [overwrite, put_in_place, remove])
async def test_an_agent_whose_file_was_replaced_says_so_once_and_its_successor_has_all_again(
    losing: Losing, tmp_path: Path, act: Callable[[Path, Path], None]
) -> None:
    a, b = await losing.start("a"), await losing.start("b")
    await insert(a, 1)
    with (
        closing(sqlite3.connect(tmp_path / "a.db")) as source,
        closing(sqlite3.connect(tmp_path / "older.db")) as older,
    ):
        source.backup(older)
    await insert(a, *range(2, 30))
    await a._database.run(lambda store: store.checkpoint(0, 0))
    await insert(a, *range(30, 50))  # in the WAL alone
    await insert(b, 100)
    await eventually(lambda: are_equal(losing.agents, 50))
    former = a.site
    act(tmp_path / "older.db", tmp_path / "a.db")
    await eventually(lambda: losing.lost["a"])
    for _ in range(2):
        with pytest.raises(ReplacedError, match=r"a\.db is not the file that this node had"):
            await insert(a, 200)
    assert len(losing.lost["a"]) == 1
    await insert(b, 101)
    await losing.stop(a)
    a = await losing.start("a")
    assert a.site != former
    await eventually(lambda: are_equal(losing.agents, 51))
    await insert(a, 201)
    await eventually(lambda: are_equal(losing.agents, 52))


@pytest.mark.parametrize(
    "statement", ["DROP TABLE items", "ALTER TABLE items RENAME TO other", "ALTER TABLE items ADD COLUMN w"]
)
async def test_what_a_shell_does_to_a_table_of_a_live_node_is_put_right(
    losing: Losing, tmp_path: Path, statement: str
) -> None:
    a, b = await losing.start("a"), await losing.start("b")
    await insert(a, 1, 2)
    await insert(b, 3, 4)
    await eventually(lambda: are_equal([a, b], 4))
    shell(tmp_path / "a.db", statement)
    await eventually(lambda: are_equal([a, b], 4))
    await a.execute([("INSERT INTO items (id) VALUES (5)", ())])
    await insert(b, 6)
    await eventually(lambda: are_equal([a, b], 6))

    async def is_told() -> bool:
        problem = await a._database.run(lambda store: store.schema_problem)
        return ("column w" in problem) is ("ADD COLUMN" in statement)

    await eventually(is_told)
    assert losing.lost["a"] == []


async def test_two_nodes_of_one_site_find_each_other_write_no_more_and_become_two(
    losing: Losing, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in "ab":
        Store.open(tmp_path / f"{name}.db", SCHEMA, site=TWIN).close()
    witness = await losing.start("witness")
    a, b = await losing.start("a"), await losing.start("b")
    assert a.site == b.site == TWIN
    await insert(a, 1)
    await insert(b, 2)
    await eventually(lambda: losing.lost["a"] and losing.lost["b"], within_s=30)
    for agent, name, other in ((a, "a", b), (b, "b", a)):
        host, port = other.address
        assert agent.status()["site_conflict"] == {
            "name": "b" if name == "a" else "a",
            "address": [host, port],
        }
        assert ("isthmus_site_conflict", (), 1.0) in list(agent.samples())
        with pytest.raises(ReplacedError, match=f"at {host}:{port} writes as the same site"):
            await insert(agent, 3)
        told = [line for line in caplog.messages if f"at {host}:{port} has the site id" in line]
        assert len(told) == 1
    await losing.stop(a)
    await losing.stop(b)
    a, b = await losing.start("a"), await losing.start("b")
    assert len({a.site, b.site, TWIN}) == 3
    await insert(a, 4)
    await insert(b, 5)
    await eventually(lambda: are_equal([a, b, witness], 4), within_s=30)
    assert alive(a) == 3
    assert linked(a) == 2
