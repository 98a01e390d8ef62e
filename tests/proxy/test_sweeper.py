"""Deadlines of connections, of which many may come at once."""

from __future__ import annotations

import asyncio

from proxy.sweeper import DUE_A_TURN, NEVER, Sweeper

TURN = "turn"


class FakeConnection:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log
        self.deadline = 0.0

    def handle_deadline(self) -> None:
        self.deadline = NEVER
        self.log.append(self.name)


class World:
    """Connections that are all due, and a log of what was called, with a word for each turn of the loop."""

    def __init__(self, count: int) -> None:
        self.log: list[str] = []
        self.connections = [FakeConnection(f"c{number}", self.log) for number in range(count)]
        self.sweeper = Sweeper(0.001, self.connections)

    def names(self) -> list[str]:
        return [name for name in self.log if name != TURN]

    async def run_until(self, handled: int) -> None:
        self.sweeper.start()
        async with asyncio.timeout(10):
            while len(self.names()) < handled:
                await asyncio.sleep(0)
                self.log.append(TURN)


async def test_many_that_are_due_are_handled_once_each_with_turns_for_others_between() -> None:
    world = World(5 * DUE_A_TURN + 1)
    await world.run_until(len(world.connections))
    world.sweeper.stop()
    assert world.names() == [connection.name for connection in world.connections]
    runs = " ".join(world.log).split(TURN)
    assert max(len(run.split()) for run in runs) == DUE_A_TURN


async def test_one_that_goes_on_or_leaves_before_its_turn_comes_is_left_alone() -> None:
    world = World(2 * DUE_A_TURN)
    await world.run_until(1)
    world.connections[-1].deadline = NEVER
    left = world.connections.pop(-2)
    await world.run_until(2 * DUE_A_TURN - 2)
    world.sweeper.stop()
    assert not {left.name, world.connections[-1].name} & set(world.log)


async def test_nothing_is_called_after_the_stop() -> None:
    world = World(3 * DUE_A_TURN)
    await world.run_until(1)
    handled = len(world.names())
    world.sweeper.stop()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert len(world.names()) == handled < len(world.connections)
