"""A replica's host on an event loop: the database on its thread, sockets, timers.

Moves calls to where they run and their results back. Decides nothing; does not know what a replica does.
Invariant: nothing is called back after `stop`.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import TypeVar

from replication.core.change import Commit
from replication.core.links import Link
from replication.core.member import Address
from replication.database import Database
from replication.errors import ReplicationError
from replication.spool import DiskSpool
from replication.store import Store
from replication.transport import Transport

log = logging.getLogger(__name__)

T = TypeVar("T")


class LoopHost:
    """The world of one agent's replica."""

    def __init__(
        self,
        database: Database,
        transport: Transport,
        directory: Path,
        *,
        wall_ms: Callable[[], int],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.wall_ms = wall_ms
        self._database = database
        self._transport = transport
        self._directory = directory
        self._monotonic = monotonic
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._timers: set[asyncio.TimerHandle] = set()
        self._is_stopped = False

    def now_ms(self) -> float:
        """Return the monotonic time."""
        return self._monotonic() * 1000

    def call_later(self, delay_ms: float, act: Callable[[], None]) -> None:
        """Call `act` after a while, unless stopped."""
        if self._is_stopped:
            return

        def call() -> None:
            self._timers.discard(timer)
            act()

        timer = self._loop.call_later(max(0.0, delay_ms) / 1000, call)
        self._timers.add(timer)

    def send_datagram(self, to: Address, data: bytes) -> None:
        """Send, and forget."""
        self._transport.send_datagram(to, data)

    def dial(self, address: Address, *, lasting: bool, done: Callable[[Link | None], None]) -> None:
        """Open a link."""

        async def connect() -> None:
            link: Link | None = None
            try:
                link = await self._transport.connect(address, lasting=lasting)
            except (ReplicationError, OSError, TimeoutError) as error:
                log.debug("dialling %s: %r", address, error)
            done(link)

        self._spawn(connect())

    def make_spool(self) -> DiskSpool:
        """Return an empty spool; raises OSError."""
        return DiskSpool(self._directory)

    def run(
        self, act: Callable[[Store], T], done: Callable[[T], None], failed: Callable[[Exception], None]
    ) -> None:
        """Run something on the store that makes no commit."""
        self._spawn(self._settle(self._database.run(act), done, failed))

    def commit(
        self,
        act: Callable[[Store], T],
        commits_of: Callable[[T], Sequence[Commit]],
        done: Callable[[T], None],
        failed: Callable[[Exception], None],
    ) -> None:
        """Run something on the store that may commit."""
        self._spawn(self._settle(self._database.commit(act, commits_of), done, failed))

    async def stop(self) -> None:
        """Give up what is under way and wait until it is."""
        self._is_stopped = True
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _settle(
        self,
        running: Coroutine[None, None, T],
        done: Callable[[T], None],
        failed: Callable[[Exception], None],
    ) -> None:
        try:
            result = await running
        except Exception as error:  # noqa: BLE001 - whoever asked decides
            failed(error)
        else:
            done(result)

    def _spawn(self, coroutine: Coroutine[None, None, None]) -> None:
        if self._is_stopped:
            coroutine.close()
            return
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._reap)

    def _reap(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a callback failed", exc_info=error)
