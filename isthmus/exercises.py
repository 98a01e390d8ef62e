"""When a node's database was last backed up, and when a backup was last put back: what a doctor asks for.

Decides where that is kept: in a small file of the data directory, not in the table, since it is about one
copy of the database and says nothing of the others. Invariant: it is a note and never in the way: what cannot
be written is not written, and what cannot be read was never done.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

_NAME = "exercises.json"

Kind = Literal["backup", "restore"]


class Exercise(Struct, frozen=True):
    """Something that was done."""

    at_ms: int
    backup: str = ""  # the file
    taken_ms: int = 0  # of what was put back


class Exercises(Struct, frozen=True):
    """The last of each kind; None for what was never done. A drill counts as a restore."""

    backup: Exercise | None = None
    restore: Exercise | None = None


def read_exercises(data: Path) -> Exercises:
    """Return what is known of a data directory."""
    try:
        return msgspec.json.decode((data / _NAME).read_bytes(), type=Exercises)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return Exercises()


def note_exercise(data: Path, kind: Kind, done: Exercise) -> bool:
    """Keep what was done just now; False when that cannot be written, as by a user who may only read."""
    noted = msgspec.structs.replace(read_exercises(data), **{kind: done})
    name = ""
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{_NAME}.", dir=data)
        with os.fdopen(descriptor, "wb") as file:
            file.write(msgspec.json.encode(noted) + b"\n")
        with suppress(OSError):
            os.chown(name, data.stat().st_uid, data.stat().st_gid)  # root may do it for the node's user
        Path(name).replace(data / _NAME)
    except OSError:
        with suppress(OSError):
            Path(name).unlink()
        return False
    return True
