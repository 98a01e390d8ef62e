"""Times that a store has told others: no write comes before them, not even after a crash."""

import sqlite3
from collections.abc import Callable
from contextlib import closing

from replication.core.clock import NEVER, compute_ms
from replication.core.codec import decode_changeset
from replication.schema import Schema
from replication.store import Store

NOW = 1_700_000_000_000
SCHEMA = Schema.parse("CREATE TABLE items (id INTEGER PRIMARY KEY, v);")


def kill(store: Store) -> None:
    """End a store as kill -9 does: what was committed stays, and nothing is said of the end."""
    store.connection.close()


def test_no_write_comes_before_a_published_beat_though_the_clock_went_back_across_a_kill(tmp_path):
    path = tmp_path / "a.db"
    store = Store.open(path, SCHEMA)
    _, published = store.beat(NOW, NEVER)
    kill(store)
    store = Store.open(path, SCHEMA)
    commit = store.execute([("INSERT INTO items (id) VALUES (1)", ())], NOW - 3_600_000)[1]
    assert decode_changeset(commit.changesets[0].payload).hlc > published
    _, later = store.beat(NOW - 3_600_000, NEVER)
    assert later > published
    kill(store)


def test_beats_write_once_in_three_seconds_and_not_when_others_write_anyway(tmp_path):
    path = tmp_path / "a.db"
    with closing(Store.open(path, SCHEMA)) as store, closing(sqlite3.connect(path)) as watcher:

        def count_commits(act: Callable[[int], object]) -> int:
            seen = []
            for number in range(60):
                act(NOW + number * 500)
                seen.append(watcher.execute("PRAGMA data_version").fetchone()[0])
            return len(set(seen)) - 1

        assert 7 <= count_commits(lambda wall_ms: store.beat(wall_ms, NEVER)) <= 10

        def write(wall_ms: int) -> None:
            store.execute([("INSERT INTO items (v) VALUES ('x')", ())], wall_ms + 30_000)
            store.beat(wall_ms + 30_000, NEVER)

        store.execute([("INSERT INTO items (v) VALUES ('x')", ())], NOW + 30_000)
        assert count_commits(write) == 59


def test_a_store_that_was_closed_does_not_come_back_ahead_of_its_clock(tmp_path):
    path = tmp_path / "a.db"
    with closing(Store.open(path, SCHEMA)) as store:
        store.beat(NOW, NEVER)
    with closing(Store.open(path, SCHEMA)) as store:
        _, hlc = store.beat(NOW + 1, NEVER)
        assert compute_ms(hlc) == NOW + 1
