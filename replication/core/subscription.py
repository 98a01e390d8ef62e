"""Keep the rows of a query whose answer changes, and number what changes.

Decides which row of a new answer is which row of the one before, and how many past changes are kept for those
who come late. It works on whole answers, so it is right for any query: joins, aggregates, DISTINCT, LIMIT.
This module does not know SQL, files or listeners.

Invariant: replaying changes 1 to n on nothing, or those after m on the rows as of m, gives the rows as of n;
the numbers have no holes.
"""

from __future__ import annotations

from collections import Counter, deque
from enum import Enum
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from .codec import pack, unpack

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .change import Row

# A query runs for a tenth of the time at most, so that one that is dear does not keep all others waiting;
# what changes meanwhile is gathered. A cheap one still rests a little: writers often come in bursts.
REST_PER_RUN: Final = 9
REST_MIN_MS: Final = 20.0
REST_MAX_MS: Final = 5_000.0
# What a change costs in memory besides its cells, roughly.
_CHANGE_BYTES: Final = 150


class ChangeKind(Enum):
    """What happened to a row of the answer."""

    INSERT = "insert"
    UPDATE = "update"
    DELETE = "delete"


class Change(NamedTuple):
    """One change; cells are packed, those of a deleted row as they last were."""

    id: int
    kind: ChangeKind
    row_id: int
    cells: bytes


class ResumeError(Exception):
    """The changes after a number are not here: too long ago, or never made."""


def pack_cells(row: Row) -> bytes:
    """Return a row as it is kept: equal if and only if values and types are (1 is not 1.0)."""
    return pack(row)


def unpack_cells(cells: bytes) -> list[Any]:
    """Return the values of a row that was packed."""
    return list(unpack(cells))


def compute_rest_ms(run_ms: float) -> float:
    """Return how long a query rests after a run that took run_ms."""
    return min(max(run_ms * REST_PER_RUN, REST_MIN_MS), REST_MAX_MS)


def compute_identity(columns: Sequence[str], keys: Iterable[str]) -> tuple[int, ...]:
    """Return the columns that say which row is which: those named like key columns, or else the first."""
    names = {key.lower() for key in keys}
    return tuple(index for index, name in enumerate(columns) if name.lower() in names) or (0,)


class LiveResult:
    """The rows of one query as of the last change, and the last changes.

    `rows` is by row id, in the order in which the rows came. `floor` is the number of the oldest change that
    is kept, one more than `last_id` when none is.
    """

    __slots__ = (
        "_bytes",
        "_bytes_max",
        "_changes",
        "_changes_max",
        "identity",
        "last_id",
        "last_row_id",
        "rows",
    )

    def __init__(self, identity: tuple[int, ...], *, changes_max: int, bytes_max: int) -> None:
        self.identity = identity
        self.rows: dict[int, bytes] = {}
        self.last_row_id = 0
        self.last_id = 0
        self._changes: deque[Change] = deque()
        self._bytes = 0  # of what is in _changes
        self._changes_max = changes_max
        self._bytes_max = bytes_max

    @property
    def floor(self) -> int:
        """The number of the oldest change that is kept."""
        return self.last_id + 1 - len(self._changes)

    def fill(self, answer: Iterable[bytes]) -> None:
        """Take a first answer: its rows are where numbering begins, not changes."""
        self.rows = dict(enumerate(answer, 1))
        self.last_row_id = len(self.rows)

    def restore(
        self, rows: Iterable[tuple[int, bytes]], last_row_id: int, last_id: int, changes: Sequence[Change]
    ) -> None:
        """Take over what an earlier life has kept; the changes end with last_id and have no hole."""
        assert not changes or (changes[-1].id == last_id and changes[0].id == last_id + 1 - len(changes))
        self.rows = dict(rows)
        self.last_row_id = last_row_id
        self.last_id = last_id - len(changes)
        self._append(changes)

    def plan_changes(self, answer: Sequence[bytes]) -> list[Change]:
        """Return what leads from the rows as they are to an answer; changes nothing.

        A row that is in both keeps its id. Of those left over, one that goes and one that comes and agree in
        the identity columns are one row that changed; so are the only rows of two answers of one row.
        """
        missing = Counter(answer)
        gone: list[int] = []
        for row_id, cells in self.rows.items():
            if missing[cells] > 0:
                missing[cells] -= 1
            else:
                gone.append(row_id)
        come: list[bytes] = []
        for cells in answer:
            if missing[cells] > 0:
                missing[cells] -= 1
                come.append(cells)
        is_single = len(self.rows) == len(answer) == 1
        updated = dict(zip(gone, come, strict=True)) if is_single else self._pair(gone, come)
        return self._number(gone, come, updated)

    def _pair(self, gone: Sequence[int], come: Sequence[bytes]) -> dict[int, bytes]:
        """Return the new cells of rows that changed, by row id."""
        if not gone or not come:
            return {}
        waiting: dict[bytes, deque[int]] = {}
        for row_id in gone:
            waiting.setdefault(self._identify(self.rows[row_id]), deque()).append(row_id)
        updated: dict[int, bytes] = {}
        for cells in come:
            found = waiting.get(self._identify(cells))
            if found:
                updated[found.popleft()] = cells
        return updated

    def _identify(self, cells: bytes) -> bytes:
        row = unpack_cells(cells)
        return pack([row[index] for index in self.identity])

    def _number(self, gone: Sequence[int], come: Sequence[bytes], updated: dict[int, bytes]) -> list[Change]:
        changes: list[Change] = []
        number = self.last_id
        for row_id in gone:
            if row_id not in updated:
                number += 1
                changes.append(Change(number, ChangeKind.DELETE, row_id, self.rows[row_id]))
        for row_id, cells in updated.items():
            number += 1
            changes.append(Change(number, ChangeKind.UPDATE, row_id, cells))
        taken = Counter(updated.values())
        last_row_id = self.last_row_id
        for cells in come:
            if taken[cells] > 0:
                taken[cells] -= 1
                continue
            number += 1
            last_row_id += 1
            changes.append(Change(number, ChangeKind.INSERT, last_row_id, cells))
        return changes

    def apply_changes(self, changes: Sequence[Change]) -> None:
        """Take changes that plan_changes has returned, with nothing taken since."""
        for change in changes:
            if change.kind is ChangeKind.DELETE:
                del self.rows[change.row_id]
            else:
                self.rows[change.row_id] = change.cells
                self.last_row_id = max(self.last_row_id, change.row_id)
        self._append(changes)

    def _append(self, changes: Sequence[Change]) -> None:
        """Keep the newest changes; those that come together are kept together, or nobody could follow."""
        if not changes:
            return
        assert changes[0].id == self.last_id + 1
        self._changes.extend(changes)
        self._bytes += sum(len(change.cells) + _CHANGE_BYTES for change in changes)
        self.last_id = changes[-1].id
        while len(self._changes) > len(changes) and (
            len(self._changes) > self._changes_max or self._bytes > self._bytes_max
        ):
            self._bytes -= len(self._changes.popleft().cells) + _CHANGE_BYTES

    def read_since(self, number: int, count_max: int) -> list[Change]:
        """Return the changes after a number, the oldest first; raises ResumeError."""
        if number > self.last_id:
            raise ResumeError(f"there is no change {number} yet, the newest is {self.last_id}")
        if number + 1 < self.floor:
            # Corrosion's words, which its clients may look for.
            raise ResumeError(f"subscription already deleted older changes, min change id: {self.floor}")
        start = number + 1 - self.floor
        if start == len(self._changes):
            return []
        if start > len(self._changes) // 2:  # a deque is slow in the middle; those who follow are at the end
            tail = list(islice(reversed(self._changes), len(self._changes) - start))
            return tail[::-1][:count_max]
        return list(islice(self._changes, start, start + count_max))
