"""All of a node in one process, for small machines and tests (`workers = 0`).

Decides the order only; agent and worker are the same as in processes of their own, and talk over the same
socket. Invariant: stops on the signals on which a supervised node stops, in the same order.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import uvloop

from isthmus.agent_role import AgentRole
from isthmus.config import Config, ConfigError
from isthmus.listeners import claim
from isthmus.role import RefusedError
from isthmus.supervisor import (
    NodeInfo,
    ends_on_hangup,
    lock_data_dir,
    node_info,
    with_addresses,
    write_node_info,
)
from isthmus.worker_role import WorkerRole

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)


def run_single(config: Config, announce: Callable[[NodeInfo], None]) -> None:
    """Run a node in this process until SIGTERM or SIGINT. Raises ConfigError when it cannot start."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run(config, announce))


async def _run(config: Config, announce: Callable[[NodeInfo], None]) -> None:
    turn = asyncio.Event()  # set when the node is to stop, and when its agent is lost
    is_stopping = False

    def stop() -> None:
        nonlocal is_stopping
        is_stopping = True
        turn.set()

    def reload() -> None:
        agent.reload()
        worker.reload()

    async def stop_agent() -> None:
        await agent.stop()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    lock = await lock_data_dir(config)
    reservation = claim(config)
    config = reservation.config
    info_file = Path(config.data) / "node.json"
    async with contextlib.AsyncExitStack() as undo:
        undo.callback(os.close, lock)
        undo.callback(reservation.close)
        try:
            agent = AgentRole(config, turn.set)
            addresses = await agent.start()
            undo.push_async_callback(stop_agent)
            config = with_addresses(config, addresses)
            worker = WorkerRole(config, 0)
            await worker.start()
            loop.add_signal_handler(signal.SIGHUP, stop if ends_on_hangup() else reload)
            undo.push_async_callback(worker.stop)
            info = node_info(config)
            write_node_info(info_file, info)
            undo.callback(info_file.unlink, missing_ok=True)
            announce(info)
            await turn.wait()
            while not is_stopping:
                turn.clear()
                log.error("the agent is started afresh; the worker goes on")
                await stop_agent()
                agent = AgentRole(config, turn.set, is_successor=True)
                await agent.start()
                await turn.wait()
        except RefusedError as error:
            raise ConfigError(str(error)) from error
