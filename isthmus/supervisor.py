"""Start one agent and N workers, restart what dies, end what stalls.

Decides when a child is started, restarted or killed. Knows nothing of routing or replication. Invariant:
at every moment each wanted child either runs or has a restart scheduled, until the node stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from isthmus.child import BEAT_S, EXIT_LOST, EXIT_REFUSED, Report, Task, send_task
from isthmus.config import Config, ConfigError
from isthmus.listeners import claim

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

log = logging.getLogger(__name__)

# A child that dies at once is tried again soon; one that goes on dying must not take a core.
RESTART_MIN_S, RESTART_MAX_S = 0.1, 5.0
# A child that lived this long died of something new: its backoff starts afresh.
STABLE_S = 10.0
# An event loop that turned for nothing in this time is stuck, not busy.
STALL_S = 10.0
# Time for faulthandler to write the stacks of a stalled child.
DUMP_S = 0.5
# Beyond the workers' own drain time, what stopping may take before SIGKILL.
STOP_GRACE_S = 5.0
START_S = 60.0
# A child that never served and died this often is not going to.
START_TRIES = 3
# An agent that lost its supervisor lets go of the data directory within this time.
LOCK_WAIT_S = 3.0


class NodeInfo(msgspec.Struct, frozen=True):
    """What `node.json` in the data directory says of a running node."""

    node: str
    region: str
    pid: int
    listen: str
    admin: str
    gossip: str
    tls: str = ""  # where clients connect over TLS; empty when they cannot


class _Child:
    """One wanted process. `process` is None between end and restart; `ready` is set while it serves."""

    def __init__(self, role: str, index: int) -> None:
        self.role = role
        self.index = index
        self.name = role if role == "agent" else f"worker-{index}"
        self.process: asyncio.subprocess.Process | None = None
        self.ready = asyncio.Event()
        self.addresses: dict[str, str] | None = None  # set when it served for the first time
        self.refused = ""
        self.is_lost = False  # whether it ended because what it stood on was lost
        self.beat_at = 0.0
        self.restarts = 0


class Supervisor:
    """Keeps the processes of one node alive.

    `announce` is called once, when the node serves, with its addresses.
    """

    def __init__(self, config: Config, announce: Callable[[NodeInfo], None]) -> None:
        self._config = config
        self._announce = announce
        self._children = [_Child("agent", 0), *(_Child("worker", i) for i in range(config.workers))]
        self._stopping = asyncio.Event()
        self._failure = ""
        self._lock = -1  # set in run(): the descriptor that makes the data directory ours

    async def run(self) -> None:
        """Run the node until SIGTERM or SIGINT. Raises ConfigError when it cannot start."""
        self._lock = await lock_data_dir(self._config)
        reservation = claim(self._config)
        self._config = reservation.config
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        loop.add_signal_handler(signal.SIGHUP, self._stopping.set if ends_on_hangup() else self._reload)
        info_file = Path(self._config.data) / "node.json"
        keepers = []
        try:
            for child in self._children:
                keepers.append(asyncio.create_task(self._keep(child)))
                await self._first_start(child)
                if child.role == "agent":
                    self._fix_agent_addresses(child.addresses)
            if not self._stopping.is_set():
                info = node_info(self._config)
                write_node_info(info_file, info)
                self._announce(info)
                keepers.append(asyncio.create_task(self._watch_loops()))
            await self._stopping.wait()
        finally:
            self._stopping.set()
            await self._stop_children()
            for keeper in keepers:
                keeper.cancel()
            await asyncio.gather(*keepers, return_exceptions=True)
            with contextlib.suppress(OSError):
                info_file.unlink()
            reservation.close()
            os.close(self._lock)
        if self._failure:
            raise ConfigError(self._failure)

    def _reload(self) -> None:
        """Have the children read again what may change; one that is starting reads it anyway."""
        for child in self._children:
            if child.process is not None and child.ready.is_set():
                _signal(child.process, signal.SIGHUP)

    async def _first_start(self, child: _Child) -> None:
        """Wait until the child serves, refuses, or takes too long."""
        waits = [asyncio.create_task(child.ready.wait()), asyncio.create_task(self._stopping.wait())]
        done, pending = await asyncio.wait(waits, timeout=START_S, return_when=asyncio.FIRST_COMPLETED)
        for wait in pending:
            wait.cancel()
        if not done:
            self._failure = f"{child.name} did not start within {START_S:.0f} s; its log above says why"
            self._stopping.set()

    def _fix_agent_addresses(self, addresses: dict[str, str] | None) -> None:
        """Keep the ports that the system chose, so that a restarted agent is found where it was."""
        if addresses:
            self._config = with_addresses(self._config, addresses)

    async def _keep(self, child: _Child) -> None:
        """Start the child, and start it again whenever it ends, until the node stops."""
        backoff = RESTART_MIN_S
        while not self._stopping.is_set():
            started = time.monotonic()
            code = await self._run_once(child)
            child.is_lost = code == EXIT_LOST
            if self._stopping.is_set():
                return
            if code == EXIT_REFUSED and child.addresses is None:
                self._failure = child.refused
                self._stopping.set()
                return
            if time.monotonic() - started > STABLE_S:
                backoff = RESTART_MIN_S
            child.restarts += 1
            if child.addresses is None and child.restarts == START_TRIES:
                self._failure = f"{child.name} dies when it starts; its log above says why"
                self._stopping.set()
                return
            # One that has served before may do so again: the others go on without it meanwhile.
            log.error(
                "a process died and is restarted",
                extra={
                    "child": child.name,
                    "exit": code,
                    **({"refused": child.refused} if code == EXIT_REFUSED else {}),
                    "restarts": child.restarts,
                    "in_s": backoff,
                },
            )
            await asyncio.sleep(backoff)
            backoff = min(backoff * 2, RESTART_MAX_S)

    async def _run_once(self, child: _Child) -> int:
        ours, theirs = socket.socketpair()
        # The agent holds the lock too: while one lives, even without its supervisor, no second may start.
        inherited = (theirs.fileno(), self._lock) if child.role == "agent" else (theirs.fileno(),)
        child.beat_at = time.monotonic()
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "isthmus.child",
            str(theirs.fileno()),
            pass_fds=inherited,
            stdin=asyncio.subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C in the terminal is the supervisor's to handle
        )
        theirs.close()
        child.process = process
        role: Literal["agent", "worker"] = "agent" if child.role == "agent" else "worker"
        task = Task(role, child.index, self._config, child.is_lost)
        reader, writer = await asyncio.open_connection(sock=ours.dup())
        try:
            with contextlib.suppress(ConnectionError), ours:  # it died; the exit status says the rest
                send_task(ours, task)
                await self._listen_to(child, reader)
            return await process.wait()
        finally:
            writer.close()
            child.ready.clear()
            child.process = None

    async def _listen_to(self, child: _Child, reader: asyncio.StreamReader) -> None:
        while line := await reader.readline():
            report = msgspec.json.decode(line, type=Report)
            child.beat_at = time.monotonic()
            if report.refused:
                child.refused = report.refused
            if report.ready is not None:
                child.addresses = report.ready
                child.ready.set()

    async def _watch_loops(self) -> None:
        """End a child whose event loop no longer turns, after it has written its stacks."""
        while True:
            before = time.monotonic()
            await asyncio.sleep(BEAT_S)
            if time.monotonic() - before > 2 * BEAT_S:
                continue  # this process slept as well, so the silence of the others says nothing
            for child in self._children:
                process = child.process
                # One that is still starting says nothing yet.
                bound = STALL_S if child.ready.is_set() else START_S
                if process is None or time.monotonic() - child.beat_at < bound:
                    continue
                log.error("an event loop is stalled; its stacks follow", extra={"child": child.name})
                _signal(process, signal.SIGUSR1)
                await asyncio.sleep(DUMP_S)
                _signal(process, signal.SIGKILL)

    async def _stop_children(self) -> None:
        """Stop the workers first, for they drain, and then the agent, which says goodbye to the others."""
        for role in ("worker", "agent"):
            running = [c.process for c in self._children if c.role == role and c.process is not None]
            for process in running:
                _signal(process, signal.SIGTERM)
            bound = STOP_GRACE_S + (self._config.proxy.drain_ms / 1000 if role == "worker" else 0)
            waits = [asyncio.create_task(process.wait()) for process in running]
            if waits:
                _, late = await asyncio.wait(waits, timeout=bound)
                for process in running if late else ():
                    _signal(process, signal.SIGKILL)


def ends_on_hangup() -> bool:
    """Say what SIGHUP means: that our terminal was closed, or, to a daemon, to read again what may change."""
    return os.isatty(0)


def node_info(config: Config) -> NodeInfo:
    """Return what this process, which runs a node, tells of it; the addresses must be those that it has."""
    return NodeInfo(
        config.node,
        config.region,
        os.getpid(),
        config.proxy.listen,
        config.admin.listen,
        config.gossip.listen,
        config.tls.listen,
    )


def with_addresses(config: Config, addresses: Mapping[str, str]) -> Config:
    """Return the configuration with the addresses that the agent's listeners got."""
    admin = msgspec.structs.replace(config.admin, listen=addresses["admin"])
    gossip = msgspec.structs.replace(config.gossip, listen=addresses["gossip"])
    return msgspec.structs.replace(config, admin=admin, gossip=gossip)


def _signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    if process.returncode is None:
        process.send_signal(number)


async def lock_data_dir(config: Config) -> int:
    """Make the data directory ours alone; returns the descriptor that holds the lock. Raises ConfigError."""
    data = Path(config.data)
    lock = _open_lock(data)
    deadline = time.monotonic() + LOCK_WAIT_S
    while not _try_lock(lock):
        if time.monotonic() < deadline:
            await asyncio.sleep(0.05)
            continue
        os.close(lock)
        raise ConfigError(
            f"data: {data} is in use by another isthmus; stop that one, or choose another with --data DIR"
        ) from None
    # The kernel limits the path of a Unix socket to 108 bytes.
    if len(os.fsencode(config.feed_socket)) > 107:
        os.close(lock)
        raise ConfigError(f"data: the path {data} is too long for a Unix socket in it; choose a shorter one")
    with contextlib.suppress(OSError):
        (data / "node.json").unlink()  # a node that was killed left it; what it says is not true any more
    return lock


def _open_lock(data: Path) -> int:
    try:
        data.mkdir(parents=True, exist_ok=True, mode=0o700)
        return os.open(data / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        problem = f"data: cannot use {data}: {error.strerror}; choose another with --data DIR"
        raise ConfigError(problem) from None


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def write_node_info(file: Path, info: NodeInfo) -> None:
    """Tell commands where the node listens. Raises ConfigError."""
    try:
        file.write_bytes(msgspec.json.encode(info) + b"\n")
    except OSError as error:
        raise ConfigError(f"data: cannot write {file}: {error.strerror}") from None


def read_node_info(data: Path) -> NodeInfo | None:
    """Return what a running node wrote of itself, or None. A node that was killed may have left its file."""
    try:
        return msgspec.json.decode((data / "node.json").read_bytes(), type=NodeInfo)
    except (OSError, msgspec.DecodeError):
        return None
