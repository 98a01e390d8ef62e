"""Heartbeats between agents over loopback sockets, as the status and the metrics show them."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.replication.test_agent import Cluster, eventually


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    cluster = Cluster(tmp_path)
    yield cluster
    for agent in list(cluster.agents):
        await cluster.stop(agent)


async def test_each_node_knows_how_old_its_view_of_every_other_is(cluster):
    agents = await cluster.three()

    def all_are_fresh() -> bool:
        ages = [view.staleness_ms for agent in agents for view in agent.members()]
        return len(ages) == 9 and all(age is not None and age < 5_000 for age in ages)

    await eventually(all_are_fresh)
    names = {name for name, _, _ in agents[0].samples()}
    assert "isthmus_view_staleness_seconds" in names


async def test_the_time_that_everybody_has_passed_follows_the_clock(cluster):
    agents = await cluster.three()
    await agents[0].execute([("INSERT INTO items VALUES (1, 'a')", ())])

    def is_stable() -> bool:
        ages = [agent.status()["stable_ms_ago"] for agent in agents]
        return all(age is not None and age < 10_000 for age in ages)

    await eventually(is_stable, within_s=20)
    assert any(name == "isthmus_stable_staleness_seconds" for name, _, _ in agents[0].samples())
