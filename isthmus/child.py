"""A child process of the supervisor: the agent or one worker, tied to its parent by a socket.

Decides when a child stops: on SIGTERM, when the socket to the supervisor closes, or when its role is lost.
Knows nothing of what its role does. Invariant: no child outlives its supervisor, and no secret is on a
command line.

On the socket the supervisor sends one `Task` and the child answers lines of JSON: `Ready` once, then a
`{"beat": n}` each second for as long as its event loop turns.
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
from functools import partial
from typing import TYPE_CHECKING, Literal

import msgspec
import uvloop

from isthmus.config import Config
from isthmus.logs import setup_logging
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


class Report(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line from a child: it is ready (with the addresses that it listens on), refuses, or beats."""

    ready: dict[str, str] | None = None
    refused: str = ""
    beat: int = 0


def send_task(channel: socket.socket, task: Task) -> None:
    """Send the one message from supervisor to child."""
    payload = msgspec.json.encode(task)
    channel.sendall(struct.pack(">I", len(payload)) + payload)


def _receive_task(channel: socket.socket) -> Task:
    with channel.makefile("rb") as stream:
        (size,) = struct.unpack(">I", stream.read(4))
        return msgspec.json.decode(stream.read(size), type=Task)


def main() -> int:
    """Run the child whose socket is the file descriptor in the first argument."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    os.set_inheritable(channel.fileno(), False)
    task = _receive_task(channel)
    name = task.role if task.role == "agent" else f"worker-{task.index}"
    setup_logging(task.config.log.format, task.config.log.level, name)
    # The supervisor asks a stalled child for its stacks before it ends it.
    faulthandler.register(signal.SIGUSR1)
    # Importing here keeps a worker from loading what only the agent needs.
    make_role: Callable[[Callable[[], None]], Role]
    if task.role == "agent":
        from isthmus.agent_role import AgentRole  # noqa: PLC0415 — see above

        make_role = partial(AgentRole, task.config, is_successor=task.is_successor)
    else:
        from isthmus.worker_role import WorkerRole  # noqa: PLC0415 — see above

        make_role = lambda _: WorkerRole(task.config, task.index)  # noqa: E731 — see above
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_live(make_role, channel))


async def _live(make_role: Callable[[Callable[[], None]], Role], channel: socket.socket) -> int:
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    code = 0

    def on_lost() -> None:
        nonlocal code
        code = EXIT_LOST
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    reader, writer = await asyncio.open_connection(sock=channel)
    lifeline = asyncio.create_task(_watch_parent(reader, stopping))
    try:
        role = make_role(on_lost)
        loop.add_signal_handler(signal.SIGHUP, role.reload)
        addresses = await role.start()
    except RefusedError as error:
        writer.write(msgspec.json.encode(Report(refused=str(error))) + b"\n")
        await writer.drain()
        return EXIT_REFUSED
    writer.write(msgspec.json.encode(Report(ready=addresses)) + b"\n")
    beats = asyncio.create_task(_beat(writer))
    await stopping.wait()
    beats.cancel()
    await role.stop()
    lifeline.cancel()
    writer.close()
    return code


async def _watch_parent(reader: asyncio.StreamReader, stopping: asyncio.Event) -> None:
    # A supervisor that died with our beats unread does not close the connection but resets it.
    with contextlib.suppress(ConnectionError):
        await reader.read()
    stopping.set()


async def _beat(writer: asyncio.StreamWriter) -> None:
    count = 0
    while True:
        count += 1
        writer.write(msgspec.json.encode(Report(beat=count)) + b"\n")
        await asyncio.sleep(BEAT_S)


if __name__ == "__main__":
    sys.exit(main())
