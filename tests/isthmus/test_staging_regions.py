"""A row that kills workers, in a world of several regions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from isthmus.staging.keeper import StagingError
from isthmus.staging.rings import order_regions
from isthmus.staging.stage import STRIKES_MAX
from tests.isthmus.staged_world import LINK_MS, POISON, STEP_MS, Node, World

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

REGIONS = ("ams", "gru", "iad", "syd")
WEB = (
    "INSERT INTO apps (name) VALUES ('web')",
    "INSERT INTO hostnames (hostname, app) VALUES ('web.test', 'web')",
    "INSERT INTO services (app, soft_limit) VALUES ('web', 10)",
)
PLANT = f"UPDATE services SET soft_limit = {POISON} WHERE app = 'web'"


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    for region in (*REGIONS, order_regions((), REGIONS)[0]):
        world.add(f"{region}-{len(world.nodes)}", region)
    yield world
    world.close()


def writer_of(world: World) -> Node:
    """A node whose region is the last to get what it writes."""
    last = order_regions((), REGIONS)[-1]
    return next(node for node in world.nodes if node.region == last)


def canaries_of(world: World) -> list[Node]:
    return [node for node in world.nodes if node.region == order_regions((), REGIONS)[0]]


async def settle(world: World) -> None:
    """All have the app `web`, and are fresh no more."""
    await world.advance(STEP_MS)
    writer_of(world).write(*WEB)
    await world.advance(2 * world.bake_ms)
    assert world.limits() == {node.name: {10} for node in world.nodes}


async def test_good_change_gets_to_all_region_by_region(world: World) -> None:
    await settle(world)
    writer_of(world).write("UPDATE services SET soft_limit = 20")
    order = order_regions((), REGIONS)
    seen: list[set[str]] = []
    for _ in range(4 * world.bake_ms // STEP_MS):
        await world.advance(STEP_MS)
        have = {node.region for node in world.nodes if world.limits()[node.name] == {20}}
        if have and have not in seen:
            seen.append(have)
    assert seen[0] == {order[0]}
    assert set(order[:2]) in seen
    assert seen[-1] == set(REGIONS)
    assert sum(world.deaths().values()) == 0
    assert not [node for node in world.nodes if node.store.read_staged() != ([], {})]


async def test_row_that_kills_hits_one_region_and_that_a_bounded_number_of_times(world: World) -> None:
    await settle(world)
    canaries = canaries_of(world)
    writer = writer_of(world)
    writer.write(PLANT)
    writer.write("INSERT INTO apps (name) VALUES ('other')", "INSERT INTO services (app) VALUES ('other')")
    await world.advance(20 * world.bake_ms)
    deaths = world.deaths()
    assert 1 <= sum(deaths[node.name] for node in canaries) <= STRIKES_MAX * len(canaries)
    assert max(deaths.values()) <= STRIKES_MAX
    assert not [name for name, count in deaths.items() if count and name not in {n.name for n in canaries}]
    # Everybody serves as before, the new app too, and knows of the row without serving it.
    assert world.limits() == {node.name: {10} for node in world.nodes}
    for node in world.nodes:
        assert all(table.app("other") is not None for table in node.workers.values())
        (limit,) = node.store.connection.execute(
            "SELECT soft_limit FROM services WHERE app = 'web'"
        ).fetchone()
        assert limit == POISON
        (change,) = node.keeper.describe()["changes"]
        assert change["state"] == "quarantined"
        assert node.keeper.count() == {"waiting": 0, "trying": 0, "suspect": 0, "quarantined": 1}
        assert change["rows"] == [{"table": "services", "key": ["web", 0], "change": "update"}]
        assert len(node.workers) == 2


async def test_workers_and_nodes_that_start_later_do_not_meet_it(world: World) -> None:
    await settle(world)
    writer_of(world).write(PLANT)
    await world.advance(10 * world.bake_ms)
    before = world.deaths()
    for node in world.nodes:
        node.crash()
    await world.advance(10 * world.bake_ms)
    assert world.deaths() == before
    assert world.limits() == {node.name: {10} for node in world.nodes}


async def test_crash_of_the_whole_canary_node_during_trials_is_remembered(world: World) -> None:
    await settle(world)
    writer_of(world).write(PLANT)
    (first, second) = canaries_of(world)
    world.nodes.remove(second)
    strikes = 0
    for _ in range(20 * world.bake_ms // STEP_MS):
        await world.advance(STEP_MS)
        if first.deaths > strikes:
            strikes = first.deaths
            first.crash()
    assert strikes == STRIKES_MAX
    world.nodes.append(second)
    assert world.limits() == {node.name: {10} for node in world.nodes}
    assert sum(world.deaths().values()) == STRIKES_MAX


async def test_drop_writes_back_what_was_and_clears_all_nodes(world: World) -> None:
    await settle(world)
    writer_of(world).write(PLANT, "INSERT INTO apps (name) VALUES ('other')")
    await world.advance(10 * world.bake_ms)
    before = world.deaths()
    node = writer_of(world)
    (change,) = node.keeper.describe()["changes"]
    assert await node.keeper.drop(change["id"]) == 2
    await world.advance(10 * world.bake_ms)
    assert world.deaths() == before
    for node in world.nodes:
        assert node.keeper.describe()["changes"] == []
        assert node.store.read_staged() == ([], {})
        assert node.store.connection.execute("SELECT soft_limit FROM services").fetchall() == [(10,)]
        assert node.store.connection.execute("SELECT name FROM apps").fetchall() == [("web",)]
    assert world.limits() == {node.name: {10} for node in world.nodes}


async def test_release_has_all_try_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await settle(world)
    node = writer_of(world)
    node.write(PLANT)
    await world.advance(10 * world.bake_ms)
    before = sum(world.deaths().values())
    (change,) = node.keeper.describe()["changes"]
    await node.keeper.release(change["id"])
    await world.advance(10 * world.bake_ms)
    assert sum(world.deaths().values()) > before, "it kills as before, and only there"
    assert {n.region for n in world.nodes if n.deaths} == {n.region for n in canaries_of(world)}
    monkeypatch.setattr("tests.isthmus.staged_world.POISON", -1)  # a version of workers that survives it
    await node.keeper.release(change["id"])
    await world.advance(10 * world.bake_ms)
    assert world.limits() == {node.name: {POISON} for node in world.nodes}
    assert all(node.keeper.describe()["changes"] == [] for node in world.nodes)


async def test_row_that_is_written_anew_needs_no_release(world: World) -> None:
    await settle(world)
    writer_of(world).write(PLANT)
    await world.advance(10 * world.bake_ms)
    world.nodes[0].write("UPDATE services SET soft_limit = 30")
    await world.advance(10 * world.bake_ms)
    assert world.limits() == {node.name: {30} for node in world.nodes}
    assert all(node.keeper.describe()["changes"] == [] for node in world.nodes)
    assert not [node for node in world.nodes if node.store.read_staged() != ([], {})]


async def test_state_of_machines_does_not_wait(world: World) -> None:
    await settle(world)
    writer_of(world).write(
        "INSERT INTO machines (id, app, node, region, address) VALUES ('m', 'web', 'n', 'ams', '10.0.0.1:80')"
    )
    await world.advance(LINK_MS + STEP_MS)
    for node in world.nodes:
        for table in node.workers.values():
            service = table.find(b"web.test", b"/", 80)
            assert service is not None
            assert [target.id for target in service.targets()] == ["m"]


async def test_what_nobody_accuses_is_not_released_by_hand(world: World) -> None:
    await settle(world)
    node = writer_of(world)
    node.write("UPDATE services SET soft_limit = 20")
    await world.advance(STEP_MS)
    (change,) = node.keeper.describe()["changes"]
    assert (change["state"], change["due_in_ms"]) == ("waiting", 2 * world.bake_ms)
    with pytest.raises(StagingError, match="in its time"):
        await node.keeper.release(change["id"])
    for wrong in ("nonsense", "00:1", change["id"] + "0"):
        with pytest.raises(StagingError, match="no change") as refused:
            await node.keeper.drop(wrong)
        assert not refused.value.found
