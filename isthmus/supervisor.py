"""Start one agent and N workers, restart what dies, end what stalls; reload and upgrade all of them.

Decides when a child is started, restarted, replaced or killed. Knows nothing of routing or replication.
Invariant: at every moment each wanted child either runs or has a restart scheduled, until the node stops, and
no child is ended for a successor that does not serve yet.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import signal
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from isthmus.child import BEAT_S, EXIT_LOST, EXIT_REFUSED, Report, Task
from isthmus.children import Child, Kind
from isthmus.config import Config, ConfigError
from isthmus.listeners import Claim, claim
from isthmus.logs import setup_logging
from isthmus.notify import notify
from isthmus.reloading import Lifecycle, Reloader, carry_addresses
from isthmus.succession import (
    Handover,
    accept_signals,
    dump_config,
    hand_over,
    rehearse,
    revive_configs,
)
from proxy.access_log import STDOUT

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

log = logging.getLogger(__name__)

# A child that dies at once is tried again soon; one that goes on dying must not take a core.
RESTART_MIN_S, RESTART_MAX_S = 0.1, 5.0
# A child that lived this long died of something new: its backoff starts afresh.
STABLE_S = 10.0
# An event loop that turned for nothing in this time is stuck, not busy.
STALL_S = 10.0
# Time for faulthandler to write the stack of a stalled child.
DUMP_S = 0.5
# Beyond the workers' own drain time, what stopping may take before SIGKILL.
STOP_GRACE_S = 5.0
START_S = 60.0
# A child that never served and died this often is not going to.
START_TRIES = 3
# An agent that lost its supervisor lets go of the data directory within this time.
LOCK_WAIT_S = 3.0
# What a child may take to adopt a configuration: an agent writes what it declares, and others hold the file.
ADOPT_S = 30.0
# Beyond the time that a retiring child has, before SIGKILL.
RETIRE_GRACE_S = 15.0


class NodeInfo(msgspec.Struct, frozen=True):
    """What `node.json` in the data directory says of a running node."""

    node: str
    region: str
    pid: int
    listen: str
    admin: str
    gossip: str
    tls: str = ""  # where clients connect over TLS; empty when they cannot
    tcp: tuple[str, ...] = ()  # and those of raw TCP, in the order of the configuration
    peering: str = ""  # where other nodes connect to have requests passed on; empty when they cannot


class Supervisor:
    """Keeps the processes of one node alive.

    `announce` is called when the node begins to serve, with its addresses. `read` returns what the sources
    of its configuration say now, and `command` is what an upgrade runs; without it there is none. With a
    `handover` the children of an earlier program in this process are taken over, and replaced.
    """

    def __init__(
        self,
        config: Config,
        announce: Callable[[NodeInfo], None],
        *,
        read: Callable[[], Config] | None = None,
        command: list[str] | None = None,
        handover: Handover | None = None,
    ) -> None:
        self._config = config
        self._read = read
        self._announce = announce
        self._command = command
        self._handover = handover
        self._children: list[Child] = []
        self._candidates: list[Child] = []  # started by an upgrade, and not in use yet
        self._leaving: list[Child] = []  # they retire, and are not started again
        self._keepers: set[asyncio.Task[None]] = set()
        self._stopping = asyncio.Event()
        self._changing = asyncio.Lock()  # held by a reload and by an upgrade
        self._counted: dict[str, list[Any]] = {}  # by workers that are gone; an agent may need it
        self._failure = ""
        # Set in run():
        self._lock = -1  # the descriptor that makes the data directory ours
        self._claim: Claim
        self._reloader: Reloader

    async def run(self) -> None:
        """Run the node until SIGTERM or SIGINT. Raises ConfigError when it cannot start."""
        info_file = Path(self._config.data) / "node.json"
        if self._handover is None:
            self._lock = await lock_data_dir(self._config)
            self._claim = claim(self._config)
            self._reloader = Reloader(self._claim.config, self._config, self._read)
        else:
            self._take_over(self._handover)
        self._handle_signals()
        try:
            if self._handover is None:
                await self._begin()
            else:
                self._start(self._succeed())
            if not self._stopping.is_set():
                if self._handover is None:
                    info = node_info(self._reloader.used)
                    write_node_info(info_file, info)
                    self._announce(info)
                notify("READY=1")
                self._start(self._watch_loops())
            await self._stopping.wait()
        finally:
            self._stopping.set()
            notify("STOPPING=1")
            self._claim.close()  # before the workers take what is left in its queues
            await self._stop_children()
            for keeper in self._keepers:
                keeper.cancel()
            await asyncio.gather(*self._keepers, return_exceptions=True)
            with contextlib.suppress(OSError):
                info_file.unlink()
            os.close(self._lock)
        if self._failure:
            raise ConfigError(self._failure)

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        hangup = self._stopping.set if ends_on_hangup() else lambda: self._start(self._reload())
        loop.add_signal_handler(signal.SIGHUP, hangup)
        loop.add_signal_handler(signal.SIGUSR2, lambda: self._start(self._upgrade()))
        accept_signals()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something beside everything else, until the node stops."""
        task = asyncio.create_task(work)
        self._keepers.add(task)
        task.add_done_callback(self._keepers.discard)

    # Children

    def _all(self) -> list[Child]:
        return [*self._children, *self._candidates, *self._leaving]

    def _agent(self) -> Child:
        return self._children[0]

    def _make_child(self, role: Kind, index: int) -> Child:
        return Child(role, index, self._handle_report)

    async def _begin(self) -> None:
        """Start all children, one after the other; the node stops if one cannot."""
        for role, index in _wanted(self._reloader.used):
            child = self._make_child(role, index)
            self._children.append(child)
            self._start(self._keep(child))
            self._failure = await self._await_start(child, child.ready)
            if self._failure:
                self._stopping.set()
            if self._stopping.is_set():
                return
            if role == "agent":
                self._fix_addresses()

    def _fix_addresses(self) -> None:
        """Keep the ports that the system chose, so that a restarted agent is found where it was."""
        addresses = self._agent().addresses
        if addresses:
            self._reloader.used = self._claim.config = with_addresses(self._reloader.used, addresses)

    async def _await_start(self, child: Child, started: asyncio.Event) -> str:
        """Return when the child has started, or why it has not; empty also when the node stops."""
        waits = [asyncio.create_task(event.wait()) for event in (started, child.failed, self._stopping)]
        done, _ = await asyncio.wait(waits, timeout=START_S, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if not done:
            return f"{child.name} did not start within {START_S:.0f} s; its log above says why"
        return child.failure

    async def _keep(self, child: Child) -> None:
        """Start the child, and start it again whenever it ends, until the node stops or the child retires."""
        backoff = RESTART_MIN_S
        is_taken_over = child.process is not None
        while is_taken_over or not (self._stopping.is_set() or child.is_retiring):
            started = time.monotonic()
            code = await (child.live_on() if is_taken_over else self._live(child))
            is_taken_over = False
            child.is_lost = code == EXIT_LOST
            if self._stopping.is_set() or child.is_retiring or self._gives_up(child, code):
                return
            if time.monotonic() - started > STABLE_S:
                backoff = RESTART_MIN_S
            # One that has served before may do so again: the others go on without it meanwhile.
            log.log(
                logging.INFO if child.is_lost else logging.ERROR,
                f"a process {'ended' if child.is_lost else 'died'} and is restarted",  # noqa: G004 - two words
                extra={
                    "child": child.name,
                    "exit": code,
                    **({"refused": child.refused} if code == EXIT_REFUSED else {}),
                    "restarts": child.restarts,
                    "in_s": backoff,
                },
            )
            if child.role == "worker" and backoff > RESTART_MIN_S and child.trial is None:
                # Clients would wait for it in vain; without a queue the kernel gives them to the others.
                self._claim.renew(child.index)
            await asyncio.sleep(backoff)
            backoff = min(backoff * 2, RESTART_MAX_S)

    def _gives_up(self, child: Child, code: int) -> bool:
        """Count a death; True when there is no hope for one that never served."""
        if child.is_on_trial and code == EXIT_REFUSED:
            child.fail(child.refused)
            return True
        child.restarts += 1
        if child.is_on_trial and child.restarts == START_TRIES:
            child.fail(f"{child.name} dies when it starts; its log above says why")
            return True
        return False

    async def _live(self, child: Child) -> int:
        config, claimed = child.trial or (self._reloader.used, self._claim)
        is_agent = child.role == "agent"
        task = Task(
            child.role,
            child.index,
            config,
            is_successor=child.is_lost,
            stands_by=is_agent and child.trial is not None,
            listeners={} if is_agent else claimed.for_worker(child.index),
            lifecycle=self._reloader.lifecycle,
            counted=self._counted if is_agent else {},
        )
        # The agent holds the lock too: while one lives, even without its supervisor, no second may start.
        return await child.live(task, (self._lock,) if is_agent else ())

    def _handle_report(self, report: Report) -> None:
        if report.counted is not None:
            self._counted = report.counted
        if report.wish == "reload":
            self._start(self._reload(report.wish_id))
        elif report.wish == "upgrade":
            self._start(self._upgrade())

    async def _watch_loops(self) -> None:
        """End a child whose event loop no longer turns, after it has written its stack."""
        while True:
            before = time.monotonic()
            await asyncio.sleep(BEAT_S)
            if time.monotonic() - before > 2 * BEAT_S:
                continue  # this process slept as well, so the silence of the others says nothing
            for child in self._all():
                # One that is still starting says nothing yet.
                bound = STALL_S if child.ready.is_set() or child.stands_by.is_set() else START_S
                process = child.process
                if process is None or time.monotonic() - child.beat_at < bound:
                    continue
                log.error("an event loop is stalled; its stack follows", extra={"child": child.name})
                process.send_signal(signal.SIGUSR1)
                await asyncio.sleep(DUMP_S)
                process.send_signal(signal.SIGKILL)

    async def _stop_children(self) -> None:
        """Stop the workers first, for they drain, and then the agent, which says goodbye to the others."""
        for role in ("worker", "agent"):
            running = [c.process for c in self._all() if c.role == role and c.process is not None]
            for process in running:
                process.send_signal(signal.SIGTERM)
            used = self._reloader.used
            bound = STOP_GRACE_S + (used.proxy.drain_ms / 1000 if role == "worker" else used.machines_stop_s)
            waits = [asyncio.create_task(process.wait()) for process in running]
            if waits:
                _, late = await asyncio.wait(waits, timeout=bound)
                for process in running if late else ():
                    process.send_signal(signal.SIGKILL)

    # Reload

    async def _reload(self, wish_id: int = 0) -> None:
        """Have all children go on with what the sources say now; with an id the agent wished for it."""
        async with self._changing:
            notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
            lifecycle = await self._reloader.reload(self._adopt)
            if lifecycle.reload_problem:
                log.error("the configuration stays as it was", extra={"problem": lifecycle.reload_problem})
            else:
                shown = {"changed": ", ".join(lifecycle.changed), "restart": ", ".join(lifecycle.restart)}
                log.info("the configuration was read again", extra={k: v for k, v in shown.items() if v})
            # Also when the configuration is wrong: a log that was moved must not grow where it is now.
            workers = [child for child in self._all() if child.role == "worker" and child.ready.is_set()]
            await asyncio.gather(*(child.order(ADOPT_S, refresh=True) for child in workers))
            await self._tell(wish_id)
            notify("READY=1")

    async def _adopt(self, config: Config) -> str:
        """Have the agent adopt a configuration, which may refuse it, and then the others."""
        await asyncio.to_thread(check_files, config, self._reloader.used)
        agent = self._agent()
        problem = await self._await_start(agent, agent.ready) or await agent.order(ADOPT_S, adopt=config)
        if problem:
            raise ConfigError(problem)
        workers = [child for child in self._all() if child.role == "worker" and child.ready.is_set()]
        answers = await asyncio.gather(*(child.order(ADOPT_S, adopt=config) for child in workers))
        kept = ""
        for child, problem in zip(workers, answers, strict=True):
            if problem:
                log.error("a worker keeps its settings", extra={"child": child.name, "problem": problem})
                kept = f"{child.name}: {problem}"
        setup_logging(config.log.format, config.log.level, "node")
        return kept

    async def _tell(self, wish_id: int = 0) -> None:
        """Let the agent know what it may be asked for."""
        await self._agent().order(ADOPT_S, told=self._reloader.lifecycle, answers=wish_id)

    # Upgrade

    async def _upgrade(self) -> None:
        """Go on as a new program, if there is one that loads; else say why not."""
        if self._changing.locked():
            log.warning("no upgrade now: the node is changing already")
            return
        async with self._changing:
            await self._set_upgrade(is_upgrading=True)
            command = self._command
            problem = await rehearse(command) if command else "this node was not started by `isthmus run`"
            if command and not problem and not self._stopping.is_set():
                try:
                    hand_over(command, self._describe())
                except OSError as error:
                    problem = f"cannot run {command[0]}: {error.strerror}"
            await self._set_upgrade(problem)

    async def _set_upgrade(self, problem: str = "", *, is_upgrading: bool = False) -> None:
        if problem:
            log.error("no upgrade: all goes on as before", extra={"problem": problem})
        self._reloader.lifecycle = msgspec.structs.replace(
            self._reloader.lifecycle, upgrade_problem=problem, is_upgrading=is_upgrading
        )
        await self._tell()

    def _describe(self) -> Handover:
        kept = [child.describe() for child in (*self._children, *self._leaving)]
        return Handover(
            used=dump_config(self._reloader.used),
            told=dump_config(self._reloader.told),
            lock=self._lock,
            listeners={name: [s.fileno() for s in sockets] for name, sockets in self._claim.sockets.items()},
            children=[child for child in kept if child is not None],
            lifecycle=self._reloader.lifecycle,
            counted=self._counted,
        )

    def _take_over(self, handover: Handover) -> None:
        """Go on with what an earlier program in this process had."""
        self._lock = handover.lock
        used, told = revive_configs(handover, self._config)
        sockets = {
            name: [socket.socket(fileno=descriptor) for descriptor in descriptors]
            for name, descriptors in handover.listeners.items()
        }
        self._claim = Claim(used, sockets)
        self._reloader = Reloader(used, told, self._read)
        self._reloader.lifecycle = handover.lifecycle
        self._counted = handover.counted
        kept = [Child.keep(one, self._handle_report) for one in handover.children]
        self._leaving = [child for child in kept if child.is_retiring]
        for role, index in _wanted(used):
            found = [c for c in kept if (c.role, c.index) == (role, index) and not c.is_retiring]
            self._children.append(found[0] if found else self._make_child(role, index))
        for child in self._all():
            self._start(self._keep(child))
        for child in self._leaving:
            self._start(self._see_off(child))

    async def _succeed(self) -> None:
        """Replace all children by new ones; if one of these does not come up, nothing changes."""
        async with self._changing:
            problem = await self._await_start(self._agent(), self._agent().ready)
            problem = problem or await self._try_candidates()
            if not problem and not self._stopping.is_set():
                await self._install_candidates()
            await self._set_upgrade(problem)

    async def _try_candidates(self) -> str:
        """Start the next children beside those that serve; return why they cannot replace them."""
        fresh, told = self._config, self._reloader.told
        if fresh.data != told.data or not fresh.workers:
            return "another data directory, or no workers, take a stop and a start"
        try:
            claimed = claim(carry_addresses(told, self._reloader.used, fresh), self._claim)
        except ConfigError as error:
            return str(error)
        self._candidates = [self._make_child(role, index) for role, index in _wanted(fresh)]
        for child in self._candidates:
            child.trial = claimed.config, claimed
            self._start(self._keep(child))
        problem = ""
        for child in self._candidates:
            started = child.stands_by if child.role == "agent" else child.ready
            problem = problem or await self._await_start(child, started)
        if problem:
            given_up, self._candidates = self._candidates, []
            self._leaving += given_up
            for child in given_up:
                # A worker that serves has connections by now, which are no worse than others.
                self._retire(child, fresh.proxy.upgrade_drain_ms / 1000 if child.ready.is_set() else 0.0)
                if not child.ready.is_set():
                    child.send_signal(signal.SIGKILL)
            claimed.close(self._claim)
        return problem

    async def _install_candidates(self) -> None:
        """Let the new children take the place of the old ones, which retire."""
        former, self._children, self._candidates = self._children, self._candidates, []
        trial = self._agent().trial
        assert trial is not None
        config, claimed = trial
        self._claim.close(claimed)
        self._claim = claimed
        lifecycle = Lifecycle(generation=self._reloader.lifecycle.generation + 1)
        self._reloader = Reloader(config, self._config, self._read)
        self._reloader.lifecycle = lifecycle
        for child in self._children:
            child.trial = None
        self._leaving += former
        for child in former:
            child.is_retiring = True
        # Two agents on one database would not do: the new one starts when the old one has ended.
        self._retire(former[0], 0.0)
        if former[0].process is not None:
            await former[0].process.wait()
        agent = self._agent()
        await agent.order(ADOPT_S, starts=True, told=lifecycle, counted=self._counted)
        problem = await self._await_start(agent, agent.ready)
        agent.is_on_trial = False
        if problem:
            log.error("the new agent does not serve", extra={"problem": problem})
        self._fix_addresses()
        # Now that there is an agent again to be told what they have counted.
        for child in former[1:]:
            self._retire(child, config.proxy.upgrade_drain_ms / 1000)
        info = node_info(self._reloader.used)
        write_node_info(Path(self._config.data) / "node.json", info)
        log.info("upgraded", extra={"generation": lifecycle.generation})

    def _retire(self, child: Child, within_s: float) -> None:
        child.is_retiring = True
        child.seen_off_at = time.monotonic() + within_s + RETIRE_GRACE_S
        self._start(self._order_retirement(child))
        self._start(self._see_off(child))

    async def _order_retirement(self, child: Child) -> None:
        await child.order(ADOPT_S, retires=True)

    async def _see_off(self, child: Child) -> None:
        """Wait for the end of a child that retires, and bring it about when its time is over."""
        process = child.process
        if process is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), max(0.0, child.seen_off_at - time.monotonic()))
            process.send_signal(signal.SIGKILL)
            await process.wait()
        self._leaving.remove(child)


def _wanted(config: Config) -> list[tuple[Kind, int]]:
    """Return role and index of each child of a node."""
    return [("agent", 0), *(("worker", index) for index in range(config.workers))]


def check_files(config: Config, former: Config | None = None) -> None:
    """Raise ConfigError when a file that the configuration names for workers cannot be used. Blocks.

    Certificates are read only when there are others than before: they may be many.
    """
    file = config.access_log.file
    if file and file != STDOUT:
        try:
            os.close(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640))
        except OSError as error:
            raise ConfigError(f"access_log.file: cannot write {file}: {error.strerror}") from None
    if config.ends_tls and (former is None or former.tls.certificates != config.tls.certificates):
        from proxy.certificates import Certificates  # noqa: PLC0415 - most supervisors never need it

        problem = Certificates(config.tls.certificates, time.time).load()
        if problem is not None:
            raise ConfigError(f"tls.certificates: {problem}")


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
        tuple(tcp.listen for tcp in config.tcp),
        config.peering.listen,
    )


def with_addresses(config: Config, addresses: Mapping[str, str]) -> Config:
    """Return the configuration with the addresses that the agent's listeners got."""
    admin = msgspec.structs.replace(config.admin, listen=addresses["admin"])
    gossip = msgspec.structs.replace(config.gossip, listen=addresses["gossip"])
    return msgspec.structs.replace(config, admin=admin, gossip=gossip)


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
    """Tell commands where the node listens, all of it or nothing. Raises ConfigError."""
    part = file.with_name(f"{file.name}.part")
    try:
        part.write_bytes(msgspec.json.encode(info) + b"\n")
        part.replace(file)
    except OSError as error:
        raise ConfigError(f"data: cannot write {file}: {error.strerror}") from None


def read_node_info(data: Path) -> NodeInfo | None:
    """Return what a running node wrote of itself, or None. A node that was killed may have left its file."""
    try:
        return msgspec.json.decode((data / "node.json").read_bytes(), type=NodeInfo)
    except (OSError, msgspec.DecodeError):
        return None
