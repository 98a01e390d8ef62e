"""A replica built from a subscription's events equals the query run again: at every step, for any query."""

from __future__ import annotations

import asyncio
import sqlite3
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from replication.core.clock import SiteId
from replication.core.subscription import ChangeKind, pack_cells
from replication.schema import Schema
from replication.store import Store
from replication.subscriptions import SubscriptionLimits, Subscriptions

QUERIES = {
    "all": "SELECT * FROM a",
    "no key": "SELECT x FROM a",
    "duplicates": "SELECT x FROM a UNION ALL SELECT z FROM b",
    "where": "SELECT id, y FROM a WHERE x > 1 OR x IS NULL",
    "join": "SELECT a.id, b.id, a.x, b.z FROM a JOIN b ON b.aid = a.id",
    "left join": "SELECT a.id, b.z FROM a LEFT JOIN b ON b.aid = a.id",
    "self join": "SELECT p.id, q.id FROM a AS p JOIN a AS q ON p.x = q.x AND p.id < q.id",
    "only existence": "SELECT id FROM a WHERE EXISTS (SELECT 1 FROM b WHERE b.aid = a.id)",
    "not in": "SELECT id, z FROM b WHERE aid NOT IN (SELECT id FROM a)",
    "count": "SELECT count(*) FROM b",
    "aggregates": "SELECT count(x), sum(x), min(y), max(id), count(DISTINCT x) FROM a",
    "group": "SELECT aid, count(*), total(z) FROM b GROUP BY aid",
    "having": "SELECT x, count(*) FROM a GROUP BY x HAVING count(*) > 1",
    "distinct": "SELECT DISTINCT x FROM a",
    "top": "SELECT id, x FROM a ORDER BY x DESC, id LIMIT 2",
    "page": "SELECT id FROM a ORDER BY y, id LIMIT 2 OFFSET 1",
    "scalar subquery": "SELECT id, (SELECT max(z) FROM b WHERE b.aid = a.id) FROM a",
    "from subquery": "SELECT s.* FROM (SELECT aid, count(*) AS n FROM b GROUP BY aid) AS s WHERE s.n > 1",
    "common table": "WITH q AS (SELECT aid, sum(z) AS s FROM b GROUP BY aid)"
    " SELECT id, s FROM a LEFT JOIN q ON aid = id",
    "recursive": "WITH RECURSIVE r(n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM r"
    " WHERE n < (SELECT count(*) FROM b)) SELECT n FROM r",
    "window": "SELECT id, row_number() OVER (ORDER BY x, id), sum(x) OVER (ORDER BY id) FROM a",
    "union": "SELECT id FROM a UNION SELECT aid FROM b",
    "except": "SELECT id FROM a EXCEPT SELECT aid FROM b",
    "view": "SELECT * FROM pairs",
    "view of a view": "SELECT n FROM pair_count",
    "json": "SELECT a.id, j.value FROM a, json_each('[1,2]') AS j WHERE j.value <> a.x",
}
VIEWS = """
CREATE VIEW pairs AS SELECT a.id AS one, b.id AS two, z FROM a JOIN b ON b.aid = a.id;
CREATE VIEW pair_count AS SELECT count(*) AS n FROM pairs;
"""

ids = st.integers(0, 3)
values = st.sampled_from([None, 0, 1, 2, 2.0, 2.5, "2", "é", "", b"\0"])
affinities = st.sampled_from(["", "TEXT", "INTEGER", "REAL", "BLOB", "TEXT COLLATE NOCASE"])
keys = st.sampled_from(["INTEGER", "TEXT"])
modes = st.sampled_from(["", "-- merge: column\n"])


@st.composite
def schemas(draw):
    key = draw(
        st.sampled_from(["INTEGER PRIMARY KEY", "INTEGER NOT NULL PRIMARY KEY", "TEXT NOT NULL PRIMARY KEY"])
    )
    end = draw(st.sampled_from([")", ") WITHOUT ROWID"]))
    a = f"CREATE TABLE a (id {key}, x {draw(affinities)}, y {draw(affinities)}{end};"
    end = draw(st.sampled_from([")", ") WITHOUT ROWID"]))
    of_b = f"id INTEGER NOT NULL, aid {draw(keys)} NOT NULL, z {draw(affinities)}, PRIMARY KEY (id, aid)"
    parts = [draw(modes) + a, f"{draw(modes)}CREATE TABLE b ({of_b}{end};"]
    if draw(st.booleans()):
        parts.append("CREATE TABLE c (k TEXT NOT NULL PRIMARY KEY);")
    if draw(st.booleans()):
        parts.append("CREATE INDEX a_x ON a (x);")
    return "\n".join(parts)


statements = st.one_of(
    st.tuples(st.just("REPLACE INTO a VALUES (?, ?, ?)"), st.tuples(ids, values, values)),
    st.tuples(st.just("REPLACE INTO b VALUES (?, ?, ?)"), st.tuples(ids, ids, values)),
    st.tuples(st.just("UPDATE a SET x = ? WHERE id = ?"), st.tuples(values, ids)),
    st.tuples(st.just("UPDATE a SET x = y, y = x WHERE id <> ?"), st.tuples(ids)),
    st.tuples(st.just("UPDATE OR REPLACE a SET id = ? WHERE id = ?"), st.tuples(ids, ids)),
    st.tuples(st.just("UPDATE OR REPLACE b SET aid = ? WHERE id = ?"), st.tuples(ids, ids)),
    st.tuples(st.just("DELETE FROM a WHERE id = ?"), st.tuples(ids)),
    st.tuples(st.just("DELETE FROM b WHERE aid = ?"), st.tuples(ids)),
    st.tuples(st.just("DELETE FROM a"), st.just(())),
)
transactions = st.lists(statements, min_size=1, max_size=4)
steps = st.one_of(
    st.tuples(st.sampled_from(["local", "peer", "foreign", "unheard"]), transactions),
    st.tuples(st.sampled_from(["interrupt", "resume"]), st.just([])),
    st.tuples(st.sampled_from(["restart", "crash"]), transactions),
)


class Client:
    """Follows one query as a program elsewhere would."""

    def __init__(self, subscriptions, subscription, sql):
        self.sql = sql
        self.id = subscription.id
        self.listener = subscriptions.listen(subscription)
        self.listener.__enter__()
        self.rows = dict(self.listener.rows)
        self.last_id = self.listener.last_id
        assert self.last_id == 0

    def interrupt(self):
        if self.listener is not None:
            self.listener.__exit__()
            self.listener = None

    def resume(self, subscriptions):
        if self.listener is None:
            self.listener = subscriptions.listen(subscriptions.get(self.id), from_id=self.last_id)
            self.listener.__enter__()

    async def take(self):
        while changes := await self.listener.read(0):
            for change in changes:
                assert change.id == self.last_id + 1
                self.last_id = change.id
                if change.kind is ChangeKind.INSERT:
                    assert change.row_id not in self.rows
                    self.rows[change.row_id] = change.cells
                elif change.kind is ChangeKind.UPDATE:
                    assert self.rows[change.row_id] != change.cells
                    self.rows[change.row_id] = change.cells
                else:
                    assert self.rows.pop(change.row_id) == change.cells


class World:
    """A replica with subscriptions, a peer that writes too, and another program at the file."""

    def __init__(self, directory, schema_sql):
        self.path = Path(directory) / "replica.db"
        self.schema = Schema.parse(schema_sql)
        self.store = Store.open(self.path, self.schema, site=SiteId(b"1" * 16))
        self.peer = Store.open(":memory:", self.schema, site=SiteId(b"2" * 16))
        self.foreign = sqlite3.connect(self.path, isolation_level=None)
        self.foreign.execute("PRAGMA synchronous = OFF")
        self.foreign.executescript(VIEWS)
        self.now = 0.0
        self.subscriptions = None
        self.is_noted = False  # the file has a write that was not captured yet, so the query knows of more
        self.clients = []

    async def start(self):
        limits = SubscriptionLimits(idle_ms=float("inf"))
        self.subscriptions = Subscriptions(
            self.path, self.schema, limits, monotonic=lambda: self.now, boot=lambda: "boot"
        )
        await self.subscriptions.start()

    async def stop(self):
        for client in self.clients:
            client.interrupt()
        await self.subscriptions.stop()

    async def crash(self):
        """End as a process does that is killed: nothing is said to the file."""
        for client in self.clients:
            client.interrupt()
        self.subscriptions._file.close = self.subscriptions._file._connection.close
        await self.subscriptions.stop()

    def write(self, who, batch):
        self.now += 100.0
        was_noted, self.is_noted = self.is_noted, who == "unheard"
        wall_ms = 1_000_000 + int(self.now * 1000)
        if who == "local":
            return [self.store.execute(batch, wall_ms)[1]]
        if who == "peer":
            _, commit = self.peer.execute(batch, wall_ms)
            if commit is None:
                self.is_noted = was_noted  # the replica was not asked to do anything, so it captured nothing
                return []
            return [self.store.apply(commit.changesets, wall_ms).commit]
        self.foreign.execute("BEGIN IMMEDIATE")
        for sql, values in batch:
            self.foreign.execute(sql, values)
        self.foreign.execute("COMMIT")
        return [] if who == "unheard" else [self.store.capture(wall_ms)]

    async def settle(self):
        async with asyncio.timeout(20):
            while any(item.wanted_seq is not None for item in self.subscriptions._by_id.values()):
                self.now += 100.0
                self.subscriptions._kick.set()
                await asyncio.sleep(0)

    async def step(self, kind, batch):
        if kind in ("restart", "crash"):
            await (self.stop() if kind == "restart" else self.crash())
            self.write("local", batch)
            await self.start()
            kind = "resume"
        if kind == "interrupt":
            for client in self.clients:
                client.interrupt()
        elif kind == "resume":
            for client in self.clients:
                client.resume(self.subscriptions)
        else:
            for commit in self.write(kind, batch):
                if commit is not None:
                    self.subscriptions.handle_commit(commit)
        await self.settle()
        if not self.is_noted:
            await self.check()

    async def check(self):
        for client in self.clients:
            if client.listener is None:
                continue
            await client.take()
            expected = [pack_cells(row) for row in self.foreign.execute(client.sql)]
            assert sorted(client.rows.values()) == sorted(expected), client.sql

    async def close(self):
        await self.stop()
        for store in (self.store, self.peer):
            store.close()
        self.foreign.close()


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
@given(schema_sql=schemas(), script=st.lists(steps, max_size=12), first=transactions)
def test_replica_built_from_events_equals_the_query_at_every_step(schema_sql, script, first):
    async def run(directory):
        world = World(directory, schema_sql)
        world.write("local", first)
        await world.start()
        try:
            for sql in QUERIES.values():
                world.clients.append(
                    Client(world.subscriptions, await world.subscriptions.subscribe(sql), sql)
                )
            await world.check()
            for kind, batch in script:
                await world.step(kind, batch)
            await world.step("foreign", [("DELETE FROM b WHERE z = 2", ())])
            await world.step("resume", [])
        finally:
            await world.close()

    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(run(directory))
