"""A store whose file fails in the middle of something."""

import sqlite3

import pytest

from replication.core.clock import SiteId
from replication.errors import StoreError
from replication.schema import Schema
from replication.store import Store

NOW = 1_700_000_000_000
SCHEMA = Schema.parse("CREATE TABLE t (k INTEGER PRIMARY KEY, v);")
INSERT = "INSERT OR REPLACE INTO t VALUES (1, ?)"


def opened(letter: str) -> Store:
    return Store.open(":memory:", SCHEMA, site=SiteId(letter.encode() * 16))


def fail_after(store: Store, steps: int, *, lasting: bool) -> None:
    """Let SQLite fail at that step, and, when lasting, at all that follow: rolling back fails too."""
    remaining = steps

    def step() -> bool:
        nonlocal remaining
        remaining -= 1
        return remaining <= 0 if lasting else remaining == 0

    store.connection.set_progress_handler(step, 1)


@pytest.mark.parametrize("lasting", [False, True])
def test_a_write_that_fails_at_any_step_is_reported_and_the_next_one_succeeds(lasting):
    store = opened("a")
    failures = 0
    for steps in range(1, 1_500):
        fail_after(store, steps, lasting=lasting)
        try:
            store.execute([(INSERT, (steps,))], NOW)
        except StoreError:
            failures += 1
        store.connection.set_progress_handler(None, 0)
        store.execute([(INSERT, (-steps,))], NOW)
        if failures < steps:
            break
    assert failures > 100
    versions = [entry.version for entry in store.read_log(store.site, 1, 1 << 30, 1 << 30)]
    assert versions == list(range(1, len(versions) + 1))
    store.close()


@pytest.mark.parametrize("lasting", [False, True])
def test_a_merge_that_fails_at_any_step_is_applied_when_it_is_tried_again(lasting):
    source = opened("a")
    sent = source.execute([(INSERT, (0,))], NOW)[1].changesets
    failures = 0
    for steps in range(1, 1_500):
        replica = opened("b")
        fail_after(replica, steps, lasting=lasting)
        failed = False
        try:
            replica.apply(sent, NOW)
        except StoreError:
            failed = True
        replica.connection.set_progress_handler(None, 0)
        replica.apply(sent, NOW)
        assert replica.digest("t") == source.digest("t")
        replica.close()
        if not failed:
            break
        failures += 1
    assert failures > 30
    source.close()


@pytest.mark.parametrize(
    "read",
    [
        Store.parked,
        Store.foreign_writes,
        lambda store: store.capture(NOW),
        lambda store: store.log_floor(store.site),
        lambda store: store.read_log(store.site, 1, 9, 99),
    ],
)
def test_a_read_that_fails_is_reported_as_trouble_with_the_store(read):
    store = opened("a")
    store.execute([(INSERT, (0,))], NOW)
    store.connection.set_progress_handler(lambda: True, 1)
    with pytest.raises(StoreError):
        read(store)
    store.connection.set_progress_handler(None, 0)
    store.close()


def test_what_could_not_be_rolled_back_is_not_served():
    store = opened("a")
    store.execute([(INSERT, (0,))], NOW)
    for steps in range(20, 500):
        fail_after(store, steps, lasting=True)
        with pytest.raises(StoreError):
            store.execute([(INSERT, (1,))], NOW)
        store.connection.set_progress_handler(None, 0)
        if store.connection.in_transaction:
            break
    assert [entry.version for entry in store.read_log(store.site, 1, 9, 999)] == [1]
    assert not store.connection.in_transaction
    store.close()


def test_what_another_wrote_is_looked_at_again_when_its_capture_failed(tmp_path):
    store = Store.open(tmp_path / "a.db", SCHEMA)
    store.foreign_writes()
    other = sqlite3.connect(tmp_path / "a.db", isolation_level=None)
    other.execute(INSERT, (1,))
    other.close()
    assert store.foreign_writes()
    fail_after(store, 40, lasting=False)
    with pytest.raises(StoreError):
        store.capture(NOW)
    store.connection.set_progress_handler(None, 0)
    assert store.foreign_writes()
    assert store.capture(NOW).changesets
    assert not store.foreign_writes()
    store.close()
