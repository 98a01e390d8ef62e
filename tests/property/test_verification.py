"""Whatever is done to one replica's file behind its back, sessions with the others make all equal again."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from replication.core.clock import SiteId
from replication.schema import Schema
from replication.store import Store
from tests.fakes.verification import NOW, Session, write_past_triggers

SCHEMA = Schema.parse(
    """
    CREATE TABLE t (k INTEGER PRIMARY KEY, a, b);
    -- merge: column
    CREATE TABLE c (k INTEGER PRIMARY KEY, a, b);
    """
)
TABLES = list(SCHEMA.tables)
REPLICAS = 3
replicas = st.integers(0, REPLICAS - 1)
ids = st.integers(0, 4)
values = st.sampled_from([None, 0, 1, 1.0, "x", b"x", ""])
tables = st.sampled_from(TABLES)
writes = st.tuples(
    tables,
    st.one_of(
        st.tuples(st.just("REPLACE INTO {t} VALUES (?, ?, ?)"), st.tuples(ids, values, values)),
        st.tuples(st.just("UPDATE {t} SET a = ? WHERE k = ?"), st.tuples(values, ids)),
        st.tuples(st.just("UPDATE {t} SET b = ? WHERE k = ?"), st.tuples(values, ids)),
        st.tuples(st.just("DELETE FROM {t} WHERE k = ?"), st.tuples(ids)),
    ),
)
vandalism = st.tuples(
    tables,
    st.one_of(
        st.tuples(st.just("DELETE FROM {t} WHERE k = ?"), st.tuples(ids)),
        st.tuples(st.just("UPDATE {t} SET a = ? WHERE k = ?"), st.tuples(values, ids)),
        st.tuples(st.just("UPDATE {t} SET a = ?, b = ?"), st.tuples(values, values)),
        st.tuples(st.just("REPLACE INTO {t} VALUES (?, ?, ?)"), st.tuples(ids, values, values)),
        st.tuples(st.just("DELETE FROM _repl_clock_{t} WHERE k_k = ?"), st.tuples(ids)),
        st.tuples(st.just("REPLACE INTO {t} SELECT * FROM old_{t} WHERE k = ?"), st.tuples(ids)),
        st.tuples(
            st.just("REPLACE INTO _repl_clock_{t} SELECT * FROM old_clock_{t} WHERE k_k = ?"), st.tuples(ids)
        ),
    ),
)


class Replicas:
    def __init__(self, directory):
        self.paths = [Path(directory) / f"{index}.db" for index in range(REPLICAS)]
        self.stores = [
            Store.open(path, SCHEMA, site=SiteId(bytes([index + 1]) * 16))
            for index, path in enumerate(self.paths)
        ]
        for store in self.stores:
            store.connection.execute("PRAGMA synchronous = OFF")
        self.now = NOW

    def write(self, batch):
        for replica, (table, (sql, parameters)) in batch:
            self.now += 1
            self.stores[replica].execute([(sql.format(t=table), parameters)], self.now)
            self.deliver()

    def deliver(self):
        for source in self.stores:
            log = source.read_log(source.site, 1, 10**6, 10**9)
            for target in self.stores:
                target.apply(log, self.now)

    def read(self, store, table):
        return {
            row[0]: row[1:] for row in store.connection.execute(f"SELECT k, quote(a), quote(b) FROM {table}")
        }

    def writers(self, store, table):
        """By key, all sites whose clocks are in a row's record."""
        found = {}
        for pk, *fields, _ in store.tables[table].read_records(None, None):
            record = store.sites.decode(fields)
            clocks = [record.life, *record.cells.values()] + ([record.base] if record.base else [])
            found[pk] = {clock.site for clock in clocks}
        return found

    def keep_old(self, index):
        for table in TABLES:
            connection = self.stores[index].connection
            connection.execute(f"CREATE TABLE old_{table} AS SELECT * FROM {table}")
            connection.execute(f"CREATE TABLE old_clock_{table} AS SELECT * FROM _repl_clock_{table}")

    def close(self):
        for store in self.stores:
            store.close()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    early=st.lists(st.tuples(replicas, writes), max_size=8),
    late=st.lists(st.tuples(replicas, writes), max_size=8),
    victim=replicas,
    damage=st.lists(vandalism, min_size=1, max_size=6),
    after=st.lists(st.tuples(replicas, writes), max_size=2),
    sessions=st.lists(st.tuples(replicas, replicas), max_size=6),
    rows_max=st.sampled_from([1, 3, 1000]),
)
def test_sessions_in_any_order_end_with_equal_replicas(
    early, late, victim, damage, after, sessions, rows_max
):
    with tempfile.TemporaryDirectory() as directory:
        cluster = Replicas(directory)
        try:
            cluster.write(early)
            cluster.keep_old(victim)
            cluster.write(late)
            write_past_triggers(
                cluster.paths[victim], *((sql.format(t=table), *given) for table, (sql, given) in damage)
            )
            cluster.write([(replica, one) for replica, one in after if replica != victim])
            check(cluster, victim, sessions, rows_max)
        finally:
            cluster.close()


def check(cluster, victim, sessions, rows_max):
    sound = cluster.stores[(victim + 1) % REPLICAS]
    expected = {table: cluster.read(sound, table) for table in TABLES}
    writers = {table: cluster.writers(sound, table) for table in TABLES}
    rounds = [(a, b) for a in range(REPLICAS) for b in range(REPLICAS)] * 3
    for asker, peer in sessions + rounds:
        if asker != peer:
            for table in TABLES:
                Session(
                    cluster.stores[asker], cluster.stores[peer], table, rows_max=rows_max, now=cluster.now
                )
            cluster.deliver()
    for table in TABLES:
        assert len({store.digest(table) for store in cluster.stores}) == 1, table
        after = cluster.read(sound, table)
        assert all(cluster.read(store, table) == after for store in cluster.stores)
        for key, row in expected[table].items():
            if cluster.stores[victim].site not in writers[table][key]:
                assert after[key] == row, (table, key)
