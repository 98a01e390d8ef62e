"""Whose turn it is, and when a rollout goes back: by names alone, with whatever a node knows."""

from __future__ import annotations

import heapq
import random
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec
import pytest

from isthmus.rollouts.course import (
    LATE_MS,
    SILENT_MS,
    End,
    Kind,
    Report,
    Rollout,
    State,
    Status,
    Take,
    Undo,
    Wait,
    find_latest,
    find_running,
    plan_node,
    plan_steps,
)

if TYPE_CHECKING:
    from isthmus.rollouts.course import Action

TRYING, GOOD, FAILED, BACK = (Report(state) for state in State)
BAKE_MS = 1_000


def rollout(id_: str = "a", *steps: str, created_ms: int = 0, **more: Any) -> Rollout:
    """A rollout that runs; each of `steps` has names with blanks between."""
    fields: dict[str, Any] = {
        "id": id_,
        "kind": Kind.CONFIG,
        "body": id_,
        "steps": tuple(tuple(step.split()) for step in steps or ("n1", "n2 n3", "n4")),
        "bake_ms": BAKE_MS,
        "status": Status.RUNNING,
        "reason": "",
        "node": "n1",
        "created_by": "",
        "created_ms": created_ms,
        "finished_ms": 0,
    }
    return Rollout(**{**fields, **more})


def plan(
    node: str,
    *rollouts: Rollout,
    present: str = "n1 n2 n3 n4",
    waits: dict[str, Wait] | None = None,
    **said: dict[str, Report],
) -> Action | None:
    return plan_node(rollouts, said, node=node, present=present.split(), waits=waits or {})


class TestSteps:
    NODES: ClassVar = {"a1": "ams", "a2": "ams", "a3": "ams", "g1": "gru", "s1": "syd", "i1": "iad"}

    def test_one_node_of_the_first_region_is_alone_and_each_region_s_turn_comes_after(self) -> None:
        steps = plan_steps(self.NODES, ("ams", "gru"))
        assert steps == (("a1",), ("a2", "a3"), ("g1",), ("i1", "s1"))

    def test_canaries_are_first_wherever_they_are(self) -> None:
        steps = plan_steps(self.NODES, ("ams", "gru"), ("s1", "a2"))
        assert steps == (("s1", "a2"), ("a1", "a3"), ("g1",), ("i1",))

    def test_order_without_configured_regions_is_the_same_wherever_it_is_asked(self) -> None:
        turned = dict(reversed(self.NODES.items()))
        steps = plan_steps(self.NODES, ())
        assert steps == plan_steps(turned, ())
        assert sorted(name for step in steps for name in step) == sorted(self.NODES)
        assert len(steps[0]) == 1

    def test_first_region_without_nodes_leaves_the_first_step_to_another(self) -> None:
        assert plan_steps({"s1": "syd", "s2": "syd"}, ("ams", "gru")) == (("s1",), ("s2",))

    def test_one_node_makes_one_step(self) -> None:
        assert plan_steps({"n1": "local"}, ()) == (("n1",),)


class TestTurns:
    def test_first_step_begins_at_once_and_no_other(self) -> None:
        one = rollout()
        assert plan("n1", one) == Take(one, BAKE_MS)
        assert [plan(node, one) for node in ("n2", "n3", "n4")] == [None] * 3

    def test_step_begins_when_all_of_those_before_are_good(self) -> None:
        one = rollout()
        assert plan("n2", one, a={"n1": TRYING}) is None
        assert plan("n2", one, a={"n1": GOOD}) == plan("n3", one, a={"n1": GOOD}) == Take(one, BAKE_MS)
        assert plan("n4", one, a={"n1": GOOD, "n2": GOOD}) is None
        assert plan("n4", one, a={"n1": GOOD, "n2": GOOD, "n3": GOOD}) == Take(one, BAKE_MS)

    def test_node_that_is_away_is_not_waited_for_unless_it_has_begun(self) -> None:
        one = rollout()
        assert plan("n2", one, present="n2 n3 n4") == Take(one, BAKE_MS)
        assert plan("n2", one, present="n2 n3 n4", a={"n1": TRYING}) is None

    def test_nobody_begins_twice(self) -> None:
        for report in (TRYING, GOOD):
            assert plan("n2", rollout(), a={"n1": GOOD, "n2": report}) is None

    def test_node_that_came_later_waits_for_the_end_and_takes_it_up_without_a_trial(self) -> None:
        one = rollout()
        good = dict.fromkeys(("n1", "n2", "n3", "n4"), GOOD)
        assert plan("n5", one, present="n1 n5", a={**good, "n1": TRYING}) is None
        done = msgspec.structs.replace(one, status=Status.DONE)
        assert plan("n5", done, present="n1 n5", a=good) == Take(done, 0)
        assert plan("n1", done, present="n1 n5", a=good) is None


class TestEnd:
    def test_one_node_says_that_it_is_done(self) -> None:
        one = rollout()
        good = dict.fromkeys(("n1", "n2", "n3", "n4"), GOOD)
        assert plan("n1", one, a=good) == End(one, Status.DONE)
        assert plan("n2", one, a=good) is None
        assert plan("n2", one, present="n2 n3", a=good) == End(one, Status.DONE)

    def test_it_is_not_done_while_a_node_that_is_there_has_not_passed(self) -> None:
        said = {"n1": GOOD, "n2": GOOD, "n3": GOOD}
        assert plan("n1", rollout(), a=said) is None
        assert plan("n1", rollout(), a={**said, "n4": TRYING}, present="n1") is None
        assert plan("n1", rollout(), a=said, present="n1 n2 n3") == End(rollout(), Status.DONE)

    def test_it_is_not_done_where_nobody_of_its_steps_is(self) -> None:
        assert plan("n5", rollout(), present="n5") is None

    def test_failure_of_one_has_all_go_back_with_its_words(self) -> None:
        one = rollout()
        said = {"n1": GOOD, "n2": GOOD, "n3": Report(State.FAILED, "a worker died")}
        assert plan("n1", one, a=said) == End(one, Status.BACK, "n3: a worker died")
        assert plan("n4", one, a=said) is None
        back = msgspec.structs.replace(one, status=Status.BACK)
        assert plan("n1", back, a=said) == plan("n2", back, a=said) == Undo(back)
        assert plan("n3", back, a=said) is None
        assert plan("n4", back, a=said) is None

    def test_cancelled_one_is_undone_by_those_that_try_it_too_and_once(self) -> None:
        back = rollout(status=Status.BACK)
        assert plan("n1", back, a={"n1": TRYING}) == Undo(back)
        assert plan("n1", back, a={"n1": BACK}) is None

    def test_node_that_is_gone_on_trial_is_blamed_after_a_while(self) -> None:
        one, said = rollout(), {"n2": TRYING}
        assert plan("n1", one, waits={"n2": Wait(60_000, SILENT_MS - 1)}, a=said) == Take(one, BAKE_MS)
        said["n1"] = GOOD
        assert plan("n1", one, waits={"n2": Wait(60_000, SILENT_MS - 1)}, a=said) is None
        end = plan("n1", one, waits={"n2": Wait(60_000, SILENT_MS)}, a=said)
        assert end == End(one, Status.BACK, "n2: it is gone since it has begun to try")
        assert plan("n3", one, waits={"n2": Wait(60_000, SILENT_MS)}, a={**said, "n3": GOOD}) is None

    def test_node_that_says_nothing_is_blamed_after_its_time_and_more(self) -> None:
        one, said = rollout(), {"n1": GOOD, "n2": TRYING, "n3": GOOD}
        assert plan("n1", one, waits={"n2": Wait(BAKE_MS + LATE_MS - 1)}, a=said) is None
        end = plan("n1", one, waits={"n2": Wait(BAKE_MS + LATE_MS)}, a=said)
        assert end == End(one, Status.BACK, "n2: it does not say how it goes")


class TestSeveral:
    def test_latest_that_is_done_wins_by_kind(self) -> None:
        done = [
            rollout("a", created_ms=1, status=Status.DONE),
            rollout("b", created_ms=3, status=Status.DONE),
            rollout("c", created_ms=2, status=Status.DONE),
            rollout("d", created_ms=4, status=Status.BACK),
            rollout("e", created_ms=9, status=Status.DONE, kind=Kind.SCHEMA),
        ]
        latest = find_latest(done, Kind.CONFIG)
        assert latest is done[1]
        assert plan("n9", *done, present="n9") == Take(latest, 0)
        assert plan("n9", *done, present="n9", b={"n9": FAILED}) == Take(done[4], 0)
        assert plan("n9", *done, present="n9", b={"n9": GOOD}, e={"n9": GOOD}) is None

    def test_of_two_begun_on_two_sides_the_first_goes_on_when_the_other_is_taken_back(self) -> None:
        first, second = rollout("b", created_ms=1), rollout("a", created_ms=2)
        assert find_running([second, first]) is first
        said = {"b": {"n1": TRYING}, "a": {"n2": TRYING}}
        end = plan("n1", second, first, **said)
        assert isinstance(end, End)
        assert (end.rollout, end.status) == (second, Status.BACK)
        assert [plan(node, second, first, **said) for node in ("n2", "n3", "n4")] == [None] * 3
        back = msgspec.structs.replace(second, status=Status.BACK)
        assert plan("n2", back, first, **said) == Undo(back)

    def test_one_that_runs_goes_back_when_a_later_one_is_done(self) -> None:
        first = rollout("a", created_ms=1)
        done = rollout("b", created_ms=2, status=Status.DONE)
        end = plan("n1", first, done, a={"n1": GOOD}, b={"n2": GOOD})
        assert isinstance(end, End)
        assert (end.rollout, end.status) == (first, Status.BACK)
        assert plan("n2", first, done, a={"n1": GOOD}, b={"n2": GOOD}) is None
        other = msgspec.structs.replace(done, kind=Kind.SCHEMA)
        assert plan("n2", first, other, a={"n1": GOOD}, b={"n2": GOOD}) == Take(first, BAKE_MS)

    def test_what_lies_under_a_later_one_that_stays_is_not_undone(self) -> None:
        under = rollout("a", created_ms=1, status=Status.BACK)
        over = rollout("b", created_ms=2, status=Status.DONE)
        good = {"a": {"n1": GOOD}, "b": {"n1": GOOD}}
        assert plan("n1", under, over, **good) is None
        back = msgspec.structs.replace(over, status=Status.BACK)
        assert plan("n1", under, back, **good) == Undo(back)
        assert plan("n1", under, back, **{**good, "b": {"n1": BACK}}) == Undo(under)
        other = msgspec.structs.replace(over, kind=Kind.SCHEMA)
        assert plan("n1", under, other, **good) == Undo(under)

    def test_node_that_tries_something_takes_up_nothing_else(self) -> None:
        tried = rollout("a", created_ms=1, status=Status.DONE)
        for status in (Status.RUNNING, Status.DONE):
            later = rollout("b", created_ms=2, status=status)
            assert plan("n1", tried, later, a={"n1": TRYING}) is None
            assert isinstance(plan("n1", tried, later, a={"n1": GOOD}), Take)

    def test_node_that_went_back_takes_up_what_is_done_after_all(self) -> None:
        done = rollout(status=Status.DONE)
        assert plan("n1", done, a={"n1": BACK}) == Take(done, 0)
        assert plan("n1", done, a={"n1": FAILED}) is None


class SimNode:
    """What a node knows, has, and would do; rows are (stamp, value)."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.rollouts: dict[str, tuple[Any, Rollout]] = {}
        self.reports: dict[tuple[str, str], tuple[Any, Report]] = {}
        self.settings = self.before = ""
        self.trial: tuple[Rollout, int] | None = None  # and when it ends
        self.up_at = 0  # when it is back, or since when it is there
        self.seen: dict[tuple[str, str], tuple[int, int | None]] = {}

    def said(self) -> dict[str, dict[str, Report]]:
        found: dict[str, dict[str, Report]] = {}
        for (id_, node), (_, report) in self.reports.items():
            found.setdefault(id_, {})[node] = report
        return found


class Sim:
    """Nodes with replicas of the rows that are late by chance, deaths, cuts, and harm that rollouts do."""

    TICK_MS = 500
    ACTIVE_MS = 120_000

    def __init__(self, seed: int, *, cuts: bool) -> None:
        self.rng = random.Random(seed)
        self.cuts = cuts
        self.now_ms = 0
        self.count = 0
        self.nodes = [SimNode(f"n{number}") for number in range(self.rng.randint(1, 6))]
        self.flying: list[tuple[int, int, SimNode, str, Any, Any, Any]] = []
        self.side: dict[str, int] = {}
        self.heals_at = 0
        self.harm: dict[tuple[str, str], str] = {}  # what a rollout does to a node
        self.began = 0

    def is_up(self, node: SimNode) -> bool:
        return self.now_ms >= node.up_at

    def present(self, node: SimNode) -> set[str]:
        """Those that a node sees: not those beyond a cut, nor those that are down."""
        return {
            other.name
            for other in self.nodes
            if other is node or (self.is_up(other) and self.side.get(other.name) == self.side.get(node.name))
        }

    def write(self, node: SimNode, table: str, key: Any, value: Any) -> None:
        self.count += 1
        stamp = (self.now_ms, self.count, node.name)
        for other in self.nodes:
            late_ms = self.rng.choice((0, 0, 500, 2_000, 9_000))
            at_ms = self.now_ms + late_ms if other is not node else 0
            if self.side.get(other.name) != self.side.get(node.name):
                at_ms = max(at_ms, self.heals_at)
            self.count += 1
            entry = (at_ms, self.count, other, table, key, stamp, value)
            if other is node:
                self.land(entry)
            else:
                heapq.heappush(self.flying, entry)

    def land(self, entry: Any) -> None:
        _, _, node, table, key, stamp, value = entry
        rows = getattr(node, table)
        if key not in rows or rows[key][0] < stamp:
            rows[key] = stamp, value

    def report(self, node: SimNode, id_: str, state: State, detail: str = "") -> None:
        self.write(node, "reports", (id_, node.name), Report(state, detail))

    def end(self, node: SimNode, one: Rollout, status: Status, reason: str) -> None:
        if node.rollouts[one.id][1].status is Status.RUNNING:
            self.write(node, "rollouts", one.id, msgspec.structs.replace(one, status=status, reason=reason))

    def begin(self, node: SimNode) -> None:
        known = [one for _, one in node.rollouts.values()]
        if find_running(known) is not None:
            return
        self.began += 1
        id_ = f"r{self.began}"
        nodes = {name: self.rng.choice(("ams", "gru", "syd")) for name in sorted(self.present(node))}
        order_ms = max([self.now_ms, *(one.created_ms + 1 for one in known)])
        for name in nodes:
            if self.rng.random() < 0.15:
                self.harm[id_, name] = self.rng.choice(("refuses", "fails", "dies"))
        one = rollout(id_, created_ms=order_ms, steps=plan_steps(nodes, ("ams", "gru")), bake_ms=2_000)
        self.write(node, "rollouts", id_, one)

    def kill(self, node: SimNode) -> None:
        node.up_at = self.now_ms + self.rng.choice((1_000, 5_000, 45_000))
        if node.trial is not None:
            node.settings = node.before
        node.trial, node.seen = None, {}

    def fail(self, node: SimNode, one: Rollout, why: str) -> None:
        if node.trial is not None:
            node.settings = node.before
        node.trial = None
        self.report(node, one.id, State.FAILED, why)
        self.end(node, one, Status.BACK, why)

    def step(self, node: SimNode) -> None:
        rollouts = [one for _, one in node.rollouts.values()]
        said = node.said()
        for one in rollouts:
            own = said.get(one.id, {}).get(node.name)
            if own is not None and own.state is State.TRYING and node.trial is None:
                self.fail(node, one, "it died")
                return
        if node.trial is not None:
            one, ends_ms = node.trial
            current = node.rollouts[one.id][1]
            if current.status is not Status.BACK and self.now_ms >= ends_ms:
                harm = self.harm.get((one.id, node.name))
                if harm == "dies":
                    self.kill(node)
                elif harm is not None:
                    self.fail(node, current, harm)
                else:
                    node.trial = None
                    self.report(node, one.id, State.GOOD)
                return
        self.act(
            node,
            plan_node(
                rollouts,
                node.said(),
                node=node.name,
                present=self.present(node),
                waits=self.waits(node, rollouts),
            ),
        )

    def waits(self, node: SimNode, rollouts: list[Rollout]) -> dict[str, Wait]:
        running, seen, waits = find_running(rollouts), {}, {}
        for name, report in node.said().get(running.id, {}).items() if running else ():
            if running is None or report.state is not State.TRYING or name == node.name:
                continue
            since_ms, gone_ms = node.seen.get((running.id, name), (self.now_ms, None))
            gone_ms = None if name in self.present(node) else self.now_ms if gone_ms is None else gone_ms
            seen[running.id, name] = since_ms, gone_ms
            waits[name] = Wait(self.now_ms - since_ms, 0 if gone_ms is None else self.now_ms - gone_ms)
        node.seen = seen
        return waits

    def act(self, node: SimNode, action: Action | None) -> None:
        said = node.said()
        match action:
            case Take(one, bake_ms):
                assert node.trial is None
                self.check_turn(node, one, said.get(one.id, {}))
                self.report(node, one.id, State.TRYING)
                if self.harm.get((one.id, node.name)) == "refuses":
                    self.fail(node, one, "refused")
                    return
                node.before, node.settings = node.settings, one.body
                node.trial = one, self.now_ms + bake_ms
            case Undo(one):
                latest = find_latest([row for _, row in node.rollouts.values()], Kind.CONFIG)
                node.settings = "" if latest is None else latest.body
                node.trial = None
                self.report(node, one.id, State.BACK)
            case End(one, status, reason):
                if status is Status.DONE:
                    for name in sorted({name for step in one.steps for name in step} & self.present(node)):
                        assert said[one.id][name].state is State.GOOD
                self.end(node, one, status, reason)

    def check_turn(self, node: SimNode, one: Rollout, said: dict[str, Report]) -> None:
        """Nobody begins before those of earlier steps that are there have passed, nor after a failure."""
        if one.status is Status.DONE:
            return
        assert State.FAILED not in {report.state for report in said.values()}
        for step in one.steps:
            if node.name in step:
                return
            for name in step:
                assert name not in self.present(node) or said[name].state is State.GOOD
        raise AssertionError(f"{node.name} is in no step")

    def run(self) -> None:
        while self.now_ms < self.ACTIVE_MS or self.flying or not self.is_over():
            self.now_ms += self.TICK_MS
            assert self.now_ms < self.ACTIVE_MS + 3_600_000, "it does not come to an end"
            is_active = self.now_ms < self.ACTIVE_MS
            while self.flying and self.flying[0][0] <= self.now_ms:
                self.land(heapq.heappop(self.flying))
            if self.side and self.now_ms >= self.heals_at:
                self.side = {}
            if is_active and self.cuts and not self.side and self.rng.random() < 0.02:
                self.side = {node.name: self.rng.randrange(2) for node in self.nodes}
                self.heals_at = self.now_ms + self.rng.choice((3_000, 50_000))
            for node in self.nodes:
                if not self.is_up(node):
                    continue
                if is_active and self.rng.random() < 0.004:
                    self.kill(node)
                elif is_active and self.rng.random() < 0.02:
                    self.begin(node)
                else:
                    self.step(node)

    def is_over(self) -> bool:
        rows = [node.rollouts for node in self.nodes]
        return (
            all(self.is_up(node) and node.trial is None for node in self.nodes)
            and find_running([one for found in rows for _, one in found.values()]) is None
            and all(
                plan_node(
                    [one for _, one in node.rollouts.values()],
                    node.said(),
                    node=node.name,
                    present=self.present(node),
                    waits={},
                )
                is None
                for node in self.nodes
            )
        )

    def check(self) -> None:
        """All that live have the same, but for those that could not take it and have what was before."""
        (rows,) = {tuple(sorted(node.rollouts.items())) for node in self.nodes} or {()}
        rollouts = [one for _, (_, one) in rows]
        latest = find_latest(rollouts, Kind.CONFIG)
        back = {one.body for one in rollouts if one.status is Status.BACK}
        for node in self.nodes:
            said = node.said()
            assert node.settings not in back, (node.name, node.settings, said)
            if latest is not None and said[latest.id][node.name].state is not State.FAILED:
                assert node.settings == latest.body, (node.name, node.settings, said)
            if latest is None:
                assert node.settings == ""


@pytest.mark.parametrize("cuts", [False, True], ids=["whole", "cut"])
def test_all_nodes_come_to_the_same_whatever_they_see_late(*, cuts: bool) -> None:
    statuses: set[Status] = set()
    began = 0
    for seed in range(40):
        sim = Sim(seed, cuts=cuts)
        try:
            sim.run()
            sim.check()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        began += sim.began
        statuses |= {one.status for _, one in sim.nodes[0].rollouts.values()}
    assert statuses == {Status.DONE, Status.BACK}
    assert began > 150
