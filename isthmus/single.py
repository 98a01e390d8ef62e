"""All of a node in one process, for small machines and tests (`workers = 0`).

Decides the order only; agent and worker are the same as in processes of their own, and talk over the same
socket. Invariant: stops on the signals on which a supervised node stops, in the same order.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import uvloop

from isthmus.agent_role import AgentRole
from isthmus.config import Config, ConfigError
from isthmus.listeners import bound_address, claim
from isthmus.role import RefusedError
from isthmus.supervisor import NodeInfo, lock_data_dir, with_addresses, write_node_info
from isthmus.worker_role import WorkerRole

if TYPE_CHECKING:
    from collections.abc import Callable


def run_single(config: Config, announce: Callable[[NodeInfo], None]) -> None:
    """Run a node in this process until SIGTERM or SIGINT. Raises ConfigError when it cannot start."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run(config, announce))


async def _run(config: Config, announce: Callable[[NodeInfo], None]) -> None:
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    lock = await lock_data_dir(config)
    reservation = claim(config)
    listen = bound_address(reservation)
    config = msgspec.structs.replace(config, proxy=msgspec.structs.replace(config.proxy, listen=listen))
    info_file = Path(config.data) / "node.json"
    async with contextlib.AsyncExitStack() as undo:
        undo.callback(os.close, lock)
        undo.callback(reservation.close)
        try:
            agent = AgentRole(config)
            addresses = await agent.start()
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, agent.reload)
            undo.push_async_callback(agent.stop)
            worker = WorkerRole(with_addresses(config, addresses), 0)
            await worker.start()
            undo.push_async_callback(worker.stop)
            info = NodeInfo(
                config.node, config.region, os.getpid(), listen, addresses["admin"], addresses["gossip"]
            )
            write_node_info(info_file, info)
            undo.callback(info_file.unlink, missing_ok=True)
        except RefusedError as error:
            raise ConfigError(str(error)) from error
        announce(info)
        await stopping.wait()
