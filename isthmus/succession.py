"""How the program of a supervisor is replaced by another one in the same process.

Decides what is handed over, and how the next program is tried before. Refuses to know what children do.
Invariant: everything handed over stays open across the change: no listening socket is closed, no child ends,
and the process keeps its id.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

import msgspec

from isthmus.children import Kept
from isthmus.config import Config, ConfigError
from isthmus.reloading import LISTENERS, Lifecycle

if TYPE_CHECKING:
    from collections.abc import Callable, MutableMapping, Sequence

log = logging.getLogger(__name__)

# Names the descriptor of a file in memory; not a setting.
VARIABLE = "ISTHMUS_HANDOVER"
# Loading everything and reading the configuration takes a second.
_TRIAL_S = 60.0
# Held back until the next program has its handlers: any of them would end it before.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)


class Handover(msgspec.Struct, frozen=True):
    """What the next program needs of this one, which may be another version.

    So settings are as in JSON, what it does not know is ignored, and what is added here needs a default.
    """

    used: dict[str, Any]
    told: dict[str, Any]
    lock: int
    listeners: dict[str, list[int]]
    children: list[Kept]
    lifecycle: Lifecycle
    counted: dict[str, list[Any]]

    def descriptors(self) -> list[int]:
        """Return all that must stay open."""
        listening = [descriptor for ours in self.listeners.values() for descriptor in ours]
        return [self.lock, *listening, *(kept.channel for kept in self.children)]


def dump_config(config: Config) -> dict[str, Any]:
    """Return a configuration as a handover holds it."""
    dumped: dict[str, Any] = msgspec.to_builtins(config)
    return dumped


def revive_configs(handover: Handover, fresh: Config) -> tuple[Config, Config]:
    """Return the configuration in use, and what the sources had said of it.

    If this program does not take them any more, a fresh one stands for both, but for where the node listens.
    """
    try:
        return msgspec.convert(handover.used, Config), msgspec.convert(handover.told, Config)
    except (msgspec.ValidationError, ValueError) as error:
        log.warning("the former configuration cannot be read", extra={"error": str(error)})
    for section in LISTENERS:
        if section not in handover.used:  # that program did not know it yet
            continue
        listen = {"listen": handover.used[section]["listen"]}
        changed = msgspec.structs.replace(getattr(fresh, section), **listen)
        fresh = msgspec.structs.replace(fresh, **{section: changed})
    return fresh, fresh


def read_or_revive(read: Callable[[], Config], handover: Handover | None) -> Config:
    """Return the configuration; if it is wrong and a node runs already, what that one was told before."""
    try:
        return read()
    except ConfigError as error:
        if handover is None:
            raise
        log.error("the configuration stays as it was", extra={"problem": str(error)})  # noqa: TRY400 - it says it all
        return msgspec.convert(handover.told, Config)


def find_command() -> list[str]:
    """Return the command line that runs this program as it was run; what is found there may be newer."""
    program = sys.argv[0]
    # A script may lead to another interpreter by now; `python -m` runs what that interpreter has.
    if os.access(program, os.X_OK) and not program.endswith(".py"):
        return [program, *sys.argv[1:]]
    return [sys.executable, *sys.orig_argv[1:]]


async def rehearse(command: Sequence[str]) -> str:
    """Have the next program load everything and check the configuration; return why it cannot, or nothing."""
    try:
        trial = await asyncio.create_subprocess_exec(
            *command,
            "--dry-run",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        return f"cannot run {command[0]}: {error.strerror}"
    try:
        _, said = await asyncio.wait_for(trial.communicate(), _TRIAL_S)
    except TimeoutError:
        return f"the new program did not load within {_TRIAL_S:.0f} s"
    finally:
        if trial.returncode is None:
            trial.kill()
    if trial.returncode == 0:
        return ""
    lines = said.decode("utf-8", "replace").strip().splitlines() or [f"it exits with {trial.returncode}"]
    return f"the new program does not start: {lines[-1].removeprefix('isthmus: ')}"


def hand_over(command: list[str], handover: Handover) -> None:
    """Go on as the next program. Returns only when that fails, by raising OSError."""
    paper = os.memfd_create("isthmus-handover")
    try:
        os.write(paper, msgspec.json.encode(handover))
        inherited = [paper, *handover.descriptors()]
        for descriptor in inherited:
            os.set_inheritable(descriptor, True)
        held_back = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        logging.shutdown()
        sys.stdout.flush()
        try:
            os.execve(command[0], command, {**os.environ, VARIABLE: str(paper)})  # noqa: S606 - our own command
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held_back)
            for descriptor in inherited:
                os.set_inheritable(descriptor, False)
    finally:
        os.close(paper)


def take_over(environ: MutableMapping[str, str]) -> Handover | None:
    """Return what an earlier program in this process has handed over; None, also at a second call."""
    paper = environ.pop(VARIABLE, None)
    if paper is None:
        return None
    with os.fdopen(int(paper), "rb") as stream:
        stream.seek(0)
        handover = msgspec.json.decode(stream.read(), type=Handover)
    for descriptor in handover.descriptors():
        os.set_inheritable(descriptor, False)
    return handover


def accept_signals() -> None:
    """Let the signals through that were held back; all have handlers now."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
