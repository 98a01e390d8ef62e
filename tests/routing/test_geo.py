from __future__ import annotations

import math

import pytest

from routing.geo import AREAS, BUILT_IN, Regions


def test_knows_the_usual_codes() -> None:
    assert {"ams", "iad", "syd", "gru", "fra", "lhr", "nrt", "sin", "jnb", "gig", "qro"} <= BUILT_IN.keys()
    assert not BUILT_IN.keys() & AREAS.keys()
    assert all(region.area in AREAS["any"] for region in BUILT_IN.values())


@pytest.mark.parametrize(
    ("a", "b", "km"), [("lhr", "cdg", 350), ("iad", "lhr", 5_900), ("syd", "scl", 11_300)]
)
def test_measures_great_circles(a: str, b: str, km: float) -> None:
    regions = Regions()
    assert regions.distance_km(a, b) == pytest.approx(km, rel=0.03)
    assert regions.distance_km(b, a) == regions.distance_km(a, b)


def test_a_region_without_coordinates_is_near_itself_and_far_from_all_others() -> None:
    regions = Regions()
    assert regions.distance_km("moon", "moon") == 0
    assert regions.distance_km("moon", "ams") == math.inf


def test_areas_cover_their_regions() -> None:
    regions = Regions()
    assert regions.covers("eu", "ams")
    assert not regions.covers("eu", "iad")
    assert regions.covers("usa", "iad")
    assert regions.covers("na", "iad")
    assert regions.covers("na", "yyz")
    assert not regions.covers("us", "yyz")
    assert regions.covers("sa", "gru")
    assert regions.covers("apac", "syd")
    assert regions.covers("any", "moon")
    assert regions.covers("moon", "moon")
    assert not regions.covers("eu", "moon")


def test_an_own_region_has_a_place_and_belongs_to_the_area_around_it() -> None:
    regions = Regions()
    regions.put_own("office", "Utrecht", 52.09, 5.12)
    assert "office" in regions
    assert regions.distance_km("office", "ams") < 50
    assert regions.covers("eu", "office")
    regions.put_own("office", "Sydney", -33.9, 151.2)
    assert regions.distance_km("office", "ams") > 10_000
    regions.drop_own("office")
    assert "office" not in regions
    assert regions.distance_km("office", "ams") == math.inf


def test_an_own_region_wins_over_the_built_in_one_until_it_goes() -> None:
    regions = Regions()
    usual = regions.distance_km("ams", "fra")
    regions.put_own("ams", "Amsterdam, New York", 42.94, -74.19)
    assert regions.covers("us", "ams")
    assert regions.distance_km("ams", "fra") > usual
    regions.drop_own("ams")
    assert regions.covers("eu", "ams")
    assert regions.distance_km("ams", "fra") == usual


def test_suggests_what_was_probably_meant() -> None:
    regions = Regions()
    assert regions.suggest("asm") == "ams"
    assert regions.suggest("frra") == "fra"
    assert regions.suggest("zzzzzz") is None
