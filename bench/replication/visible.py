"""From the call that writes on one agent to the commit on another: two processes, sealed, over loopback.

Decides what visible means: the commit of the peer is done, any reader of its file sees the row, and its
application is told. The clock is CLOCK_MONOTONIC, which processes of one machine share. Run as a program it
is the peer.
"""

import asyncio
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import uvloop

from replication.agent import Agent
from replication.core.change import Commit
from replication.settings import AgentSettings

from .ours import INSERT, compute_row, make_schema

KEY = bytes(range(32))
WRITES = 600
GAP_S = (0.005, 0.025)
START_TIMEOUT_S = 20.0
# The row that tells that the agents talk; no part of the measure.
HELLO_ID = 0
_SENT = 6  # the column that carries when the write was asked for


def measure_visible(folder: Path) -> list[float]:
    """Return the milliseconds of each write."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_write(folder))


async def _write(folder: Path) -> list[float]:
    peer = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.replication.visible", str(folder)), stdout=subprocess.PIPE
    )
    assert peer.stdout is not None, "it is a pipe"
    try:
        address = (await asyncio.wait_for(peer.stdout.readline(), START_TIMEOUT_S)).decode().strip()
        settings = AgentSettings(
            "writer", folder / "writer.db", bind=("127.0.0.1", 0), join=(address,), keys=(KEY,)
        )
        agent = Agent(settings, make_schema("row"), on_commit=lambda _: None)
        await agent.start()
        try:
            await _send(agent, HELLO_ID)
            await asyncio.wait_for(peer.stdout.readline(), START_TIMEOUT_S)
            for i in range(1, WRITES + 1):
                await asyncio.sleep(random.uniform(*GAP_S))
                await _send(agent, i)
            line = await asyncio.wait_for(peer.stdout.readline(), START_TIMEOUT_S)
            await asyncio.wait_for(peer.wait(), START_TIMEOUT_S)
        finally:
            await agent.stop()
    finally:
        if peer.returncode is None:
            peer.kill()
            await peer.wait()
    latencies: list[float] = json.loads(line)
    return latencies


async def _send(agent: Agent, number: int) -> None:
    row = [number, *compute_row(number, 0)]
    row[_SENT] = time.monotonic_ns()
    await agent.execute([(INSERT, row)])


async def _receive(folder: Path) -> None:
    latencies: dict[int, float] = {}
    ended = asyncio.Event()

    def handle_commit(commit: Commit) -> None:
        now = time.monotonic_ns()
        for change in commit.changes:
            assert change.row is not None, "nothing is deleted"
            number, sent = change.row[0], change.row[_SENT]
            assert isinstance(number, int), "the key"
            assert isinstance(sent, int), "a time"
            if number == HELLO_ID:
                print("ready", flush=True)
            else:
                latencies[number] = (now - sent) / 1e6
        if len(latencies) == WRITES:
            ended.set()

    settings = AgentSettings("reader", folder / "reader.db", bind=("127.0.0.1", 0), keys=(KEY,))
    agent = Agent(settings, make_schema("row"), on_commit=handle_commit)
    await agent.start()
    try:
        print(f"{agent.address[0]}:{agent.address[1]}", flush=True)
        await asyncio.wait_for(ended.wait(), 2 * START_TIMEOUT_S + WRITES * GAP_S[1])
    finally:
        await agent.stop()
    print(json.dumps(list(latencies.values())), flush=True)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as peer_runner:
        peer_runner.run(_receive(Path(sys.argv[1])))
