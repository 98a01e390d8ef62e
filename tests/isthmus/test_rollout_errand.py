"""What becomes of a change of tables that one agent asks the next one for, whenever either ends."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from isthmus.declared import combine_schema, load_schema, make_plan, open_alone
from isthmus.rollouts import errand as module
from isthmus.rollouts.errand import DIED, Errand, Errands, Stage
from replication.database import lock_file
from replication.schema_apply import apply_plan, read_attic
from replication.store import Store

if TYPE_CHECKING:
    from pathlib import Path

NOTES = "CREATE TABLE notes (id INTEGER PRIMARY KEY, text TEXT);"
MORE = "CREATE TABLE notes (id INTEGER PRIMARY KEY, text TEXT, at INTEGER);"


class _DiedError(Exception):
    """The agent ends here."""


class Data:
    """The data directory of a node whose agent is not there."""

    def __init__(self, directory: Path) -> None:
        self.database = directory / "isthmus.db"
        self.errands = Errands(directory, self.database)
        Store.open(self.database, combine_schema("")).close()

    def ask(self, declared: str = NOTES) -> None:
        self.errands.put(Errand("r1", declared))

    def carry_out(self) -> Errand:
        self.errands.carry_out()
        found = self.errands.read()
        assert found is not None
        return found

    def turn(self, stage: Stage) -> None:
        found = self.errands.read()
        assert found is not None
        self.errands.put(msgspec.structs.replace(found, stage=stage))

    def apply(self, declared: str) -> None:
        """What somebody does with `isthmus db schema apply`."""
        with open_alone(self.database) as connection:
            apply_plan(connection, make_plan(connection, declared)[0], declared)

    def execute(self, *statements: str) -> list[tuple[Any, ...]]:
        store = Store.open(self.database, load_schema(self.database))
        try:
            if statements:
                store.execute([(sql, ()) for sql in statements], 1_700_000_000_000)
            return store.connection.execute("SELECT * FROM notes ORDER BY id").fetchall()
        finally:
            store.close()

    def columns(self) -> list[str]:
        return [*(load_schema(self.database).tables["notes"].columns)] if self.has_notes else []

    @property
    def has_notes(self) -> bool:
        return "notes" in load_schema(self.database).tables

    @property
    def plans(self) -> int:
        with closing(sqlite3.connect(self.database)) as connection:
            return len(read_attic(connection))


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return Data(tmp_path)


def test_nothing_asked_for_is_nothing_done(data: Data) -> None:
    data.errands.carry_out()
    assert (data.errands.read(), data.has_notes) == (None, False)
    data.errands.forget()


def test_tables_are_taken_and_their_plan_is_known(data: Data) -> None:
    data.ask()
    done = data.carry_out()
    assert (done.stage, bool(done.plan), done.problem) == (Stage.TAKEN, True, "")
    assert data.execute("INSERT INTO notes VALUES (1, 'x')") == [(1, "x")]


def test_tables_that_have_passed_are_left_alone_by_all_agents_to_come(data: Data) -> None:
    data.ask()
    data.carry_out()
    data.turn(Stage.KEPT)
    assert data.carry_out().stage is Stage.KEPT
    assert data.has_notes


def test_tables_on_trial_are_undone_when_their_agent_has_ended(data: Data) -> None:
    data.ask()
    data.carry_out()
    undone = data.carry_out()
    assert (undone.stage, undone.problem) == (Stage.UNDONE, DIED)
    assert (data.has_notes, data.plans) == (False, 0)
    assert data.carry_out() == undone  # and that is the end of it


def test_rows_written_meanwhile_stay_when_a_column_is_undone(data: Data) -> None:
    data.apply(NOTES)
    data.ask(MORE)
    assert data.carry_out().stage is Stage.TAKEN
    assert data.execute("INSERT INTO notes VALUES (1, 'x', 7)") == [(1, "x", 7)]
    data.turn(Stage.TO_UNDO)
    undone = data.carry_out()
    assert (undone.stage, undone.problem) == (Stage.UNDONE, "")
    assert data.execute() == [(1, "x")]
    assert data.plans == 1


@pytest.mark.parametrize("dies", ["before the transaction", "in it", "after it"])
def test_agent_that_dies_over_it_leaves_the_tables_that_were(
    data: Data, monkeypatch: pytest.MonkeyPatch, dies: str
) -> None:
    def apply(connection: sqlite3.Connection, *args: Any) -> None:
        if dies == "in it":
            connection.execute("BEGIN")
            connection.execute("CREATE TABLE notes (id INTEGER PRIMARY KEY)")
        elif dies == "after it":
            apply_plan(connection, *args)
        raise _DiedError

    data.ask()
    with monkeypatch.context() as patch:
        patch.setattr(module, "apply_plan", apply)
        with pytest.raises(_DiedError):
            data.errands.carry_out()
    begun = data.errands.read()
    assert begun is not None
    assert (begun.stage, bool(begun.plan)) == (Stage.BEGUN, True)
    assert data.plans == (dies == "after it")
    undone = data.carry_out()
    assert (undone.stage, undone.problem) == (Stage.UNDONE, DIED)
    assert (data.has_notes, data.plans) == (False, 0)


def test_agent_that_dies_over_the_undoing_is_followed_by_one_that_ends_it(
    data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    data.ask()
    data.carry_out()
    data.turn(Stage.TO_UNDO)
    rollback = module.rollback
    for after in (False, True):

        def undo(connection: sqlite3.Connection, *, after: bool = after) -> None:
            if after:
                rollback(connection)
            raise _DiedError

        with monkeypatch.context() as patch:
            patch.setattr(module, "rollback", undo)
            with pytest.raises(_DiedError):
                data.errands.carry_out()
    assert data.carry_out().stage is Stage.UNDONE
    assert not data.has_notes


def test_plan_that_others_were_carried_out_after_is_not_undone(data: Data) -> None:
    data.ask()
    data.carry_out()
    data.apply(MORE)
    data.turn(Stage.TO_UNDO)
    failed = data.carry_out()
    assert failed.stage is Stage.FAILED
    assert "another plan was carried out since" in failed.problem
    assert data.columns() == ["id", "text", "at"]


def test_plan_that_somebody_undid_by_hand_is_undone(data: Data) -> None:
    data.ask()
    data.carry_out()
    with open_alone(data.database) as connection:
        module.rollback(connection)
    data.turn(Stage.TO_UNDO)
    assert data.carry_out().stage is Stage.UNDONE


def test_nothing_is_touched_while_an_agent_has_the_file(data: Data) -> None:
    data.ask()
    asked = data.errands.read()
    lock = lock_file(data.database)
    try:
        assert data.carry_out() == asked
    finally:
        os.close(lock)
    assert not data.has_notes
    assert data.carry_out().stage is Stage.TAKEN


@pytest.mark.parametrize(
    ("declared", "problem"),
    [
        ("CREATE TABLE notes (id INTEGER)", "primary key"),
        ("CREATE TABLE apps (id INTEGER PRIMARY KEY)", "one of isthmus's own"),
        ("CREATE TABL", "only CREATE TABLE"),
        ("CREATE TABLE notes (id INTEGER PRIMARY KEY, text TEXT NOT NULL);", "notes"),
    ],
)
def test_plan_that_is_refused_changes_nothing(data: Data, declared: str, problem: str) -> None:
    data.apply(NOTES)
    data.execute("INSERT INTO notes VALUES (1, NULL)")
    data.ask(declared)
    failed = data.carry_out()
    assert failed.stage is Stage.FAILED
    assert problem in failed.problem
    assert failed.plan == ""
    assert data.execute() == [(1, None)]


def test_tables_that_are_there_already_are_taken_without_a_plan_and_nothing_is_undone(data: Data) -> None:
    data.apply(NOTES)
    data.ask(NOTES)
    taken = data.carry_out()
    assert (taken.stage, taken.plan, data.plans) == (Stage.TAKEN, "", 1)
    data.turn(Stage.TO_UNDO)
    assert data.carry_out().stage is Stage.UNDONE
    assert (data.has_notes, data.plans) == (True, 1)


def test_file_of_an_errand_that_cannot_be_read_is_none(data: Data, tmp_path: Path) -> None:
    (tmp_path / "errand.json").write_text('{"rollout": 5}')
    assert data.errands.read() is None
    data.errands.carry_out()
