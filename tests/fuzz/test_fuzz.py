"""All targets of the fuzzer with the corpus as it is, and with some changes that a seed makes of it."""

from __future__ import annotations

import random

import pytest

from tests.fuzz.mutation import mutate
from tests.fuzz.seeds import make_seeds
from tests.fuzz.targets import TARGETS

SEEDS = make_seeds()
# Together some seconds; `make fuzz` is for hours.
MUTANTS = {"requests": 700, "answers": 900}
MUTANTS_OF_PARTS = 1_500


@pytest.mark.parametrize("name", list(TARGETS))
def test_nothing_surprises(name: str) -> None:
    target, seeds = TARGETS[name], SEEDS[name]
    for seed in seeds:
        check(target, seed)
    rng = random.Random(f"{name} 1")
    for _ in range(MUTANTS.get(name, MUTANTS_OF_PARTS)):
        check(target, mutate(rng, seeds))


def check(target, data: bytes) -> None:
    try:
        target(data)
    except Exception:
        print(f"input: {data!r}")
        raise
