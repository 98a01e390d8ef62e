from __future__ import annotations

from isthmus.checking.watchers import GONE_AFTER_S, Presence

ALL = {"a1": "ams", "a2": "ams", "a3": "ams", "s1": "syd"}
MACHINES = [f"m{i}" for i in range(300)]


def presence(node: str, members: dict[str, str]) -> Presence:
    """What a node knows that has run for long and sees these members."""
    made = Presence(node, ALL[node], 0.0)
    made.set_members(members, GONE_AFTER_S)
    return made


def watchers(members: dict[str, str], owner: str, region: str) -> dict[str, str]:
    """Who watches each machine; all who are there must agree."""
    views = [presence(node, members) for node in members]
    found = [{m: view.find_watcher(m, owner, region) for m in MACHINES} for view in views]
    assert all(view == found[0] for view in found)
    return found[0]


def without(*nodes: str) -> dict[str, str]:
    return {node: region for node, region in ALL.items() if node not in nodes}


def test_a_node_that_is_there_watches_its_own() -> None:
    assert set(watchers(ALL, "a1", "ams").values()) == {"a1"}


def test_machines_of_a_node_that_is_gone_are_shared_among_its_region() -> None:
    shares = list(watchers(without("a1"), "a1", "ams").values())
    assert set(shares) == {"a2", "a3"}
    assert 100 < shares.count("a2") < 200


def test_others_take_over_where_nobody_of_the_region_is_left() -> None:
    assert set(watchers(without("s1"), "s1", "syd").values()) == {"a1", "a2", "a3"}


def test_when_another_goes_only_its_share_moves() -> None:
    before, after = watchers(without("s1"), "s1", "syd"), watchers(without("s1", "a3"), "s1", "syd")
    assert all(after[m] == before[m] for m in MACHINES if before[m] != "a3")
    assert {after[m] for m in MACHINES if before[m] == "a3"} == {"a1", "a2"}


def test_a_node_that_went_is_waited_for_and_one_that_comes_back_is_there_at_once() -> None:
    seen = presence("a2", ALL)
    assert not seen.set_members(without("a1"), 20.0)
    assert seen.find_watcher("m", "a1", "ams") == "a1"
    assert not seen.set_members(without("a1"), 20.0 + GONE_AFTER_S - 1)
    assert seen.set_members(without("a1"), 20.0 + GONE_AFTER_S)
    assert seen.find_watcher("m", "a1", "ams") != "a1"
    assert seen.set_members(ALL, 31.0)
    assert seen.find_watcher("m", "a1", "ams") == "a1"
    # And it is waited for again, from the time when it goes again.
    seen.set_members(without("a1"), 50.0)
    assert seen.find_watcher("m", "a1", "ams") == "a1"


def test_a_node_that_has_just_started_takes_nobody_for_gone() -> None:
    seen = Presence("a1", "ams", 100.0)
    seen.set_members({"a1": "ams"}, 100.0 + GONE_AFTER_S - 1)
    assert seen.find_watcher("m", "s1", "syd") == "s1"
    assert seen.set_members({"a1": "ams"}, 100.0 + GONE_AFTER_S)
    assert seen.find_watcher("m", "s1", "syd") == "a1"


def test_a_node_never_takes_itself_for_gone() -> None:
    assert presence("a1", without("a1")).find_watcher("m", "a1", "ams") == "a1"
