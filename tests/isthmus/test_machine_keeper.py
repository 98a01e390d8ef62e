"""The keeper and the scaler with a driver that records what it is told."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import pytest

from isthmus.checking.probe import Outcome
from isthmus.config_machines import PROCESS, MachinesConfig
from isthmus.machines.driver import DriverError, Machine, Made
from isthmus.machines.goals import Goals
from isthmus.machines.keeper import Keeper
from isthmus.machines.scaler import Scaler
from routing.types import MachineState
from tests.fakes.table import TableDatabase
from tests.isthmus.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from isthmus.checking.definition import Definition


class FakeDriver:
    """Does at once what it is told, and records it. `failures` are raised by the next calls, one each."""

    poll_s = 0.02

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.releases: list[str] = []  # of each start
        self.running: dict[str, bool | None] = {}
        self.failures: list[DriverError] = []
        self.again = True

    async def start(self, machine: Machine) -> None:
        self._call("start", machine)
        self.releases.append(machine.release)
        self.running[machine.id] = True

    async def stop(self, machine: Machine) -> None:
        self._call("stop", machine)
        self.running[machine.id] = False

    async def suspend(self, machine: Machine) -> bool:
        self._call("suspend", machine)
        self.running[machine.id] = False
        return True

    async def is_running(self, machine: Machine) -> bool | None:
        return self.running.get(machine.id, False)

    async def create(self, like: Machine, region: str) -> Made:
        raise DriverError("not here")

    def explain_end(self, machine: Machine) -> tuple[str, bool]:
        return "exited with 3", self.again

    def _call(self, what: str, machine: Machine) -> None:
        self.calls.append(f"{what} {machine.id}")
        if self.failures:
            raise self.failures.pop(0)


class FakeProber:
    """Says what it is told to, and records what is probed."""

    def __init__(self) -> None:
        self.outcome = Outcome(True, "connected")
        self.probed: list[Definition] = []

    async def probe(self, definition: Definition) -> Outcome:
        self.probed.append(definition)
        return self.outcome


class World:
    """A node `n1` with its table; `m1` is its machine, with a driver."""

    def __init__(self) -> None:
        self.database = TableDatabase()
        self.driver, self.prober = FakeDriver(), FakeProber()
        self.present = {"n1", "n2"}
        self.now_ms = time.time_ns() // 1_000_000
        self.database.put("apps", name="web")
        self.service()
        self.keeper: Keeper | None = None

    async def start(self, **settings: int) -> None:
        usual = {"drain_ms": 50, "ready_timeout_ms": 10_000, "idle_ms": 100}
        table, database = self.database.table, self.database
        self.goals = Goals(table, database, "n1")
        self.keeper = Keeper(
            table,
            database,
            self.prober,
            {"fake": self.driver, PROCESS: self.driver},
            self.goals,
            node="n1",
            settings=MachinesConfig(**{**usual, **settings}),
            clock_ms=lambda: self.now_ms,
        )
        self.scaler = Scaler(
            table,
            self.keeper,
            self.goals,
            lambda: self.present,
            node="n1",
            idle_s=0.001,
            clock_ms=lambda: self.now_ms,
        )
        database.on_commit = self.keeper.handle_commit
        await self.keeper.start()

    async def stop(self) -> None:
        if self.keeper is not None:
            await self.keeper.stop()
            await self.goals.stop()
        self.database.close()

    def service(self, **options: Any) -> None:

        self.database.put("services", app="web", soft_limit=2, options=json.dumps(options))

    def machine(self, machine: str = "m1", goal: str = "", reason: str = "command", **columns: Any) -> None:
        usual = {"app": "web", "node": "n1", "region": "ams", "address": "10.0.0.1:80", "driver": "fake"}
        if goal:
            self.goal(goal, machine, reason)
        self.database.put("machines", **{"id": machine, "state": "stopped", **usual, **columns})

    def goal(self, state: str, machine: str = "m1", reason: str = "command") -> None:
        self.database.put("goals", machine=machine, state=state, reason=reason)

    def load(self, count: int, machine: str = "m1", node: str = "n2") -> None:
        self.database.put("loads", machine=machine, node=node, in_flight=count)
        self.database.table.set_present(sorted(self.present))

    def release(self, version: int, release: str = "", state: str = "started") -> None:
        self.database.put("goals", machine="m1", state=state, version=version, release=release)

    def version(self) -> int:
        return int(self.database.rows("SELECT version FROM machines WHERE id = 'm1'")[0][0])

    def state(self, machine: str = "m1") -> str:
        return str(self.database.rows("SELECT state FROM machines WHERE id = ?", machine)[0][0])

    def problem(self, machine: str = "m1") -> str:
        return str(self.database.rows("SELECT problem FROM machines WHERE id = ?", machine)[0][0])

    def asked(self) -> list[tuple[Any, ...]]:
        return self.database.rows("SELECT machine, state, reason FROM goals ORDER BY machine")

    async def settle(self, state: str, machine: str = "m1") -> None:
        await eventually(f"{machine} is {state}", lambda: self.state(machine) == state)


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.machines.keeper.TICK_S", 0.005)
    monkeypatch.setattr("isthmus.machines.kept.LOOK_S", 0.005)
    monkeypatch.setattr("isthmus.machines.life.RETRY_S_FIRST", 0.02)
    monkeypatch.setattr("isthmus.machines.life.RETRY_S_MAX", 0.02)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    yield world
    await world.stop()


async def test_machine_is_started_and_serves_once_it_answers(world: World) -> None:
    world.prober.outcome = Outcome(False, "Connection refused")
    world.machine(goal="started")
    await world.start()
    await world.settle("starting")
    await eventually("a look", lambda: world.problem() == "Connection refused")
    world.prober.outcome = Outcome(True, "connected")
    await world.settle("started")
    assert world.driver.calls == ["start m1"]
    assert (world.prober.probed[0].check.type, world.problem()) == ("tcp", "")
    ((since_ms,),) = world.database.rows("SELECT since_ms FROM machines")
    assert abs(since_ms - world.now_ms) < 60_000


async def test_machine_serves_only_when_all_its_checks_pass(world: World) -> None:
    checks = '[{"name": "a"}, {"name": "b", "path": "/ready"}]'
    world.database.put("services", app="web", checks=checks)
    world.machine(goal="started")
    await world.start()
    await world.settle("started")
    assert [definition.name for definition in world.prober.probed] == ["a", "b"]


async def test_goal_that_changes_is_followed_at_any_time(world: World) -> None:
    world.prober.outcome = Outcome(False, "Connection refused")
    world.machine(goal="started")
    await world.start()
    await world.settle("starting")
    world.goal("stopped")
    await world.settle("stopped")
    world.prober.outcome = Outcome(True, "connected")
    world.goal("started")
    await world.settle("started")
    world.goal("suspended")
    await world.settle("suspended")
    world.goal("started")
    await world.settle("started")
    world.goal("draining")
    await world.settle("draining")
    world.goal("started")
    await world.settle("started")
    calls = ["start m1", "stop m1", "start m1", "suspend m1", "start m1"]
    assert world.driver.calls == calls


async def test_goal_is_taken_up_and_what_came_of_it_told_without_waiting_for_the_next_look(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isthmus.machines.keeper.TICK_S", 3_600.0)
    world.machine(goal="stopped")
    await world.start()
    await eventually("the first look", lambda: world.keeper._kept["m1"].found)
    world.goal("started")
    await world.settle("starting")


async def test_machine_that_is_to_run_another_release_is_drained_stopped_and_started_with_it(
    world: World,
) -> None:
    world.machine(goal="started")
    world.load(1)
    await world.start(drain_ms=60_000)
    await world.settle("started")
    world.release(2, "v2")
    await world.settle("draining")
    assert world.version() == 0
    world.load(0)
    world.keeper._kept["m1"].since -= 10.0
    await eventually("the new release", lambda: (world.state(), world.version()) == ("started", 2))
    assert world.driver.calls == ["start m1", "stop m1", "start m1"]
    assert world.driver.releases == ["", "v2"]


async def test_release_is_taken_up_without_a_start_by_what_rests(world: World) -> None:
    world.machine(goal="stopped")
    await world.start()
    world.release(2, "v2", "stopped")
    await eventually("the version", lambda: world.version() == 2)
    world.release(2, "v2", "suspended")
    assert world.driver.calls == []


async def test_memory_of_an_old_release_is_not_woken(world: World) -> None:
    world.machine(goal="suspended", state="suspended")
    await world.start()
    world.release(2, "v2", "started")
    await eventually("the new release", lambda: (world.state(), world.version()) == ("started", 2))
    assert world.driver.calls == ["stop m1", "start m1"]


async def test_release_that_does_not_start_is_left_without_its_pause(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isthmus.machines.life.RETRY_S_FIRST", 3_600.0)
    monkeypatch.setattr("isthmus.machines.life.RETRY_S_MAX", 3_600.0)
    world.machine(goal="started")
    await world.start()
    await world.settle("started")
    world.driver.failures = [DriverError("no such image")]
    world.keeper._kept["m1"].state = MachineState.STOPPED
    world.release(2, "v2")
    await eventually("the failure", lambda: world.problem() == "no such image")
    assert (world.state(), world.version()) == ("stopped", 2)
    world.release(1, "v1")
    await eventually("the old release", lambda: (world.state(), world.version()) == ("started", 1))
    assert world.problem() == ""


async def test_stop_that_fails_has_its_pause_before_another_release_too(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isthmus.machines.life.RETRY_S_FIRST", 3_600.0)
    monkeypatch.setattr("isthmus.machines.life.RETRY_S_MAX", 3_600.0)
    world.machine(goal="started")
    await world.start(drain_ms=0)
    await world.settle("started")
    world.driver.failures = [DriverError("try later")] * 10
    world.release(2, "v2")
    await eventually("the failure", lambda: world.problem() == "try later")
    kept = world.keeper._kept["m1"]
    world.keeper._tick()
    assert (kept.task, world.driver.calls) == (None, ["start m1", "stop m1"])


async def test_machine_whose_command_has_changed_is_drained_stopped_and_started(world: World) -> None:
    world.machine(goal="started")
    world.load(1)
    await world.start(drain_ms=60_000)
    await world.settle("started")
    world.keeper.restart(["m1"])
    await world.settle("draining")
    assert world.driver.calls == ["start m1"]
    world.load(0)
    world.keeper._kept["m1"].since -= 10.0
    await world.settle("started")
    assert world.driver.calls == ["start m1", "stop m1", "start m1"]


async def test_command_that_changes_is_tried_without_the_pause_of_the_last_one(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isthmus.machines.life.RETRY_S_FIRST", 3_600.0)
    monkeypatch.setattr("isthmus.machines.life.RETRY_S_MAX", 3_600.0)
    world.driver.failures = [DriverError("no such file")]
    world.machine(goal="started")
    await world.start()
    await eventually("the failure", lambda: world.problem() == "no such file")
    world.keeper.restart(["m1"])
    await world.settle("started")


async def test_machine_is_drained_of_what_all_nodes_have_there_before_it_is_stopped(world: World) -> None:
    world.machine(goal="started")
    world.load(1)
    await world.start(drain_ms=60_000)
    await world.settle("started")
    world.goal("stopped")
    await world.settle("draining")
    assert world.driver.calls == ["start m1"]
    world.keeper._kept["m1"].since -= 10.0  # long enough for all to have heard of it
    await eventually("some looks", lambda: world.state() == "draining")
    world.load(0)
    await world.settle("stopped")


async def test_driver_that_fails_is_told_and_tried_again(world: World) -> None:
    world.driver.failures = [DriverError("no room"), DriverError("no room")]
    world.machine(goal="started")
    await world.start()
    await eventually("the problem is told", lambda: world.problem() == "no room")
    await world.settle("started")
    assert world.driver.calls == ["start m1"] * 3
    samples = {(name, labels): value for name, labels, value in world.keeper.samples()}
    assert samples["isthmus_machine_steps_total", (("step", "start"), ("result", "failed"))] == 2.0


async def test_machine_that_never_answers_is_stopped_and_started_again(world: World) -> None:
    world.prober.outcome = Outcome(False, "404 Not Found")
    world.machine(goal="started")
    await world.start(ready_timeout_ms=100)
    await eventually("it is given up", lambda: world.problem() == "does not answer in time: 404 Not Found")
    await eventually("the next try", lambda: world.driver.calls[:3] == ["start m1", "stop m1", "start m1"])


@pytest.mark.parametrize("again", [True, False])
async def test_machine_that_ends_by_itself_is_started_again_where_its_driver_says_so(
    world: World, again: bool
) -> None:
    world.driver.again = again
    world.machine(goal="started")
    await world.start()
    await world.settle("started")
    world.driver.running["m1"] = False
    if again:
        await eventually("another start", lambda: world.driver.calls == ["start m1"] * 2)
        await world.settle("started")
    else:
        await eventually("another goal", lambda: world.asked() == [("m1", "stopped", "ended")])
        await world.settle("stopped")
        assert (world.driver.calls, world.problem()) == (["start m1"], "exited with 3")


async def test_what_runs_and_what_does_not_is_found_out_first(world: World) -> None:
    world.machine("m1", goal="started", state="started")
    world.machine("m2", goal="started", state="started")
    world.machine("m3", goal="stopped", state="started")
    world.driver.running = {"m1": True, "m2": False, "m3": False}
    await world.start()
    await world.settle("stopped", "m3")
    await eventually("m2 is started", lambda: world.driver.calls == ["start m2"])
    await world.settle("started", "m1")


async def test_row_that_somebody_else_has_written_is_put_right(world: World) -> None:
    world.machine(goal="started")
    await world.start()
    await world.settle("started")
    world.database.put(
        "machines",
        id="m1",
        app="web",
        node="n1",
        region="ams",
        address="10.0.0.1:80",
        driver="fake",
        state="stopped",
    )
    await world.settle("started")
    assert world.driver.calls == ["start m1"]


async def test_machines_of_others_and_without_a_driver_are_left_alone(world: World) -> None:
    world.machine("m2", goal="started", node="n2")
    world.machine("m3", goal="started", driver="")
    world.machine("m4", goal="started", driver="unknown")
    world.machine("m1", goal="started")
    await world.start()
    await world.settle("started")
    assert world.driver.calls == ["start m1"]
    assert [world.state(machine) for machine in ("m2", "m3", "m4")] == ["stopped"] * 3


async def test_process_whose_row_is_removed_ends(world: World) -> None:
    world.driver.running = {"m1": True}
    world.machine(goal="started", driver=PROCESS, state="started")
    await world.start()
    await eventually("it is known", lambda: world.keeper.owns("m1"))
    world.database.drop("machines", id="m1")
    await eventually("its end", lambda: world.driver.calls == ["stop m1"])
    assert not world.keeper.owns("m1")


async def test_node_that_stops_ends_its_processes_and_says_so(world: World) -> None:
    world.machine("m1", goal="started", driver=PROCESS)
    await world.start()
    await world.settle("started")
    await world.keeper.shut_down(alone=True)
    assert (world.driver.calls, world.state()) == (["start m1", "stop m1"], "stopped")
    assert world.asked() == [("m1", "started", "command")]  # so the next life of the node starts it


# The scaler


async def test_requests_have_a_machine_started_once(world: World) -> None:
    world.machine()
    await world.start()
    for _ in range(3):
        world.scaler.start_for_request("m1")
    await world.settle("started")
    assert world.asked() == [("m1", "started", "request")]
    goals = [t for t in world.database.transactions if "goals" in t[0][0]]
    assert len(goals) == 1


@pytest.mark.parametrize(
    ("columns", "goal"),
    [({"cordoned": 1}, ""), ({"state": "draining"}, "draining"), ({"state": "started"}, "")],
)
async def test_requests_do_not_start_what_is_cordoned_or_is_to_drain_or_runs(
    world: World, columns: dict[str, Any], goal: str
) -> None:
    world.machine(goal=goal, **columns, node="n2")
    await world.start()
    before = world.asked()
    world.scaler.start_for_request("m1")
    world.scaler.start_for_request("nobody")
    await world.goals.stop()
    assert world.asked() == before


async def test_machine_of_a_node_that_is_gone_is_replaced_by_one_of_a_node_that_is_there(
    world: World,
) -> None:
    world.machine("m1", node="n3")
    world.machine("m2", node="n2", region="syd")
    world.machine("m3", node="n2")
    await world.start()
    world.scaler.start_for_request("m1")
    await eventually("another goal", lambda: world.asked() == [("m3", "started", "request")])


async def test_load_has_one_more_started_by_its_owner(world: World) -> None:
    world.machine("m1", state="started", node="n2", since_ms=1)
    world.machine("m2")
    world.machine("m3")
    await world.start()
    world.load(1)
    world.scaler.scale_up()
    assert world.asked() == []
    world.load(2)
    world.scaler.scale_up()
    await world.goals.stop()
    world.scaler.scale_up()  # one is on its way
    await world.goals.stop()
    assert world.asked() == [("m2", "started", "load")]


async def test_minimum_is_kept_in_the_primary_region_only(world: World) -> None:
    world.service(min_machines_running=1, primary_region="ams")
    world.machine("m1", region="syd")
    world.machine("m2")
    await world.start()
    world.scaler.scale_up()
    await eventually("a goal", lambda: world.asked() == [("m2", "started", "minimum")])


@pytest.mark.parametrize(("autostop", "goal"), [("stop", "stopped"), ("suspend", "suspended")])
async def test_idle_machine_is_stopped_or_suspended_and_a_busy_one_is_not(
    world: World, autostop: str, goal: str
) -> None:
    world.service(autostop=autostop)
    world.machine("m1", state="started")
    world.machine("m2", state="started")
    world.driver.running = {"m1": True, "m2": True}
    await world.start()
    world.load(1, "m1")

    def look() -> bool:
        world.scaler.scale_down()
        return world.asked() == [("m2", goal, "idle")]

    await eventually("a goal", look)
    world.scaler.scale_down()
    await world.settle(goal, "m2")
    assert world.state("m1") == "started"


async def test_nothing_is_stopped_where_that_is_not_wanted(world: World) -> None:
    world.machine("m1", state="started")
    world.driver.running = {"m1": True}
    await world.start()
    world.scaler.scale_down()
    await world.goals.stop()
    assert world.asked() == []
