"""A child process of the supervisor: the agent or one worker, tied to its parent by a socket.

Decides when a child stops: on SIGTERM, when the socket to the supervisor closes, when it is told to retire,
or when its role is lost. Knows nothing of what its role does. Invariant: no child outlives its supervisor,
and no secret is on a command line.

On the socket the supervisor sends a `Task`, and then `Order`s, each behind its length. The child answers with
lines of JSON: that it is ready, what became of an order, and a `{"beat": n}` each second for as long as its
event loop turns.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import logging
import os
import signal
import socket
import struct
import sys
import time
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import uvloop

from isthmus.config import Config
from isthmus.logs import setup_logging
from isthmus.reloading import Lifecycle
from isthmus.role import RefusedError, Role

if TYPE_CHECKING:
    from collections.abc import Callable

BEAT_S = 1.0

# What a child exits with when it cannot start for a reason that a restart does not mend.
EXIT_REFUSED = 78
# What it exits with when it must be started afresh to go on.
EXIT_LOST = 75

log = logging.getLogger(__name__)


class Task(msgspec.Struct, frozen=True):
    """What a child is to be."""

    role: Literal["agent", "worker"]
    index: int
    config: Config
    is_successor: bool = False  # of an agent that was lost
    stands_by: bool = False  # to make ready, and start when told to
    listeners: dict[str, int] = {}  # descriptors of bound sockets, by setting
    lifecycle: Lifecycle = Lifecycle()
    counted: dict[str, list[Any]] = {}  # what workers had counted that are gone, by name


class Order(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a child that runs is to do; it reports the same id when that is done.

    The supervisor may be a newer program than the child: as in reports, what is added needs a default.
    """

    id: int = 0
    adopt: Config | None = None
    refresh: bool = False
    told: Lifecycle | None = None  # news for those who ask an agent
    answers: int = 0  # id of the wish for a reload that these answer
    starts: bool = False  # no more standing by
    counted: dict[str, list[Any]] | None = None  # with that: what is known by now of workers that are gone
    retires: bool = False


class Report(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line from a child: of how it is, what became of an order, or what it wishes."""

    ready: dict[str, str] | None = None  # it serves, on these addresses
    stands_by: bool = False
    refused: str = ""  # why it cannot start
    beat: int = 0
    done: int = 0  # id of an order
    problem: str = ""  # why that order changed nothing
    wish: Literal["", "reload", "upgrade"] = ""
    wish_id: int = 0  # of a reload
    counted: dict[str, list[Any]] | None = None  # what a worker had counted that is gone


def encode_message(message: Task | Order) -> bytes:
    """Return a message to a child as it goes over the socket."""
    payload = msgspec.json.encode(message)
    return struct.pack(">I", len(payload)) + payload


def _receive_task(channel: socket.socket) -> Task:
    (size,) = struct.unpack(">I", channel.recv(4, socket.MSG_WAITALL))
    return msgspec.json.decode(channel.recv(size, socket.MSG_WAITALL), type=Task)


def main() -> int:
    """Run the child whose socket is the file descriptor in the first argument."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    task = _receive_task(channel)
    for descriptor in (channel.fileno(), *task.listeners.values()):
        os.set_inheritable(descriptor, False)
    name = task.role if task.role == "agent" else f"worker-{task.index}"
    setup_logging(task.config.log.format, task.config.log.level, name)
    # The supervisor asks a stalled child for its stack before it ends it. That of the loop's thread only: to
    # walk those of threads that run meanwhile can crash the interpreter.
    faulthandler.register(signal.SIGUSR1, all_threads=False)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_live(task, name, channel))


async def _live(task: Task, name: str, channel: socket.socket) -> int:
    loop = asyncio.get_running_loop()
    reader, writer = await asyncio.open_connection(sock=channel)

    def report(report: Report) -> None:
        if not writer.is_closing():  # the supervisor may be gone
            writer.write(msgspec.json.encode(report) + b"\n")

    life = Life(task, name, report)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, life.end)
    loop.add_signal_handler(signal.SIGHUP, lambda: None)  # for the supervisor to handle
    obeying = asyncio.create_task(obey(reader, life))
    beats = asyncio.create_task(_beat(life.report)) if task.stands_by else None
    try:
        await life.begin()
    except RefusedError as error:
        life.report(Report(refused=str(error)))
        await writer.drain()
        return EXIT_REFUSED
    beats = beats or asyncio.create_task(_beat(life.report))
    await life.finish()
    beats.cancel()
    obeying.cancel()
    writer.close()
    return life.code


class Life:
    """What a child is, from its task to its end."""

    def __init__(self, task: Task, name: str, report: Callable[[Report], None]) -> None:
        self.lifecycle = task.lifecycle
        self.report = report
        self.code = 0
        self._task = task
        self._name = name
        self._counted = task.counted
        self._starting = asyncio.Event()
        self._stopping = asyncio.Event()
        self._ending = asyncio.Event()  # set with `_stopping` unless there is time
        self._waiting: dict[int, asyncio.Future[Lifecycle]] = {}  # for the end of a reload, by wish
        self._role: Role | None = None
        self._orders: set[asyncio.Task[None]] = set()

    async def begin(self) -> None:
        """Start what the task says. Raises RefusedError."""
        role = self._make_role()
        if self._task.stands_by:
            self.report(Report(stands_by=True))
            await self._starting.wait()
            if self._stopping.is_set():
                return
            role = self._make_role()  # what it looked at may be another by now
        addresses = await role.start()
        self._role = role
        self.report(Report(ready=addresses))

    def _make_role(self) -> Role:
        # Importing here keeps a worker from loading what only the agent needs.
        task = self._task
        if task.role == "agent":
            from isthmus.agent_role import AgentRole  # noqa: PLC0415 — see above

            return AgentRole(
                task.config,
                self._lose,
                is_successor=task.is_successor,
                control=self,
                counted=self._counted,
                on_counted=lambda counted: self.report(Report(counted=counted)),
            )
        from isthmus.worker_role import WorkerRole  # noqa: PLC0415 — see above

        return WorkerRole(task.config, task.index, task.listeners)

    async def finish(self) -> None:
        """Wait for the end, and stop."""
        await self._stopping.wait()
        role = self._role
        if role is None:
            return
        if not self._ending.is_set():
            retiring = asyncio.create_task(role.retire())
            ending = asyncio.create_task(self._ending.wait())
            done, _ = await asyncio.wait((retiring, ending), return_when=asyncio.FIRST_COMPLETED)
            for waiting in (retiring, ending):
                waiting.cancel()
            await asyncio.gather(retiring, ending, return_exceptions=True)
            if retiring in done:
                return
        await role.stop()

    def end(self) -> None:
        """Stop soon."""
        self._ending.set()
        self._stopping.set()
        self._starting.set()

    def _lose(self) -> None:
        self.code = EXIT_LOST
        self.end()

    def handle_order(self, order: Order) -> None:
        """Begin to do what the supervisor says."""
        if order.told is not None:
            self.lifecycle = order.told
            waiter = self._waiting.pop(order.answers, None)
            if waiter is not None and not waiter.done():
                waiter.set_result(order.told)
        if order.retires:
            self._stopping.set()
        if order.counted is not None:
            self._counted = order.counted
        if order.starts:
            self._starting.set()
        doing = asyncio.create_task(self._do(order))
        self._orders.add(doing)
        doing.add_done_callback(self._orders.discard)

    async def _do(self, order: Order) -> None:
        problem = ""
        role = self._role
        if role is not None:
            try:
                if order.adopt is not None:
                    await role.adopt(order.adopt)
                    setup_logging(order.adopt.log.format, order.adopt.log.level, self._name)
            except RefusedError as error:
                problem = str(error)
            except Exception as error:
                log.exception("a new configuration could not be adopted")
                problem = f"internal error: {error!r}"
            if order.refresh:
                role.refresh()
        self.report(Report(done=order.id, problem=problem))

    async def reload(self) -> Lifecycle:
        """Ask the supervisor to have all read the configuration again."""
        # A reload that is under way has read the configuration already: no other answers this wish. Nor does
        # one that the agent before us wished for.
        wish_id = time.monotonic_ns()
        waiter: asyncio.Future[Lifecycle] = asyncio.get_running_loop().create_future()
        self._waiting[wish_id] = waiter
        self.report(Report(wish="reload", wish_id=wish_id))
        return await waiter

    async def upgrade(self) -> None:
        """Ask the supervisor to replace all processes."""
        self.report(Report(wish="upgrade"))


async def obey(reader: asyncio.StreamReader, life: Life) -> None:
    """Follow the supervisor's orders until it is gone, and then end."""
    # A supervisor that died with our beats unread does not close the connection but resets it.
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
        while True:
            (size,) = struct.unpack(">I", await reader.readexactly(4))
            message = await reader.readexactly(size)
            try:
                life.handle_order(msgspec.json.decode(message, type=Order))
            except msgspec.MsgspecError as error:
                log.warning("an order cannot be read", extra={"error": str(error)})  # of a newer supervisor
    life.end()


async def _beat(report: Callable[[Report], None]) -> None:
    count = 0
    while True:
        count += 1
        report(Report(beat=count))
        await asyncio.sleep(BEAT_S)


if __name__ == "__main__":
    sys.exit(main())
