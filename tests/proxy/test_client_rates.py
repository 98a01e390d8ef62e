"""How often a client may connect: the rate, the burst, and what is remembered of whom."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.core.client_rates import BURST_S, CLIENTS_MAX, ClientRates


@given(st.integers(1, 50), st.lists(st.floats(0, 2), max_size=100))
def test_no_window_of_time_has_more_than_its_rate_and_one_burst(rate: int, pauses: list[float]) -> None:
    rates = ClientRates(rate)
    now, taken = 0.0, []
    for pause in pauses:
        now += pause
        taken += [now for _ in range(rate) if rates.take("a", now)]
    for i, start in enumerate(taken):
        for count, end in enumerate(taken[i:], 1):
            assert count <= rate * (BURST_S + end - start) + 1e-6


@given(st.integers(1, 50), st.integers(1, 300))
def test_who_keeps_to_the_rate_is_never_refused(rate: int, connections: int) -> None:
    rates = ClientRates(rate)
    assert all(rates.take("a", 1_000.0 + i / rate) for i in range(connections))


def test_a_burst_is_four_seconds_of_the_rate_and_each_client_has_its_own() -> None:
    rates = ClientRates(2)
    assert [rates.take("a", 5.0) for _ in range(9)] == [True] * 8 + [False]
    assert rates.take("b", 5.0)
    assert rates.take("a", 5.5)
    assert not rates.take("a", 5.5)


def test_no_rate_is_no_limit_and_remembers_nobody() -> None:
    rates = ClientRates(0)
    assert all(rates.take("a", 0.0) for _ in range(10_000))
    assert not len(rates)


def test_only_so_many_clients_are_remembered_and_those_that_paused_are_forgotten_first() -> None:
    rates = ClientRates(1)
    for _ in range(4):
        rates.take("greedy", 100.0)
    for i in range(CLIENTS_MAX - 1):
        rates.take(f"before-{i}", 90.0)
    rates.take("newcomer", 100.0)
    assert len(rates) == 2
    assert not rates.take("greedy", 100.0)


def test_a_flood_of_addresses_stays_bounded() -> None:
    rates = ClientRates(1)
    most = 0
    for i in range(3 * CLIENTS_MAX):
        rates.take(str(i), 100.0)
        most = max(most, len(rates))
    assert most == CLIENTS_MAX
