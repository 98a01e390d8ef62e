"""The supervisor's end of one child process.

Decides nothing but how a child is spoken to. Refuses to know when one is started or ended. Invariant: whoever
waits for a child to obey is told when it has, or that it has died.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
import time
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from isthmus.child import Order, Report, Task, encode_message
from isthmus.processes import Process

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Sequence

    from isthmus.config import Config
    from isthmus.listeners import Claim

log = logging.getLogger(__name__)

# A line may hold all that a worker had counted.
_LINE_BYTES_MAX = 16 << 20

Kind = Literal["agent", "worker"]


class Kept(msgspec.Struct, frozen=True):
    """What another program in this process needs to go on with a child."""

    role: Kind
    index: int
    pid: int
    channel: int
    addresses: dict[str, str] | None
    is_retiring: bool = False
    seen_off_at: float = 0.0


class Child:
    """One wanted process. `process` is None between end and restart; `ready` is set while it serves.

    `on_report` is called with each report that this class has no use for.
    """

    def __init__(self, role: Kind, index: int, on_report: Callable[[Report], None]) -> None:
        self.role: Kind = role
        self.index = index
        self.name = role if role == "agent" else f"worker-{index}"
        self.process: Process | None = None
        self.ready = asyncio.Event()
        self.stands_by = asyncio.Event()  # set when it only waits to be told to start
        self.failed = asyncio.Event()  # set when it is given up; `failure` says why
        self.failure = ""
        self.is_on_trial = True  # until it has served, or its predecessor is gone
        self.trial: tuple[Config, Claim] | None = None  # in place of the node's, while it may be given up
        self.is_retiring = False  # it is not started again
        self.seen_off_at = 0.0  # when a retiring one is ended, monotonic
        self.addresses: dict[str, str] | None = None  # set when it served for the first time
        self.refused = ""
        self.is_lost = False  # whether it ended because what it stood on was lost
        self.beat_at = 0.0
        self.restarts = 0
        self._on_report = on_report
        self._channel: socket.socket | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._orders = 0
        self._obeyed: dict[int, asyncio.Future[str]] = {}

    @classmethod
    def keep(cls, kept: Kept, on_report: Callable[[Report], None]) -> Child:
        """Go on with a child that another program in this process had."""
        child = cls(kept.role, kept.index, on_report)
        child._channel = socket.socket(fileno=kept.channel)
        os.set_inheritable(kept.channel, False)
        child.addresses = kept.addresses
        child.is_on_trial = False
        child.is_retiring, child.seen_off_at = kept.is_retiring, kept.seen_off_at
        child.process = Process(kept.pid)
        return child

    def describe(self) -> Kept | None:
        """Return what `keep` needs; None when no process runs."""
        if self.process is None or self._channel is None or not self.ready.is_set():
            return None
        return Kept(
            self.role,
            self.index,
            self.process.pid,
            self._channel.fileno(),
            self.addresses,
            self.is_retiring,
            self.seen_off_at,
        )

    def fail(self, why: str) -> None:
        """Give it up."""
        self.failure = why
        self.failed.set()

    async def live(self, task: Task, inherited: Sequence[int] = ()) -> int:
        """Run a process with this task to its end, and return its exit code."""
        ours, theirs = socket.socketpair()
        with theirs:
            args = (sys.executable, "-m", "isthmus.child", str(theirs.fileno()))
            fds = (theirs.fileno(), *task.listeners.values(), *inherited)
            self.process = Process.start(args, fds)
        self._channel = ours
        return await self.live_on(encode_message(task))

    async def live_on(self, message: bytes = b"") -> int:
        """Listen to the process that runs to its end, and return its exit code."""
        channel, process = self._channel, self.process
        assert channel is not None
        assert process is not None
        self.beat_at = time.monotonic()
        try:
            reader, self._writer = await asyncio.open_connection(sock=channel.dup(), limit=_LINE_BYTES_MAX)
            if self.addresses is not None and not message:
                self.ready.set()  # it has been for long
            with contextlib.suppress(ConnectionError):  # it died; the exit status says the rest
                self._writer.write(message)
                await self._listen(reader)
            return await process.wait()
        finally:
            if self._writer is not None:
                self._writer.close()
            channel.close()
            self._channel = self._writer = self.process = None
            self.ready.clear()
            self.stands_by.clear()
            for obeyed in self._obeyed.values():
                if not obeyed.done():
                    obeyed.set_result(f"{self.name} died")

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        while line := await reader.readline():
            self.beat_at = time.monotonic()
            try:
                report = msgspec.json.decode(line, type=Report)
            except msgspec.MsgspecError as error:
                # The rest of a line whose beginning was read by an earlier program in this process.
                log.warning("a report cannot be read", extra={"child": self.name, "error": str(error)})
                continue
            if report.done in self._obeyed and not self._obeyed[report.done].done():
                self._obeyed[report.done].set_result(report.problem)
            self.refused = report.refused or self.refused
            if report.stands_by:
                self.stands_by.set()
            if report.ready is not None:
                self.addresses = report.ready
                self.is_on_trial = False
                self.ready.set()
            self._on_report(report)

    async def order(self, within_s: float, **what: Any) -> str:
        """Have the child do something, and return why it did not; empty when it did."""
        if self._writer is None:
            return f"{self.name} does not run"
        self._orders += 1
        id_ = self._orders
        obeyed = self._obeyed[id_] = asyncio.get_running_loop().create_future()
        self._writer.write(encode_message(Order(id_, **what)))
        try:
            return await asyncio.wait_for(obeyed, within_s)
        except TimeoutError:
            return f"{self.name} did not answer within {within_s:g} s"
        finally:
            del self._obeyed[id_]

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the process, if there is one."""
        if self.process is not None:
            self.process.send_signal(number)
