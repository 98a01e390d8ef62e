"""All of a node in one process, for small machines and tests (`workers = 0`).

Decides the order only; agent and worker are the same as in processes of their own, and talk over the same
socket. Invariant: reloads and stops on the signals on which a supervised node does, in the same order.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvloop

from isthmus.agent_role import AgentRole
from isthmus.config import Config, ConfigError
from isthmus.listeners import claim
from isthmus.logs import setup_logging
from isthmus.notify import notify
from isthmus.reloading import Lifecycle, Reloader
from isthmus.role import RefusedError
from isthmus.supervisor import (
    NodeInfo,
    check_files,
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


def run_single(
    config: Config, announce: Callable[[NodeInfo], None], read: Callable[[], Config] | None = None
) -> None:
    """Run a node in this process until SIGTERM or SIGINT. Raises ConfigError when it cannot start."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_Single(config, announce, read).run())


class _Single:
    """A node in one process; it is what its agent asks for a reload."""

    def __init__(
        self, config: Config, announce: Callable[[NodeInfo], None], read: Callable[[], Config] | None
    ) -> None:
        self._config = config
        self._announce = announce
        self._read = read
        self._turn = asyncio.Event()  # set when the node is to stop, and when its agent is lost
        self._is_stopping = False
        self._reloading: set[asyncio.Task[Lifecycle]] = set()
        self._counted: dict[str, list[Any]] = {}  # by the worker, as the last agent left it
        # Set in `run`:
        self._reloader: Reloader
        self._agent: AgentRole
        self._worker: WorkerRole

    @property
    def lifecycle(self) -> Lifecycle:
        """What became of the last reload."""
        return self._reloader.lifecycle

    async def upgrade(self) -> None:
        """Refuse: there is no other process that could go on meanwhile."""
        raise RefusedError("a node with workers = 0 is one process; stop it and start it again")

    async def reload(self) -> Lifecycle:
        """Read the configuration again."""
        lifecycle = await self._reloader.reload(self._adopt)
        if lifecycle.reload_problem:
            log.error("the configuration stays as it was", extra={"problem": lifecycle.reload_problem})
        self._worker.refresh()
        return lifecycle

    async def _adopt(self, config: Config) -> str:
        await asyncio.to_thread(check_files, config, self._reloader.used)
        try:
            await self._agent.adopt(config)
            await self._worker.adopt(config)
        except RefusedError as error:
            raise ConfigError(str(error)) from error
        setup_logging(config.log.format, config.log.level, "node")
        return ""

    def _handle_hangup(self) -> None:
        task = asyncio.create_task(self.reload())
        self._reloading.add(task)
        task.add_done_callback(self._reloading.discard)

    def _stop(self) -> None:
        self._is_stopping = True
        self._turn.set()

    def _make_agent(self, config: Config, *, is_successor: bool = False) -> AgentRole:
        def keep(counted: dict[str, list[Any]]) -> None:
            self._counted = counted

        return AgentRole(
            config,
            self._turn.set,
            is_successor=is_successor,
            control=self,
            counted=self._counted,
            on_counted=keep,
        )

    async def _stop_agent(self) -> None:
        await self._agent.stop()

    async def run(self) -> None:
        """Run until a signal. Raises ConfigError."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        lock = await lock_data_dir(self._config)
        claimed = claim(self._config)
        self._reloader = Reloader(claimed.config, self._config, self._read)
        info_file = Path(self._config.data) / "node.json"
        async with contextlib.AsyncExitStack() as undo:
            undo.callback(os.close, lock)
            undo.callback(claimed.close)
            try:
                self._agent = self._make_agent(claimed.config)
                addresses = await self._agent.start()
                undo.push_async_callback(self._stop_agent)
                config = self._reloader.used = with_addresses(claimed.config, addresses)
                listeners = {name: os.dup(found) for name, found in claimed.for_worker(0).items()}
                self._worker = WorkerRole(config, 0, listeners)
                await self._worker.start()
                loop.add_signal_handler(
                    signal.SIGHUP, self._stop if ends_on_hangup() else self._handle_hangup
                )
                undo.push_async_callback(self._worker.stop)
                undo.callback(claimed.close)  # before the worker takes what is left in its queues
                info = node_info(config)
                write_node_info(info_file, info)
                undo.callback(info_file.unlink, missing_ok=True)
                self._announce(info)
                notify("READY=1")
                await self._turn.wait()
                await self._go_on_when_lost()
                notify("STOPPING=1")
            except RefusedError as error:
                raise ConfigError(str(error)) from error

    async def _go_on_when_lost(self) -> None:
        while not self._is_stopping:
            self._turn.clear()
            log.error("the agent is started afresh; the worker goes on")
            await self._stop_agent()
            self._agent = self._make_agent(self._reloader.used, is_successor=True)
            await self._agent.start()
            await self._turn.wait()
