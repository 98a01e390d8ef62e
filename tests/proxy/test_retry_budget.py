from __future__ import annotations

import random
from dataclasses import replace

import pytest

from proxy.core.retry_budget import BUDGETS_MAX, WINDOW_S, RetryBudgets
from proxy.metrics import ProxyMetrics
from proxy.settings import ProxySettings


class World:
    """An app's requests and retries in virtual time."""

    def __init__(self, percent: int = 20, per_s: int = 0) -> None:
        settings = replace(ProxySettings("n1", "ams"), retry_percent=percent, retries_per_s_min=per_s)
        self.metrics = ProxyMetrics()
        self.now = 1_000.0
        self.budgets = RetryBudgets(settings, self.metrics, self.now)

    def serve(self, requests: int, seconds: float, app: str = "app") -> None:
        self.metrics.app(app).statuses[2] += requests
        self.now += seconds

    def take(self, wanted: int, app: str = "app") -> int:
        return sum(self.budgets.take(app, self.now) for _ in range(wanted))


def test_a_share_of_the_last_requests_may_be_retries() -> None:
    world = World(percent=20)
    world.serve(1_000, WINDOW_S)
    assert world.take(500) == 200
    assert world.metrics.app("app").retries == 200
    assert world.metrics.app("app").retries_refused == 300


def test_without_requests_there_is_a_minimum() -> None:
    world = World(per_s=10)
    assert world.take(1_000) == 10 * WINDOW_S
    world.now += 1.0
    assert world.take(1_000) == 10


def test_good_times_long_ago_do_not_pay_for_an_outage() -> None:
    world = World(percent=20)
    world.serve(3_600_000, 3_600.0)
    assert world.take(10**6) == 2_000  # of a window of 1,000 a second
    world.now += 3_600.0
    assert world.take(1) == 0


def test_what_is_not_used_is_lost_after_the_window() -> None:
    world = World(percent=50)
    world.serve(100, WINDOW_S)
    assert world.take(1) == 1
    world.now += WINDOW_S
    assert world.take(1) == 0


def test_other_settings_hold_from_now_on() -> None:
    world = World(percent=20)
    world.serve(100, WINDOW_S)
    assert world.take(1) == 1
    world.budgets.adopt(replace(ProxySettings("n1", "ams"), retry_percent=50, retries_per_s_min=0))
    world.serve(100, WINDOW_S)
    assert world.take(100) == 50


def test_nothing_allowed_is_nothing() -> None:
    world = World(percent=0)
    world.serve(1_000, WINDOW_S)
    assert world.take(10) == 0


def test_an_app_does_not_use_up_the_budget_of_another() -> None:
    world = World(per_s=1)
    assert world.take(100, "a") == world.take(100, "b") == WINDOW_S


def test_budgets_are_bounded_and_a_forgotten_one_is_not_a_fresh_start() -> None:
    world = World(percent=20)
    world.serve(100, WINDOW_S)
    assert world.take(100) == 20
    world.now += 2 * WINDOW_S
    for n in range(2 * BUDGETS_MAX):
        world.take(1, f"app{n}")
        assert len(world.budgets._budgets) <= BUDGETS_MAX
    # Its hundred requests count as spread over the whole life by now.
    assert world.take(100) <= 7


@pytest.mark.parametrize("seed", range(5))
def test_an_outage_is_never_amplified_by_more_than_the_share(seed: int) -> None:
    rng = random.Random(seed)
    world = World(percent=20, per_s=5)
    requests = granted = 0
    begun = world.now
    for _ in range(2_000):
        burst = rng.randrange(40)
        requests += burst
        world.serve(burst, rng.random() * 0.2)
        granted += world.take(burst * rng.randrange(4))
    allowed = 0.2 * requests + 5 * (world.now - begun + WINDOW_S)
    assert 0.8 * allowed < granted <= allowed, f"seed {seed}"
