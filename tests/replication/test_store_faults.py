"""A store whose file fails in the middle of something."""

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


def fail_once_after(store: Store, steps: int) -> None:
    remaining = steps

    def step() -> bool:
        nonlocal remaining
        remaining -= 1
        return remaining == 0

    store.connection.set_progress_handler(step, 1)


def test_a_write_that_fails_at_any_step_is_reported_and_the_next_one_succeeds():
    store = opened("a")
    failures = 0
    for steps in range(1, 1_500):
        fail_once_after(store, steps)
        try:
            store.execute([(INSERT, (steps,))], NOW)
        except StoreError:
            failures += 1
        store.connection.set_progress_handler(None, 0)
        assert not store.connection.in_transaction
        store.execute([(INSERT, (-steps,))], NOW)
        if failures < steps:
            break
    assert failures > 100
    versions = [entry.version for entry in store.read_log(store.site, 1, 1 << 30, 1 << 30)]
    assert versions == list(range(1, len(versions) + 1))
    store.close()


def test_a_merge_that_fails_at_any_step_is_applied_when_it_is_tried_again():
    source = opened("a")
    sent = source.execute([(INSERT, (0,))], NOW)[1].changesets
    failures = 0
    for steps in range(1, 1_500):
        replica = opened("b")
        fail_once_after(replica, steps)
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
