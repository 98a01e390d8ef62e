import sqlite3
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replication.changelog import ChangeLog, compute_share
from replication.core.change import EncodedChangeset
from replication.core.clock import SiteId
from replication.errors import StatementError
from replication.schema import Schema
from replication.sidetables import create_common
from replication.store import Store
from replication.tables import Sites

NOW = 1_700_000_000_000
BUSY, QUIET = SiteId(b"b" * 16), SiteId(b"q" * 16)
SCHEMA = Schema.parse("CREATE TABLE t (k INTEGER PRIMARY KEY, v);")


@pytest.fixture
def connection():
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        create_common(connection)
        yield connection


def fill(log: ChangeLog, site: SiteId, count: int, size: int) -> None:
    log.append([EncodedChangeset(site, version, bytes(size)) for version in range(1, count + 1)])


def versions(log: ChangeLog, site: SiteId) -> list[int]:
    return [entry.version for entry in log.read(site, 1, 1 << 40, 1 << 40)]


def test_the_busiest_sites_are_trimmed_and_quiet_ones_keep_all(connection):
    log = ChangeLog(connection, Sites(connection))
    fill(log, BUSY, 100, 1000)
    fill(log, QUIET, 5, 1000)
    assert log.trim(1000, 20_000) > 80
    assert log.size_bytes <= 20_000
    assert versions(log, QUIET) == [1, 2, 3, 4, 5]
    assert versions(log, BUSY) == list(range(log.floor(BUSY), 101))


def test_the_newest_changeset_stays_whatever_its_size(connection):
    log = ChangeLog(connection, Sites(connection))
    fill(log, BUSY, 3, 100_000)
    assert log.trim(1000, 10) == 2
    assert versions(log, BUSY) == [3]
    assert log.trim(1000, 10) == 0


def test_versions_are_bounded_as_well(connection):
    log = ChangeLog(connection, Sites(connection))
    fill(log, BUSY, 9, 10)
    assert not log.is_above(9, 1 << 30)
    assert log.is_above(8, 1 << 30)
    assert log.trim(2, 1 << 30) == 7
    assert versions(log, BUSY) == [8, 9]


def test_what_is_counted_is_what_is_there_also_after_a_rollback_and_for_who_opens_the_file(connection):
    log = ChangeLog(connection, Sites(connection))
    for size in (1, 1500, 3000, 5000, 50_000):
        fill(log, BUSY, 3, size)
        log.drop(BUSY, 3)
    fill(log, BUSY, 20, 1500)
    fill(log, QUIET, 3, 5000)
    log.commit()
    before = log.size_bytes
    assert ChangeLog(connection, Sites(connection)).size_bytes == before
    connection.execute("BEGIN")
    log.drop(BUSY, 3)
    fill(log, SiteId(b"n" * 16), 3, 70)
    assert log.size_bytes != before
    connection.execute("ROLLBACK")
    log.rollback()
    assert log.size_bytes == before


@given(st.lists(st.integers(0, 10_000), min_size=1), st.integers(0, 100_000))
def test_shares_are_equal_and_use_all_that_there_is(sizes, bytes_max):
    share = compute_share(sizes, bytes_max)
    kept = sum(min(size, share) for size in sizes)
    assert kept <= bytes_max
    assert kept == sum(sizes) or kept > bytes_max - len(sizes)


def test_a_log_beyond_its_part_of_the_file_is_trimmed_and_its_pages_are_used_again(tmp_path):
    path = tmp_path / "a.db"
    with closing(Store.open(path, SCHEMA)) as store:
        store.execute([("INSERT INTO t VALUES (?, ?)", (k, "x" * 1000)) for k in range(300)], NOW)
        sizes = []
        for change in range(300):
            store.execute([("UPDATE t SET v = ? WHERE k = ?", (f"{change:1000}", change))], NOW)
            store.trim_log(1 << 20, 0)
            sizes.append(store.connection.execute("PRAGMA page_count").fetchone()[0])
        assert store.log_floor(store.site) > 200
        assert store.read_log(store.site, 301, 301, 1)
        assert sizes[-1] <= sizes[100]
        assert store.trim_log(1 << 20, 1 << 30) == 0


def test_a_write_that_fails_leaves_the_log_as_it_was():
    with closing(Store.open(":memory:", SCHEMA)) as store:
        store.execute([("INSERT INTO t VALUES (1, 1)", ())], NOW)
        with pytest.raises(StatementError):
            store.execute([("INSERT INTO t VALUES (2, 1)", ()), ("INSERT INTO t VALUES (1, 1)", ())], NOW)
        store.execute([("INSERT INTO t VALUES (2, 1)", ())], NOW)
        assert store.trim_log(1, 0) == 1
        assert store.log_floor(store.site) == 2
