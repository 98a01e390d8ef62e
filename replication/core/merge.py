"""Decide what a row is when two replicas know different things of it.

What a replica knows of a row is a record: when it was last created or deleted (its life), and when its
values were written: all of them (base) and, in tables that merge by column, single columns after that
(cells). Joining two records takes the larger clock of each. That is commutative, associative and
idempotent, so the order in which changes arrive, and how often, do not matter.

A row is alive when its last creation is later than its last deletion: a delete beats updates of what it
deleted, however late their clocks; an insert after it brings the row back. Values written after the deletion
of a row by someone who did not know of it are kept ("limbo"): if an insert that lies between them turns up,
they show. This module does not know SQL, nor where values are kept.

Invariant: join(a, b) == join(b, a), and a record is always in its one normal form (see normalise).
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .clock import Clock

NO_CELLS: Mapping[str, Clock] = {}


class Record(NamedTuple):
    """What a replica knows of one row, without its values.

    life is when the row was last created or, if dead, deleted. base is when all columns were written at
    once, None when that is not known (yet) or no longer of interest. cells are columns written after base.
    """

    life: Clock
    dead: bool
    base: Clock | None
    cells: Mapping[str, Clock] = NO_CELLS


class Take(Enum):
    """Whose values a joined record has."""

    NONE = "nothing changes"
    CLOCKS = "values stay, clocks change"
    ALL = "all values are theirs"
    SOME = "some values are theirs"


def normalise(record: Record) -> Record:
    """Return the record without what can never matter again.

    Cells not after base are covered by it. Values that are not after the deletion of a dead row cannot show:
    whatever revives the row writes all columns, later than the deletion.
    """
    life, dead, base, cells = record
    if dead and base is not None and base < life:
        base = None
    floor = base
    if dead and (floor is None or floor < life):
        floor = life
    if cells and floor is not None:
        cells = {name: clock for name, clock in cells.items() if clock > floor} or NO_CELLS
    return Record(life, dead, base, cells)


def join(mine: Record, theirs: Record) -> Record:
    """Return the record of who knows both; both must be normal, and so is the result."""
    life, dead = (mine.life, mine.dead) if mine.life >= theirs.life else (theirs.life, theirs.dead)
    base = mine.base
    if theirs.base is not None and (base is None or theirs.base > base):
        base = theirs.base
    cells = mine.cells
    if theirs.cells:
        merged = dict(mine.cells)
        for name, clock in theirs.cells.items():
            if name not in merged or clock > merged[name]:
                merged[name] = clock
        cells = merged
    if not cells and not dead:
        return Record(life, dead, base)
    return normalise(Record(life, dead, base, cells))


def get_clock(record: Record, column: str) -> Clock | None:
    """Return when a column was last written; None when that is not known."""
    return record.cells.get(column, record.base)


def is_theirs(mine: Record, theirs: Record, column: str) -> bool:
    """True when the joined value of a column is theirs."""
    newer = get_clock(theirs, column)
    older = get_clock(mine, column)
    return newer is not None and (older is None or newer > older)


def plan_values(mine: Record, theirs: Record, joined: Record) -> Take:
    """Say whose values the joined record has, in the cases that can be told without looking at columns."""
    if joined == mine:
        return Take.NONE
    if not mine.cells and not theirs.cells:
        taken = theirs.base is not None and (mine.base is None or theirs.base > mine.base)
        return Take.ALL if taken else Take.CLOCKS
    return Take.SOME
