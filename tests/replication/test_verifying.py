import sqlite3
from collections import Counter

import pytest

from replication.core.clock import SiteId
from replication.core.codec import CodecError, pack
from replication.errors import SnapshotError
from replication.schema import Schema
from replication.store import Store
from replication.verifying import BLOCK_ROWS, find_differences, heal, read_range_states, read_ranges
from tests.fakes.verification import NOW, Session, write_past_triggers

SQL = """
CREATE TABLE t (k INTEGER PRIMARY KEY, v, w DEFAULT 'w', CHECK (v IS NOT 'poison'));
-- merge: column
CREATE TABLE c (k TEXT NOT NULL, n INTEGER NOT NULL, x, y, PRIMARY KEY (k, n));
"""
SCHEMA = Schema.parse(SQL)
WIDER = Schema.parse(SQL.replace("w DEFAULT 'w',", "w DEFAULT 'w', z DEFAULT 0,"))


def site(letter):
    return SiteId(letter.encode() * 16)


@pytest.fixture
def make(tmp_path):
    stores = []

    def make(letter, schema=SCHEMA):
        stores.append(Store.open(tmp_path / letter, schema, site=site(letter)))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


@pytest.fixture
def pair(make):
    """Two replicas with ten rows in each table, written by the first."""
    a, b = make("a"), make("b")
    write(a, b, *(f"INSERT INTO t (k, v) VALUES ({n}, 'v{n}')" for n in range(10)))
    write(a, b, *(f"INSERT INTO c VALUES ('k', {n}, 'x{n}', 'y{n}')" for n in range(10)))
    return a, b


def write(store, *rest, at=NOW):
    others = [other for other in rest if isinstance(other, Store)]
    _, commit = store.execute([(sql, ()) for sql in rest if isinstance(sql, str)], at)
    for other in others:
        other.apply(commit.changesets, at)
    return commit


def rows(store, table="t"):
    return store.connection.execute(f"SELECT * FROM {table} ORDER BY 1, 2").fetchall()


def damage(store, *statements):
    path = store.connection.execute("PRAGMA database_list").fetchone()[2]
    write_past_triggers(path, *statements)


def assert_equal(*stores, tables=("t", "c")):
    for table in tables:
        assert len({store.digest(table) for store in stores}) == 1
        assert len({repr(rows(store, table)) for store in stores}) == 1


def test_equal_replicas_send_no_rows(pair):
    a, b = pair
    write(a, "DELETE FROM t WHERE k = 3")
    write(b, "DELETE FROM t WHERE k = 3", at=NOW + 5)  # other tombstones, the same live rows
    write(a, b, "DELETE FROM c", at=NOW + 10)
    late = write(b, "INSERT INTO c VALUES ('k', 1, 1, 1)", at=NOW + 11)
    deleted = write(b, "DELETE FROM c", at=NOW + 13)
    a.apply(late.changesets, NOW + 12)
    write(a, "UPDATE c SET x = 'later than the deletion'", at=NOW + 14)
    a.apply(deleted.changesets, NOW + 14)
    for table in ("t", "c"):
        assert Session(a, b, table).sent_bytes == Session(b, a, table).sent_bytes == 0


@pytest.mark.parametrize("is_writer_damaged", [False, True])
@pytest.mark.parametrize(
    "statements",
    [
        [("DELETE FROM t WHERE k = 4",)],
        [("DELETE FROM t",)],
        [("DELETE FROM _repl_clock_t WHERE k_k = 4",)],
        [("DELETE FROM t",), ("DELETE FROM _repl_clock_t",)],
        [("DELETE FROM _repl_clock_t",), ("UPDATE t SET v = 'wrong'",)],
        [("UPDATE t SET v = 'old' WHERE k = 4",), ("UPDATE _repl_clock_t SET hlc = 9 WHERE k_k = 4",)],
    ],
)
def test_rows_and_records_that_are_lost_or_old_come_back_from_the_peer(pair, statements, is_writer_damaged):
    a, b = pair
    expected = rows(a)
    damaged, sound = (a, b) if is_writer_damaged else (b, a)
    damage(damaged, *statements)
    done = Session(damaged, sound)
    assert rows(damaged) == expected
    assert 0 < done.healed <= 10
    assert not done.unresolved
    assert_equal(a, b)
    changed = {change.pk: change.row for commit in done.commits for change in commit.changes}
    assert all(tuple(row) in expected for row in changed.values())
    assert not any(commit.changesets for commit in done.commits)
    assert Session(sound, damaged).sent_bytes == 0


@pytest.mark.parametrize("statement", ["UPDATE t SET v = 'wrong', w = 1.0", "UPDATE c SET y = x"])
def test_a_value_changed_under_its_clock_is_as_its_writer_has_it(pair, statement):
    a, b = pair
    damage(b, (statement,))
    table = statement.split()[1]
    expected = rows(a, table)
    done = Session(a, b, table)
    assert (done.healed, done.unresolved) == (0, Counter())
    assert Session(b, a, table).healed == 10
    assert rows(b, table) == expected
    assert_equal(a, b)


def test_values_of_two_writers_in_one_row_are_as_each_has_them(pair):
    a, b = pair
    write(b, a, "UPDATE c SET y = 'by b'", at=NOW + 1)
    damage(b, ("UPDATE c SET x = 'wrong', y = 'right, for b wrote it'",))
    Session(b, a, "c")
    Session(a, b, "c")
    assert rows(a, "c") == [("k", n, f"x{n}", "right, for b wrote it") for n in range(10)]
    assert_equal(a, b)


def test_one_and_one_point_nought_are_two_values(pair):
    a, b = pair
    write(a, b, "UPDATE t SET v = 1")
    damage(b, ("UPDATE t SET v = 1.0 WHERE k = 1",))
    assert Session(b, a).healed == 1
    assert_equal(a, b)


def test_what_neither_of_two_wrote_is_left_to_its_writer(pair, make):
    a, b = pair
    c = make("c")
    c.apply_snapshot(a.snapshot(10_000), NOW)
    damage(b, ("UPDATE t SET v = 'wrong' WHERE k = 1",), ("DELETE FROM t WHERE k = 2",))
    done = Session(c, b)
    assert (done.healed, done.unresolved) == (0, Counter({site("a"): 1}))
    # The row that b lost while c has it is no question of who is right.
    assert Session(b, c).healed == 1
    assert Session(b, a).healed == 1
    assert_equal(a, b, c)


def test_where_the_writer_is_gone_the_larger_bytes_win(pair, make):
    a, b = pair
    c = make("c")
    c.apply_snapshot(a.snapshot(10_000), NOW)
    damage(b, ("UPDATE t SET v = 'z', w = 'a' WHERE k = 1",), ("UPDATE t SET v = 'a', w = 'z' WHERE k = 2",))
    # Both ask before either has healed: they must not swap what they have.
    answers = [list(read_range_states(store, "t", None, None, 10_000)) for store in (c, b)]
    for store, chunks, peer in ((b, answers[0], c), (c, answers[1], b)):
        assert not heal(store, chunks, NOW, peer.site, {site("a")}.__contains__).unresolved
    assert_equal(b, c)
    assert rows(b)[1:3] in (
        [(1, "v1", "w"), (2, "v2", "w")],
        [(1, "z", "a"), (2, "v2", "w")],
        [(1, "v1", "w"), (2, "a", "z")],
    )


def test_a_lost_row_does_not_give_way_to_a_peer_that_knows_less(pair, make):
    a, b = pair
    c = make("c")
    c.apply_snapshot(a.snapshot(10_000), NOW)
    write(a, b, "UPDATE t SET v = 'newer' WHERE k = 1", at=NOW + 1)
    damage(b, ("DELETE FROM t WHERE k = 1",))
    done = Session(b, c)
    assert (done.healed, done.unresolved) == (0, Counter({site("a"): 1}))
    assert Session(b, a).healed == 1
    assert_equal(a, b)


def test_a_row_put_in_past_the_triggers_becomes_a_write_of_ours(pair):
    a, b = pair
    damage(b, ("INSERT INTO t VALUES (77, 'stray', 'w')",))
    (commit,) = Session(b, a).commits
    assert [change.row for change in commit.changes] == [(77, "stray", "w")]
    assert [changeset.site for changeset in commit.changesets] == [b.site]
    a.apply(commit.changesets, NOW)
    assert (77, "stray", "w") in rows(a)
    assert_equal(a, b)
    assert not Session(b, a).commits


def test_a_row_that_is_noted_and_not_captured_is_no_stray_and_no_difference(pair, tmp_path):
    a, b = pair
    with sqlite3.connect(tmp_path / "b", isolation_level=None) as other:
        other.execute("INSERT INTO t (k, v) VALUES (78, 'soon')")
        other.execute("UPDATE t SET v = 'soon' WHERE k = 1")
        other.execute("DELETE FROM t WHERE k = 2")
    other.close()
    done = Session(b, a)
    assert not done.commits
    assert done.sent_bytes == Session(a, b).sent_bytes == 0
    a.apply(b.capture(NOW).changesets, NOW)
    assert_equal(a, b)


def test_a_deletion_reaches_a_replica_that_has_lost_the_record(pair):
    a, b = pair
    damage(b, ("DELETE FROM _repl_clock_t",))
    commit = write(a, "DELETE FROM t WHERE k < 5", at=NOW + 1)
    b.apply(commit.changesets, NOW + 1)
    Session(b, a, now=NOW + 1)
    assert [row[0] for row in rows(b)] == [5, 6, 7, 8, 9]
    assert_equal(a, b)


def test_live_here_and_dead_there_is_found(pair):
    a, b = pair
    write(a, "DELETE FROM t WHERE k = 5", at=NOW + 1)  # b is never told
    assert Session(b, a, now=NOW + 1).healed == 1
    assert_equal(a, b)


def test_a_slice_ends_where_it_was_asked_to_and_goes_on_behind(pair):
    a, b = pair
    many = 3 * BLOCK_ROWS + 20
    write(a, b, *(f"REPLACE INTO t (k, v) VALUES ({n}, 'v')" for n in range(many)), at=NOW + 1)
    ranges, is_last = read_ranges(a, "t", None, BLOCK_ROWS + 10)
    assert ([upper for upper, _, _ in ranges], is_last) == ([pack((255,)), pack((265,))], False)
    ranges, is_last = read_ranges(a, "t", ranges[-1][0], 10_000)
    assert ([count for _, count, _ in ranges], is_last) == ([256, 256, many - 266 - 512], True)
    damage(b, ("UPDATE t SET v = 'wrong' WHERE k IN (1, 300, 301, 777)",))
    assert Session(b, a, rows_max=100, now=NOW + 1).healed == 4
    assert_equal(a, b)


def test_rows_of_one_block_are_asked_for_not_the_table(pair):
    a, b = pair
    write(a, b, *(f"REPLACE INTO t (k, v) VALUES ({n}, 'v')" for n in range(10 * BLOCK_ROWS)), at=NOW + 1)
    damage(b, ("UPDATE t SET v = 'wrong' WHERE k = 300",))
    ranges, is_last = read_ranges(a, "t", None, 10_000)
    assert find_differences(b, "t", None, ranges, is_last, 10_000) == ([(pack((255,)), pack((511,)))], None)


def test_no_more_of_our_rows_are_gone_through_at_once_where_the_peer_has_few(make):
    a, b = make("a"), make("b")
    write(a, *(f"INSERT INTO t (k, v) VALUES ({n}, 'v')" for n in range(100)))
    assert find_differences(a, "t", None, [], True, 10) == ([(None, pack((10,)))], pack((10,)))
    assert find_differences(a, "t", pack((95,)), [], True, 10) == ([(pack((95,)), None)], None)
    ranges, is_last = read_ranges(a, "t", None, 1_000)
    assert find_differences(a, "t", None, ranges, is_last, 100) == ([], None)
    damage(a, ("INSERT INTO t (k, v) VALUES (200, 'stray')",))
    session = Session(a, b, rows_max=5)
    assert [change.pk for commit in session.commits for change in commit.changes] == [(200,)]
    assert session.sent_bytes < 1_000


def test_keys_of_several_columns_are_gone_through_in_their_order(make):
    a, b = make("a"), make("b")
    write(a, b, *(f"INSERT INTO c VALUES ('{k}', {n}, 1, 2)" for k in "ä\x01Zz" for n in (-1, 0, 2**40)))
    damage(b, ("DELETE FROM c WHERE n = 0",))
    assert Session(b, a, "c", rows_max=2).healed == 4
    assert_equal(a, b)


def test_rows_behind_the_last_of_the_peer_are_no_loss(pair):
    a, b = pair
    write(b, "INSERT INTO t (k, v) VALUES (99, 'only here')")
    done = Session(b, a)
    assert (done.healed, done.commits) == (0, [])
    assert Session(a, b).healed == 1
    assert_equal(a, b)


def test_empty_tables_are_equal(make):
    assert Session(make("a"), make("b")).sent_bytes == 0


def test_all_rows_come_back_to_an_emptied_file_that_the_writer_has_in_an_empty_table(pair):
    a, b = pair
    damage(a, ("DELETE FROM t",), ("DELETE FROM _repl_clock_t",))
    Session(b, a)
    assert len(rows(b)) == 10
    Session(a, b)
    assert_equal(a, b)


def test_of_a_table_that_the_peer_does_not_know_nothing_is_said(pair):
    a, _ = pair
    assert read_ranges(a, "unknown", None, 10) == ([], False)
    assert find_differences(a, "t", None, [], False, 10) == ([], None)
    assert list(read_range_states(a, "unknown", None, None, 100)) == []


def test_a_column_that_one_does_not_have_yet_is_no_difference(pair, make):
    a, b = pair
    w = make("w", WIDER)
    w.apply_snapshot(a.snapshot(10_000), NOW)
    assert Session(w, a).sent_bytes == Session(a, w).sent_bytes == 0
    damage(w, ("UPDATE t SET v = 'wrong' WHERE k = 1",))
    assert Session(w, a).healed == 1
    assert_equal(a, b)


def test_states_with_a_column_that_is_not_known_here_are_refused(pair, make):
    a, b = pair
    w = make("w", WIDER)
    w.apply_snapshot(a.snapshot(10_000), NOW)
    write(w, "UPDATE t SET z = 1", at=NOW + 1)
    before = rows(a)
    with pytest.raises(SnapshotError, match=r"unknown column t\.z"):
        Session(a, w, now=NOW + 1)
    assert rows(a) == before
    assert Session(w, b, now=NOW + 1).healed == 0


def test_one_row_that_cannot_be_stored_does_not_keep_the_others_from_healing(pair, make):
    a, _ = pair
    lax = make("l", Schema.parse(SQL.replace(", CHECK (v IS NOT 'poison')", "")))
    lax.apply_snapshot(a.snapshot(10_000), NOW)
    write(lax, "UPDATE t SET v = 'poison' WHERE k = 4", "UPDATE t SET v = 'new' WHERE k <> 4", at=NOW + 1)
    assert Session(a, lax, now=NOW + 1).healed == 9
    assert [row[1] for row in rows(a)] == ["new"] * 4 + ["v4"] + ["new"] * 5


def test_what_is_malformed_or_of_the_future_is_refused_whole(pair):
    a, b = pair
    before = rows(b)
    chunks = list(read_range_states(a, "t", None, None, 100_000))
    for bad in ([chunks[0][:-1]], [b""], [pack((1, "end", 1))], [pack(7)]):
        with pytest.raises(SnapshotError):
            heal(b, bad, NOW, a.site, lambda _: False)
    damage(b, ("DELETE FROM t",), ("DELETE FROM _repl_clock_t",))
    with pytest.raises(SnapshotError, match="ahead"):
        heal(b, chunks, NOW - 3_600_000, a.site, lambda _: False)
    assert rows(b) == [] != before
    for key in (pack((1, 2)), pack(1), b"", pack(("k", [1]))):
        with pytest.raises(CodecError):
            read_ranges(a, "t", key, 10)


def test_healing_passes_on_what_was_noted_meanwhile(pair, tmp_path):
    a, b = pair
    damage(b, ("DELETE FROM t WHERE k = 4",))
    with sqlite3.connect(tmp_path / "b", isolation_level=None) as other:
        other.execute("UPDATE t SET v = 'soon' WHERE k = 1")
    other.close()
    (commit,) = Session(b, a).commits
    assert len(commit.changesets) == 1
    a.apply(commit.changesets, NOW)
    assert_equal(a, b)


def test_what_was_committed_is_told_when_the_rest_of_the_states_cannot_be_read(pair, tmp_path):
    a, b = pair
    damage(b, ("DELETE FROM t",), ("DELETE FROM _repl_clock_t",))
    with sqlite3.connect(tmp_path / "b", isolation_level=None) as other:
        other.execute("UPDATE c SET x = 'soon' WHERE n = 1")
    other.close()

    def chunks():
        yield from read_range_states(a, "t", None, None, 100_000)
        raise ValueError("read of closed file")

    (commit,) = heal(b, chunks(), NOW, a.site, lambda _: False).commits
    assert [item.version for item in commit.changesets] == [b.seen()[b.site].last]
    a.apply(commit.changesets, NOW)
    assert_equal(a, b)
