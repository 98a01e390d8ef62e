"""Coordinates: nodes of ten regions find their places from noisy round trips."""

import itertools
import math
from random import Random
from statistics import median

import pytest

from replication.core.clock import SiteId
from replication.core.vivaldi import (
    ERROR_MAX,
    ORIGIN,
    REACH_MS,
    STEP_MAX_MS,
    Coordinate,
    Vivaldi,
    estimate_rtt_ms,
    is_sane,
)
from replication.simulator.regions import REGIONS, compute_one_way_us

FAR = (REACH_MS / 2.1,) * 4


def site(number: int) -> SiteId:
    return SiteId(number.to_bytes(16, "big"))


class World:
    """Nodes in regions, each behind a link of its own, that measure each other in turn."""

    def __init__(self, count: int, *, seed: int, jitter: float = 0.1, liars: int = 0) -> None:
        self.rng = Random(seed)
        self.regions = [REGIONS[index % 10] for index in range(count)]
        self.access_ms = [3 * self.rng.random() for _ in range(count)]
        self.nodes = [Vivaldi() for _ in range(count)]
        self.jitter = jitter
        self.honest = range(liars, count)

    def rtt_ms(self, one: int, other: int) -> float:
        way_us = compute_one_way_us(self.regions[one], self.regions[other])
        return 2 * way_us / 1000 + self.access_ms[one] + self.access_ms[other]

    def measure(self, one: int, other: int) -> None:
        slow = 1 + self.jitter * self.rng.expovariate(1)
        stall = 1_000 * self.rng.random() if self.rng.random() < self.jitter / 5 else 0
        claimed = self.nodes[other].place
        if other not in self.honest:
            claimed = Coordinate(tuple(self.rng.choice([-1, 1]) * axis for axis in FAR), 0.0, 0.0)
        self.nodes[one].observe(site(other), claimed, self.rtt_ms(one, other) * slow + stall, self.rng)

    def run(self, rounds: int) -> None:
        for _ in range(rounds):
            for one in self.honest:
                other = self.rng.randrange(len(self.nodes) - 1)
                self.measure(one, other + (other >= one))

    def compute_error(self, of: int | None = None) -> float:
        return median(
            abs(estimate_rtt_ms(self.nodes[one].place, self.nodes[other].place) - self.rtt_ms(one, other))
            / self.rtt_ms(one, other)
            for one, other in itertools.combinations(self.honest, 2)
            if of is None or of in (one, other)
        )


@pytest.mark.parametrize("count", [5, 30, 100])
@pytest.mark.parametrize("seed", range(3))
def test_estimates_are_near_the_round_trips_after_two_minutes_of_probes(count, seed):
    world = World(count, seed=seed)
    assert world.compute_error() > 0.9, "at first all are at one place"
    world.run(120)
    assert world.compute_error() < 0.22, f"seed {seed}"


@pytest.mark.parametrize("seed", range(3))
def test_without_noise_estimates_come_nearer(seed):
    world = World(30, seed=seed, jitter=0)
    world.run(300)
    assert world.compute_error() < 0.15, f"seed {seed}"


@pytest.mark.parametrize("seed", range(3))
def test_a_node_that_moved_to_another_continent_finds_its_new_place(seed):
    world = World(30, seed=seed)
    world.run(200)
    world.regions[29] = REGIONS[4]
    assert world.compute_error(of=29) > 0.4
    world.run(120)
    assert world.compute_error(of=29) < 0.3, f"seed {seed}"
    assert world.compute_error() < 0.22, "the others stay where they are"


@pytest.mark.parametrize("seed", range(3))
def test_liars_among_thirty_do_not_spoil_the_map(seed):
    world = World(30, seed=seed, liars=2)
    world.run(200)
    assert world.compute_error() < 0.35, f"seed {seed}"


@pytest.mark.parametrize(
    "claimed",
    [
        Coordinate((math.nan, 0.0, 0.0, 0.0), 1.0, 1.0),
        Coordinate((math.inf, 0.0, 0.0, 0.0), 1.0, 1.0),
        Coordinate((REACH_MS, REACH_MS, 0.0, 0.0), 1.0, 1.0),
        Coordinate((0.0, 0.0, 0.0, 0.0), math.nan, 1.0),
        Coordinate((0.0, 0.0, 0.0, 0.0), -1.0, 1.0),
        Coordinate((0.0, 0.0, 0.0, 0.0), 1.0, ERROR_MAX + 0.1),
        Coordinate((0.0, 0.0, 0.0, 0.0), 1.0, -0.1),
        Coordinate((0.0, 0.0, 0.0), 1.0, 1.0),
    ],
)
def test_a_place_out_of_this_world_is_refused(claimed):
    node = Vivaldi()
    assert not node.observe(site(1), claimed, 10.0, Random(1))
    assert node.place == ORIGIN


@pytest.mark.parametrize("rtt_ms", [0.0, -1.0, math.nan, math.inf, REACH_MS + 1])
def test_a_round_trip_that_cannot_be_is_refused(rtt_ms):
    node = Vivaldi()
    assert not node.observe(site(1), ORIGIN, rtt_ms, Random(1))
    assert node.place == ORIGIN


def test_one_claim_moves_a_node_by_a_bounded_step_and_never_out_of_reach():
    node, rng = Vivaldi(), Random(1)
    for number in range(2_000):
        before = node.place
        claimed = Coordinate(FAR if number % 2 else tuple(-axis for axis in FAR), REACH_MS, 0.0)
        node.observe(site(number), claimed, rng.choice([0.001, REACH_MS]), rng)
        assert is_sane(node.place)
        # With a hair for the pull of gravity.
        assert math.dist(before.vector, node.place.vector) <= STEP_MAX_MS + (REACH_MS / 500) ** 2


def test_a_slow_answer_among_fast_ones_moves_nothing():
    calm, stalled = Vivaldi(), Vivaldi()
    for node, third in ((calm, 50.0), (stalled, 1_900.0)):
        for rtt_ms in (50.0, 50.0, third):
            node.observe(site(1), ORIGIN._replace(error=0.1), rtt_ms, Random(1))
    assert calm.place == stalled.place


def test_filters_are_kept_for_a_bounded_number_of_peers():
    node = Vivaldi()
    for number in range(1_000):
        node.observe(site(number), ORIGIN, 50.0, Random(1))
    assert len(node._samples) == 64
