"""A worker that is killed takes its own connections with it, and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from typing import TYPE_CHECKING

from tests.fakes.client import RawClient
from tests.fakes.machine import FakeMachine
from tests.integration.processes import Node
from tests.integration.test_upgrade import behave, config, eventually, port_of, websocket

if TYPE_CHECKING:
    from pathlib import Path

GET = b"GET / HTTP/1.1\r\nHost: app.test\r\n\r\n"
TUNNELS = 16


async def is_alive(tunnel: RawClient) -> bool:
    """True when the other end still answers; fails when it neither does nor is gone."""
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
        tunnel.send(b"ping")
        async with asyncio.timeout(20):
            return await tunnel.reader.readexactly(4) == b"PING"
    return False


async def test_crash_of_a_worker_is_contained_and_its_counters_outlive_the_agent_too(tmp_path: Path) -> None:
    machine = await FakeMachine(behave=behave).start()
    node = await asyncio.to_thread(Node, "n1", tmp_path, config(machine))
    try:
        tunnels = [await websocket(port_of(node)) for _ in range(TUNNELS)]
        for _ in range(10):
            client = await RawClient.connect(port_of(node))
            client.send(GET)
            assert (await client.read_response()).status == 200
            client.close()

        def counted() -> float:
            with contextlib.suppress(OSError):  # between two agents
                return node.metric("isthmus_requests_total")
            return 0.0

        await eventually("all are counted", lambda: counted() >= 10)
        workers = node.worker_pids()
        assert len(workers) == 2
        os.kill(workers[0], signal.SIGKILL)
        # While it is away nobody is refused: who is given to it waits for the next one.
        clients = [await RawClient.connect(port_of(node)) for _ in range(12)]
        for client in clients:
            client.send(GET)
        assert {(await client.read_response()).status for client in clients} == {200}
        alive = [await is_alive(tunnel) for tunnel in tunnels]
        assert {True, False} == set(alive), "the kernel gave all tunnels to one worker"
        pids = await eventually("another worker", lambda: len(node.worker_pids()) == 2 and node.worker_pids())
        assert workers[0] not in pids
        assert workers[1] in pids
        await eventually("those before and after", lambda: counted() >= 10 + 12)
        os.kill(node.agent_pid(), signal.SIGKILL)
        await eventually("the next agent to have them", lambda: counted() >= 10 + 12)
        for one in (*tunnels, *clients):
            one.close()
    finally:
        await asyncio.to_thread(node.close)
        await machine.stop()
