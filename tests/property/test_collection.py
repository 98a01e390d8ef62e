"""Tombstones that every member has passed can go, whenever each goes: no deleted row comes back."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from replication.collecting import Collector
from replication.core.clock import HLC_MAX, Hlc, SiteId, hlc_from_ms
from replication.schema import Schema
from replication.store import Store

SCHEMA = Schema.parse(
    """
    CREATE TABLE t (k INTEGER PRIMARY KEY, a);
    -- merge: column
    CREATE TABLE c (k INTEGER PRIMARY KEY, a, b DEFAULT 0);
    """
)
MEMBERS = 3
members = st.integers(0, MEMBERS - 1)
ids = st.integers(0, 2)
statements = st.sampled_from(
    [
        "INSERT OR IGNORE INTO {t} (k, a) VALUES ({k}, 1)",
        "UPDATE {t} SET a = a + 1 WHERE k = {k}",
        "REPLACE INTO {t} (k, a) VALUES ({k}, 5)",
        "DELETE FROM {t} WHERE k = {k}",
        "DELETE FROM {t}",
    ]
)
steps = st.one_of(
    st.tuples(st.just("write"), members, statements, st.sampled_from(["t", "c"]), ids),
    st.tuples(st.just("deliver"), members, members, st.integers(0, 30)),
    st.tuples(st.just("collect"), members, st.integers(1, 4)),
    st.tuples(st.just("skew"), members, st.integers(-20, 20)),
)


class Members:
    """Members whose changesets are delivered one by one, and one replica more that forgets nothing."""

    def __init__(self, is_hasty=False):
        self.is_hasty = is_hasty
        self.stores = [
            Store.open(":memory:", SCHEMA, site=SiteId(bytes([n + 1]) * 16)) for n in range(MEMBERS)
        ]
        self.witness = Store.open(":memory:", SCHEMA, site=SiteId(b"w" * 16))
        self.collectors = [Collector(store, keep_ms=0) for store in self.stores]
        self.sent = []  # (time, changeset)
        self.now = [1_000_000] * MEMBERS
        self.collected = 0

    def write(self, member, sql, table, key):
        commit = self.stores[member].execute([(sql.format(t=table, k=key), ())], self.now[member])[1]
        if commit is not None:
            for changeset in commit.changesets:
                self.sent.append((self.stores[member]._clock.last, changeset))
            self.witness.apply(commit.changesets, 2_000_000)

    def deliver(self, source, target, index):
        mine = [changeset for _, changeset in self.sent if changeset.site == self.stores[source].site]
        if mine:
            self.stores[target].apply([mine[index % len(mine)]], 2_000_000)

    def skew(self, member, by_ms):
        self.now[member] += by_ms

    def compute_stable(self):
        """Return the time up to which each member has seen all there is, and behind which all will write."""
        stable = min(store._clock.last for store in self.stores)
        for hlc, changeset in self.sent:
            for store in self.stores:
                seen = store.seen().get(changeset.site)
                if seen is None or not seen.contains(changeset.version):
                    stable = min(stable, Hlc(hlc - 1))
        return Hlc(HLC_MAX) if self.is_hasty else stable

    def collect(self, member, limit):
        self.collected += self.collectors[member].run(self.compute_stable(), 2_000_000, limit)

    def settle(self):
        for store in (*self.stores, self.witness):
            store.apply([changeset for _, changeset in self.sent], 2_000_000)

    def assert_equal(self):
        for table in SCHEMA.tables:
            expected = self.witness.digest(table)
            assert [store.digest(table) for store in self.stores] == [expected] * MEMBERS

    def close(self):
        for store in (*self.stores, self.witness):
            store.close()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(steps, max_size=40))
def test_no_deleted_row_comes_back_when_tombstones_go_in_time(taken):
    cluster = Members()
    try:
        for name, *given_ in taken:
            getattr(cluster, name)(*given_)
        cluster.settle()
        cluster.assert_equal()
        for member in range(MEMBERS):
            cluster.collect(member, 100)
        cluster.assert_equal()
    finally:
        cluster.close()


@pytest.mark.parametrize("is_hasty", [False, True])
def test_tombstones_that_go_too_early_let_rows_come_back(is_hasty):
    cluster = Members(is_hasty)
    try:
        insert = "INSERT OR IGNORE INTO {t} (k, a) VALUES ({k}, 1)"
        cluster.write(0, insert, "t", 1)
        cluster.deliver(0, 1, 0)
        cluster.skew(1, 10)
        cluster.write(1, "DELETE FROM {t} WHERE k = {k}", "t", 1)
        cluster.deliver(1, 2, 0)  # the deletion comes before what it deletes
        cluster.collect(2, 100)
        assert cluster.collected == is_hasty
        cluster.settle()
        if is_hasty:
            with pytest.raises(AssertionError):
                cluster.assert_equal()
        else:
            cluster.assert_equal()
            cluster.collect(2, 100)
            cluster.collect(2, 100)
            assert cluster.collected == (cluster.compute_stable() >= hlc_from_ms(1_000_010))
    finally:
        cluster.close()
