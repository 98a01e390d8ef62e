"""Schemas that change while replicas write: what is online, what takes a plan, what undoing gives back."""

import sqlite3

import pytest

from replication.core.clock import SiteId
from replication.errors import SchemaError
from replication.schema import Schema
from replication.schema_apply import apply_plan, forget
from replication.schema_plan import plan_schema, read_schema
from replication.schema_rollback import rollback
from replication.sidetables import read_declared
from replication.store import Store

NOW = 1_700_000_000_000


class Replica:
    """One file, opened again with each schema that it gets; pulls from others by their logs."""

    def __init__(self, path, letter, sql):
        self.path = path / f"{letter}.db"
        self.site = SiteId(letter.encode() * 16)
        self.now = NOW
        self.open(sql)

    def open(self, sql):
        self.sql = sql
        self.store = Store.open(self.path, Schema.parse(sql), site=self.site)
        self.store.retry_parked(self.now)

    def write(self, *statements):
        self.now += 1_000
        return self.store.execute([(sql, ()) for sql in statements], self.now)[1]

    def pull(self, other):
        for site, ranges in other.store.seen().items():
            mine = self.store.seen().get(site)
            for first, last in mine.missing(ranges.last) if mine else [(1, ranges.last)]:
                self.store.apply(other.store.read_log(site, first, last, 1 << 30), max(self.now, other.now))
        self.now = max(self.now, other.now)

    def plan(self, sql):
        return plan_schema(self.store.connection, Schema.parse(sql))

    def evolve(self, sql):
        """Do what an operator does: plan and apply while no agent runs, then start it with the schema."""
        plan = self.plan(sql)
        self.store.close()
        with_plan(self.path, lambda connection: apply_plan(connection, plan))
        self.open(sql)
        self.store.capture(self.now)
        return plan

    def undo(self, sql):
        self.store.close()
        with_plan(self.path, rollback)
        self.open(sql)
        self.store.capture(self.now)

    def rows(self, table="t"):
        return self.store.connection.execute(f'SELECT * FROM "{table}" ORDER BY 1').fetchall()

    def state(self, *tables):
        return [(repr(self.rows(table)), self.store.digest(table)) for table in tables or ("t",)]


def with_plan(path, act):
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        return act(connection)
    finally:
        connection.close()


@pytest.fixture
def make(tmp_path):
    made = []

    def make(sql, letters="ab"):
        made.extend(Replica(tmp_path, letter, sql) for letter in letters)
        return made

    yield make
    for replica in made:
        replica.store.close()


def sync(*replicas):
    for _ in range(2):
        for replica in replicas:
            for other in replicas:
                if other is not replica:
                    replica.pull(other)


def assert_equal(*replicas, tables=("t",)):
    assert not any(replica.store.parked() for replica in replicas)
    assert len({repr(replica.state(*tables)) for replica in replicas}) == 1


ROW = "CREATE TABLE t (k INTEGER PRIMARY KEY, a TEXT, b TEXT DEFAULT 'b');"
CELLS = f"-- merge: column\n{ROW}"

# Online


def test_what_is_added_rewrites_no_row_makes_no_version_and_lets_others_write(make):
    (a,) = make(ROW, "a")
    a.write("INSERT INTO t (k, a) VALUES (1, 'x'), (2, 'y')")
    seen, root = a.store.seen(), read_page(a)
    other = sqlite3.connect(a.path, isolation_level=None)
    a.store.close()
    more = ROW.replace("b TEXT DEFAULT 'b'", "b TEXT DEFAULT 'b', c INTEGER DEFAULT 7")
    a.open(f"{more} CREATE INDEX by_a ON t (a); CREATE TABLE u (k INTEGER PRIMARY KEY);")
    assert read_page(a) == root
    assert a.store.seen() == seen
    assert a.rows() == [(1, "x", "b", 7), (2, "y", "b", 7)]
    assert a.store.capture(NOW) is None
    other.execute("UPDATE t SET a = 'z', c = 8 WHERE k = 1")  # opened before the columns came
    other.execute("INSERT INTO u VALUES (1)")
    other.close()
    commit = a.store.capture(a.now)
    assert {change.row for change in commit.changes} == {(1, "z", "b", 8), (1,)}


def test_adding_while_another_connection_is_in_the_middle_of_reading(make):
    (a,) = make(ROW, "a")
    a.write("INSERT INTO t (k) VALUES (1)")
    reader = sqlite3.connect(a.path, isolation_level=None)
    reader.execute("BEGIN")
    assert reader.execute("SELECT count(*) FROM t").fetchone() == (1,)
    a.store.close()
    a.open(ROW.replace("a TEXT", "a TEXT, c TEXT"))
    assert reader.execute("SELECT * FROM t").fetchall() == [(1, None, "b")]
    reader.close()


def read_page(replica):
    """Return what is on the page on which the rows of t are."""
    connection = replica.store.connection
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    (root,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 't'").fetchone()
    (size,) = connection.execute("PRAGMA page_size").fetchone()
    with replica.path.open("rb") as file:
        file.seek((root - 1) * size)
        return file.read(size)


@pytest.mark.parametrize("sql", [ROW, CELLS])
def test_a_node_without_the_column_parks_what_names_it_until_its_schema_comes(make, sql):
    a, b = make(sql)
    a.write("INSERT INTO t (k, a) VALUES (1, 'x')")
    sync(a, b)
    more = sql.replace("a TEXT,", "a TEXT, c TEXT DEFAULT 'c',")
    a.evolve(more)
    a.write("UPDATE t SET c = 'new' WHERE k = 1")
    sync(a, b)
    assert [parked.reason for parked in b.store.parked()] == ["unknown column t.c"]
    b.evolve(more)
    assert_equal(a, b)
    assert sorted(b.rows()[0][1:]) == ["b", "new", "x"]


def test_a_write_without_the_column_resets_it_where_rows_are_one_value(make):
    a, b = make(ROW)
    a.write("INSERT INTO t (k, a) VALUES (1, 'x')")
    sync(a, b)
    more = ROW.replace("a TEXT,", "a TEXT, c TEXT DEFAULT 'c',")
    a.evolve(more)
    a.write("UPDATE t SET c = 'new' WHERE k = 1")
    b.now = a.now
    b.write("UPDATE t SET a = 'later' WHERE k = 1")
    sync(a, b)
    b.evolve(more)
    assert_equal(a, b)
    assert a.store.connection.execute("SELECT a, c FROM t").fetchall() == [("later", "c")]


def test_a_write_without_the_column_leaves_it_alone_where_columns_merge_alone(make):
    a, b = make(CELLS)
    a.write("INSERT INTO t (k, a) VALUES (1, 'x')")
    sync(a, b)
    more = CELLS.replace("a TEXT,", "a TEXT, c TEXT DEFAULT 'c',")
    a.evolve(more)
    a.write("UPDATE t SET c = 'new' WHERE k = 1")
    b.now = a.now
    b.write("UPDATE t SET a = 'later' WHERE k = 1")
    sync(a, b)
    b.evolve(more)
    assert_equal(a, b)
    assert a.store.connection.execute("SELECT a, c FROM t").fetchall() == [("later", "new")]


# Plans


TWO = f"{ROW} CREATE TABLE u (k TEXT NOT NULL, n INT NOT NULL, v BLOB, PRIMARY KEY (k, n)) WITHOUT ROWID;"
CHANGES = {
    "drop column": ROW.replace(", b TEXT DEFAULT 'b'", "") + "-- dropped: t.b",
    "rename column": ROW.replace("a TEXT,", "\n-- renamed from: a\nz TEXT,"),
    "retype": ROW.replace("a TEXT", "a INTEGER"),
    "default": ROW.replace("'b'", "'bb'"),
    "collation": ROW.replace("a TEXT", "a TEXT COLLATE NOCASE"),
    "check": ROW.replace("a TEXT", "a TEXT CHECK (a <> 'bad')"),
    "rename key": ROW.replace("k INTEGER", "\n-- renamed from: k\nid INTEGER"),
    "several": ROW.replace("a TEXT,", "\n-- renamed from: a\nz NUMERIC, new TEXT DEFAULT 'n',").replace(
        ", b TEXT DEFAULT 'b'", ""
    )
    + "-- dropped: t.b",
}
EVERY = pytest.mark.parametrize("mode", ["row", "column"])


@EVERY
@pytest.mark.parametrize("change", CHANGES)
def test_nodes_change_one_after_another_and_replicate_all_the_while(make, mode, change):
    old, new = f"-- merge: {mode}\n{ROW}", f"-- merge: {mode}\n{CHANGES[change]}"
    a, b = make(old)
    a.write("INSERT INTO t (k, a) VALUES (1, '1'), (2, '02'), (3, 'x')", "DELETE FROM t WHERE k = 3")
    b.write("INSERT INTO t VALUES (4, '4', 'mine')")
    sync(a, b)
    a.write("UPDATE t SET b = 'cell' WHERE k = 2")  # on its way while the plans are carried out
    b.write("UPDATE t SET a = '007' WHERE k = 4")
    a.evolve(new)
    if change not in ("collation", "check"):  # which are not looked at when a file is opened
        assert_open_again_refuses(a, old)
    b.write("UPDATE t SET b = 'late' WHERE k = 1", "INSERT INTO t (k, a) VALUES (5, '5')")
    a.write(f"DELETE FROM t WHERE {'id' if change == 'rename key' else 'k'} = 2")
    sync(a, b)
    b.evolve(new)
    sync(a, b)
    assert_equal(a, b)
    assert [row[0] for row in a.rows()] == [1, 4, 5]


def assert_open_again_refuses(replica, old):
    replica.store.close()
    with pytest.raises(SchemaError, match="plan"):
        Store.open(replica.path, Schema.parse(old))
    replica.open(replica.sql)


def test_the_other_way_to_merge_reaches_nodes_one_after_another(make):
    for old, new in ((ROW, CELLS), (CELLS, ROW)):
        a, b = replicas = make(old)[-2:]
        a.write("DELETE FROM t")
        a.write("INSERT INTO t (k, a) VALUES (1, '1'), (2, '2')")
        sync(a, b)
        a.write("UPDATE t SET b = 'a' WHERE k = 1")
        b.write("UPDATE t SET a = 'b' WHERE k = 1")
        sync(a, b)
        a.evolve(new)
        a.write("UPDATE t SET b = 'after' WHERE k = 2")
        sync(a, b)
        b.evolve(new)
        sync(a, b)
        assert_equal(*replicas)
        for replica in replicas:
            replica.store.close()
            replica.path.unlink()
        replicas.clear()


@EVERY
def test_a_dropped_table_does_not_pile_up_what_others_write_to_it(make, mode):
    old = f"-- merge: {mode}\n{TWO}"
    a, b = make(old)
    a.write("INSERT INTO u VALUES ('x', 1, NULL)")
    sync(a, b)
    assert [(step.text, step.lost) for step in a.evolve(f"-- merge: {mode}\n{ROW}-- dropped: u").steps] == [
        ("drop table u", "1 row")
    ]
    b.write("INSERT INTO u VALUES ('y', 1, NULL)", "INSERT INTO t (k) VALUES (1)")
    sync(a, b)
    assert_equal(a, b)
    assert len(a.rows()) == 1


def test_a_renamed_table_takes_what_comes_under_the_old_name(make):
    a, b = make(TWO)
    a.write("INSERT INTO u VALUES ('x', 1, NULL)")
    sync(a, b)
    new = TWO.replace("CREATE TABLE u", "-- renamed from: u\nCREATE TABLE v")
    a.evolve(new)
    b.write("INSERT INTO u VALUES ('y', 1, x'00')")
    a.write("DELETE FROM v WHERE k = 'x'")
    sync(a, b)
    assert [parked.reason for parked in b.store.parked()] == ["unknown table v"]
    b.evolve(new)
    sync(a, b)
    assert_equal(a, b, tables=("t", "v"))
    assert a.rows("v") == [("y", 1, b"\x00")]


def test_a_snapshot_of_a_node_with_old_names_is_understood(make):
    a, b = make(CELLS)
    a.write("INSERT INTO t (k, a) VALUES (1, 'x')")
    a.write("UPDATE t SET a = 'y', b = 'gone'")
    new = CELLS.replace("a TEXT", "\n-- renamed from: a\nz TEXT").replace(", b TEXT DEFAULT 'b'", "")
    new += "-- dropped: t.b"
    b.evolve(new)
    b.store.apply_snapshot(a.store.snapshot(1 << 20), a.now)
    a.evolve(new)
    assert_equal(a, b)
    assert b.rows() == [(1, "y")]


def test_a_plan_says_what_becomes_of_values(make):
    (a,) = make(ROW, "a")
    a.write("INSERT INTO t VALUES (1, '007', 'b'), (2, 'x', 'mine'), (3, NULL, NULL)")
    plan = a.plan(
        "CREATE TABLE t (k INTEGER PRIMARY KEY, a INTEGER);\n-- dropped: t.b\nCREATE TABLE n (k INT NOT NULL "
        "PRIMARY KEY); CREATE INDEX i ON t (a);"
    )
    assert [(step.text, step.is_online, step.lost, step.note) for step in plan.steps] == [
        ("drop column t.b", False, "2 values", ""),
        (
            "change column t.a: a TEXT becomes a INTEGER",
            False,
            "1 value is converted: '007' to 7",
            "1 text stays a text: 'x'",
        ),
        ("add table n", True, "", ""),
        ("add index i", True, "", ""),
    ]


def test_values_that_do_not_fit_are_listed_and_keep_the_plan_from_being_carried_out(make):
    (a,) = make(ROW, "a")
    a.write("INSERT INTO t VALUES (1, NULL, 'b'), (2, 'x', 'b')")
    strict = ROW.replace("a TEXT", "a TEXT NOT NULL DEFAULT ''")
    plan = a.plan(strict)
    assert [step.refused for step in plan.steps if step.refused] == [
        "1 row does not fit: 1: NOT NULL constraint failed: t.a"
    ]
    before = a.state()
    with pytest.raises(SchemaError, match="does not fit"):
        apply_plan(a.store.connection, plan)
    assert a.state() == before
    a.write("UPDATE t SET a = '' WHERE k = 1")
    a.evolve(strict)
    assert a.rows() == [(1, "", "b"), (2, "x", "b")]


@pytest.mark.parametrize(
    ("new", "reason"),
    [
        ("CREATE TABLE t (k INTEGER PRIMARY KEY, a TEXT);", "say what became of it"),
        ("CREATE TABLE t (k TEXT NOT NULL PRIMARY KEY, a TEXT, b TEXT);", "key cannot be changed"),
        (
            "CREATE TABLE t (k INTEGER NOT NULL, a TEXT NOT NULL, b TEXT DEFAULT 'b', PRIMARY KEY (k, a));",
            "key cannot be changed",
        ),
    ],
)
def test_what_no_plan_can_do_is_refused_with_the_reason(make, new, reason):
    (a,) = make(ROW, "a")
    with pytest.raises(SchemaError, match=reason):
        a.plan(new)


def test_a_plan_is_for_one_schema_of_the_file_and_for_what_was_gathered(make):
    (a,) = make(ROW, "a")
    stale = a.plan(CHANGES["retype"])
    a.evolve(CHANGES["check"])
    with pytest.raises(SchemaError, match="changed since"):
        apply_plan(a.store.connection, stale)
    plan = a.plan(CHANGES["retype"])
    with_plan(a.path, lambda other: other.execute("INSERT INTO t (k) VALUES (9)"))
    with pytest.raises(SchemaError, match="gathered"):
        apply_plan(a.store.connection, plan)


def test_a_schema_that_the_file_has_takes_no_step(make):
    (a,) = make(TWO, "a")
    assert a.plan(TWO).steps == ()
    assert a.plan(TWO.replace("v BLOB", "v   blob -- a comment\n")).steps == ()
    assert {*read_schema(a.store.connection).tables} == {"t", "u"}


# Undoing


@EVERY
@pytest.mark.parametrize("change", CHANGES)
def test_undoing_at_once_gives_back_exactly_what_was(make, mode, change):
    old, new = f"-- merge: {mode}\n{ROW}", f"-- merge: {mode}\n{CHANGES[change]}"
    (a,) = make(old, "a")
    a.store.connection.execute("CREATE INDEX mine ON t (b)")
    a.write("INSERT INTO t (k, a) VALUES (1, '1'), (2, '02'), (3, 'x')", "DELETE FROM t WHERE k = 3")
    a.write("UPDATE t SET a = '3', b = 'cell' WHERE k = 2")
    before, seen = a.state(), a.store.seen()
    a.evolve(new)
    a.undo(old)
    assert a.state() == before
    assert a.store.seen() == seen
    assert a.store.connection.execute("SELECT name FROM sqlite_master WHERE name = 'mine'").fetchone()


@EVERY
@pytest.mark.parametrize("change", CHANGES)
def test_undoing_later_keeps_what_was_written_since_and_nodes_agree(make, mode, change):
    old, new = f"-- merge: {mode}\n{ROW}", f"-- merge: {mode}\n{CHANGES[change]}"
    key, value = ("id" if change == "rename key" else "k"), ("z" if "z " in new else "a")
    a, b = make(old)
    a.write("INSERT INTO t VALUES (1, '1', 'one'), (2, '02', 'two'), (3, '3', 'three'), (4, '4', 'four')")
    sync(a, b)
    a.evolve(new)
    a.write(f"UPDATE t SET {value} = '11' WHERE {key} = 1", f"INSERT INTO t ({key}, {value}) VALUES (5, '5')")
    a.write(f"DELETE FROM t WHERE {key} = 3")
    b.write(
        "UPDATE t SET b = 'b' || k, a = '00' || a WHERE k IN (2, 4)", "INSERT INTO t VALUES (6, '6', '6')"
    )
    sync(a, b)
    a.undo(old)
    sync(a, b)
    rows = [(1, "11", "one"), (2, "0002", "b2"), (4, "004", "b4"), (5, "5", a.rows()[3][2]), (6, "6", "6")]
    assert a.rows() == rows
    assert b.rows() == rows
    assert a.store.digest("t") == b.store.digest("t")


@EVERY
def test_undoing_what_was_added_tells_others_what_was_written_with_it(make, mode):
    old = f"-- merge: {mode}\n{ROW}"
    a, b = make(old)
    a.evolve(old.replace("a TEXT,", "a TEXT, c TEXT,"))
    a.write("INSERT INTO t (k, a, c) VALUES (1, 'x', 'c')")
    sync(a, b)
    assert b.rows() == []
    a.undo(old)
    sync(a, b)
    assert a.rows() == b.rows() == [(1, "x", "b")]
    assert a.store.digest("t") == b.store.digest("t")


def test_a_dropped_table_comes_back_with_what_others_wrote_to_it_meanwhile(make):
    a, b = make(TWO)
    a.write("INSERT INTO u VALUES ('x', 1, NULL)")
    sync(a, b)
    a.evolve(f"{ROW}-- dropped: u")
    b.write("INSERT INTO u VALUES ('y', 1, NULL)", "DELETE FROM u WHERE k = 'x'")
    sync(a, b)
    a.undo(TWO)
    sync(a, b)
    assert a.rows("u") == [("y", 1, None)]
    assert_equal(a, b, tables=("t", "u"))


@EVERY
def test_a_row_that_was_made_anew_does_not_get_the_dropped_value_of_its_forerunner(make, mode):
    old, new = f"-- merge: {mode}\n{ROW}", f"-- merge: {mode}\n{CHANGES['drop column']}"
    (a,) = make(old, "a")
    a.write("INSERT INTO t VALUES (1, 'x', 'mine')")
    a.evolve(new)
    a.write("DELETE FROM t")
    a.write("INSERT INTO t VALUES (1, 'another')")
    a.undo(old)
    assert a.rows() == [(1, "another", "b")]


def test_plans_are_undone_one_after_another_until_they_are_forgotten(make):
    (a,) = make(ROW, "a")
    a.write("INSERT INTO t VALUES (1, '01', 'one')")
    first = a.state()
    a.evolve(CHANGES["drop column"])
    second = CHANGES["drop column"].replace("a TEXT", "a INTEGER")
    a.evolve(second)
    a.undo(CHANGES["drop column"])
    assert a.rows() == [(1, "01")]
    a.undo(ROW)
    assert a.state() == first
    with pytest.raises(SchemaError, match="no plan"):
        rollback(a.store.connection)
    a.evolve(CHANGES["drop column"])
    assert forget(a.store.connection) == 1
    left = a.store.connection.execute("SELECT name FROM sqlite_master WHERE name LIKE '%attic%'").fetchall()
    assert left == []


@EVERY
@pytest.mark.parametrize("change", CHANGES)
def test_undoing_keeps_what_was_written_since_without_the_log_too(make, mode, change):
    old, new = f"-- merge: {mode}\n{ROW}", f"-- merge: {mode}\n{CHANGES[change]}"
    key, value = ("id" if change == "rename key" else "k"), ("z" if "z " in new else "a")
    a, b = make(old)
    a.write("INSERT INTO t VALUES (1, '1', 'one'), (2, '02', 'two'), (3, '3', 'three'), (4, '4', 'four')")
    sync(a, b)
    a.evolve(new)
    a.write(f"UPDATE t SET {value} = '11' WHERE {key} = 1", f"INSERT INTO t ({key}, {value}) VALUES (5, '5')")
    a.write(f"DELETE FROM t WHERE {key} IN (3, 4)")
    sync(a, b)
    a.store.connection.execute("DELETE FROM _repl_log")
    a.store.connection.execute(f"DELETE FROM _repl_clock_t WHERE k_{key} = 4")  # its deletion is forgotten
    a.undo(old)
    b.write("DELETE FROM t WHERE k = 4")
    sync(a, b)
    assert [row[:2] for row in a.rows()] == [(1, "11"), (2, "02"), (5, "5")]
    assert [row[2] for row in a.rows()][:2] == ["one", "two"]
    assert a.rows() == b.rows()
    assert a.store.digest("t") == b.store.digest("t")


# While the replica is open


def test_an_open_replica_takes_up_what_is_added_and_what_waited_for_it(make):
    a, b = make(ROW)
    a.write("INSERT INTO t (k, a) VALUES (1, 'x')")
    sync(a, b)
    more = ROW.replace("b TEXT DEFAULT 'b'", "b TEXT DEFAULT 'b', c TEXT")
    more += "CREATE TABLE u (k INTEGER PRIMARY KEY); CREATE INDEX by_c ON t (c);"
    a.store.extend(Schema.parse(more), "declared")
    a.write("UPDATE t SET c = 'new'", "INSERT INTO u VALUES (1)")
    sync(a, b)
    with_plan(b.path, lambda other: other.execute("UPDATE t SET a = 'noted before' WHERE k = 1"))
    b.store.extend(Schema.parse(more))
    b.store.capture(b.now + 1)
    b.store.retry_parked(b.now)
    sync(a, b)
    assert_equal(a, b, tables=("t", "u"))
    assert a.rows() == [(1, "noted before", "b", None)]
    assert read_declared(a.store.connection) == "declared"


def test_an_open_replica_refuses_what_takes_a_plan_and_goes_on(make):
    (a,) = make(ROW, "a")
    with pytest.raises(SchemaError, match="plan"):
        a.store.extend(Schema.parse("CREATE TABLE u (k INTEGER PRIMARY KEY);" + CHANGES["drop column"]))
    a.write("INSERT INTO t VALUES (1, 'x', 'y')")
    assert a.rows() == [(1, "x", "y")]
    assert "u" not in read_schema(a.store.connection).tables
