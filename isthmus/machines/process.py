"""A driver whose machines are processes of this node: commands of its configuration file.

Decides how they are run, signalled and found again. Refuses to know why. Invariant: a process that was
started is known by its id and the time of its start, in a file; so the next agent goes on with it, and nobody
else is ever signalled in its place.

Each runs in a session of its own, so signals reach all that it has started. An agent that dies leaves them
running.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from isthmus.config_sources import ENVIRONMENT_PREFIX
from isthmus.machines.driver import DriverError, Machine, Made
from isthmus.machines.output import Output

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from isthmus.config_machines import MachineConfig

log = logging.getLogger(__name__)

LOOK_S: Final = 0.02
_ENDED: Final = frozenset((b"Z", b"X"))
_STOPPED: Final = b"T"
# In a command or directory of the configuration it stands for what is deployed.
RELEASE_MARK: Final = "{release}"
# After SIGKILL; only one that hangs in the kernel takes longer.
GONE_S: Final = 5.0


class Record(msgspec.Struct, frozen=True):
    """What is written down of a process: enough to know it again."""

    pid: int
    started: int  # in the ticks of the kernel, since it booted


def read_started(pid: int) -> int | None:
    """Return when the process was started, or None when there is none (a zombie is none)."""
    fields = _read_stat(pid)
    return None if fields[0] in _ENDED else int(fields[19])


def _read_stat(pid: int) -> list[bytes]:
    """Return what the kernel says of a process from its state on."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2].split()
    except OSError:
        return [b"X"]


class _Running:
    """A process that runs, or has just ended. `popen` is None for one that an earlier agent has started."""

    def __init__(self, record: Record, output: Output, popen: subprocess.Popen[bytes] | None) -> None:
        self.record = record
        self.output = output
        self.popen = popen
        self.is_suspended = _read_stat(record.pid)[0] == _STOPPED

    def is_alive(self) -> bool:
        return read_started(self.record.pid) == self.record.started

    def is_gone(self) -> bool:
        """Return True when nothing of it is left but, for a while, its number."""
        group = b"%d" % self.record.pid
        stats = (_read_stat(int(entry.name)) for entry in Path("/proc").iterdir() if entry.name.isdigit())
        return not any(fields[2] == group for fields in stats if fields[0] not in _ENDED)

    def signal(self, number: signal.Signals) -> None:
        """Signal all that it has started, also what is left of it when it has ended itself.

        As long as there is something left the kernel gives the number of its group to nobody else; a process
        that has that number by now is another one.
        """
        if read_started(self.record.pid) in {None, self.record.started}:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.record.pid, number)

    def reap(self) -> int | None:
        """Kill what it left behind, and return what it exited with; None for one that is not our child."""
        self.signal(signal.SIGKILL)  # before it is waited for, since that frees its number
        return None if self.popen is None else self.popen.wait()


class ProcessDriver:
    """Runs the commands of one node. `directory` holds what is known of them, and their output."""

    poll_s = 0.5  # to look takes microseconds

    def __init__(self, directory: Path, configs: Mapping[str, MachineConfig]) -> None:
        self._directory = directory
        self.configs = configs  # by machine; may be replaced
        self._running: dict[str, _Running] = {}
        self._ends: dict[str, int | None] = {}  # what those exited with that ended by themselves

    def adopt(self) -> None:
        """Find the processes that an earlier agent has left running. Call once, before all else."""
        self._directory.mkdir(mode=0o700, exist_ok=True)
        for file in self._directory.glob("*.json"):
            with contextlib.suppress(OSError, msgspec.DecodeError):
                record = msgspec.json.decode(file.read_bytes(), type=Record)
                if read_started(record.pid) == record.started:
                    output = Output(file.stem, file.with_suffix(".out"))
                    output.open()
                    self._running[file.stem] = _Running(record, output, None)
                    log.info("a machine still runs", extra={"machine": file.stem, "pid": record.pid})
                    continue
            self._forget_files(file.stem)

    def machines(self) -> set[str]:
        """Return the machines that have a process."""
        return set(self._running)

    async def start(self, machine: Machine) -> None:
        """Run its command, or have it go on."""
        running = self._running.get(machine.id)
        if running is not None and running.is_alive():
            running.signal(signal.SIGCONT)
            running.is_suspended = False
            return
        self._collect(machine.id)
        config = self.configs.get(machine.id)
        if config is None:
            raise DriverError("this node's configuration has no command for it")
        config = _fill_in(config, machine)
        output = Output(machine.id, self._directory / f"{machine.id}.out")
        try:
            output.open()
            # Not in a thread: a process must not come to be while this is cancelled. It takes 2 ms.
            popen = _spawn(config, machine, output)
        except (OSError, subprocess.SubprocessError) as error:
            output.close()
            raise DriverError(f"`{config.command[0]}` cannot be run: {error}") from None
        record = Record(popen.pid, read_started(popen.pid) or 0)
        self._running[machine.id] = _Running(record, output, popen)
        self._ends.pop(machine.id, None)
        (self._directory / f"{machine.id}.json").write_bytes(msgspec.json.encode(record))
        log.info("a machine runs", extra={"machine": machine.id, "pid": popen.pid})

    async def stop(self, machine: Machine) -> None:
        """End it: SIGTERM, and SIGKILL after its time."""
        running = self._running.get(machine.id)
        if running is None:
            return
        config = self.configs.get(machine.id)
        running.signal(signal.SIGTERM)
        running.signal(signal.SIGCONT)  # one that is suspended hears the first only then
        if not await _becomes(running.is_gone, 5.0 if config is None else config.kill_timeout_ms / 1000):
            log.warning("a machine does not end and is killed", extra={"machine": machine.id})
            running.signal(signal.SIGKILL)
            if not await _becomes(running.is_gone, GONE_S):
                raise DriverError(f"process {running.record.pid} does not end")
        self._collect(machine.id)
        self._ends.pop(machine.id, None)

    async def suspend(self, machine: Machine) -> bool:
        """Have it sleep: SIGSTOP."""
        running = self._running.get(machine.id)
        if running is None or not running.is_alive():
            raise DriverError("it does not run")
        running.signal(signal.SIGSTOP)
        running.is_suspended = True
        return True

    async def is_running(self, machine: Machine) -> bool | None:
        """Look whether its process is there."""
        running = self._running.get(machine.id)
        if running is None:
            return False
        if running.is_alive():
            return not running.is_suspended
        self._collect(machine.id)
        return False

    async def create(self, like: Machine, region: str) -> Made:  # noqa: ARG002 — as Driver has it
        """Commands come from the configuration alone."""
        raise DriverError(
            f"processes are declared: add [[apps.machines]] to the configuration of a node in {region}"
        )

    def explain_end(self, machine: Machine) -> tuple[str, bool]:
        """Tell what it exited with, and what its restart policy makes of that."""
        code = self._ends.get(machine.id)
        config = self.configs.get(machine.id)
        policy = "never" if config is None else config.restart
        again = policy == "always" or (policy == "on-failure" and code != 0)
        if machine.id not in self._ends:
            return "it does not run", True
        if code is None:
            return "it ended", again
        told = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        return told, again

    def close(self) -> None:
        """Read no more; the processes go on."""
        for running in self._running.values():
            running.output.close()

    def _collect(self, machine: str) -> None:
        """Take note of the end of a process."""
        running = self._running.pop(machine, None)
        if running is not None:
            self._ends[machine] = running.reap()
            self._forget_files(machine)

    def _forget_files(self, machine: str) -> None:
        for suffix in (".json", ".out"):
            (self._directory / f"{machine}{suffix}").unlink(missing_ok=True)


async def _becomes(condition: Callable[[], bool], within_s: float) -> bool:
    deadline = asyncio.get_running_loop().time() + within_s
    while not condition():
        if asyncio.get_running_loop().time() >= deadline:
            return False
        await asyncio.sleep(LOOK_S)
    return True


def _spawn(config: MachineConfig, machine: Machine, output: Output) -> subprocess.Popen[bytes]:
    """Run a command. Blocks until the program is there, or it is clear that it will not be."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(ENVIRONMENT_PREFIX)}
    about = {"FLY_APP_NAME": machine.app, "FLY_MACHINE_ID": machine.id, "FLY_REGION": machine.region}
    if machine.port is not None:
        about["PORT"] = str(machine.port)
    if machine.release:
        about["RELEASE"] = machine.release
    writer = output.open_for_machine()
    try:
        return subprocess.Popen(  # noqa: S603 — from this node's own configuration file
            config.command,
            cwd=config.directory or None,
            env={**own, **about, **config.env},
            stdin=subprocess.DEVNULL,
            stdout=writer,
            stderr=writer,
            start_new_session=True,
        )
    finally:
        os.close(writer)


def _fill_in(config: MachineConfig, machine: Machine) -> MachineConfig:
    """Put the release of a machine where the configuration wants it.

    Who may write to the table chooses among what is there below that place, and cannot leave it.
    """
    if not any(RELEASE_MARK in text for text in (*config.command, config.directory)):
        return config
    if not machine.release:
        raise DriverError(f"its command wants a release: `isthmus deploy {machine.app} TAG` gives it one")
    if "/" in machine.release:
        raise DriverError(f"`{machine.release}` is no release for processes of a node: it has a /")
    return msgspec.structs.replace(
        config,
        command=tuple(text.replace(RELEASE_MARK, machine.release) for text in config.command),
        directory=config.directory.replace(RELEASE_MARK, machine.release),
    )
