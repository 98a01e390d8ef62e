"""In which steps the machines of an app give way to others, or to another release of themselves.

Decides the batches. Refuses to know what is done with one (`course`), and rows. Invariant: every machine
that is to go and every one that is to come is in exactly one batch.
"""

from __future__ import annotations

import math
from enum import Enum
from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# As on Fly: a third of the machines may be away at a time.
UNAVAILABLE_USUAL: Final = 1 / 3


class Strategy(Enum):
    """How a release takes over."""

    ROLLING = "rolling"  # some machines at a time
    CANARY = "canary"  # one machine, which is watched for longer, and then as rolling
    BLUEGREEN = "bluegreen"  # all new machines beside the old ones, and then all at once


class Batch(msgspec.Struct, frozen=True):
    """Machines that give way together: `new` ones come in place of `old` ones.

    Where both are the same, these machines go on as another release of themselves.
    """

    old: tuple[str, ...]
    new: tuple[str, ...]

    @property
    def in_place(self) -> bool:
        """True when the machines themselves become the new release."""
        return self.old == self.new


def mix_regions(machines: Iterable[tuple[str, str]]) -> list[str]:
    """Return the machines of (region, machine) pairs in an order of which each part has all regions' share.

    So a batch takes no region away that has other machines.
    """
    regions: dict[str, list[str]] = {}
    for region, machine in sorted(machines):
        regions.setdefault(region, []).append(machine)
    places = [
        ((index + 0.5) / len(there), region, machine)
        for region, there in regions.items()
        for index, machine in enumerate(there)
    ]
    return [machine for _, _, machine in sorted(places)]


def plan_batches(
    strategy: Strategy, old: Sequence[str], new: Sequence[str], max_unavailable: float = UNAVAILABLE_USUAL
) -> tuple[Batch, ...]:
    """Return the batches, first to last.

    `max_unavailable` is the share of a batch, or a number of machines from 1 on. Old and new machines are
    taken in the order given, so that the share of old ones that has gone is never larger than that of new
    ones that have come.
    """
    if strategy is Strategy.BLUEGREEN:
        return (Batch(tuple(old), tuple(new)),)
    size = compute_batch_size(len(new), max_unavailable)
    sizes = [1] if strategy is Strategy.CANARY and len(new) > 1 else []
    while sum(sizes) < len(new):
        sizes.append(min(size, len(new) - sum(sizes)))
    in_place = tuple(old) == tuple(new)
    batches = []
    come = gone = 0
    for count in sizes:
        come += count
        # Rounded down, and the last batch has all that is left.
        leave = come if in_place else len(old) * come // len(new)
        batches.append(Batch(tuple(old[gone:leave]), tuple(new[come - count : come])))
        gone = leave
    return tuple(batches)


def compute_batch_size(machines: int, max_unavailable: float) -> int:
    """Return how many are taken at a time: a number from 1 on, else a share rounded down; never none."""
    many = max_unavailable if max_unavailable >= 1 else math.floor(machines * max_unavailable)
    return max(1, min(int(many), machines))
