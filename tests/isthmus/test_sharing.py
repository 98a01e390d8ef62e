from __future__ import annotations

import sqlite3
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from isthmus import sharing
from isthmus.sharing import Sharing
from replication.errors import BusyError
from routing.table import RoutingTable
from tests.isthmus.waiting import eventually
from tests.routing.rows import put, row

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence


_LOADS = "CREATE TABLE loads (machine, node, in_flight, updated_ms, PRIMARY KEY (machine, node))"


class Cluster:
    """Members that a test decides, and a table of loads."""

    def __init__(self) -> None:
        self.there: list[tuple[str, str, float | None]] = [("n1", "alive", 0.0), ("n2", "alive", 80.0)]
        self.problem: Exception | None = None
        self.refused = 0
        self.database = sqlite3.connect(":memory:")
        self.database.execute(_LOADS)
        self.database.execute("INSERT INTO loads VALUES ('m1', 'n1', 99, 0), ('m1', 'n2', 4, 0)")

    def members(self) -> list[Any]:
        return [
            SimpleNamespace(name=name, state=state, rtt_ms=rtt_ms, is_self=name == "n1")
            for name, state, rtt_ms in self.there
        ]

    async def execute(self, statements: Sequence[tuple[str, Sequence[Any]]]) -> None:
        if self.problem is not None:
            self.refused += 1
            raise self.problem
        for sql, values in statements:
            self.database.execute(sql, values)

    def rows(self) -> dict[tuple[str, str], int]:
        rows = self.database.execute("SELECT machine, node, in_flight FROM loads")
        return {(machine, node): count for machine, node, count in rows}


class Feed:
    def __init__(self) -> None:
        self.sent: list[tuple[list[Any], str | None]] = []

    def send(self, message: list[Any], worker: str | None = None) -> None:
        self.sent.append((message, worker))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "SHARE_INTERVAL_S", 0.002)
    monkeypatch.setattr(sharing, "AFTER_ERROR_S", 0.002)


class World:
    def __init__(self) -> None:
        self.cluster, self.feed, self.table = Cluster(), Feed(), RoutingTable("n1")
        for one in (row("apps"), row("services"), row("machines"), row("nodes", id="n2", region="syd")):
            self.table.apply(*one)
        self.sharing = Sharing(self.cluster, self.table, "n1", "ams")


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    yield world
    await world.sharing.stop()
    world.cluster.database.close()


async def test_what_workers_have_is_written_and_what_an_earlier_life_wrote_is_gone(world: World) -> None:
    world.sharing.add_worker("a")
    world.sharing.add_worker("b")
    world.sharing.start(world.feed)
    await eventually("old rows go", lambda: world.cluster.rows() == {("m1", "n2"): 4})
    world.sharing.handle_counts("a", [("m1", 5)])
    world.sharing.handle_counts("b", [("m1", 2)])
    await eventually("the sum is written", lambda: world.cluster.rows().get(("m1", "n1")) == 7)
    assert (["siblings", [("m1", 5)]], "b") in world.feed.sent
    machine = world.table.machine("m1")
    assert machine is not None
    assert machine.load == 7, "the agent's own table knows all of it"
    world.sharing.drop_worker("a")
    await eventually("what it had is gone", lambda: world.cluster.rows()["m1", "n1"] == 2)


async def test_a_node_alone_writes_no_loads(world: World) -> None:
    world.cluster.there = [("n1", "alive", 0.0), ("n2", "dead", None)]
    world.sharing.add_worker("a")
    world.sharing.handle_counts("a", [("m1", 5)])
    world.sharing.start(world.feed)
    machine = world.table.machine("m1")
    assert machine is not None
    await eventually("it is shared", lambda: machine.load == 5)
    await eventually("some rounds pass", lambda: ("m1", "n1") not in world.cluster.rows())
    world.cluster.there = [("n1", "alive", 0.0), ("n2", "alive", 80.0)]
    await eventually("another one to write it for", lambda: world.cluster.rows().get(("m1", "n1")) == 5)


async def test_loads_of_a_node_that_is_gone_do_not_count(world: World) -> None:
    put(world.table, "loads", machine="m1", node="n2", in_flight=4)
    machine = world.table.machine("m1")
    assert machine is not None
    world.sharing.start(world.feed)
    await eventually("they count while it is there", lambda: world.feed.sent and machine.load == 4)
    world.cluster.there = [("n1", "alive", 0.0), ("n2", "dead", 80.0)]
    await eventually("and then not", lambda: machine.load == 0)
    assert (["present", ["n1"]], None) in world.feed.sent
    assert world.sharing.add_worker("late")[0] == ["present", ["n1"]]


async def test_round_trips_to_regions_are_told(world: World) -> None:
    world.sharing.start(world.feed)
    told = ["round_trips", "ams", [("syd", 80.0)]]
    await eventually("they are told", lambda: (told, None) in world.feed.sent)
    assert world.table.regions.rtt_ms("ams", "syd") == 80.0
    assert world.sharing.add_worker("late")[1] == told


async def test_a_database_that_refuses_is_tried_again(world: World) -> None:
    world.cluster.problem = BusyError("busy")
    world.sharing.add_worker("a")
    world.sharing.handle_counts("a", [("m1", 5)])
    world.sharing.start(world.feed)
    await eventually("it is refused", lambda: world.cluster.refused)
    world.cluster.problem = None
    await eventually("then written", lambda: world.cluster.rows().get(("m1", "n1")) == 5)
