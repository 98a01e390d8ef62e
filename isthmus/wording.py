"""How numbers are put into sentences, in every part that speaks to a person.

Decides what stands behind a number. Refuses to know what is counted. Invariant: one is never many.
"""

from __future__ import annotations


def count_of(count: int, noun: str) -> str:
    """Return a number with its noun."""
    return f"{count} {noun}" + ("" if count == 1 else "s")
