"""Reading on one node what was written on another."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from replication.core.change import EncodedChangeset
from replication.core.clock import SiteId
from replication.core.sync import SyncSettings
from replication.core.tokens import Token
from replication.errors import BehindError, BusyError, ParkedError
from replication.replica import WAITING_MAX
from tests.replication.network import Network
from tests.replication.test_agent import Cluster, alive, eventually, ids, insert

FOREVER_MS = 20_000


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    cluster = Cluster(tmp_path)
    yield cluster
    for agent in list(cluster.agents):
        await cluster.stop(agent)


@pytest.fixture
async def network() -> AsyncIterator[Network]:
    network = Network()
    yield network
    await network.stop()


async def write(agent, number: int) -> Token:
    done = await agent.execute([("INSERT INTO items (id) VALUES (?)", (number,))])
    assert done.token == Token(agent.site, done.version)
    return done.token


async def test_a_node_has_its_own_write_at_once(cluster):
    a = await cluster.start("a")
    await a.wait_for(await write(a, 1), 0)
    unchanged = await a.execute([("DELETE FROM items WHERE id = 5", ())])
    assert unchanged.token is None


async def test_a_read_elsewhere_waits_for_a_write_that_is_on_its_way(cluster, network):
    relays = [await network.add(number) for number in (1, 2)]
    for name, relay in zip("ab", relays, strict=True):
        options = {"bind": (relay.node_host, 0), "advertise": relay.address, "join": (relays[0].join,)}
        relay.target = (await cluster.start(name, **options)).address
    a, b = cluster.agents
    await eventually(lambda: alive(a) == alive(b) == 2)
    await b.wait_for(await write(a, 1), FOREVER_MS)
    network.cut(relays[:1], relays[1:])
    await write(a, 2)
    token = await write(a, 3)
    with pytest.raises(BehindError, match=r"version 3 .* up to version 1"):
        await b.wait_for(token, 50)
    assert await ids(b) == [1]
    waiting = asyncio.create_task(b.wait_for(token, FOREVER_MS))
    await asyncio.sleep(0)
    assert not waiting.done()
    network.heal()
    await waiting
    assert await ids(b) == [1, 2, 3]


async def test_what_no_push_brings_is_asked_for(cluster):
    """The sync that would come by itself is far off."""
    lazy = SyncSettings(quiet_interval_ms=60_000, busy_interval_ms=60_000)
    a = await cluster.start("a", sync=lazy)
    b = await cluster.start("b", sync=lazy)
    await b.wait_for(await write(a, 1), FOREVER_MS)
    replicas = [agent._replica for agent in (a, b)]
    far_ms = a._host.now_ms() + 30_000
    await eventually(lambda: all(replica._schedule.next_at() > far_ms for replica in replicas))
    b._replica.inbox.add = lambda _changeset: False  # pushes are dropped
    await insert(a, 2)
    token = await write(a, 3)
    await eventually(lambda: b._replica.counters["inbox_overflows"] >= 2)
    await b.wait_for(token, FOREVER_MS)
    assert await ids(b) == [1, 2, 3]


async def test_a_site_that_nobody_knows_is_behind(cluster):
    a = await cluster.start("a")
    with pytest.raises(BehindError, match="nothing of that site"):
        await a.wait_for(Token(SiteId(b"?" * 16), 1), 10)
    assert a._replica.measure()["arrivals"][0] == 0


async def test_a_write_that_is_parked_is_not_waited_for(cluster):
    a = await cluster.start("a")
    junk = SiteId(b"j" * 16)
    waiting = asyncio.create_task(a.wait_for(Token(junk, 1), FOREVER_MS))
    await eventually(lambda: a._replica.measure()["arrivals"][0] == 1)
    a._replica._apply([EncodedChangeset(junk, 1, b"\x00")], lambda _: None, lambda _: None)
    with pytest.raises(ParkedError, match="not a changeset"):
        await waiting


async def test_only_so_many_wait_at_once(cluster):
    a = await cluster.start("a")
    token = Token(SiteId(b"?" * 16), 1)
    ends = [a._replica.await_write(token, lambda: None) for _ in range(WAITING_MAX)]
    with pytest.raises(BusyError, match="wait for writes"):
        await a.wait_for(token, 10)
    ends[0]()
    with pytest.raises(BehindError):
        await a.wait_for(token, 10)
