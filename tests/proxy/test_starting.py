"""Requests that find only machines that have to be started."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxy.core.phase import Phase
from tests.proxy.test_exchange import GET, OK, World

if TYPE_CHECKING:
    from routing.target import Target


class Starter:
    """Records what is asked for."""

    def __init__(self, *, reachable: bool = True) -> None:
        self.asked: list[str] = []
        self._reachable = reachable

    def start(self, machine: Target) -> bool:
        self.asked.append(machine.id)
        return self._reachable


def put(world: World, machine: str, state: str, **columns: object) -> None:
    values = {"region": "ams", "cordoned": 0, "driver": "process", "problem": "", **columns}
    row = (machine, "app", "n1", values["region"], "10.0.0.1:80", state, values["cordoned"], "")
    world.table.apply("machines", (machine,), (*row, values["driver"], 0, values["problem"]))
    assert not world.table.rejected


def asleep(*machines: str, options: str = "{}", **settings: object) -> tuple[World, Starter]:
    world, starter = World(idle=True, **settings), Starter()
    world.plane.starter = starter
    row = ("app", 0, 8080, "requests", 1, None, "[]", "", options)
    world.table.apply("services", ("app", 0), row)
    for machine in machines:
        put(world, machine, "stopped")
    return world, starter


def test_requests_wait_for_a_machine_to_start_and_then_all_go_on() -> None:
    world, starter = asleep("m1", "m2")
    waiting = [world.exchange(GET) for _ in range(20)]
    assert {e.phase for e in waiting} == {Phase.QUEUED}
    assert set(starter.asked) == {"m1"}  # one start for all of them
    assert waiting[0].deadline == world.now + world.plane.settings.start_timeout_s
    put(world, "m1", "starting")
    world.plane.queue.handle_deadline()
    assert {e.phase for e in waiting} == {Phase.QUEUED}
    put(world, "m1", "started")
    world.plane.queue.handle_deadline()
    assert {e.phase for e in waiting} == {Phase.WAITING}
    for exchange in waiting:
        exchange.handle_response(OK, b"ok", ended=True)
    assert world.in_flight() == world.metrics.queued == 0


def test_a_start_that_takes_too_long_ends_with_a_code_and_says_why() -> None:
    world, _ = asleep("m1")
    exchange = world.exchange(GET)
    put(world, "m1", "stopped", problem="exited with 3")
    exchange.handle_deadline()
    assert exchange.phase is Phase.DONE
    assert b"503" in world.answer[:20]
    assert b"fly-proxy-error: PM03" in world.answer
    assert b"exited with 3" in world.answer
    assert world.metrics.queued == 0


def test_a_start_that_got_lost_is_asked_for_again() -> None:
    world, starter = asleep("m1")
    world.exchange(GET)
    before = len(starter.asked)
    world.plane.queue.handle_deadline()
    assert len(starter.asked) > before


def test_nothing_is_waited_for_where_nobody_can_be_asked() -> None:
    world, _ = asleep("m1")
    world.plane.starter = Starter(reachable=False)
    assert world.exchange(GET).phase is Phase.DONE
    assert b"fly-proxy-error: PR01" in world.answer


def test_machines_are_not_started_where_the_service_does_not_want_it() -> None:
    world, starter = asleep("m1", options='{"autostart": false}')
    assert world.exchange(GET).phase is Phase.DONE
    assert starter.asked == []


def test_machines_that_nothing_can_start_or_that_are_cordoned_or_drain_are_left_alone() -> None:
    world, starter = asleep()
    put(world, "m1", "stopped", driver="")
    put(world, "m2", "stopped", cordoned=1)
    put(world, "m3", "draining")
    assert world.exchange(GET).phase is Phase.DONE
    assert starter.asked == []


def test_one_that_drains_to_be_stopped_may_go_on_but_not_one_that_is_to_drain() -> None:
    world, starter = asleep()
    put(world, "m1", "draining")
    put(world, "m2", "draining")
    for machine, goal in (("m1", "draining"), ("m2", "stopped")):
        world.table.apply("goals", (machine,), (machine, goal, "n1", "idle", 0))
    assert world.exchange(GET).phase is Phase.QUEUED
    assert starter.asked == ["m2"]


def test_machines_of_a_node_that_is_gone_are_not_waited_for() -> None:
    world, starter = asleep("m1")
    world.table.set_present(["n2"])
    assert world.exchange(GET).phase is Phase.DONE
    world.table.set_present(["n1", "n2"])
    assert world.exchange(GET).phase is Phase.QUEUED
    assert starter.asked == ["m1"]


def test_no_machine_is_started_while_one_serves() -> None:
    world, starter = asleep("m1")
    put(world, "m2", "started")
    assert world.exchange(GET).phase is Phase.WAITING
    assert world.exchange(GET).phase is Phase.WAITING  # above the soft limit
    assert starter.asked == []


def test_one_that_is_on_its_way_comes_first_then_the_nearest_without_fault() -> None:
    world, starter = asleep()
    put(world, "m1", "stopped", region="syd")
    put(world, "m2", "stopped", problem="exited with 1")
    put(world, "m3", "suspended", region="ams")
    put(world, "m4", "stopped", region="ams")
    world.exchange(GET)
    put(world, "m1", "starting", region="syd")
    world.exchange(GET)
    assert starter.asked == ["m3", "m1"]
