import pytest

from replication.errors import SchemaError
from replication.schema import MergeMode, Schema


@pytest.mark.parametrize(
    ("sql", "reason"),
    [
        ("CREATE TABLE t (a TEXT);", "primary key"),
        ("CREATE TABLE t (a TEXT PRIMARY KEY);", "NOT NULL"),
        ("CREATE TABLE t (a TEXT COLLATE NOCASE NOT NULL PRIMARY KEY);", "NOCASE"),
        ("CREATE TABLE t (a NOT NULL PRIMARY KEY);", "needs a type"),
        ("CREATE TABLE t (a INTEGER PRIMARY KEY, b UNIQUE);", "UNIQUE"),
        ("CREATE TABLE t (a INTEGER PRIMARY KEY); CREATE UNIQUE INDEX i ON t (a);", "CREATE TABLE"),
        ("CREATE TABLE t (a INTEGER PRIMARY KEY, b REFERENCES t);", "foreign"),
        ("CREATE TABLE t (a INTEGER PRIMARY KEY AUTOINCREMENT);", "AUTOINCREMENT"),
        ("CREATE TABLE _repl_x (a INTEGER PRIMARY KEY);", "reserved"),
        ("-- merge: column\nCREATE TABLE t (a INTEGER PRIMARY KEY, b NOT NULL);", "DEFAULT"),
        ("-- merge: cell\nCREATE TABLE t (a INTEGER PRIMARY KEY);", "line 2"),
        ("\n\nDROP TABLE t;", "line 3"),
        ("CREATE TABLE t (a INTEGER PRIMARY KEY", "line 1"),
        ("CREATE TABLE t (a INTEGER PRIMARY KEY));", "line 1"),
        ("-- dropped: t\nCREATE TABLE t (a INTEGER PRIMARY KEY);", "t is a table and dropped"),
        ("-- dropped: t.b\nCREATE TABLE t (a INTEGER PRIMARY KEY, b);", "t.b is a column and dropped"),
        ("CREATE TABLE t (a INTEGER PRIMARY KEY, -- renamed from: b\nc);", "line of its own"),
        ("CREATE TABLE t (a INTEGER PRIMARY KEY, c\n-- renamed from: b\n);", "line of its own"),
        ("CREATE TABLE t (\n-- renamed from: b\na INTEGER PRIMARY KEY, b);", "a former name of t.a"),
        (
            "-- renamed from: u\nCREATE TABLE t (a INTEGER PRIMARY KEY);\n-- dropped: u",
            "u is a former name of t",
        ),
        ("SELECT 'x", "without an end"),
    ],
)
def test_refuses_with_the_place_and_the_reason(sql, reason):
    with pytest.raises(SchemaError, match=reason):
        Schema.parse(sql)


def test_directive_holds_for_the_next_table_only():
    schema = Schema.parse(
        "-- merge: column\nCREATE TABLE a (k INTEGER PRIMARY KEY);\nCREATE TABLE b (k INTEGER PRIMARY KEY)"
    )
    assert [table.mode for table in schema.tables.values()] == [MergeMode.COLUMN, MergeMode.ROW]


def test_defaults_are_as_the_column_stores_them():
    schema = Schema.parse(
        "CREATE TABLE t (k TEXT NOT NULL PRIMARY KEY, r REAL DEFAULT 1, s DEFAULT 'a(', n INT DEFAULT '7', "
        "u DEFAULT CURRENT_TIMESTAMP, CHECK (r > 5));"
    )
    assert schema.tables["t"].defaults == {"k": None, "r": 1.0, "s": "a(", "n": 7, "u": None}


def test_finds_column_definitions_between_odd_commas():
    schema = Schema.parse(
        """CREATE TABLE t ("a,(" TEXT NOT NULL, -- first, (
        b DECIMAL(10, 2) DEFAULT (1), /* , */ [c d] TEXT DEFAULT ',', PRIMARY KEY ("a,("));"""
    )
    assert schema.tables["t"].definitions == {
        "a,(": '"a,(" TEXT NOT NULL',
        "b": "b DECIMAL(10, 2) DEFAULT (1)",
        "c d": "[c d] TEXT DEFAULT ','",
    }


def test_key_columns_travel_first_and_rows_keep_the_order_of_the_file():
    table = Schema.parse("CREATE TABLE t (v TEXT, k INTEGER PRIMARY KEY, w TEXT);").tables["t"]
    assert table.stored == ("k", "v", "w")
    assert table.to_row((1, "v", "w")) == ("v", 1, "w")


def test_comments_say_what_was_renamed_and_dropped():
    schema = Schema.parse(
        """
        -- dropped: gone
        -- renamed from: s
        -- renamed from: old table
        CREATE TABLE t (
            -- renamed from: id
            k INTEGER PRIMARY KEY,
            -- renamed from: a
            -- renamed from: b c
            "the value" TEXT DEFAULT ('-- renamed from: x')
        );
        -- dropped: t.v
        """
    )
    table = schema.tables["t"]
    assert table.former_names == ("s", "old table")
    assert table.former_columns == {"id": "k", "a": "the value", "b c": "the value"}
    assert schema.dropped == {("gone", ""), ("t", "v")}
    assert table.definitions["the value"] == "\"the value\" TEXT DEFAULT ('-- renamed from: x')"
