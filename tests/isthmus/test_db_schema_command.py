"""`isthmus db schema`: a schema file is planned, carried out on a stopped node, undone and forgotten."""

from __future__ import annotations

import os
import re
import sqlite3
from typing import TYPE_CHECKING, Any

import pytest

from isthmus.cli import make_parser
from isthmus.client import ClientError
from isthmus.commands import db_schema
from isthmus.config import ConfigError
from isthmus.declared import combine_schema, load_schema
from replication.database import lock_file
from replication.errors import SchemaError
from replication.store import Store

if TYPE_CHECKING:
    from pathlib import Path

NOW = 1_700_000_000_000
NOTES = "CREATE TABLE notes (id INTEGER PRIMARY KEY, text TEXT, mood TEXT DEFAULT 'fine');"
BODY = """
-- dropped: notes.mood
CREATE TABLE notes (
    id INTEGER PRIMARY KEY,
    -- renamed from: text
    body TEXT
);
"""


class Node:
    """The data directory of a node that does not run."""

    def __init__(self, data: Path, capsys: Any) -> None:
        self.data = data
        self.database = data / "isthmus.db"
        self.file = data / "mine.sql"
        self._capsys = capsys
        self.execute()

    def execute(self, *statements: str) -> None:
        """Write as the node would: with the schema that it opens its database with."""
        store = Store.open(self.database, load_schema(self.database))
        store.execute([(sql, ()) for sql in statements], NOW)
        store.close()

    def run(self, *args: str) -> str:
        parsed = make_parser().parse_args(["db", "schema", *args, "--data", str(self.data)])
        assert parsed.run(parsed) == 0
        return str(self._capsys.readouterr().out)

    def plan(self, sql: str) -> str:
        """Return the id of the plan for a schema file."""
        self.file.write_text(sql)
        found = re.match(r"plan (\w{12})\n", self.run("plan", str(self.file)))
        assert found is not None
        return found[1]

    def apply(self, sql: str) -> str:
        return self.run("apply", str(self.file), "--plan", self.plan(sql), "--yes")

    def notes(self) -> list[tuple[Any, ...]]:
        connection = sqlite3.connect(self.database)
        try:
            return connection.execute("SELECT * FROM notes ORDER BY id").fetchall()
        finally:
            connection.close()


@pytest.fixture
def node(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Node:
    return Node(tmp_path, capsys)


def test_a_table_of_the_operators_own_is_replicated_once_the_plan_is_carried_out(node: Node) -> None:
    node.apply(NOTES)
    assert load_schema(node.database).tables.keys() > {"notes", "machines"}
    node.execute("INSERT INTO notes (id, text) VALUES (1, 'hello')")
    assert node.notes() == [(1, "hello", "fine")]


def test_what_a_plan_takes_away_comes_back_until_it_is_forgotten(node: Node) -> None:
    node.apply(NOTES)
    node.execute("INSERT INTO notes VALUES (1, 'hello', 'good')")
    assert "loses 1 value" in node.apply(BODY)
    node.execute("INSERT INTO notes (id, body) VALUES (2, 'later')")
    node.run("rollback", "--yes")
    assert load_schema(node.database).tables["notes"].columns == ("id", "text", "mood")
    assert node.notes() == [(1, "hello", "good"), (2, "later", "fine")]
    node.apply(BODY)
    assert node.run("forget", "--yes") == "2 plans forgotten\n"
    with pytest.raises(ClientError, match="no plan"):
        node.run("rollback", "--yes")
    assert node.notes() == [(1, "hello"), (2, "later")]


def test_a_plan_that_is_not_what_was_shown_is_refused(node: Node) -> None:
    shown = node.plan(NOTES)
    node.file.write_text(NOTES.replace("text", "words"))
    with pytest.raises(ClientError, match="by now"):
        node.run("apply", str(node.file), "--plan", shown, "--yes")
    assert "notes" not in load_schema(node.database).tables


@pytest.mark.parametrize(("is_terminal", "answer"), [(True, "n"), (True, ""), (False, "y")])
def test_nothing_is_changed_without_a_yes(
    node: Node, monkeypatch: pytest.MonkeyPatch, is_terminal: bool, answer: str
) -> None:
    shown = node.plan(NOTES)
    monkeypatch.setattr("sys.stdin.isatty", lambda: is_terminal, raising=False)
    monkeypatch.setattr("builtins.input", lambda _question: answer)
    with pytest.raises(ClientError, match="nothing was changed"):
        node.run("apply", str(node.file), "--plan", shown)
    assert "notes" not in load_schema(node.database).tables


def test_a_node_that_runs_is_asked_for_what_only_adds_and_refused_the_rest(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, Any]] = []

    class Running:
        def post(self, path: str, body: Any) -> None:
            asked.append((path, body))

    def is_in_use(_config: object) -> Any:
        raise ConfigError("data: in use")

    monkeypatch.setattr(db_schema, "make_client", lambda _args: Running())
    with monkeypatch.context() as running:
        running.setattr(db_schema, "lock_data_dir", is_in_use)
        assert "running node" in node.apply(NOTES)
    assert asked == [("/v1/db/schema", {"sql": NOTES})]
    node.apply(NOTES)
    monkeypatch.setattr(db_schema, "lock_data_dir", is_in_use)
    with pytest.raises(ConfigError):
        node.apply(BODY)
    assert len(asked) == 1


def test_an_agent_that_runs_alone_is_noticed_too(node: Node) -> None:
    lock = lock_file(node.database)
    try:
        with pytest.raises(ClientError, match="another agent"):
            node.apply(NOTES)
    finally:
        os.close(lock)


@pytest.mark.parametrize(
    "sql",
    [
        "CREATE TABLE apps (name TEXT NOT NULL PRIMARY KEY);",
        "-- dropped: machines",
        "-- dropped: machines.region",
        "-- renamed from: apps\nCREATE TABLE mine (name TEXT NOT NULL PRIMARY KEY);",
    ],
)
def test_the_tables_that_routing_reads_are_not_for_schema_files(sql: str) -> None:
    with pytest.raises(SchemaError, match="own"):
        combine_schema(sql)


def test_a_fault_in_a_schema_file_is_told_with_its_line(node: Node) -> None:
    with pytest.raises(ClientError, match="line 2"):
        node.plan(f"{NOTES}\nDROP TABLE notes;")


def test_a_file_that_is_no_database_is_left_for_the_agent_to_judge(tmp_path: Path) -> None:
    path = tmp_path / "isthmus.db"
    path.write_bytes(b"no database at all" * 100)
    assert load_schema(path).tables.keys() == combine_schema("").tables.keys()
