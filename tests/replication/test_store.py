import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from replication import identity
from replication.core.change import EncodedChangeset, RowChange
from replication.core.clock import SiteId
from replication.core.versions import VersionRanges
from replication.errors import BusyError, SchemaError, SnapshotError, StatementError, StoreError
from replication.schema import Schema
from replication.store import Store

NOW = 1_700_000_000_000
SQL = """
CREATE TABLE t (k INTEGER PRIMARY KEY, v, w TEXT COLLATE NOCASE DEFAULT 'w', CHECK (v IS NOT 'poison'));
-- merge: column
CREATE TABLE "or der" (
    "se lect" TEXT NOT NULL PRIMARY KEY, "a""b", "c'd" TEXT NOT NULL DEFAULT 'd'
) WITHOUT ROWID;
"""
SCHEMA = Schema.parse(SQL)
LAX = Schema.parse(SQL.replace(", CHECK (v IS NOT 'poison')", ""))
QUOTED = '"or der"'


def site(letter: str) -> SiteId:
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
    _, commit = store.execute([(sql, ()) for sql in statements], at)
    return commit


def rows(store, table="t"):
    return store.connection.execute(f"SELECT * FROM {table} ORDER BY 1").fetchall()


def assert_equal(*stores):
    for table in SCHEMA.tables:
        assert len({store.digest(table) for store in stores}) == 1


def test_values_at_the_edges_of_their_types_arrive_as_they_were(make):
    a, b = make("a"), make("b")
    values = [2**63 - 1, -(2**63), 2**53 + 1, 1.0, 1, "", b"", None, "\0x", b"\xff", float("inf"), 5e-324]
    _, commit = a.execute(
        [("INSERT INTO t (k, v) VALUES (?, ?)", (-(2**62) - n, v)) for n, v in enumerate(values)], NOW
    )
    b.apply(commit.changesets, NOW)
    assert sorted(map(repr, rows(b))) == sorted(map(repr, rows(a)))
    assert {repr(change.row[1]) for change in commit.changes} == set(map(repr, values))
    assert_equal(a, b)


@pytest.mark.parametrize(
    "no_op",
    [
        "UPDATE t SET v = v",
        "REPLACE INTO t VALUES (1, 1, 'one')",
        "INSERT INTO t (k, v) VALUES (1, 9) ON CONFLICT DO UPDATE SET v = t.v",
        "INSERT OR IGNORE INTO t (k, v) VALUES (1, 9)",
        "DELETE FROM t WHERE k = 7",
    ],
)
def test_writing_what_is_there_makes_no_change(make, no_op):
    a = make()
    write(a, "INSERT INTO t VALUES (1, 1, 'one')")
    assert write(a, no_op) is None
    assert a.seen()[a.site] == VersionRanges([(1, 1)])
    assert a.seq == 1


def test_a_detour_that_ends_where_it_began_makes_no_change(make):
    a = make()
    write(a, "INSERT INTO t VALUES (1, 1, 'one')")
    assert (
        write(a, "DELETE FROM t", "INSERT INTO t VALUES (2, 2, '')", "UPDATE t SET k=1, v=1, w='one'") is None
    )


@pytest.mark.parametrize("change", ["SET v = 1.0", "SET w = 'ONE'", "SET v = '1'", "SET v = NULL"])
def test_a_change_of_type_or_case_is_a_change(make, change):
    a, b = make("a"), make("b")
    first = write(a, "INSERT INTO t VALUES (1, 1, 'one')")
    second = write(a, f"UPDATE t {change}")
    b.apply(first.changesets + second.changesets, NOW)
    assert repr(rows(a)) == repr(rows(b))


def test_changing_a_key_onto_another_row_deletes_and_overwrites(make):
    a, b = make("a"), make("b")
    first = write(a, "INSERT INTO t (k, v) VALUES (1, 'x'), (2, 'y')")
    second = write(a, "UPDATE OR REPLACE t SET rowid = 2 WHERE k = 1")
    assert set(second.changes) == {RowChange("t", (1,), None), RowChange("t", (2,), (2, "x", "w"))}
    b.apply(second.changesets + first.changesets, NOW)
    assert rows(b) == [(2, "x", "w")]
    assert_equal(a, b)


def test_a_failing_statement_undoes_all_and_names_itself(make):
    a = make()
    with pytest.raises(StatementError, match="no such column") as caught:
        write(a, "INSERT INTO t (k) VALUES (1)", "UPDATE t SET nope = 1")
    assert caught.value.index == 1
    assert rows(a) == []
    assert write(a, "INSERT INTO t (k) VALUES (1)").changesets[0].version == 1


@pytest.mark.parametrize(
    "sql",
    [
        *(
            "SELECT 1",
            "COMMIT",
            "PRAGMA user_version = 1",
            "DROP TABLE t",
            "/* x */ ROLLBACK",
            "-- x\nBEGIN",
            "",
        ),
        *("INSERT INTO t (k) VALUES (1) RETURNING k", "WITH x AS (SELECT 1) SELECT * FROM x"),
        *("INSERT INTO t (k) VALUES (1); COMMIT", "INSERT INTO t (k, v) VALUES ('a', 1)"),
    ],
)
def test_executes_single_writes_only(make, sql):
    a = make()
    with pytest.raises(StatementError):
        write(a, sql)
    assert not a.connection.in_transaction
    assert rows(a) == []


def test_counts_the_rows_of_each_statement(make):
    a = make()
    counts = {
        "INSERT INTO t (k) VALUES (1), (2)": 2,
        "INSERT OR IGNORE INTO t (k) VALUES (1), (3)": 1,
        "INSERT INTO t (k, v) VALUES (1, 'x'), (4, 'x') ON CONFLICT DO UPDATE SET v = 'y'": 2,
        "REPLACE INTO t (k) VALUES (1)": 1,
        "UPDATE t SET v = 1 WHERE k > 9": 0,
        "WITH x AS (SELECT 9) UPDATE t SET v = 1 WHERE k > 9": 0,
        "/* all */ WITH x AS (SELECT 1) DELETE FROM t WHERE k > 0": 4,
    }
    affected, commit = a.execute([(sql, {}) for sql in counts], NOW)
    assert affected == list(counts.values())
    assert commit is None


def test_captures_what_another_client_wrote_while_the_store_is_open(make, tmp_path):
    a, b = make("a", tmp_path / "a.db"), make("b")
    a.foreign_writes()
    assert not a.foreign_writes()
    script = (
        "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); "
        "c.execute('INSERT INTO t (k, v) VALUES (1, 2)'); c.commit()"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path / "a.db"], check=True)
    assert a.foreign_writes()
    commit = a.capture(NOW)
    assert commit.changes == (RowChange("t", (1,), (1, 2, "w")),)
    assert a.capture(NOW) is None
    b.apply(commit.changesets, NOW)
    assert_equal(a, b)


def test_noted_but_uncaptured_writes_are_in_no_snapshot(make, tmp_path):
    a, b = make("a", tmp_path / "a.db"), make("b")
    write(a, "INSERT INTO t (k, v) VALUES (1, 'captured')")
    other = sqlite3.connect(tmp_path / "a.db", isolation_level=None)
    other.execute("UPDATE t SET v = 'not yet'")
    other.execute("INSERT INTO t (k) VALUES (2)")
    other.close()
    b.apply_snapshot(a.snapshot(1000), NOW)
    assert rows(b) == [(1, "captured", "w")]
    b.apply(a.capture(NOW).changesets, NOW)
    assert rows(b) == rows(a)


def test_text_that_is_not_utf8_is_passed_on_as_something_readable(make):
    a, b = make("a"), make("b")
    commit = write(a, "INSERT INTO t (k, v) VALUES (1, CAST(x'61ff' AS TEXT))")
    assert commit.changes[0].row == (1, "a\ufffd", "w")
    b.apply(commit.changesets, NOW)
    assert rows(b) == [(1, "a\ufffd", "w")]


def test_a_writer_that_holds_the_lock_is_reported_as_busy(make, tmp_path):
    a = make("a", tmp_path / "a.db")
    a.connection.execute("PRAGMA busy_timeout = 1")
    other = sqlite3.connect(tmp_path / "a.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(BusyError):
        write(a, "INSERT INTO t (k) VALUES (1)")
    other.execute("ROLLBACK")
    other.close()
    assert write(a, "INSERT INTO t (k) VALUES (1)") is not None


def test_columns_merge_one_by_one_and_may_come_before_their_row(make):
    a, b, c = make("a"), make("b"), make("c")
    created = write(a, f"""INSERT INTO {QUOTED} VALUES ('k', 1, 'x')""")
    b.apply(created.changesets, NOW)
    one = write(a, f"""UPDATE {QUOTED} SET "a""b" = 2""", at=NOW + 5)
    two = write(b, f"""UPDATE {QUOTED} SET "c'd" = 'y'""", at=NOW + 3)
    for changesets in (two.changesets, one.changesets, created.changesets):
        c.apply(changesets, NOW + 9)
    a.apply(two.changesets, NOW + 9)
    b.apply(one.changesets, NOW + 9)
    assert rows(c, QUOTED) == [("k", 2, "y")]
    assert_equal(a, b, c)


def test_an_insert_that_comes_after_updates_of_all_its_columns_changes_no_row(make):
    a, b = make("a"), make("b")
    created = write(a, f"INSERT INTO {QUOTED} VALUES ('k', 1, 'x'), ('l', 1, 'x')")
    updated = write(a, f"""UPDATE {QUOTED} SET "a""b" = 2, "c'd" = 'y'""")
    assert len(b.apply(updated.changesets, NOW).commit.changes) == 2
    assert b.apply(created.changesets, NOW).commit.changes == ()
    assert_equal(a, b)


def test_rows_that_were_written_together_are_merged_each_on_its_own(make):
    a, b = make("a"), make("b")
    created = write(a, f"INSERT INTO {QUOTED} VALUES ('k', 1, 'x'), ('l', 1, 'x'), ('m', 1, 'x')")
    b.apply(created.changesets, NOW)
    theirs = write(b, f"""UPDATE {QUOTED} SET "c'd" = 'b' WHERE "se lect" = 'l'""", at=NOW + 9)
    ours = write(a, f"""UPDATE {QUOTED} SET "a""b" = "se lect", "c'd" = 'a'""", at=NOW + 5)
    b.apply(ours.changesets, NOW + 9)
    a.apply(theirs.changesets, NOW + 9)
    assert rows(a, QUOTED) == [("k", "k", "a"), ("l", "l", "b"), ("m", "m", "a")]
    assert_equal(a, b)


def test_columns_of_a_deleted_row_do_not_shine_through_its_successor(make):
    a, at_once, one_by_one = make("a"), make("b"), make("c")
    created = write(a, f"INSERT INTO {QUOTED} VALUES ('k', 1, 'old')").changesets
    deleted = write(a, f"DELETE FROM {QUOTED}").changesets
    again = write(a, f"INSERT INTO {QUOTED} VALUES ('k', 2, 'new')").changesets
    updated = write(a, f"""UPDATE {QUOTED} SET "a""b" = 3""").changesets
    for replica in (at_once, one_by_one):
        replica.apply(created, NOW)
    at_once.apply(deleted + updated, NOW)
    one_by_one.apply(deleted, NOW)
    one_by_one.apply(updated, NOW)
    assert rows(at_once, QUOTED) == rows(one_by_one, QUOTED) == [("k", 3, "d")]
    for replica in (at_once, one_by_one):
        replica.apply(again, NOW)
    assert_equal(a, at_once, one_by_one)


def test_a_row_overwritten_by_its_equal_has_not_changed(make):
    a = make()
    write(a, "INSERT INTO t (k, v) VALUES (1, 'x'), (2, 'x')")
    assert write(a, "UPDATE OR REPLACE t SET k = 2 WHERE k = 1").changes == (RowChange("t", (1,), None),)


def test_a_whole_row_wins_where_rows_merge(make):
    a, b = make("a"), make("b")
    created = write(a, "INSERT INTO t VALUES (1, 1, 'x')")
    b.apply(created.changesets, NOW)
    one = write(a, "UPDATE t SET v = 2", at=NOW + 5)
    two = write(b, "UPDATE t SET w = 'y'", at=NOW + 3)
    a.apply(two.changesets, NOW + 9)
    b.apply(one.changesets, NOW + 9)
    assert rows(a) == rows(b) == [(1, 2, "x")]


def test_values_written_after_an_unseen_delete_show_when_the_row_is_revived(make):
    a, b, c = make("a"), make("b"), make("c")
    created = write(a, "INSERT INTO t (k, v) VALUES (1, 'first')")
    b.apply(created.changesets, NOW)
    c.apply(created.changesets, NOW)
    late = write(b, "UPDATE t SET v = 'late'", at=NOW + 90)
    deleted = write(c, "DELETE FROM t", at=NOW + 10)
    again = write(c, "INSERT INTO t (k, v) VALUES (1, 'again')", at=NOW + 20)
    a.apply(late.changesets, NOW + 99)
    gone = a.apply(deleted.changesets, NOW + 99)
    assert gone.commit.changes == (RowChange("t", (1,), None),)
    back = a.apply(again.changesets, NOW + 99)
    assert back.commit.changes == (RowChange("t", (1,), (1, "late", "w")),)
    b.apply(again.changesets + deleted.changesets, NOW + 99)
    c.apply(late.changesets, NOW + 99)
    assert_equal(a, b, c)


def test_poison_is_parked_alone_and_applied_when_the_reason_is_gone(make, tmp_path):
    a, b = make("a", schema=LAX), make("b", tmp_path / "b.db")
    commits = [
        write(a, f"INSERT INTO t (k, v) VALUES ({n}, '{v}')") for n, v in enumerate(["x", "poison", "z"])
    ]
    result = b.apply([commit.changesets[0] for commit in commits], NOW)
    assert (result.applied, result.parked) == (2, 1)
    assert [row[1] for row in rows(b)] == ["x", "z"]
    assert "CHECK" in b.parked()[0].reason
    assert b.seen() == a.seen()
    assert b.connection.execute("SELECT merging FROM _repl_state").fetchone() == (0,)
    assert len(result.commit.changesets) == 3


def test_unknown_tables_and_columns_wait_for_the_schema(make, tmp_path):
    wider = Schema.parse(
        SQL.replace("v,", "v, x DEFAULT 5,", 1) + "CREATE TABLE new (k INTEGER PRIMARY KEY);"
    )
    path = tmp_path / "b.db"
    a, b = make("a", schema=wider), make("b", path)
    commits = [write(a, "INSERT INTO t (k, x) VALUES (1, 6)"), write(a, "INSERT INTO new VALUES (1)")]
    commits.append(write(a, f"INSERT INTO {QUOTED} VALUES ('k', 1, '')"))
    before = write(b, "INSERT INTO t (k) VALUES (2)")
    assert b.apply([commit.changesets[0] for commit in commits], NOW).parked == 2
    b.close()
    b = make("b", path, wider)
    assert b.capture(NOW) is None  # adding a column is no change
    commit = b.retry_parked(NOW)
    assert set(commit.changes) == {RowChange("t", (1,), (1, None, 6, "w")), RowChange("new", (1,), (1,))}
    assert b.parked() == []
    a.apply(before.changesets, NOW)
    assert (2, None, 5, "w") in a.connection.execute("SELECT k, v, x, w FROM t").fetchall()
    assert a.digest("t") == b.digest("t")


def test_far_future_is_held_back_until_its_time_has_come(make):
    a, b = make("a"), make("b")
    commit = write(a, "INSERT INTO t (k) VALUES (1)", at=NOW + 60_000)
    assert b.apply(commit.changesets, NOW).parked == 1
    assert "60000 ms ahead" in b.parked()[0].reason
    assert b.retry_parked(NOW) is None
    assert b.retry_parked(NOW + 60_000).changes == (RowChange("t", (1,), (1, None, "w")),)


def test_undecodable_changesets_are_parked_and_passed_on(make):
    a = make("a")
    noise = EncodedChangeset(site("z"), 3, b"noise")
    result = a.apply([noise, noise], NOW)
    assert (result.parked, result.duplicates) == (1, 1)
    assert result.commit.changesets == (noise,)
    assert result.commit.seq == 0
    assert a.read_log(site("z"), 1, 9, 100) == [noise]


def test_reading_the_log_is_bounded_but_never_stuck(make):
    a = make()
    for n in range(5):
        write(a, f"INSERT INTO t (k) VALUES ({n})")
    size = len(a.read_log(a.site, 1, 1, 1)[0].payload)
    assert [entry.version for entry in a.read_log(a.site, 2, 9, 2 * size)] == [2, 3]
    assert [entry.version for entry in a.read_log(a.site, 4, 9, 0)] == [4]
    assert a.prune_log({a.site: 3}) == 2
    assert a.log_floor(a.site) == 3
    assert a.prune_log({a.site: 99}) == 3
    assert a.log_floor(a.site) == 6
    assert a.log_floor(site("z")) == 1


def test_a_snapshot_carries_parked_changesets_and_leaves_no_hole_in_the_log(make):
    a, b, c = make("a"), make("b"), make("c")
    first = [write(a, f"INSERT INTO t (k) VALUES ({n})").changesets[0] for n in range(4)]
    b.apply([first[0]], NOW)
    a.apply([EncodedChangeset(site("z"), 1, b"noise")], NOW)
    commit = b.apply_snapshot(a.snapshot(1), NOW)
    assert len(commit.changes) == 3
    assert b.seen() == a.seen()
    assert [entry.payload for entry in b.parked()] == [b"noise"]
    assert b.log_floor(a.site) == 5
    c.apply(b.read_log(a.site, 1, 4, 10**6), NOW)
    assert rows(c) == []
    assert b.apply_snapshot(a.snapshot(1), NOW) is None


@pytest.mark.parametrize(
    "spoil", [lambda c: c[:-1], lambda c: c[1:], lambda c: c[:1] + c, lambda c: [*c[:1], b"x"], lambda c: []]
)
def test_a_spoilt_snapshot_changes_nothing(make, spoil):
    a, b = make("a"), make("b")
    write(a, "INSERT INTO t (k) VALUES (1), (2)")
    with pytest.raises(SnapshotError):
        b.apply_snapshot(spoil(list(a.snapshot(1))), NOW)
    assert rows(b) == []
    assert b.seen() == {}


def test_a_snapshot_that_changes_very_many_rows_names_only_their_tables(make, monkeypatch):
    monkeypatch.setattr("replication.adopting.NAMED_ROWS_MAX", 3)
    a, b, c = make("a"), make("b"), make("c")
    write(a, "INSERT INTO t (k) VALUES (1), (2), (3)")
    named = b.apply_snapshot(a.snapshot(1), NOW)
    assert (named.reload, len(named.changes)) == ((), 3)
    write(a, "INSERT INTO t (k) VALUES (4)")
    commit = c.apply_snapshot(a.snapshot(1), NOW)
    assert (commit.reload, commit.changes) == (("t",), ())
    assert commit.seq == c.seq == 1
    assert_equal(a, c)


def test_a_snapshot_from_the_far_future_is_refused(make):
    a, b = make("a"), make("b")
    write(a, "INSERT INTO t (k) VALUES (1)", at=NOW + 60_000)
    with pytest.raises(SnapshotError, match="ahead"):
        b.apply_snapshot(a.snapshot(1000), NOW)


def test_own_versions_told_by_peers_are_not_used_again(make):
    a, b, lost = make("a"), make("b"), make("a")
    commit = write(a, "INSERT INTO t (k) VALUES (1)")
    b.apply(commit.changesets, NOW)
    lost.apply_snapshot(b.snapshot(1000), NOW)
    assert write(lost, "INSERT INTO t (k) VALUES (2)").changesets[0].version == 2


def test_nothing_committed_is_lost_or_numbered_twice_after_a_kill(make, tmp_path):
    path = tmp_path / "a.db"
    script = """
        import sys
        from replication.schema import Schema
        from replication.store import Store
        store = Store.open(sys.argv[1], Schema.parse(sys.argv[2]))
        number = 0
        while True:
            number += 1
            _, commit = store.execute([("INSERT INTO t (k) VALUES (?)", (number,))], 1_700_000_000_000)
            print(commit.seq, commit.changesets[0].version, store._clock.last, flush=True)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), path, SQL], stdout=subprocess.PIPE, text=True
    )
    lines = [process.stdout.readline() for _ in range(20)]
    process.send_signal(signal.SIGKILL)
    lines += process.stdout.read().splitlines()
    process.stdout.close()
    process.wait()
    seq, version, hlc = map(int, [line for line in lines if line.count(" ") == 2][-1].split())
    store = Store.open(path, SCHEMA)
    assert store.seq >= seq
    assert len(rows(store)) == store.seq
    commit = write(store, "INSERT INTO t (k) VALUES (-1)", at=1)
    assert commit.changesets[0].version == store.seq > version
    assert store._clock.last > hlc
    store.close()


@pytest.mark.parametrize(
    ("is_closed", "boot", "keeps"), [(True, "2", True), (False, "1", True), (False, "2", False)]
)
def test_a_file_left_open_at_a_reboot_gets_a_new_identity(tmp_path, monkeypatch, is_closed, boot, keeps):
    boot_id = tmp_path / "boot_id"
    monkeypatch.setattr(identity, "BOOT_ID", boot_id)
    boot_id.write_text("1")
    store = Store.open(tmp_path / "a.db", SCHEMA)
    first = write(store, "INSERT INTO t (k) VALUES (1)").changesets[0]
    if is_closed:
        store.close()
    else:
        store.connection.close()
    boot_id.write_text(boot)
    store = Store.open(tmp_path / "a.db", SCHEMA)
    assert (store.site == first.site) is keeps
    assert write(store, "INSERT INTO t (k) VALUES (2)").changesets[0].version == (2 if keeps else 1)
    assert store.seen()[first.site].contains(1)
    store.close()


@pytest.mark.parametrize(("move", "keeps"), [(shutil.copyfile, False), (Path.rename, True)])
def test_a_copy_of_a_file_gets_an_identity_of_its_own(tmp_path, move, keeps):
    there, here = tmp_path / "a.db", tmp_path / "b.db"
    store = Store.open(there, SCHEMA)
    first = write(store, "INSERT INTO t (k) VALUES (1)").changesets[0]
    store.close()
    move(there, here)
    copy = Store.open(here, SCHEMA)
    assert (copy.site == first.site) is keeps
    assert copy.seen()[first.site].contains(1)
    copy.close()


def test_rows_of_a_table_that_was_there_before_are_adopted(tmp_path):
    plain = sqlite3.connect(tmp_path / "a.db")
    plain.execute(SCHEMA.tables["t"].create_sql)
    plain.execute("INSERT INTO t (k, v) VALUES (1, 2)")
    plain.commit()
    plain.close()
    store = Store.open(tmp_path / "a.db", SCHEMA)
    assert store.capture(NOW).changes == (RowChange("t", (1,), (1, 2, "w")),)
    store.close()


@pytest.mark.parametrize(
    "sql", [SQL.replace("v,", "", 1), SQL.replace("v,", "v INTEGER,", 1), SQL.replace("-- merge: column", "")]
)
def test_a_schema_that_would_destroy_data_is_refused_and_changes_nothing(make, tmp_path, sql):
    make("a", tmp_path / "a.db").close()
    with pytest.raises(SchemaError):
        Store.open(tmp_path / "a.db", Schema.parse(sql.replace(", CHECK (v IS NOT 'poison')", "")))
    Store.open(tmp_path / "a.db", SCHEMA).close()


def test_a_file_that_is_no_database_or_of_another_site_is_refused(make, tmp_path):
    (tmp_path / "a.db").write_bytes(os.urandom(4096))
    with pytest.raises(StoreError):
        Store.open(tmp_path / "a.db", SCHEMA)
    make("b", tmp_path / "b.db").close()
    with pytest.raises(StoreError, match="site"):
        Store.open(tmp_path / "b.db", SCHEMA, site=site("c"))
