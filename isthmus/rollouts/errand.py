"""A change of the tables that an agent asks the next one for, which does it before it opens the database.

Decides what becomes of it when an agent ends before its time: then it is undone. Refuses to know who wants
it, and why. Invariant: what is to be done, and what was done, is on disk before the next step, so that a node
that dies at any moment starts with the tables that it had, or with those that have passed.
"""

from __future__ import annotations

import os
import sqlite3
from enum import Enum
from typing import TYPE_CHECKING, Final

import msgspec

from isthmus.declared import make_plan, open_alone
from replication.errors import InUseError, ReplicationError
from replication.schema_apply import apply_plan, read_attic
from replication.schema_rollback import rollback

if TYPE_CHECKING:
    from pathlib import Path

_FILE: Final = "errand.json"
DIED: Final = "the agent ended while it was tried"


class Stage(Enum):
    """How far an errand is."""

    ASKED = "asked"
    BEGUN = "begun"
    TAKEN = "taken"  # the tables are there, and on trial
    KEPT = "kept"  # they have passed
    TO_UNDO = "to undo"
    UNDONE = "undone"
    FAILED = "failed"  # and nothing has changed


class Errand(msgspec.Struct, frozen=True):
    """Tables that a rollout wants. `plan` is the id of what was carried out, if anything was to be done."""

    rollout: str
    declared: str
    stage: Stage = Stage.ASKED
    plan: str = ""
    problem: str = ""


class Errands:
    """The one errand of a node. All methods block, and may raise OSError."""

    def __init__(self, data: Path, database: Path) -> None:
        self._file = data / _FILE
        self._database = database

    def read(self) -> Errand | None:
        """Return the errand, if there is one."""
        try:
            return msgspec.json.decode(self._file.read_bytes(), type=Errand)
        except (FileNotFoundError, msgspec.MsgspecError):
            return None

    def put(self, errand: Errand) -> None:
        """Write down an errand in place of any other."""
        fresh = self._file.with_name(f"{_FILE}.new")
        with fresh.open("wb") as stream:
            stream.write(msgspec.json.encode(errand))
            stream.flush()
            os.fsync(stream.fileno())
        fresh.replace(self._file)

    def forget(self) -> None:
        """Have none any more."""
        self._file.unlink(missing_ok=True)

    def carry_out(self) -> None:
        """Do what is to be done, unless an agent has the database: then it is not our turn yet."""
        errand = self.read()
        if errand is None or errand.stage in {Stage.KEPT, Stage.UNDONE, Stage.FAILED}:
            return
        try:
            with open_alone(self._database) as connection:
                self.put(self._do(connection, errand))
        except InUseError:
            return
        except (ReplicationError, sqlite3.Error) as error:
            self.put(msgspec.structs.replace(errand, stage=Stage.FAILED, problem=str(error)))

    def _do(self, connection: sqlite3.Connection, errand: Errand) -> Errand:
        if errand.stage is Stage.ASKED:
            plan, _ = make_plan(connection, errand.declared)
            if plan.steps:
                errand = msgspec.structs.replace(errand, stage=Stage.BEGUN, plan=plan.id)
                self.put(errand)
                apply_plan(connection, plan, errand.declared)
            return msgspec.structs.replace(errand, stage=Stage.TAKEN)
        problem = "" if errand.stage is Stage.TO_UNDO else DIED
        plans = [past.plan for past in read_attic(connection)]
        if errand.plan in plans[:1]:
            rollback(connection)
        elif errand.plan in plans:
            problem = "another plan was carried out since; `isthmus db schema rollback` undoes both"
            return msgspec.structs.replace(errand, stage=Stage.FAILED, problem=problem)
        return msgspec.structs.replace(errand, stage=Stage.UNDONE, problem=problem)
