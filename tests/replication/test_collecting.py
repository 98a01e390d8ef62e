import sqlite3

import pytest

from replication.collecting import Collector
from replication.core.change import EncodedChangeset, RowChange
from replication.core.clock import HLC_MAX, NEVER, Hlc, SiteId, hlc_from_ms
from replication.core.codec import pack, unpack
from replication.errors import SnapshotError
from replication.schema import Schema
from replication.store import Store

NOW = 1_700_000_000_000
KEEP_MS = 60_000
LATER = NOW + 2 * KEEP_MS
ALL = Hlc(HLC_MAX)
SQL = """
CREATE TABLE t (k INTEGER PRIMARY KEY, v);
-- merge: column
CREATE TABLE c (k TEXT NOT NULL PRIMARY KEY, x, y);
"""
SCHEMA = Schema.parse(SQL)
WIDER = Schema.parse(SQL.replace("k INTEGER PRIMARY KEY, v", "k INTEGER PRIMARY KEY, v, w"))


def site(letter):
    return SiteId(letter.encode() * 16)


@pytest.fixture
def make():
    stores = []

    def make(letter="a", path=":memory:", schema=SCHEMA):
        stores.append(Store.open(path, schema, site=site(letter)))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


def write(store, *statements, at=NOW):
    return store.execute([(sql, ()) for sql in statements], at)[1]


def fill(store, count=10):
    """Insert rows and delete all but the first."""
    write(store, *(f"REPLACE INTO t VALUES ({n}, 'v')" for n in range(count)))
    return write(store, "DELETE FROM t WHERE k > 0", at=NOW + 10)


def tombstones(store, table="t"):
    return store.connection.execute(f"SELECT count(*) FROM _repl_clock_{table} WHERE dead").fetchone()[0]


def keys(store):
    return [row[0] for row in store.connection.execute("SELECT k FROM t ORDER BY k")]


def collect(store, stable=ALL, now=LATER, limit=1000, **options):
    return Collector(store, keep_ms=KEEP_MS, **options).run(stable, now, limit)


def test_tombstones_go_once_all_have_passed_them_and_they_are_old_enough(make):
    store = make()
    fill(store)
    digest, commits = store.digest("t"), store.seq
    deleted = hlc_from_ms(NOW + 10)
    assert collect(store, Hlc(deleted - 1)) == 0
    assert collect(store, now=NOW + 10 + KEEP_MS - 1) == 0
    assert (tombstones(store), store.collected_hlc) == (9, NEVER)
    assert collect(store, deleted) == 9
    assert (tombstones(store), store.collected_hlc) == (0, deleted)
    assert (store.digest("t"), store.seq, keys(store)) == (digest, commits, [0])


def test_a_pass_goes_through_all_tables_in_parts(make):
    store = make()
    fill(store, 10)
    write(store, "INSERT INTO c VALUES ('a', 1, 1), ('b', 1, 1)")
    write(store, "DELETE FROM c", at=NOW + 10)
    collector = Collector(store, keep_ms=KEEP_MS)
    dropped = [collector.run(ALL, LATER, 4) for _ in range(4)]
    assert dropped[0] == 3  # of four records the first is alive
    assert sum(dropped) == 11
    fill(store, 5)
    assert sum(collector.run(ALL, LATER, 4) for _ in range(3)) == 4


def test_what_was_collected_is_remembered_in_files_of_any_age(make, tmp_path):
    path = tmp_path / "db"
    store = Store.open(path, SCHEMA, site=site("a"))
    fill(store)
    assert not store.connection.execute(
        "SELECT 1 FROM sqlite_master WHERE name = '_repl_collected'"
    ).fetchall()
    collect(store)
    store.close()
    assert make(path=path).collected_hlc == hlc_from_ms(NOW + 10)


def test_values_later_than_a_deletion_keep_its_tombstone_until_all_have_passed_them(make):
    a, b, c = make("a"), make("b"), make("c")
    created = write(a, "INSERT INTO c VALUES ('k', 1, 1)")
    b.apply(created.changesets, NOW)
    deleted = write(a, "DELETE FROM c", at=NOW + 10)
    write(b, "UPDATE c SET x = 'late'", at=NOW + 20)
    b.apply(deleted.changesets, NOW + 20)
    assert collect(b, hlc_from_ms(NOW + 15)) == 0
    # An insert that lies between brings the row back, with the late value.
    c.apply(write(c, "INSERT INTO c VALUES ('k', 2, 2)", at=NOW + 15).changesets, NOW)
    b.apply(c.read_log(site("c"), 1, 1, 10**6), NOW + 20)
    assert b.connection.execute("SELECT * FROM c").fetchall() == [("k", "late", 2)]


def test_a_row_put_in_again_and_not_captured_yet_is_not_lost(make, tmp_path):
    store = make(path=tmp_path / "db")
    fill(store)
    with sqlite3.connect(tmp_path / "db", isolation_level=None) as other:
        other.execute("INSERT INTO t VALUES (5, 'again')")
    other.close()
    collect(store)
    assert store.capture(LATER).changes == (RowChange("t", (5,), (5, "again")),)
    assert keys(store) == [0, 5]


@pytest.fixture
def waiting(make):
    """A replica that has parked an insert, for its schema lacks a column, and knows of the row's deletion."""
    wide, store = make("w", schema=WIDER), make("a")
    store.apply(write(wide, "INSERT INTO t VALUES (1, 'v', 'w')").changesets, NOW)
    other = make("b")
    other.apply(write(store, "INSERT INTO t VALUES (1, 'mine')", at=NOW + 1).changesets, NOW + 1)
    write(store, "DELETE FROM t", at=NOW + 2)
    assert len(store.parked()) == 1
    return store


def test_a_tombstone_stays_while_something_parked_could_bring_its_row_back(waiting):
    assert collect(waiting, hlc_from_ms(NOW + 2), now=NOW + KEEP_MS - 1) == 0
    assert collect(waiting, hlc_from_ms(NOW - 1)) == 0
    assert (tombstones(waiting), len(waiting.parked()), waiting.dropped_parked) == (1, 1, 0)


def test_a_pass_ends_with_the_time_with_which_it_began(waiting):
    write(waiting, *(f"INSERT INTO c VALUES ({n}, 1, 1)" for n in range(5)))
    collector = Collector(waiting, keep_ms=KEEP_MS)
    collector.run(hlc_from_ms(NOW - 1), LATER, 1)
    while len(waiting.parked()):  # all have passed it by now, and only the next pass looks at what is parked
        assert tombstones(waiting) == 1
        collector.run(ALL, LATER, 1)


def test_what_all_have_passed_is_dropped_from_what_is_parked_and_counted(waiting):
    assert collect(waiting) == 1
    assert (waiting.parked(), waiting.dropped_parked) == ([], 1)
    assert waiting.seen()[site("w")].contains(1)
    assert waiting.read_log(site("w"), 1, 1, 10**6)


def test_the_oldest_of_too_much_that_is_parked_goes_and_what_cannot_be_read_has_no_age(make):
    store = make()
    junk = [EncodedChangeset(site("j"), version, b"x" * 100) for version in range(1, 6)]
    store.apply(junk, NOW)
    collect(store)
    assert len(store.parked()) == 5
    collect(store, parked_bytes_max=250)
    assert [entry.version for entry in store.parked()] == [4, 5]
    assert store.dropped_parked == 3


def test_a_parked_changeset_is_given_up_by_hand(waiting):
    assert not waiting.drop_parked(site("w"), 2)
    assert not waiting.drop_parked(site("x"), 1)
    assert waiting.drop_parked(site("w"), 1)
    assert waiting.parked() == []
    assert waiting.retry_parked(LATER) is None


@pytest.fixture
def away(make):
    """Two replicas; the second was away while the first deleted rows and forgot it."""
    a, b = make("a"), make("b")
    write(a, *(f"INSERT INTO t VALUES ({n}, 'v')" for n in range(6)))
    b.apply_snapshot(a.snapshot(1000), NOW)
    write(a, "DELETE FROM t WHERE k IN (0, 2, 3, 5)", at=NOW + 10)
    write(a, "INSERT INTO t VALUES (7, 'new')", at=NOW + 20)
    collect(a)
    return a, b


@pytest.mark.parametrize("chunk_bytes", [1, 300, 100_000])
def test_a_replica_that_was_away_forgets_what_the_sender_of_a_snapshot_has_forgotten(away, make, chunk_bytes):
    a, b = away
    commit = b.apply_snapshot(a.snapshot(chunk_bytes), LATER)
    assert keys(a) == keys(b) == [1, 4, 7]
    assert a.digest("t") == b.digest("t")
    assert {change.pk[0] for change in commit.changes if change.row is None} == {0, 2, 3, 5}
    # Who takes a snapshot from it has to forget as much.
    assert b.collected_hlc == a.collected_hlc
    third = make("c")
    third.apply_snapshot(b.snapshot(1000), LATER)
    assert (keys(third), third.collected_hlc) == ([1, 4, 7], a.collected_hlc)


def test_a_snapshot_tells_what_was_forgotten_when_it_began(make, tmp_path):
    a, b, c = make("a", tmp_path / "a"), make("b"), make("c")
    fill(a)
    early = a.snapshot(1000)
    collect(a)
    b.apply_snapshot(early, LATER)
    assert (tombstones(b), b.collected_hlc) == (9, NEVER)
    c.apply_snapshot(a.snapshot(1000), LATER)
    assert (tombstones(c), c.collected_hlc) == (0, a.collected_hlc)


@pytest.mark.parametrize("collected", [-1, HLC_MAX + 1, HLC_MAX, "1"])
def test_a_snapshot_that_has_forgotten_what_is_yet_to_come_is_refused(away, collected):
    a, b = away
    chunks = list(a.snapshot(1000))
    chunks[0] = pack((*unpack(chunks[0])[:-1], collected))
    with pytest.raises(SnapshotError):
        b.apply_snapshot(chunks, LATER)
    assert b.collected_hlc == NEVER


def test_a_table_that_the_sender_has_emptied_is_emptied(away):
    a, b = away
    write(a, "DELETE FROM t", at=NOW + 30)
    collect(a)
    b.apply_snapshot(a.snapshot(1000), LATER)
    assert keys(b) == []


@pytest.mark.parametrize("is_logged", [True, False])
def test_writes_that_the_sender_has_not_seen_stay(away, make, is_logged):
    a, b = away
    write(b, "INSERT INTO t VALUES (8, 'mine')", at=NOW + 5)
    write(b, "UPDATE t SET v = 'mine' WHERE k = 5", at=NOW + 5)
    other = make("o")
    b.apply(write(other, "INSERT INTO t VALUES (9, 'of another')", at=NOW + 5).changesets, NOW + 5)
    if not is_logged:
        b.prune_log({site("b"): 9, site("o"): 9})
    b.apply_snapshot(a.snapshot(1000), LATER)
    assert keys(b) == [1, 4, 5, 7, 8, 9]


def test_a_snapshot_that_breaks_off_forgets_nothing(away):
    a, b = away
    before = keys(b)
    with pytest.raises(Exception, match="not complete"):
        b.apply_snapshot(list(a.snapshot(1))[:-1], LATER)
    assert (keys(b), b.collected_hlc) == (before, NEVER)
