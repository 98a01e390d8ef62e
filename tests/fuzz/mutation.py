"""Changes that a fuzzer makes to what it starts from, where none is installed that sees the code."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.fuzz.seeds import TOKENS

if TYPE_CHECKING:
    import random

INPUT_BYTES_MAX = 6_000


def mutate(rng: random.Random, seeds: list[bytes]) -> bytes:
    """Return one of the seeds with a few changes."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((1, 1, 2, 5, 30)))
        match rng.randrange(7):
            case 0:
                data[at:at] = rng.choice(TOKENS)
            case 1:
                data[at:end] = rng.choice(TOKENS)
            case 2:
                del data[at:end]
            case 3:
                data[at:end] = rng.randbytes(end - at)
            case 4:
                data[at:at] = data[at:end] * rng.choice((1, 2, 40))
            case 5:
                other = rng.choice(seeds)
                start = rng.randrange(len(other) + 1)
                data[at:] = other[start:]
            case _:
                if at < len(data):
                    data[at] ^= 1 << rng.randrange(8)
    return bytes(data[:INPUT_BYTES_MAX])
