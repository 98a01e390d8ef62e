"""How a keeper deals with its workers, its disk, and what other nodes write."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from isthmus.declared import combine_schema
from isthmus.staging import keeper
from isthmus.staging.stage import STRIKES_MAX
from replication.errors import ReadOnlyError
from replication.store import Store
from tests.isthmus.staged_world import LINK_MS, RESTART_MS, STEP_MS, Node, World
from tests.isthmus.test_staging_regions import PLANT, WEB
from tests.isthmus.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    """One node with the app `web`, fresh no more."""
    world = World(tmp_path)
    node = world.add("n1", "ams")
    await world.advance(STEP_MS)
    node.write(*WEB)
    await world.advance(2 * world.bake_ms)
    node.sent.clear()
    yield node
    world.close()


def kinds(node: Node) -> list[tuple[str | None, Any]]:
    return [(worker, (message[0], *message[1:2])) for worker, message in node.sent]


async def test_one_worker_tries_and_is_told_when_all_have_it(node: Node) -> None:
    node.write("UPDATE services SET soft_limit = 20")
    await node.world.advance(STEP_MS)
    assert node.world.limits()["n1"] == {10, 20}
    assert kinds(node) == [("worker/0001", ("try", 1))]
    await node.world.advance(node.world.bake_ms)
    assert node.world.limits()["n1"] == {20}
    assert kinds(node)[1:] == [("worker/0001", ("settled",))]


async def test_large_change_is_answered_once(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "ROWS_A_MESSAGE", 3)
    node.write(*(f"INSERT INTO apps (name) VALUES ('a{number}')" for number in range(7)))
    await node.world.advance(STEP_MS)
    assert [message[1] for _, message in node.sent] == [0, 0, 1]
    assert sorted(row[1] for _, message in node.sent for row in message[2]) == [
        (f"a{number}",) for number in range(7)
    ]


async def test_snapshot_is_looked_through(node: Node) -> None:
    other = Store.open(":memory:", combine_schema(""))
    other.execute([("INSERT INTO apps (name) VALUES ('b')", ())], node.world.now_ms)
    commit = node.store.apply_snapshot(other.snapshot(1 << 20), node.world.now_ms)
    assert commit is not None
    node.take(replace(commit, held=(), reload=("apps",)))  # as that of a large one
    other.close()
    await node.world.advance(2 * node.world.bake_ms)
    assert all(table.app("b") is not None for table in node.workers.values())


async def test_nothing_is_tried_while_a_strike_cannot_be_written(node: Node) -> None:
    node.write(PLANT)
    node.failures = [ReadOnlyError("full")]
    with pytest.raises(ReadOnlyError):
        await node.world.advance(STEP_MS)
    assert (node.deaths, node.sent) == (0, [])
    await node.world.advance(STEP_MS)
    assert node.deaths == 1


async def test_release_that_fails_is_made_up_for(node: Node) -> None:
    node.write("UPDATE services SET soft_limit = 20")
    await node.world.advance(STEP_MS)
    node.failures = [ReadOnlyError("full")]
    with pytest.raises(ReadOnlyError):
        await node.world.advance(node.world.bake_ms)
    await node.world.advance(2 * node.world.bake_ms)
    assert node.world.limits()["n1"] == {20}
    assert node.deaths == 0


async def test_accusation_that_fails_is_made_again(node: Node) -> None:
    node.write(PLANT)
    await node.world.advance(STEP_MS)
    node.failures = [ReadOnlyError("full")]
    with pytest.raises(ReadOnlyError):
        await node.world.advance(RESTART_MS)
    await node.world.advance(4 * node.world.bake_ms)
    found = node.store.connection.execute("SELECT node, status, deaths, what FROM quarantines").fetchall()
    assert found == [("n1", "quarantined", STRIKES_MAX, '[["services","web",0]]')]
    assert node.world.limits()["n1"] == {10}


async def test_what_another_version_says_counts_as_quarantined(node: Node) -> None:
    node.write("UPDATE services SET soft_limit = 20")
    (row,) = node.store.read_staged().rows
    node.write(
        "INSERT INTO quarantines (site, hlc, node, status, what) VALUES "
        f"('{row.clock.site.hex()}', {row.clock.hlc}, 'n2', 'condemned', 'no JSON'), "
        "('odd', 1, 'n2', 'x', '')"
    )
    await node.world.advance(2 * node.world.bake_ms)
    assert node.world.limits()["n1"] == {10}
    (change,) = node.keeper.describe()["changes"]
    assert change["state"] == "quarantined"
    assert change["accusers"][0]["what"] == []


async def test_keeper_works_by_itself_and_outlives_an_error(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "AFTER_ERROR_S", 0.001)
    monkeypatch.setattr(keeper, "TICK_S", 0.001)
    await node.keeper.start()
    node.failures = [ReadOnlyError("full"), RuntimeError("a mistake")]
    node.write("UPDATE services SET soft_limit = 20")

    def has_it() -> bool:
        node.world.now_ms += STEP_MS
        return node.world.limits()["n1"] == {20}

    await eventually("all workers to have it", has_it)
    await node.keeper.stop()
    assert node.failures == []
    assert node.store.read_staged() == ([], {})


async def test_end_of_the_agent_is_not_blamed_on_what_is_tried(node: Node) -> None:
    await node.keeper.start()
    node.write("UPDATE services SET soft_limit = 20")
    await node.world.advance(STEP_MS)
    assert list(node.store.read_staged().strikes.values()) == [1]
    await node.keeper.stop()
    assert node.store.read_staged().strikes == {}


@pytest.mark.parametrize(("bake_ms", "warns"), [(14_999, True), (15_000, False), (0, False)])
async def test_time_in_which_no_stall_is_found_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, bake_ms: int, *, warns: bool
) -> None:
    world = World(tmp_path, bake_ms=bake_ms)
    node = world.add("n1", "ams")
    await node.keeper.start()
    await node.keeper.stop()
    world.close()
    assert ("staging.bake_ms is short" in caplog.text) is warns


async def test_node_without_staging_accuses_nobody(tmp_path: Path) -> None:
    world = World(tmp_path, bake_ms=0)
    node = world.add("n1", "ams")
    for name in ("n1", "n2"):
        node.write(f"INSERT INTO quarantines (site, hlc, node) VALUES ('00', 1, '{name}')")
    await node.keeper.start()
    await node.keeper.stop()
    assert node.store.connection.execute("SELECT node FROM quarantines").fetchall() == [("n2",)]
    await world.advance(LINK_MS)
    world.close()
