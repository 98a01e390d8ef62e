"""The wait of a database that was put back for the versions that it had given out since."""

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from pathlib import Path

import pytest

from replication import agent as agent_module
from replication.agent import Agent
from replication.backup import make_backup, restore_backup
from replication.core.clock import SiteId
from replication.core.member import MemberInfo, MemberState, Update
from replication.core.recovery import SETTLE_MS, Recovery
from replication.core.swim import SwimSettings
from replication.errors import StoreError
from replication.schema import Schema
from replication.settings import AgentSettings
from replication.sidetables import is_held
from replication.store import Store

NOW = 1_700_000_000_000
SCHEMA = Schema.parse("CREATE TABLE items (id INTEGER PRIMARY KEY);")
# Four times the default pace, so that a death takes a second or two.
QUICK = SwimSettings(
    probe_interval_ms=250, probe_timeout_ms=100, gossip_interval_ms=50, reconnect_interval_ms=400
)
A, B, C = (SiteId(letter * 16) for letter in (b"a", b"b", b"c"))


def settled(recovery: Recovery, *known: SiteId) -> bool:
    """Look twice, so far apart that who is known counts as settled."""
    recovery.is_over(known, 0)
    return recovery.is_over(known, SETTLE_MS)


def test_waits_for_every_member():
    recovery = Recovery()
    assert not settled(recovery, A, B)
    recovery.handle_synced(A)
    assert not settled(recovery, A, B)
    assert recovery.compute_missing([A, B]) == [B]
    recovery.handle_synced(B)
    assert settled(recovery, A, B)


def test_is_never_over_without_a_member():
    assert not settled(Recovery())


def test_waits_until_no_further_member_has_shown_up():
    recovery = Recovery()
    for site in (A, B, C):
        recovery.handle_synced(site)
    assert not recovery.is_over([A], 0)
    assert not recovery.is_over([A, B], SETTLE_MS)
    assert not recovery.is_over([B, A], 2 * SETTLE_MS - 1)
    assert recovery.is_over([B, A], 2 * SETTLE_MS)


def test_a_member_that_has_left_is_no_longer_waited_for():
    recovery = Recovery()
    recovery.handle_synced(A)
    assert not settled(recovery, A, B)
    assert settled(recovery, A)


def test_the_latest_claim_of_a_member_counts_and_those_that_left_do_not():
    def claim(site: SiteId, state: MemberState, incarnation: int) -> Update:
        return Update(MemberInfo(site, site.decode()[:1], "127.0.0.1", 1, incarnation), state)

    recovery = Recovery()
    recovery.handle_claims([claim(A, MemberState.ALIVE, 1), claim(B, MemberState.DEAD, 1)])
    recovery.handle_claims([claim(C, MemberState.DEAD, 2), claim(A, MemberState.LEFT, 1)])
    recovery.handle_claims([claim(A, MemberState.ALIVE, 1), claim(C, MemberState.ALIVE, 1)])
    assert recovery.compute_known(C) == {B: "b"}
    assert recovery.compute_known(A) == {B: "b", C: "c"}


class Agents:
    """Agents that a test starts; all are stopped at its end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running: dict[str, Agent] = {}

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.db"

    async def start(self, name: str) -> Agent:
        join = tuple(f"127.0.0.1:{agent.address[1]}" for agent in self.running.values())
        settings = AgentSettings(
            name=name, path=self.path(name), bind=("127.0.0.1", 0), join=join, swim=QUICK
        )
        agent = Agent(settings, SCHEMA, on_commit=lambda _commit: None)
        await agent.start()
        self.running[name] = agent
        return agent

    async def stop(self, name: str) -> None:
        await self.running.pop(name).stop()

    def restore(self, name: str, backup: Path) -> None:
        restore_backup(backup, self.path(name), NOW, keep_site=True)


@pytest.fixture
async def agents(tmp_path: Path) -> AsyncIterator[Agents]:
    agents = Agents(tmp_path)
    yield agents
    for name in list(agents.running):
        await agents.stop(name)


@pytest.fixture
async def backup(agents: Agents, tmp_path: Path) -> Path:
    """A backup of `a`, which `a` has written after, and `b` knows it all."""
    a = await agents.start("a")
    b = await agents.start("b")
    await insert(a, 1)
    made = await asyncio.to_thread(make_backup, agents.path("a"), tmp_path / "copy", NOW)
    assert made.version == 1
    await insert(a, 2)
    await insert(a, 3)
    await eventually(lambda: head(b, a.site) == 3)
    await agents.stop("a")
    return made.path


async def insert(agent: Agent, number: int) -> int | None:
    return (await agent.execute([("INSERT INTO items VALUES (?)", (number,))])).version


def head(agent: Agent, site: SiteId) -> int:
    return agent.status()["sites"].get(site.hex(), {"head": 0})["head"]


def alive(agent: Agent) -> int:
    return sum(1 for member in agent.members() if member.state == "alive")


async def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        await asyncio.sleep(0.005)


async def test_the_same_site_goes_on_after_its_last_version_however_soon_it_writes(agents, backup):
    agents.restore("a", backup)
    a = await agents.start("a")
    assert await insert(a, 4) == 4
    b = agents.running["b"]
    await eventually(lambda: head(b, a.site) == 4)
    found = await b.query("SELECT id FROM items ORDER BY id")
    assert [number for (number,) in found.rows] == [1, 2, 3, 4]
    assert await a._database.run(lambda store: store.digest("items")) == await b._database.run(
        lambda store: store.digest("items")
    )
    await agents.stop("a")
    with closing(sqlite3.connect(agents.path("a"))) as connection:
        assert not is_held(connection)


async def test_the_same_site_does_not_start_without_the_others_and_does_later(agents, backup, monkeypatch):
    await agents.stop("b")
    agents.restore("a", backup)
    monkeypatch.setattr(agent_module, "RECOVERY_S", 0.2)
    with pytest.raises(StoreError, match="no other node is in reach"):
        await agents.start("a")
    monkeypatch.undo()
    await agents.start("b")
    assert await insert(await agents.start("a"), 4) == 4


async def test_a_member_that_is_dead_is_named_and_holds_the_start_up(agents, backup, monkeypatch):
    b = agents.running["b"]
    c = await agents.start("c")
    await eventually(lambda: alive(b) == alive(c) == 2)
    c._replica.swim.leave = list  # it dies without a word
    await agents.stop("c")
    await eventually(lambda: "dead" in [member.state for member in b.members()])
    agents.restore("a", backup)
    monkeypatch.setattr(agent_module, "RECOVERY_S", 2.5)
    with pytest.raises(StoreError, match="no answer from c;"):
        await agents.start("a")


def test_a_held_store_gives_out_no_version(tmp_path):
    path = tmp_path / "data.db"
    with closing(Store.open(path, SCHEMA)) as store:
        store.execute([("INSERT INTO items VALUES (1)", ())], NOW)
        site = store.site
        make_backup(path, tmp_path / "copy", NOW)
    restore_backup(tmp_path / "copy", path, NOW, keep_site=True)
    with closing(Store.open(path, SCHEMA)) as store:
        assert (store.site, store.is_held) == (site, True)
        with pytest.raises(StoreError, match="put back"):
            store.execute([("INSERT INTO items VALUES (2)", ())], NOW)
        with closing(sqlite3.connect(path)) as foreign, foreign:
            foreign.execute("INSERT INTO items VALUES (3)")
        assert store.capture(NOW) is None
        assert store.seen()[site].encode() == [(1, 1)]
        store.release()
        assert store.capture(NOW) is not None
        assert store.seen()[site].encode() == [(1, 2)]


def test_a_held_store_that_becomes_a_new_site_is_held_no_longer(tmp_path):
    path = tmp_path / "data.db"
    Store.open(path, SCHEMA).close()
    made = make_backup(path, tmp_path / "copy", NOW)
    restore_backup(made.path, path, NOW, keep_site=True)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE _repl_state SET is_clean = 0, boot = 'one before this'")
    with closing(Store.open(path, SCHEMA)) as store:
        assert store.site != made.site
        assert not store.is_held


NOTED = Schema.parse("CREATE TABLE items (id INTEGER PRIMARY KEY, value TEXT);")


def write_past(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as foreign, foreign:
        for statement in statements:
            foreign.execute(statement)


def read_items(store: Store) -> list[tuple[int, str]]:
    return store.connection.execute("SELECT id, value FROM items ORDER BY id").fetchall()


def test_what_others_write_into_a_held_store_wins_against_what_comes_back_and_leaves_when_it_is_released(
    tmp_path,
):
    path = tmp_path / "data.db"
    with (
        closing(Store.open(path, NOTED)) as store,
        closing(Store.open(tmp_path / "peer.db", NOTED)) as peer,
    ):
        insert = [(f"INSERT INTO items VALUES ({number}, 'first')", ()) for number in (1, 2, 3)]
        first = store.execute(insert, NOW)[1]
        make_backup(path, tmp_path / "copy", NOW)
        later = store.execute([("UPDATE items SET value = 'later'", ())], NOW + 1)[1]
        assert first is not None
        assert later is not None
        peer.apply([*first.changesets, *later.changesets], NOW + 1)
        site = store.site
    restore_backup(tmp_path / "copy", path, NOW, keep_site=True)
    write_past(
        path, "UPDATE items SET value = 'foreign' WHERE id = 1", "INSERT INTO items VALUES (4, 'gone')"
    )
    with (
        closing(Store.open(path, NOTED)) as store,
        closing(Store.open(tmp_path / "peer.db", NOTED)) as peer,
    ):
        assert store.capture(NOW + 2) is None
        write_past(path, "DELETE FROM items WHERE id IN (3, 4)", "INSERT INTO items VALUES (5, 'foreign')")
        store.apply(later.changesets, NOW + 2)
        assert read_items(store) == [(1, "foreign"), (2, "later"), (5, "foreign")]
        write_past(path, "INSERT INTO items VALUES (3, 'first')")
        assert store.seen()[site].encode() == [(1, 2)]
        store.release()
        commit = store.capture(NOW + 3)
        assert commit is not None
        assert [item.version for item in commit.changesets] == [3]
        peer.apply(commit.changesets, NOW + 3)
        assert read_items(peer) == read_items(store)
        assert (3, "first") in read_items(peer)
        assert peer.digest("items") == store.digest("items")


async def test_a_backup_with_writes_that_were_not_captured_yet_starts_as_the_same_site(agents, backup):
    agents.restore("a", backup)
    write_past(agents.path("a"), "INSERT INTO items VALUES (7)")
    a = await agents.start("a")
    assert await insert(a, 4) > 4
    b = agents.running["b"]
    await eventually(lambda: head(b, a.site) == head(a, a.site))
    found = await b.query("SELECT id FROM items ORDER BY id")
    assert [number for (number,) in found.rows] == [1, 2, 3, 4, 7]
