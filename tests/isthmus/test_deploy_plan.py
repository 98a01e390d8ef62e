"""In which batches machines give way."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.deploys.plan import (
    UNAVAILABLE_USUAL,
    Batch,
    Strategy,
    compute_batch_size,
    mix_regions,
    plan_batches,
)

ROLLING, CANARY, BLUEGREEN = Strategy.ROLLING, Strategy.CANARY, Strategy.BLUEGREEN


def shown(batches: tuple[Batch, ...]) -> list[str]:
    return [f"{''.join(batch.old)}>{''.join(batch.new)}" for batch in batches]


@pytest.mark.parametrize(
    ("strategy", "old", "new", "max_unavailable", "expected"),
    [
        (ROLLING, "abc", "xyz", 0.33, ["a>x", "b>y", "c>z"]),
        (ROLLING, "abcdef", "abcdef", 0.34, ["ab>ab", "cd>cd", "ef>ef"]),
        (ROLLING, "abcde", "abcde", 2, ["ab>ab", "cd>cd", "e>e"]),
        (ROLLING, "a", "xyz", 1, [">x", ">y", "a>z"]),
        (ROLLING, "abc", "x", 1, ["abc>x"]),
        (ROLLING, "", "x", 1, [">x"]),
        (CANARY, "abcd", "abcd", 0.99, ["a>a", "bcd>bcd"]),
        (CANARY, "a", "a", 1, ["a>a"]),
        (CANARY, "abcd", "wxyz", 2, ["a>w", "bc>xy", "d>z"]),
        (BLUEGREEN, "abc", "xyz", 1, ["abc>xyz"]),
    ],
)
def test_batches(strategy: Strategy, old: str, new: str, max_unavailable: float, expected: list[str]) -> None:
    assert shown(plan_batches(strategy, old, new, max_unavailable)) == expected


@pytest.mark.parametrize(
    ("machines", "max_unavailable", "size"), [(3, 0.33, 1), (9, 0.33, 2), (9, 4, 4), (2, 4, 2), (1, 0.0, 1)]
)
def test_share_is_rounded_down_and_never_none(machines: int, max_unavailable: float, size: int) -> None:
    assert compute_batch_size(machines, max_unavailable) == size


def test_a_third_of_the_machines_is_usual() -> None:
    sizes = [compute_batch_size(machines, UNAVAILABLE_USUAL) for machines in (1, 2, 3, 4, 6, 9, 300)]
    assert sizes == [1, 1, 1, 1, 2, 3, 100]


@pytest.mark.parametrize(
    ("there", "max_unavailable", "expected"),
    [
        ({"ams": 3, "gru": 3, "syd": 3}, UNAVAILABLE_USUAL, ["ams gru syd"] * 3),
        ({"ams": 2, "gru": 2, "syd": 2}, UNAVAILABLE_USUAL, ["ams gru", "syd ams", "gru syd"]),
        ({"ams": 6, "gru": 2}, 0.5, ["ams ams gru ams", "ams ams gru ams"]),
        ({"ams": 1, "gru": 1}, 1, ["ams", "gru"]),
        ({"ams": 4}, 2, ["ams ams", "ams ams"]),
    ],
)
def test_a_batch_has_its_share_of_each_region(
    there: dict[str, int], max_unavailable: float, expected: list[str]
) -> None:
    machines = [(region, f"{region}{i}") for region, count in there.items() for i in range(count)]
    order = mix_regions(machines)
    batches = plan_batches(ROLLING, order, order, max_unavailable)
    assert [" ".join(machine[:3] for machine in batch.new) for batch in batches] == expected


@given(
    st.sampled_from(Strategy), st.integers(0, 30), st.integers(1, 30), st.floats(0.01, 40.0, allow_nan=False)
)
def test_each_machine_is_in_one_batch_and_old_ones_never_go_ahead(
    strategy: Strategy, old_count: int, new_count: int, max_unavailable: float
) -> None:
    old, new = [f"o{i}" for i in range(old_count)], [f"n{i}" for i in range(new_count)]
    batches = plan_batches(strategy, old, new, max_unavailable)
    assert [machine for batch in batches for machine in batch.old] == old
    assert [machine for batch in batches for machine in batch.new] == new
    gone = come = 0
    for batch in batches:
        gone, come = gone + len(batch.old), come + len(batch.new)
        assert gone * new_count <= come * old_count
