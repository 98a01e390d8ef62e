from __future__ import annotations

import random

from routing.nearness import HOLD_S, Nearness
from tests.routing.rows import row, table_with


def test_what_was_never_measured_is_taken_at_once() -> None:
    nearness = Nearness()
    assert nearness.observe(0, [("fra", 7.0), ("iad", 80.0)])
    assert nearness.round_trips_ms == {"fra": 7.0, "iad": 80.0}
    assert not nearness.observe(1, [("fra", 7.1)])


def test_the_median_of_a_regions_nodes_counts() -> None:
    nearness = Nearness()
    nearness.observe(0, [("fra", 7.0), ("fra", 400.0), ("fra", 8.0)])
    assert nearness.round_trips_ms == {"fra": 8.0}


def test_jitter_changes_nothing() -> None:
    rng, nearness = random.Random(3), Nearness()
    nearness.observe(0, [("fra", 20.0), ("lhr", 21.0)])
    for second in range(1, 2_000):
        spikes = [(code, 20.0 + rng.uniform(-3, 3) + rng.choice((0, 0, 90))) for code in ("fra", "lhr")]
        assert not nearness.observe(second, spikes)


def test_a_lasting_difference_is_taken_after_a_while() -> None:
    nearness = Nearness()
    nearness.observe(0, [("fra", 20.0)])
    assert not nearness.observe(1, [("fra", 60.0)])
    assert not nearness.observe(HOLD_S, [("fra", 60.0)])
    assert nearness.observe(1 + HOLD_S, [("fra", 60.0)])
    assert nearness.round_trips_ms == {"fra": 60.0}


def test_a_region_that_nobody_measures_any_more_stays_where_it_was() -> None:
    nearness = Nearness()
    nearness.observe(0, [("fra", 20.0)])
    assert not nearness.observe(1_000, [])
    assert nearness.round_trips_ms == {"fra": 20.0}


def test_measured_beats_distance_and_only_from_where_it_was_measured() -> None:
    table = table_with(row("machines", id="near", region="fra"), row("machines", id="far", region="syd"))
    regions = table.regions
    assert regions.rtt_ms("ams", "fra") < regions.rtt_ms("ams", "lhr") < regions.rtt_ms("ams", "syd")
    assert regions.rtt_ms("ams", "nowhere") == float("inf")
    table.set_round_trips("ams", [("syd", 3.0), ("fra", 200.0), ("ams", 500.0)])
    assert regions.rtt_ms("ams", "syd") == 3.0
    assert regions.rtt_ms("ams", "ams") == 0.0
    assert regions.rtt_ms("lhr", "syd") > 100.0
