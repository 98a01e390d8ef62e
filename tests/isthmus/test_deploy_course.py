"""The course of a deploy: pure, with machines that are as the test says."""

from __future__ import annotations

import msgspec
import pytest

from isthmus.deploys.course import (
    STOP_S,
    Action,
    Course,
    Kind,
    Position,
    Settings,
    Sight,
    Stage,
    Status,
)
from isthmus.deploys.plan import Batch, Strategy, plan_batches
from isthmus.machines.life import DRAIN_MIN_S
from routing.types import MachineState

STARTED, STOPPED, STARTING = MachineState.STARTED, MachineState.STOPPED, MachineState.STARTING
DRAINING = MachineState.DRAINING
SETTINGS = Settings(ready_s=60.0, settle_s=5.0, watch_s=2.0, first_watch_s=4.0, drain_s=10.0)


class World:
    """Machines that do at once what they are asked, unless they are `broken`; keeps the transcript.

    `b1 b2` serve; `g1 g2` are cordoned. With `drivers` they run version 1 and can be told to run 2.
    """

    def __init__(
        self, *batches: Batch, drivers: bool = False, settings: Settings = SETTINGS, resting: str = ""
    ) -> None:
        self.batches = batches
        self.settings = settings
        self.course = Course(batches, settings, version=2, before=1)
        self.now = 100.0
        self.known = True
        self.drivers = drivers
        self.broken: dict[str, str] = {}  # what is wrong with machines once they run version 2
        self.stuck: set[str] = set()  # those that never come to be ready, whatever they run
        self.sights = {
            name: Sight(STARTED, 1, drivers, True, "", "", 0, 0) for name in ("b1", "b2", "g1", "g2")
        }
        for name in resting.split():
            self.sights[name] = self.sights[name]._replace(state=STOPPED, is_ready=False, trouble="stopped")
        self.serving = {"b1", "b2"}
        self.transcript: list[str] = []
        self.last: Action | None = None

    def carry_out(self, action: Action) -> None:
        self.last = action
        batch = action.batch
        self.transcript.append(f"{action.kind.value} {','.join(batch.old)}>{','.join(batch.new)}")
        if action.kind is Kind.PREPARE:
            for machine in batch.new:
                self._run(machine)
        elif action.kind is Kind.FLIP and not batch.in_place:
            self.serving = (self.serving - set(batch.old)) | set(batch.new)
            for name in self.sights:
                self.see(name, cordoned=name not in self.serving)
        elif action.kind is Kind.RETIRE:
            for machine in batch.old:
                state = STOPPED if self.drivers else DRAINING
                self.see(machine, state=state, is_ready=False, trouble="stopped")
        elif action.kind is Kind.REST:
            for machine in batch.old:
                self.see(machine, state=STOPPED)
        self.course.arrive(action)

    def _run(self, machine: str) -> None:
        version = self.course.version
        problem = self.broken.get(machine, "") if version == 2 else ""
        sight = self.sights[machine]
        wanted = version if self.drivers else None
        new = sight._replace(version=version if self.drivers else 0, wanted=wanted)
        if problem:
            state = STOPPED if self.drivers else STARTED
            since_ms = sight.since_ms + 1
            new = new._replace(
                state=state, is_ready=False, problem=problem, trouble=problem, since_ms=since_ms
            )
        elif machine in self.stuck:
            new = new._replace(state=STARTING, is_ready=False, trouble="503", problem="")
        else:
            new = new._replace(state=STARTED, is_ready=True, trouble="", problem="")
        self.sights[machine] = new

    def see(self, machine: str, **changes: object) -> None:
        self.sights[machine] = self.sights[machine]._replace(**changes)

    def step(self, seconds: float = 0.5) -> Action | None:
        self.now += seconds
        action = self.course.step(self.now, self.sights, is_known=self.known)
        if action is not None:
            self.carry_out(action)
        return action

    def run(self, until: Stage | None = None, batch: int = 0) -> list[str]:
        """Go on until it is over, or at a stage of a batch on the way there; returns the transcript."""
        for _ in range(1_000):
            position = self.course.position
            if position.stage is Stage.OVER or (position.stage is until and position.index == batch):
                return self.transcript
            self.step()
        raise AssertionError(f"it does not end: {self.course.position}, {self.transcript}")

    @property
    def end(self) -> tuple[Status, str]:
        assert self.last is not None
        assert self.last.kind is Kind.FINISH
        return self.last.status, self.last.problem


def blue_green(**settings: bool) -> World:
    return World(*plan_batches(Strategy.BLUEGREEN, ["b1", "b2"], ["g1", "g2"]), **settings)


def rolling(*, drivers: bool = False) -> World:
    return World(*plan_batches(Strategy.ROLLING, ["b1", "b2"], ["g1", "g2"], 1), drivers=drivers)


def in_place() -> World:
    return World(*plan_batches(Strategy.ROLLING, ["b1", "b2"], ["b1", "b2"], 1), drivers=True)


def test_blue_green_flips_all_at_once_and_retires_the_old_ones_after_the_watch() -> None:
    world = blue_green(drivers=True)
    assert world.run() == [
        "prepare b1,b2>g1,g2",
        "flip b1,b2>g1,g2",
        "retire b1,b2>g1,g2",
        "rest b1,b2>g1,g2",
        "finish >",
    ]
    assert world.serving == {"g1", "g2"}
    assert world.end == (Status.COMPLETE, "")


def test_rolling_goes_on_with_the_next_batch_when_the_old_ones_of_the_last_are_drained() -> None:
    world = rolling()
    assert world.run() == [
        *("prepare b1>g1", "flip b1>g1", "retire b1>g1", "rest b1>g1"),
        *("prepare b2>g2", "flip b2>g2", "retire b2>g2", "rest b2>g2"),
        "finish >",
    ]
    assert world.serving == {"g1", "g2"}


def test_machines_that_become_the_new_release_are_neither_flipped_nor_retired() -> None:
    world = in_place()
    assert world.run() == [
        *("prepare b1>b1", "flip b1>b1", "next b1>b1", "prepare b2>b2", "flip b2>b2", "next b2>b2"),
        "finish >",
    ]
    assert [world.sights[name].version for name in ("b1", "b2")] == [2, 2]
    assert world.serving == {"b1", "b2"}


def test_new_machine_that_fails_before_it_got_requests_goes_and_the_old_ones_never_noticed() -> None:
    world = blue_green(drivers=True)
    world.broken["g2"] = "exited with 1"
    assert world.run() == [
        *("prepare b1,b2>g1,g2", "turn back b1,b2>g1,g2"),
        *("retire g1,g2>b1,b2", "rest g1,g2>b1,b2", "finish >"),
    ]
    assert world.serving == {"b1", "b2"}
    assert world.end == (Status.ROLLED_BACK, "g2: exited with 1")


def test_new_machine_that_fails_in_the_watch_gives_its_requests_back_at_once() -> None:
    world = blue_green(drivers=True)
    world.run(Stage.WATCH)
    assert world.serving == {"g1", "g2"}
    world.see("g1", is_ready=False, trouble="http-0: 500")
    assert world.run()[2:] == [
        "turn back b1,b2>g1,g2",
        "prepare g1,g2>b1,b2",
        "flip g1,g2>b1,b2",
        "retire g1,g2>b1,b2",
        "rest g1,g2>b1,b2",
        "finish >",
    ]
    assert world.serving == {"b1", "b2"}
    assert world.end == (Status.ROLLED_BACK, "g1, which had got requests: http-0: 500")


@pytest.mark.parametrize("drivers", [True, False])
def test_batch_that_fails_takes_those_before_it_back_too_the_last_one_first(drivers: bool) -> None:
    world = rolling(drivers=drivers)
    if drivers:
        world.broken["g2"] = "no such image"
    else:
        world.run(Stage.READY, 1)
        world.see("g2", is_ready=False, trouble="http-0: 404")
        world.now += SETTINGS.ready_s
    transcript = world.run()
    assert transcript[transcript.index("turn back b2>g2") + 1 :] == [
        *("retire g2>b2", "rest g2>b2"),
        *("prepare g1>b1", "flip g1>b1", "retire g1>b1", "rest g1>b1"),
        "finish >",
    ]
    assert world.serving == {"b1", "b2"}
    assert world.end[0] is Status.ROLLED_BACK


def test_machine_that_cannot_become_the_new_release_becomes_the_old_one_again() -> None:
    world = in_place()
    world.broken["b2"] = "exited with 3"
    assert world.run()[-8:] == [
        "turn back b2>b2",
        *("prepare b2>b2", "flip b2>b2", "next b2>b2", "prepare b1>b1", "flip b1>b1", "next b1>b1"),
        "finish >",
    ]
    assert [(world.sights[name].version, world.sights[name].is_ready) for name in ("b1", "b2")] == [
        (1, True)
    ] * 2
    assert world.end == (Status.ROLLED_BACK, "b2: exited with 3")


def test_not_ready_in_time_says_what_was_waited_for() -> None:
    world = blue_green()
    world.stuck = {"g2"}
    world.run()
    assert world.end == (Status.ROLLED_BACK, "not ready after 60 s: g2: 503")


def test_machine_with_a_driver_is_not_ready_while_it_runs_the_old_release() -> None:
    world = in_place()
    world.step()
    world.see("b1", version=1, is_ready=True, trouble="", wanted=2)
    assert world.step() is None
    world.now += SETTINGS.ready_s
    action = world.step()
    assert action is not None
    assert action.problem == "not ready after 60 s: b1: does not run this release yet"


def test_problem_from_before_the_deploy_is_not_taken_for_its_failure() -> None:
    world = blue_green(drivers=True)
    world.see("g1", state=STOPPED, is_ready=False, problem="exited with 1", version=2, since_ms=5)
    world.stuck = {"g1"}
    world.step()
    world.see("g1", state=STOPPED, problem="exited with 1", version=2, since_ms=5)
    assert world.step() is None
    world.see("g1", since_ms=6)
    action = world.step()
    assert action is not None
    assert action.kind is Kind.TURN_BACK


def test_goal_that_somebody_wrote_over_is_set_again_and_not_all_the_time() -> None:
    world = in_place()
    world.step()
    world.see("b1", version=1, wanted=1)
    assert [world.step() for _ in range(4)] == [None] * 4
    action = world.step()
    assert action is not None
    assert (action.kind, action.then) == (Kind.PREPARE, world.course.position)


def test_flip_that_an_owner_wrote_over_is_made_again() -> None:
    world = blue_green()
    world.run(Stage.WATCH)
    world.see("g1", cordoned=True)
    assert world.run()[2] == "flip b1,b2>g1,g2"
    assert world.end == (Status.COMPLETE, "")


def test_rest_waits_for_all_nodes_for_a_while_and_then_says_so() -> None:
    world = blue_green()
    world.known = False
    world.run(Stage.KNOWN)
    started = world.now
    world.run(Stage.WATCH)
    assert world.now - started >= SETTINGS.settle_s
    assert world.course.lines == ["not all nodes have confirmed that they know within 5 s; going on"]


def test_old_machine_without_a_driver_rests_when_nothing_is_in_flight_or_its_time_is_up() -> None:
    for load, least_s in ((0, DRAIN_MIN_S), (3, SETTINGS.drain_s)):
        world = World(Batch(("b1",), ("g1",)))
        world.run(Stage.DRAIN)
        world.see("b1", load=load)
        started = world.now
        world.run()
        assert least_s <= world.now - started <= least_s + 2.0
        assert world.course.lines == ([] if not load else ["b1 is draining with 3 in flight; going on"])


def test_old_machine_that_does_not_stop_does_not_hold_up_the_deploy_for_ever() -> None:
    world = blue_green(drivers=True)
    world.run(Stage.DRAIN)
    world.see("b1", state=DRAINING)
    started = world.now
    world.run()
    assert world.now - started >= SETTINGS.drain_s + STOP_S
    assert world.end[0] is Status.COMPLETE


def test_machine_that_rests_because_nobody_needs_it_is_not_started_and_not_wrong() -> None:
    world = in_place()
    world.step()
    for name in ("b1", "b2"):
        world.see(name, state=STOPPED, is_ready=False, version=2, wanted=2, rests_by_itself=True)
    world.stuck = {"b1", "b2"}
    world.run(Stage.READY, 1)
    world.see("b2", state=STOPPED, is_ready=False, version=2, rests_by_itself=True)
    world.run()
    assert world.end[0] is Status.COMPLETE


def test_old_machine_that_does_not_come_back_is_left_and_told() -> None:
    world = rolling(drivers=True)
    world.broken["g2"] = "exited with 1"
    world.run(Stage.READY, 1)
    world.stuck = {"b1"}
    world.run()
    problem = "g2: exited with 1; not rolled back: not ready after 60 s: b1: 503"
    assert world.end == (Status.FAILED, problem)
    assert world.serving == {"g1", "b2"}


@pytest.mark.parametrize("stage", [Stage.READY, Stage.KNOWN, Stage.WATCH, Stage.DRAIN])
@pytest.mark.parametrize("batch", [0, 1])
def test_cancelled_at_any_point_all_is_as_before(stage: Stage, batch: int) -> None:
    world = rolling(drivers=True)
    world.known = False
    world.run(stage, batch)
    action = world.course.cancel("cancelled by ana")
    assert action is not None
    world.carry_out(action)
    assert world.course.cancel("again") is None
    world.run()
    assert world.serving == {"b1", "b2"}
    assert world.end == (Status.ROLLED_BACK, "cancelled by ana")


@pytest.mark.parametrize("steps", range(1, 14))
@pytest.mark.parametrize("broken", ["", "g2"])
def test_who_goes_on_from_what_was_written_comes_to_the_same_end(steps: int, broken: str) -> None:
    def make() -> World:
        world = rolling(drivers=True)
        world.broken = {broken: "exited with 1"} if broken else {}
        return world

    whole, world = make(), make()
    whole.run()
    while len(world.transcript) < steps and world.course.position.stage is not Stage.OVER:
        world.step()
    written = msgspec.json.decode(msgspec.json.encode(world.course.position), type=Position)
    problem = world.course.problem
    world.course = Course(world.batches, SETTINGS, version=2, before=1, position=written, problem=problem)
    world.run()
    assert world.serving == whole.serving
    assert world.end == whole.end


def test_machine_that_is_gone_turns_it_back() -> None:
    world = blue_green(drivers=True)
    world.step()
    del world.sights["g1"]
    action = world.course.step(world.now + 1, world.sights, is_known=True)
    assert action is not None
    assert (action.kind, action.problem) == (Kind.TURN_BACK, "g1 is gone")
