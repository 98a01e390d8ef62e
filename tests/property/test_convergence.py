"""Replicas that have seen the same changes are equal, whatever the order in which they saw them."""

from __future__ import annotations

import sqlite3
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from replication.core.clock import SiteId
from replication.schema import Schema
from replication.store import Store

SCHEMA = Schema.parse(
    """
    CREATE TABLE "by row" (
        "the id" INTEGER NOT NULL PRIMARY KEY, a TEXT COLLATE NOCASE, "or" NUMERIC, c BLOB
    );
    -- merge: column
    CREATE TABLE cells (k TEXT NOT NULL, n INTEGER NOT NULL, a, b TEXT NOT NULL DEFAULT 'b', c DEFAULT 7,
        PRIMARY KEY (k, n)) WITHOUT ROWID;
    CREATE TABLE keys_only (k TEXT NOT NULL PRIMARY KEY);
    """
)
REPLICAS = 3
replicas = st.integers(0, REPLICAS - 1)
ids = st.integers(0, 2)
names = st.sampled_from(["x", "y"])
values = st.one_of(
    st.none(),
    st.sampled_from(
        ["", "a", "A", "1", "\0z", b"", b"a", 0, 1, 1.0, 1.5, -0.5, 2**63 - 1, -(2**63), 2**53 + 1]
    ),
)
texts = st.sampled_from(["b", "B", "later"])

ROW = '"by row"'
statements = st.one_of(
    st.tuples(
        st.just(f"INSERT OR IGNORE INTO {ROW} VALUES (?, ?, ?, ?)"), st.tuples(ids, values, values, values)
    ),
    st.tuples(st.just(f"REPLACE INTO {ROW} VALUES (?, ?, ?, ?)"), st.tuples(ids, values, values, values)),
    st.tuples(
        st.just(
            f'INSERT INTO {ROW} ("the id", a) VALUES (?, ?) '
            'ON CONFLICT DO UPDATE SET a = excluded.a, "or" = "or"'
        ),
        st.tuples(ids, values),
    ),
    st.tuples(st.just(f'UPDATE {ROW} SET "or" = ? WHERE "the id" = ?'), st.tuples(values, ids)),
    st.tuples(st.just(f'UPDATE OR REPLACE {ROW} SET "the id" = ? WHERE "the id" = ?'), st.tuples(ids, ids)),
    st.tuples(st.just(f"UPDATE OR REPLACE {ROW} SET rowid = ? WHERE rowid = ?"), st.tuples(ids, ids)),
    st.tuples(st.just(f'DELETE FROM {ROW} WHERE "the id" = ?'), st.tuples(ids)),
    st.tuples(
        st.just("INSERT OR IGNORE INTO cells (k, n, a) VALUES (?, ?, ?)"), st.tuples(names, ids, values)
    ),
    st.tuples(
        st.just("REPLACE INTO cells VALUES (?, ?, ?, ?, ?)"), st.tuples(names, ids, values, texts, values)
    ),
    st.tuples(st.just("UPDATE cells SET a = ? WHERE k = ?"), st.tuples(values, names)),
    st.tuples(st.just("UPDATE cells SET b = ?, c = ? WHERE n = ?"), st.tuples(texts, values, ids)),
    st.tuples(st.just("UPDATE OR REPLACE cells SET n = n + ? WHERE k = ?"), st.tuples(ids, names)),
    st.tuples(st.just("UPDATE OR IGNORE cells SET k = ? WHERE n = ?"), st.tuples(names, ids)),
    st.tuples(st.just("DELETE FROM cells WHERE n < ?"), st.tuples(ids)),
    st.tuples(st.just("REPLACE INTO keys_only VALUES (?)"), st.tuples(names)),
    st.tuples(st.just("DELETE FROM keys_only"), st.just(())),
)


def read(store: Store) -> dict[str, list[tuple[object, ...]]]:
    tables = {}
    for table in SCHEMA.tables.values():
        columns = ", ".join(f'quote("{column}")' for column in table.columns)
        tables[table.name] = store.connection.execute(
            f'SELECT {columns} FROM "{table.name}" ORDER BY 1'
        ).fetchall()
        tables[table.name].sort()
    return tables


class Cluster(RuleBasedStateMachine):
    """Three replicas in files, a second client on each file, and a network that delivers as it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.wall_ms = [1_000_000 for _ in range(REPLICAS)]
        self.stores = []
        self.others = []
        self.feeds: list[dict[str, dict[tuple[object, ...], tuple[object, ...]]]] = []
        for index in range(REPLICAS):
            path = Path(self.directory.name) / f"{index}.db"
            self.stores.append(Store.open(path, SCHEMA, site=SiteId(bytes([index]) * 16)))
            other = sqlite3.connect(path, isolation_level=None)
            other.execute("PRAGMA synchronous = OFF")
            if index:
                other.execute("PRAGMA recursive_triggers = ON")
            self.others.append(other)
            self.feeds.append({name: {} for name in SCHEMA.tables})

    def teardown(self) -> None:
        for connection in self.others:
            connection.close()
        for store in self.stores:
            store.close()
        self.directory.cleanup()

    def feed(self, index: int, commit) -> list[object]:
        if commit is None:
            return []
        for table, pk, row in commit.changes:
            if row is None:
                self.feeds[index][table].pop(pk, None)
            else:
                self.feeds[index][table][pk] = row
        return list(commit.changesets)

    @rule(
        writes=st.lists(
            st.tuples(replicas, st.booleans(), st.lists(statements, min_size=1, max_size=3)), max_size=8
        )
    )
    def write(self, writes):
        for replica, is_foreign, batch in writes:
            if is_foreign:
                self.write_from_another_connection(replica, batch)
            else:
                self.execute(replica, batch)

    def execute(self, replica, batch):
        before = read(self.stores[replica])
        noted = bool(self.stores[replica]._capture.find_noted())
        _, commit = self.stores[replica].execute(batch, self.wall_ms[replica])
        if not noted:
            assert (commit is None) == (read(self.stores[replica]) == before)
        self.feed(replica, commit)

    def write_from_another_connection(self, replica, batch):
        other = self.others[replica]
        other.execute("BEGIN IMMEDIATE")
        for sql, parameters in batch:
            other.execute(sql, parameters)
        other.execute("COMMIT")

    @rule(replica=replicas)
    def capture(self, replica):
        self.feed(replica, self.stores[replica].capture(self.wall_ms[replica]))

    @rule(by_ms=st.lists(st.integers(-50, 100), min_size=REPLICAS, max_size=REPLICAS))
    def turn_the_clocks(self, by_ms):
        self.wall_ms = [wall_ms + step for wall_ms, step in zip(self.wall_ms, by_ms, strict=True)]

    @rule(source=replicas, receiver=replicas, data=st.data())
    def deliver_some_of_the_log(self, source, receiver, data):
        log = self.log_of(source)
        if log:
            picked = data.draw(st.lists(st.sampled_from(log), max_size=6))
            self.feed(receiver, self.stores[receiver].apply(picked, self.wall_ms[receiver]).commit)

    @rule(source=replicas, receiver=replicas, chunk_bytes=st.sampled_from([1, 300, 100_000]))
    def send_a_snapshot(self, source, receiver, chunk_bytes):
        if source != receiver:
            chunks = self.stores[source].snapshot(chunk_bytes)
            self.feed(receiver, self.stores[receiver].apply_snapshot(chunks, self.wall_ms[receiver]))

    @rule(replica=replicas)
    def reopen(self, replica):
        store = self.stores[replica]
        before = (store.seq, store.seen(), store._clock.last)
        store.connection.close()  # as after kill -9: nothing is said before
        path = Path(self.directory.name) / f"{replica}.db"
        self.stores[replica] = Store.open(path, SCHEMA)
        after = (self.stores[replica].seq, self.stores[replica].seen())
        assert after == before[:2]

    def log_of(self, index: int) -> list[object]:
        store = self.stores[index]
        entries = []
        for site, ranges in store.seen().items():
            found = store.read_log(site, store.log_floor(site), ranges.last, 10**9)
            assert [e.version for e in found] == [
                version
                for first, last in ranges
                for version in range(first, last + 1)
                if version >= store.log_floor(site)
            ]
            entries += found
        return entries

    @invariant()
    def guard_is_never_left_set(self):
        for store in self.stores:
            assert store.connection.execute("SELECT merging FROM _repl_state").fetchone() == (0,)

    def settle(self) -> None:
        now = max(self.wall_ms)
        for index, store in enumerate(self.stores):
            self.feed(index, store.capture(now))
        for _ in range(2):
            for source in range(REPLICAS):
                for target in range(REPLICAS):
                    result = self.stores[target].apply(self.log_of(source), now)
                    self.feed(target, result.commit)
                    if self.stores[target].seen() != self.stores[source].seen():
                        chunks = self.stores[source].snapshot(500)
                        self.feed(target, self.stores[target].apply_snapshot(chunks, now))

    @rule()
    def all_sync_and_are_equal(self):
        self.settle()
        first = self.stores[0]
        for index, store in enumerate(self.stores):
            assert not store.parked()
            assert store.seen() == first.seen()
            assert read(store) == read(first)
            for table in SCHEMA.tables.values():
                assert store.digest(table.name) == first.digest(table.name), table.name
                rows = store.connection.execute(
                    f"""SELECT {", ".join(f'"{c}"' for c in table.columns)} FROM "{table.name}" """
                ).fetchall()
                assert sorted(map(repr, self.feeds[index][table.name].values())) == sorted(map(repr, rows))


TestConvergence = Cluster.TestCase
TestConvergence.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
