from __future__ import annotations

import itertools
import random
from typing import TYPE_CHECKING

import pytest

from isthmus.staging.rings import find_ring, order_regions
from isthmus.staging.stage import (
    SETTLE_MS_MAX,
    STALL_MS,
    STRIKES_MAX,
    TOGETHER_MAX,
    Absolve,
    Accuse,
    Release,
    Revert,
    Stage,
    Status,
    Strikes,
    Try,
)
from replication.core.clock import Clock, Hlc, SiteId

if TYPE_CHECKING:
    from collections.abc import Mapping

    from isthmus.staging.stage import Action

SITE = SiteId(bytes(16))
A, B, C = (Clock(Hlc(number), SITE) for number in (1, 2, 3))
BAKE_MS = 4_000
SETTLE_MS = BAKE_MS / 4


def make_stage(*held: Clock, worker: str = "worker-0/1", strikes: Mapping[Clock, int] | None = None) -> Stage:
    stage = Stage("n1", BAKE_MS)
    if worker:
        stage.handle_worker(worker)
    stage.handle_held(dict.fromkeys(held), strikes or {}, 0)
    return stage


def only(actions: list[Action], kind: type) -> list[Action]:
    return [action for action in actions if isinstance(action, kind)]


def die(stage: Stage, now_ms: float, worker: str = "worker-0/1") -> list[Action]:
    """The worker dies, and is there again."""
    actions = stage.handle_gone(worker, is_death=True)
    stage.handle_worker(worker)
    return actions + stage.plan(now_ms, 0)


def test_due_changesets_are_tried_together_on_one_worker() -> None:
    stage = make_stage(A, B)
    stage.handle_worker("worker-1/2")
    assert stage.plan(0, 0) == [Try("worker-0/1", 1, {A: 1, B: 1})]
    assert stage.plan(1, 0) == []
    assert stage.on_trial == (A, B)


def test_those_that_a_worker_survives_are_released_when_it_has_settled() -> None:
    stage = make_stage(A)
    stage.plan(0, 0)
    assert stage.handle_tried("worker-0/1", 1, "", 10) == []
    assert stage.plan(9 + SETTLE_MS, 0) == []
    assert stage.plan(10 + SETTLE_MS, 0) == [Release((A,), "worker-0/1")]
    assert stage.entries == {}


def test_settling_has_a_bound() -> None:
    stage = Stage("n1", 100 * SETTLE_MS_MAX)
    stage.handle_worker("w")
    stage.handle_held({A: None}, {}, 0)
    stage.plan(0, 0)
    stage.handle_tried("w", 1, "", 0)
    assert stage.plan(SETTLE_MS_MAX, 0) == [Release((A,), "w")]


def test_later_rings_wait_from_arrival_on() -> None:
    stage = make_stage(A)
    assert stage.plan(BAKE_MS - 1, BAKE_MS) == []
    stage.handle_held({A: None, B: None}, {}, BAKE_MS)
    assert stage.plan(BAKE_MS, BAKE_MS) == [Try("worker-0/1", 1, {A: 1})]


def test_without_a_worker_nothing_is_tried_or_released() -> None:
    stage = make_stage(A, worker="")
    assert stage.plan(1_000_000, 0) == []
    stage.handle_worker("worker-0/1")
    assert stage.plan(1_000_000, 0) == [Try("worker-0/1", 1, {A: 1})]


def test_fresh_node_releases_at_once_what_nobody_accuses() -> None:
    stage = make_stage(A, B, C, strikes={B: 1})
    stage.fresh_until_ms = 100
    stage.handle_told({C: {"n2": Status.SUSPECT}}, 0)
    actions = stage.plan(99, BAKE_MS)
    assert actions[0] == Release((A,))
    assert list(stage.entries) == [B, C]
    stage.handle_held({A: None}, {}, 100)
    assert stage.plan(100, BAKE_MS) == []


def test_death_is_a_strike_against_all_on_trial_and_then_each_is_alone() -> None:
    stage = make_stage(A, B)
    stage.plan(0, 0)
    actions = die(stage, 1)
    assert [accuse.clock for accuse in only(actions, Accuse)] == [A, B]
    assert {accuse.status for accuse in only(actions, Accuse)} == {Status.SUSPECT}
    assert only(actions, Try) == [Try("worker-0/1", 2, {A: 2})]
    stage.handle_tried("worker-0/1", 2, "", 2)
    actions = stage.plan(2 + SETTLE_MS, 0)
    assert only(actions, Release) == [Release((A,), "worker-0/1")]
    assert only(actions, Try) == [Try("worker-0/1", 3, {B: 2})]
    actions = die(stage, 3_000)
    assert [(a.clock, a.status, a.strikes) for a in only(actions, Accuse)] == [
        (B, Status.QUARANTINED, STRIKES_MAX)
    ]
    assert only(actions, Try) == []
    assert stage.plan(1_000_000, 0) == actions, "it is told until it is known"
    stage.note_accused(B, Status.QUARANTINED)
    assert stage.plan(1_000_000, 0) == []


def test_survivor_takes_back_what_was_told_of_it() -> None:
    stage = make_stage(A)
    stage.plan(0, 0)
    die(stage, 1)
    stage.note_accused(A, Status.SUSPECT)
    stage.handle_told({A: {"n1": Status.SUSPECT}}, 2)
    stage.handle_tried("worker-0/1", 2, "", 2)
    assert stage.plan(2 + SETTLE_MS, 0) == [Release((A,), "worker-0/1")]
    assert stage.plan(3 + SETTLE_MS, 0) == [Absolve(A)]
    stage.handle_told({}, 4)
    assert stage.plan(4 + SETTLE_MS, 0) == []


def test_worker_that_takes_its_leave_proves_nothing() -> None:
    stage = make_stage(A)
    stage.plan(0, 0)
    assert stage.handle_gone("worker-0/1", is_death=False) == [Strikes({A: 0})]
    stage.handle_worker("worker-0/2")
    assert stage.plan(1, 0) == [Try("worker-0/2", 2, {A: 1})]


def test_death_of_another_worker_is_no_strike() -> None:
    stage = make_stage(A)
    stage.handle_worker("worker-1/2")
    stage.plan(0, 0)
    assert stage.handle_gone("worker-1/2", is_death=True) == []
    assert stage.on_trial == (A,)


def test_silence_is_a_strike_and_the_next_trial_is_another_worker_s() -> None:
    stage = make_stage(A)
    stage.handle_worker("worker-1/2")
    stage.plan(0, 0)
    assert stage.plan(STALL_MS - 1, 0) == []
    actions = stage.plan(STALL_MS, 0)
    assert only(actions, Revert) == [Revert("worker-0/1")]
    assert only(actions, Try) == [Try("worker-1/2", 2, {A: 2})]
    assert stage.entries[A].strikes == 1
    # Its answer comes late, and is none to the trial that goes on.
    stage.handle_tried("worker-0/1", 1, "", STALL_MS + 1)
    assert stage.plan(STALL_MS + 1 + SETTLE_MS, 0)[:1] != [Release((A,))]


def test_worker_that_cannot_apply_it_lives_and_goes_back() -> None:
    stage = make_stage(A)
    stage.plan(0, 0)
    assert stage.handle_tried("worker-0/1", 1, "KeyError('x')", 5) == [Revert("worker-0/1")]
    assert stage.entries[A].strikes == 1
    assert "KeyError" in stage.entries[A].reason


def test_strikes_on_disk_count_after_a_restart() -> None:
    stage = make_stage(A, B, strikes={A: STRIKES_MAX, B: 1})
    actions = stage.plan(0, BAKE_MS)
    assert {a.clock: a.status for a in only(actions, Accuse)} == {A: Status.QUARANTINED, B: Status.SUSPECT}
    assert only(actions, Try) == [Try("worker-0/1", 1, {B: 2})]


@pytest.mark.parametrize("status", Status)
def test_what_another_node_accuses_is_not_tried(status: Status) -> None:
    stage = make_stage(A, B)
    stage.handle_told({A: {"n2": status}}, 0)
    assert stage.plan(1_000_000, 0) == [Try("worker-0/1", 1, {B: 1})]


def test_two_nodes_that_suspect_the_same_find_out_each_for_itself() -> None:
    stage = make_stage(A)
    stage.plan(0, 0)
    stage.handle_told({A: {"n2": Status.SUSPECT}}, 1)
    assert only(die(stage, 2), Try) == [Try("worker-0/1", 2, {A: 2})]


def test_accusation_that_comes_during_a_trial_keeps_the_other_workers_from_it() -> None:
    stage = make_stage(A, B)
    stage.plan(0, 0)
    stage.handle_tried("worker-0/1", 1, "", 1)
    stage.handle_told({A: {"n2": Status.QUARANTINED}}, 2)
    assert stage.plan(1 + SETTLE_MS, 0) == [Strikes({A: 0}), Release((B,)), Revert("worker-0/1")]
    assert list(stage.entries) == [A]


def test_release_by_hand_begins_anew() -> None:
    stage = make_stage(A, strikes={A: STRIKES_MAX})
    stage.plan(0, 0)
    stage.note_accused(A, Status.QUARANTINED)
    stage.handle_told({A: {"n1": Status.QUARANTINED}}, 1)
    assert stage.plan(1_000_000, 0) == []
    assert stage.handle_told({}, 1_000_000) == [Strikes({A: 0})]
    assert stage.plan(1_000_000, 0) == [Try("worker-0/1", 1, {A: 1})]


def test_end_of_an_accusation_by_others_starts_the_wait_anew() -> None:
    stage = make_stage(A)
    stage.handle_told({A: {"n2": Status.SUSPECT}}, 1)
    stage.handle_told({}, 10_000)
    assert stage.plan(10_000 + BAKE_MS - 1, BAKE_MS) == []
    assert only(stage.plan(10_000 + BAKE_MS, BAKE_MS), Try)


def test_changeset_that_is_overwritten_is_let_go_and_absolved() -> None:
    stage = make_stage(A, strikes={A: STRIKES_MAX})
    stage.plan(0, 0)
    stage.note_accused(A, Status.QUARANTINED)
    stage.handle_told({A: {"n1": Status.QUARANTINED}}, 1)
    stage.handle_held({B: None}, {A: STRIKES_MAX}, 2)
    assert stage.plan(2, 0) == [Absolve(A), Try("worker-0/1", 1, {B: 1})]


def test_death_with_something_that_is_gone_meanwhile_clears_its_strike() -> None:
    stage = make_stage(A)
    stage.plan(0, 0)
    stage.handle_held({}, {}, 1)
    assert stage.handle_gone("worker-0/1", is_death=True) == [Strikes({A: 0})]
    assert stage.entries == {}


def test_trials_have_a_bound() -> None:
    clocks = [Clock(Hlc(number), SITE) for number in range(1, TOGETHER_MAX + 10)]
    stage = make_stage(*clocks)
    (trial,) = stage.plan(0, 0)
    assert isinstance(trial, Try)
    assert list(trial.strikes) == clocks[:TOGETHER_MAX]


@pytest.mark.parametrize("seed", range(200))
def test_only_what_kills_is_quarantined_whatever_else_happens(seed: int) -> None:
    """Any mixture: poison dies at most STRIKES_MAX times alone, everything else gets to all workers."""
    rng = random.Random(seed)
    clocks = [Clock(Hlc(number), SITE) for number in range(1, rng.randrange(3, 12))]
    poison = set(rng.sample(clocks, rng.randrange(3)))
    stage = Stage("n1", BAKE_MS)
    stage.handle_worker("w")
    disk: dict[Clock, int] = {}
    released: list[Clock] = []
    deaths = 0
    todo: list[Action] = []
    held = clocks[: rng.randrange(len(clocks))]
    for step in itertools.count():
        assert step < 1_000, f"seed {seed}"
        now_ms = step * 500.0
        if step == 3:
            held = [clock for clock in clocks if clock not in released]
        stage.handle_held(dict.fromkeys(held), disk, now_ms)
        actions, todo = [*todo, *stage.plan(now_ms, 0)], []
        for action in actions:
            match action:
                case Try(worker, token, strikes):
                    disk |= strikes
                    if poison & set(strikes):
                        deaths += 1
                        todo += stage.handle_gone(worker, is_death=True)
                        stage.handle_worker(worker)
                    elif rng.random() < 0.1:
                        todo += stage.handle_gone(worker, is_death=False)
                        stage.handle_worker(worker)
                    else:
                        todo += stage.handle_tried(worker, token, "", now_ms)
                case Strikes(strikes):
                    disk |= strikes
                case Release(found, _):
                    released += found
                    disk |= dict.fromkeys(found, 0)
                    held = [clock for clock in held if clock not in found]
                case Accuse(clock, status):
                    stage.note_accused(clock, status)
        if step > 3 and {*held} <= poison and not actions and not stage.on_trial:
            break
    assert sorted(released) == sorted(set(clocks) - poison), f"seed {seed}"
    assert {clock for clock, count in disk.items() if count} == poison, f"seed {seed}"
    assert deaths <= 2 * len(poison), f"seed {seed}"


def test_regions_have_one_order_everywhere() -> None:
    regions = ["ams", "gru", "syd", "iad"]
    order = order_regions((), regions)
    assert order == ("gru", "ams", "syd", "iad"), "by SHA-256 of their names, for ever"
    assert order_regions((), [*reversed(regions), "ams"]) == order
    assert [find_ring(order, region) for region in order] == [0, 1, 2, 2]


def test_regions_that_are_not_named_come_last() -> None:
    assert order_regions(("gru", "ams"), ["ams", "gru", "syd"]) == ("gru", "ams")
    assert find_ring(("gru", "ams"), "syd") == 2
    assert find_ring(("gru",), "syd") == 1
    assert find_ring((), "syd") == 0
