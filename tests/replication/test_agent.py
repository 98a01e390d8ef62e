"""Agents over loopback sockets, with real SQLite files."""

import asyncio
import contextlib
import os
import socket
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from replication.agent import Agent
from replication.core.change import Commit
from replication.core.swim import SwimSettings
from replication.core.sync import SyncSettings
from replication.database import QueryError
from replication.errors import StoreError
from replication.metrics import METRICS
from replication.schema import Schema
from replication.settings import AgentSettings, SettingsError, parse_address
from replication.transport import LinkError
from replication.verifier import VerifySettings
from tests.fakes.verification import write_past_triggers
from tests.replication.network import Network, Relay

KEY = b"k" * 32
NOW = 1_700_000_000_000
SCHEMA = Schema.parse("CREATE TABLE items (id INTEGER PRIMARY KEY, v TEXT NOT NULL DEFAULT '');")
# Four times the default pace, so that a death takes a second or two.
QUICK = SwimSettings(
    probe_interval_ms=250, probe_timeout_ms=100, gossip_interval_ms=50, reconnect_interval_ms=400
)


async def eventually(condition: Callable[[], object], within_s: float = 30.0) -> float:
    """Wait until the condition holds; return how long it took."""
    started = time.monotonic()
    while True:
        result = condition()
        if asyncio.iscoroutine(result):
            result = await result
        if result:
            return time.monotonic() - started
        assert time.monotonic() - started < within_s, "did not happen in time"
        await asyncio.sleep(0.005)


class Cluster:
    """Agents that a test starts; all are stopped at its end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.agents: list[Agent] = []
        self.commits: dict[str, list[Commit]] = {}

    async def start(self, name: str, join: tuple[str, ...] | None = None, **options: object) -> Agent:
        if join is None:
            join = tuple(f"127.0.0.1:{agent.address[1]}" for agent in self.agents[:1])
        commits = self.commits.setdefault(name, [])
        given = {"bind": ("127.0.0.1", 0), "keys": (KEY,), "swim": QUICK, **options}
        settings = AgentSettings(name=name, path=self.folder / f"{name}.db", join=join, **given)
        agent = Agent(settings, SCHEMA, on_commit=commits.append)
        await agent.start()
        self.agents.append(agent)
        return agent

    async def three(self) -> list[Agent]:
        for name in "abc":
            await self.start(name)
        await eventually(lambda: all(alive(agent) == 3 for agent in self.agents))
        await eventually(lambda: all(linked(agent) == 2 for agent in self.agents))
        return self.agents

    async def stop(self, agent: Agent) -> None:
        self.agents.remove(agent)
        await agent.stop()


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


def alive(agent: Agent) -> int:
    return sum(1 for member in agent.members() if member.state == "alive")


def linked(agent: Agent) -> int:
    return sum(len(peers) for peers in agent.status()["peers"].values())


def state_of(agent: Agent, name: str) -> str | None:
    return next((member.state for member in agent.members() if member.name == name), None)


def dropped(agent: Agent) -> dict[str, int]:
    return agent.status()["counters"]["dropped"]


async def ids(agent: Agent) -> list[int]:
    return [row[0] for row in (await agent.query("SELECT id FROM items ORDER BY id")).rows]


async def digest(agent: Agent) -> bytes:
    return await agent._database.run(lambda store: store.digest("items"))


async def insert(agent: Agent, *numbers: int) -> None:
    for number in numbers:
        await agent.execute([("INSERT INTO items VALUES (?, ?)", (number, f"from {agent.site.hex()[:4]}"))])


async def test_a_write_is_on_all_other_nodes_a_moment_later(cluster):
    agents = await cluster.three()
    await insert(agents[0], 0)  # the first one forms the tree
    for number, writer in enumerate(agents, start=1):
        await insert(writer, number)

        async def everywhere(number: int = number) -> bool:
            return all([number in await ids(agent) for agent in agents])

        assert await eventually(everywhere) < 1.0
    for agent in agents:
        pushes = agent.status()["counters"]["broadcast"].get("pushes_new", 0)
        assert pushes >= 1, "sync brought it, not the broadcast"
    assert len({await digest(agent) for agent in agents}) == 1


async def test_the_application_hears_of_every_commit_in_order_whoever_made_it(cluster):
    a, b, _ = await cluster.three()
    await asyncio.gather(insert(a, *range(20)), insert(b, *range(100, 120)))
    for name in "abc":
        commits = cluster.commits[name]
        await eventually(lambda commits=commits: sum(len(commit.changes) for commit in commits) == 40)
        assert [commit.seq for commit in commits] == list(range(1, len(commits) + 1))


async def test_a_failing_callback_does_not_stop_replication(tmp_path, cluster, caplog):
    def fail(_: Commit) -> None:
        raise RuntimeError("the application is broken")

    a = await cluster.start("a")
    join = (f"127.0.0.1:{a.address[1]}",)
    settings = AgentSettings("b", tmp_path / "b.db", ("127.0.0.1", 0), join=join, keys=(KEY,), swim=QUICK)
    b = Agent(settings, SCHEMA, on_commit=fail)
    await b.start()
    try:
        await insert(a, 1, 2)

        async def there() -> bool:
            return await ids(b) == [1, 2]

        await eventually(there)
        assert b.counters["callbacks_failed"] >= 1
    finally:
        await b.stop()
    assert "on_commit failed" in caplog.text


async def test_a_write_whose_caller_went_away_still_reaches_the_application_and_the_peers(cluster):
    a, b, _ = await cluster.three()
    write = asyncio.create_task(insert(a, 7))
    await asyncio.sleep(0)
    write.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await write
    await eventually(lambda: cluster.commits["a"])

    async def there() -> bool:
        return await ids(b) == [7]

    await eventually(there)


async def test_a_write_by_another_program_replicates(cluster, tmp_path):
    _, b, c = await cluster.three()
    with contextlib.closing(sqlite3.connect(tmp_path / "a.db")) as shell:
        shell.execute("INSERT INTO items VALUES (1, 'by hand')")
        shell.commit()

    async def there() -> bool:
        return await ids(b) == [1] and await ids(c) == [1]

    await eventually(there)


async def test_what_another_program_wrote_while_no_agent_ran_replicates(cluster, tmp_path):
    a = await cluster.start("a")
    await insert(a, 1)
    await cluster.stop(a)
    with contextlib.closing(sqlite3.connect(tmp_path / "a.db")) as shell:
        shell.execute("INSERT INTO items VALUES (2, 'by hand')")
        shell.commit()
    await cluster.start("a")
    b = await cluster.start("b")

    async def there() -> bool:
        return await ids(b) == [1, 2]

    await eventually(there)


async def relayed(cluster: Cluster, network: Network, count: int) -> list[Relay]:
    relays = [await network.add(number) for number in range(1, count + 1)]
    for name, relay in zip("abcdef", relays, strict=False):
        agent = await cluster.start(
            name, join=(relays[0].join,), bind=(relay.node_host, 0), advertise=relay.address
        )
        relay.target = agent.address
    await eventually(lambda: all(alive(agent) == count for agent in cluster.agents))
    return relays


async def test_both_sides_of_a_partition_take_writes_and_are_equal_soon_after_it_heals(cluster, network):
    relays = await relayed(cluster, network, 3)
    a, b, c = cluster.agents
    await insert(a, 1)
    network.cut(relays[:2], relays[2:])
    await insert(a, 10, 11)
    await insert(c, 20, 21)
    await a.execute([("UPDATE items SET v = 'left' WHERE id = 1", ())])
    await c.execute([("INSERT OR REPLACE INTO items VALUES (1, 'right')", ())])
    await eventually(lambda: state_of(a, "c") == "dead" and state_of(c, "a") == "dead", 15)
    assert await ids(b) == [1, 10, 11]
    assert 10 not in await ids(c)
    assert network.lost > 0
    network.heal()

    async def equal() -> bool:
        return len({await digest(agent) for agent in (a, b, c)}) == 1

    assert await eventually(equal) < 5
    assert await ids(c) == [1, 10, 11, 20, 21]
    await eventually(lambda: all(alive(agent) == 3 for agent in (a, b, c)))


async def test_all_traffic_leaves_from_the_bound_address(cluster, network):
    await relayed(cluster, network, 2)
    await eventually(lambda: {kind for kind, _ in network.seen} == {"datagram", "stream"})
    assert {host for _, host in network.seen} == {"127.0.2.1", "127.0.2.2"}


async def test_a_restarted_node_keeps_its_site_and_catches_up(cluster):
    a, b, c = await cluster.three()
    await insert(c, 1)
    site = c.site
    await cluster.stop(c)
    await eventually(lambda: state_of(a, "c") == "left" and state_of(b, "c") == "left")
    await insert(a, 2)
    c = await cluster.start("c")
    assert c.site == site

    async def there() -> bool:
        return await ids(c) == [1, 2]

    assert await eventually(there) < 2
    await eventually(lambda: alive(a) == 3)
    await insert(c, 3)

    async def back() -> bool:
        return await ids(a) == [1, 2, 3]

    await eventually(back)


async def test_a_node_that_is_killed_is_seen_as_dead_within_seconds(cluster):
    a, b, c = await cluster.three()
    # As a kill does: sockets close, nobody says goodbye.
    c._running = False
    await c._host.stop()
    await c._transport.stop()
    took = await eventually(lambda: state_of(a, "c") == "dead" and state_of(b, "c") == "dead")
    assert took < 5
    c._running = True  # the fixture closes the file


async def test_a_node_that_comes_when_the_log_is_pruned_starts_from_a_snapshot(cluster):
    a = await cluster.start("a")
    await insert(a, *range(50))
    pruned = await a._database.run(lambda store: store.prune_log({a.site: 45}))
    assert pruned > 0
    b = await cluster.start("b")

    async def equal() -> bool:
        return await digest(a) == await digest(b)

    await eventually(equal)
    await eventually(lambda: b.status()["counters"]["sync"].get("snapshots_received") == 1)
    await eventually(lambda: a.status()["sites"] == b.status()["sites"])
    await insert(a, 50)

    async def there() -> bool:
        return 50 in await ids(b)

    await eventually(there)


async def test_a_large_backlog_arrives_in_parts(cluster):
    a = await cluster.start("a")
    for number in range(30):
        await a.execute([("INSERT INTO items VALUES (?, ?)", (number, os.urandom(50_000).hex()))])
    b = await cluster.start("b")

    async def equal() -> bool:
        return await digest(a) == await digest(b)

    await eventually(equal)
    await eventually(lambda: b.status()["counters"]["sync"].get("changesets_received") == 30)


@pytest.mark.parametrize("options", [{"keys": (b"x" * 32,)}, {"keys": ()}, {"cluster": "another"}])
async def test_who_has_another_key_or_cluster_never_joins_and_both_say_so(cluster, options, caplog):
    a = await cluster.start("a", look_interval_ms=50)
    await insert(a, 1)
    stranger = await cluster.start("stranger", look_interval_ms=50, **options)
    await eventually(lambda: sum(dropped(a).values()) >= 3)
    with pytest.raises((LinkError, OSError)):
        await stranger._transport.connect(a.address, lasting=False)
    await eventually(lambda: any(reason.startswith("stream:") for reason in dropped(a)))
    assert alive(a) == 1
    assert alive(stranger) == 1
    assert await ids(stranger) == []
    assert a._transport.counters["datagrams_sent"] == 0, "a stranger was answered"
    await eventually(lambda: len([line for line in caplog.messages if "cluster key" in line]) >= 2)
    await eventually(lambda: sum(dropped(a).values()) >= 8)  # many looks later
    told = [line for line in caplog.messages if "cluster key" in line]
    assert sorted(line.split(": ")[0] for line in told) == [
        f"nobody answers at 127.0.0.1:{a.address[1]}",
        f"what comes from 127.0.0.1:{stranger.address[1]} is dropped",
    ]


async def test_a_key_ring_is_rotated_without_a_restart(cluster):
    a = await cluster.start("a")
    b = await cluster.start("b")
    await eventually(lambda: alive(a) == 2 and alive(b) == 2)
    new = b"n" * 32
    for ring in ((KEY, new), (new, KEY), (new,)):
        for agent in (a, b):
            agent.replace_keys(ring)
    await insert(a, 1)

    async def there() -> bool:
        return await ids(b) == [1]

    await eventually(there)
    c = await cluster.start("c", keys=(new,))
    await eventually(lambda: alive(c) == 3)


async def test_garbage_is_counted_and_harmless(cluster):
    a, b, _ = await cluster.three()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        for data in (
            b"",
            b"x",
            os.urandom(100),
            os.urandom(1200),
            b"\xd1" + os.urandom(60),
            os.urandom(9000),
        ):
            udp.sendto(data, a.address)
    for data in (
        os.urandom(200),
        b"IST\x01" + os.urandom(48),
        b"IST\x01",
        b"GET / HTTP/1.1\r\n\r\n" + b"x" * 50,
    ):
        reader, writer = await asyncio.open_connection(*a.address)
        writer.write(data)
        writer.write_eof()
        assert await reader.read() == b"", "a stranger was answered"
        writer.close()
    await eventually(lambda: {"datagram:magic", "datagram:tag", "datagram:size"} <= set(dropped(a)))
    await eventually(lambda: {"stream:magic", "stream:tag", "stream:truncated"} <= set(dropped(a)))
    await insert(a, 1)

    async def there() -> bool:
        return await ids(b) == [1]

    await eventually(there)


async def test_a_key_holder_that_sends_garbage_frames_loses_its_link_only(cluster):
    a, b, _ = await cluster.three()
    for frame in (b"", b"\xc1", os.urandom(50), b"\x91" * 10_000, b"\xdf\xff\xff\xff\xff"):
        link = await b._transport.connect(a.address, lasting=False)
        link.send(frame)
        await asyncio.wait_for(link.closed.wait(), 5)
    assert dropped(a)["stream:msgpack"] >= 3
    await insert(a, 1)

    async def there() -> bool:
        return await ids(b) == [1]

    await eventually(there)


async def test_an_agent_that_nobody_answers_at_first_keeps_trying(cluster):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        a = await cluster.start("a", join=(f"127.0.0.1:{port}",))
        await eventually(lambda: a.status()["counters"]["swim"]["joins_sent"] >= 3)
    assert alive(a) == 1
    await cluster.start("b", join=(), bind=("127.0.0.1", port))
    await eventually(lambda: alive(a) == 2)


async def test_a_resolver_that_fails_is_asked_again_and_told_of_once(cluster, monkeypatch, caplog):
    b = await cluster.start("b", join=())
    loop = asyncio.get_running_loop()
    real = loop.getaddrinfo
    asked = []

    async def resolve(host: str, port: int, **options: object) -> list:
        if host != "gossip.test":
            return await real(host, port, **options)
        asked.append(host)
        if len(asked) < 3:
            raise socket.gaierror(socket.EAI_AGAIN, "try again")
        return await real("127.0.0.1", port, **options)

    monkeypatch.setattr(loop, "getaddrinfo", resolve)
    quick = SwimSettings(probe_interval_ms=250, join_backoff_max_ms=100)
    a = await cluster.start("a", join=(f"gossip.test:{b.address[1]}",), swim=quick)
    await eventually(lambda: alive(a) == 2)
    assert a.counters["resolves_failed"] == 2
    assert sum("cannot resolve gossip.test" in line for line in caplog.messages) == 1


@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="this machine has no IPv6")
async def test_agents_find_each_other_over_ipv6(cluster):
    a = await cluster.start("a", bind=("::1", 0))
    b = await cluster.start("b", bind=("::1", 0), join=(f"[::1]:{a.address[1]}",))
    await insert(a, 1)

    async def there() -> bool:
        return await ids(b) == [1]

    await eventually(there)


async def test_a_node_that_leaves_is_not_taken_for_dead(cluster):
    a, b, c = await cluster.three()
    await cluster.stop(c)
    await eventually(lambda: state_of(a, "c") == "left" and state_of(b, "c") == "left", 3)


async def test_two_nodes_of_one_name_are_told_so(cluster, tmp_path, caplog):
    first = await cluster.start("a")
    (tmp_path / "elsewhere").mkdir()
    cluster.folder = tmp_path / "elsewhere"
    second = await cluster.start("a")
    await eventually(lambda: alive(first) == alive(second) == 2)
    for agent, other in ((first, second), (second, first)):
        assert f"the node at 127.0.0.1:{other.address[1]} has the name of this one" in caplog.text
        assert agent.status()["counters"]["agent"]["name_conflicts"] >= 1


async def test_two_agents_cannot_open_one_file(cluster, tmp_path):
    await cluster.start("a")
    second = Agent(
        AgentSettings("a", tmp_path / "a.db", ("127.0.0.1", 0)), SCHEMA, on_commit=lambda commit: None
    )
    with pytest.raises(StoreError, match="another agent"):
        await second.start()


async def test_a_taken_port_is_refused_with_nothing_left_open(cluster, tmp_path):
    a = await cluster.start("a")
    second = Agent(AgentSettings("b", tmp_path / "b.db", a.address), SCHEMA, on_commit=lambda commit: None)
    with pytest.raises(OSError, match="cannot bind gossip"):
        await second.start()
    await cluster.start("b")  # the file is free again


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO items VALUES (1, '')",
        "ATTACH ':memory:' AS x",
        "PRAGMA cache_size = 1",
        "SELECT load_extension('x')",
        "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT sum(x) FROM n",
        "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n LIMIT 1000) SELECT x FROM n",
        "SELECT no_such_column FROM items",
        "not sql",
    ],
)
async def test_a_query_can_only_read_and_only_so_much(cluster, sql):
    a = await cluster.start("a", query_timeout_ms=100.0, query_rows_max=100)
    with pytest.raises(QueryError):
        await a.query(sql)
    assert (await a.query("SELECT count(*) AS n FROM items")).columns == ["n"]


async def test_a_file_that_lost_its_last_versions_gets_them_back_and_says_so(cluster, tmp_path):
    a = await cluster.start("a")
    await insert(a, 1)
    await cluster.stop(a)
    backup = (tmp_path / "a.db").read_bytes()
    a = await cluster.start("a", join=())
    b = await cluster.start("b")
    await insert(a, 2, 3)

    async def there() -> bool:
        return await ids(b) == [1, 2, 3]

    await eventually(there)
    await cluster.stop(a)
    (tmp_path / "a.db").write_bytes(backup)
    for suffix in ("-wal", "-shm"):
        (tmp_path / f"a.db{suffix}").unlink(missing_ok=True)
    a = await cluster.start("a")

    async def restored() -> bool:
        return await ids(a) == [1, 2, 3]

    await eventually(restored)
    assert a.status()["own_versions_lost"] >= 2
    await insert(a, 4)
    assert a.status()["sites"][a.site.hex()]["head"] == 4


async def test_every_sample_has_a_name_that_is_described(cluster):
    a, *_ = await cluster.three()
    await insert(a, 1)
    samples = list(a.samples())
    assert {name for name, _, _ in samples} <= set(METRICS)
    assert ("isthmus_members", (("state", "alive"),), 2) in samples


@pytest.mark.parametrize(
    "options",
    [
        {"bind": ("0.0.0.0", 0)},
        {"bind": ("10.0.0.1", 7946)},
        {"bind": ("::", 0), "keys": (KEY,)},
        {"keys": (b"short",)},
        {"name": ""},
        {"name": "a\nb"},
        {"join": ("fdaa::3:7946",)},
        {"join": ("host:0",)},
        {"join": ("host",)},
    ],
)
def test_unsafe_settings_are_refused(tmp_path, options):
    with pytest.raises(SettingsError):
        AgentSettings(**{"name": "a", "path": tmp_path / "a.db", "bind": ("127.0.0.1", 0), **options})


def test_reads_addresses_of_both_families():
    assert parse_address("[fdaa::3]:7946") == ("fdaa::3", 7946)
    assert parse_address("top1.nearest.of.app.internal:7946") == ("top1.nearest.of.app.internal", 7946)


async def test_who_is_asked_by_a_node_that_knows_more_asks_back_at_once(cluster):
    slow = SyncSettings(quiet_interval_ms=60_000)
    a = await cluster.start("a", sync=slow)
    b = await cluster.start("b", sync=slow)
    await eventually(lambda: linked(a) == linked(b) == 1)
    await eventually(
        lambda: a._replica.puller._session is None and a.status()["counters"]["sync"].get("sessions")
    )
    # Lost on the way: neither the broadcast nor the next regular sync will bring it for a minute.
    b._replica.tree.handle_peer_down(a.site)
    await insert(b, 1)
    b._replica.want_sync(a.site)

    async def there() -> bool:
        return await ids(a) == [1]

    assert await eventually(there) < 5


async def test_a_transaction_of_100_megabytes_arrives_whole_in_parts(cluster):
    agents = await cluster.three()
    a = agents[0]
    value = "x" * 10_000
    ids_ = range(10_000)
    await a.execute([("INSERT INTO items VALUES (?, ?)", (number, value)) for number in ids_])
    seen: set[int] = set()

    async def there() -> bool:
        for agent in agents[1:]:
            seen.add((await agent.query("SELECT count(*) FROM items")).rows[0][0])
        return all(ranges(agent, a) == 1 for agent in agents)

    def ranges(agent: Agent, of: Agent) -> int:
        return agent.status()["sites"].get(of.site.hex(), {"head": 0})["head"]

    await eventually(there, within_s=60)
    await there()
    assert seen == {0, 10_000}, "never a part of it"
    assert {await digest(agent) for agent in agents} == {await digest(a)}
    assert all(agent.status()["counters"]["broadcast"].get("pushes_new", 0) == 0 for agent in agents)


async def test_what_was_changed_behind_the_triggers_is_found_and_put_right(cluster, tmp_path):
    quick = VerifySettings(slice_rows=64, pause_ms=20, interval_ms=50)
    a, b, c = [await cluster.start(name, verify=quick) for name in "abc"]
    await a.execute([("INSERT INTO items VALUES (?, ?)", (number, f"v{number}")) for number in range(300)])
    await eventually(lambda: all(agent.status()["passes_verified"] for agent in (a, b, c)))
    right = await digest(a)
    write_past_triggers(
        tmp_path / "b.db",
        ("UPDATE items SET v = 'wrong' WHERE id % 50 = 7",),
        ("DELETE FROM items WHERE id BETWEEN 100 AND 110",),
        ("DELETE FROM _repl_clock_items WHERE k_id BETWEEN 105 AND 115",),
    )
    assert await digest(b) != right

    async def equal() -> bool:
        return [await digest(agent) for agent in (a, b, c)] == [right] * 3

    await eventually(equal)
    assert (await b.query("SELECT count(*) FROM items WHERE v = 'v' || id")).rows == [(300,)]
    assert b.status()["counters"]["verification"]["rows_healed"] >= 17


async def test_a_commit_that_nobody_was_told_of_is_made_up_for_by_the_next(cluster):
    a = await cluster.start("a")
    await insert(a, 1)
    await a._database.run(lambda store: store.execute([("INSERT INTO items VALUES (2, '')", ())], NOW))
    assert a.status()["sites"][a.site.hex()]["head"] == 1
    await insert(a, 3)
    await eventually(lambda: a.status()["sites"][a.site.hex()] == {"head": 3, "last": 3, "gaps": []})
    assert cluster.commits["a"][-1].reload == ("items",)
    assert a.status()["counters"]["agent"]["commits_missed"] == 1
    b = await cluster.start("b")

    async def there() -> bool:
        return await ids(b) == [1, 2, 3]

    await eventually(there)
