"""Keep which versions of one site have been seen.

Versions of a site are numbered from 1 without holes by the site itself; they arrive in any order.
This module does not know what a version contains.

Invariant: ranges are sorted, do not overlap and do not touch.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


class VersionRanges:
    """A set of version numbers as closed ranges."""

    __slots__ = ("_firsts", "_lasts")

    def __init__(self, pairs: Iterable[tuple[int, int]] = ()) -> None:
        self._firsts: list[int] = []
        self._lasts: list[int] = []
        for first, last in pairs:
            self.add(first, last)

    @property
    def head(self) -> int:
        """The largest version up to which nothing is missing; 0 when version 1 is."""
        return self._lasts[0] if self._firsts and self._firsts[0] == 1 else 0

    @property
    def last(self) -> int:
        """The largest version seen; 0 for none."""
        return self._lasts[-1] if self._lasts else 0

    def add(self, first: int, last: int) -> None:
        """Note that all versions from first to last have been seen."""
        if not 1 <= first <= last:
            raise ValueError(f"not a range of versions: {first}..{last}")
        if self._lasts and first == self._lasts[-1] + 1:  # the usual case: the next version
            self._lasts[-1] = last
            return
        # Ranges from `low` up to `high` overlap or touch the new one and become part of it.
        low = bisect_right(self._lasts, first - 2)
        high = bisect_right(self._firsts, last + 1)
        if low < high:
            first = min(first, self._firsts[low])
            last = max(last, self._lasts[high - 1])
        self._firsts[low:high] = [first]
        self._lasts[low:high] = [last]

    def update(self, other: VersionRanges) -> None:
        """Note all that the other one holds."""
        for first, last in other:
            self.add(first, last)

    def contains(self, version: int) -> bool:
        """True when the version has been seen."""
        index = bisect_right(self._firsts, version) - 1
        return index >= 0 and version <= self._lasts[index]

    def missing(self, upto: int) -> list[tuple[int, int]]:
        """Return the ranges that have not been seen from 1 up to and including a version."""
        gaps = []
        following = 1
        for first, last in self:
            if first > upto:
                break
            if first > following:
                gaps.append((following, first - 1))
            following = last + 1
        if following <= upto:
            gaps.append((following, upto))
        return gaps

    def copy(self) -> VersionRanges:
        """Return an independent equal set."""
        other = VersionRanges()
        other._firsts = self._firsts.copy()
        other._lasts = self._lasts.copy()
        return other

    def encode(self) -> list[tuple[int, int]]:
        """Return the ranges as pairs, lowest first."""
        return list(self)

    @classmethod
    def decode(cls, pairs: Iterable[tuple[int, int]]) -> VersionRanges:
        """Return the set that pairs in any order describe; raise ValueError for what is no range."""
        return cls(pairs)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self._firsts, self._lasts, strict=True)

    def __bool__(self) -> bool:
        return bool(self._firsts)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, VersionRanges):
            return NotImplemented
        return self._firsts == other._firsts and self._lasts == other._lasts

    __hash__ = None  # type: ignore[assignment]  # mutable; mypy knows no other way to say unhashable

    def __repr__(self) -> str:
        return f"VersionRanges({self.encode()})"
