"""Processes of the benchmark: started, watched until they answer, counted, stopped.

Decides what the CPU of a program is: that of its busiest process, and that of the whole tree. Invariant:
only what was started here is stopped, by its process id, and all of it is.
"""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

START_TIMEOUT_S = 120.0  # a table of a million machines takes its time
STOP_TIMEOUT_S = 15.0
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Program:
    """A running server."""

    name: str
    version: str
    pid: int
    port: int


def find_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(
    name: str, version: str, command: Sequence[str], port: int, log: Path, env: Mapping[str, str] = os.environ
) -> Iterator[Program]:
    """Start a server and wait until it answers; stop it in the end."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=env, start_new_session=True)
    try:
        wait_until_answers(process, port, log)
        yield Program(name, version, process.pid, port)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            for pid in [*read_cpu(process.pid)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()


def wait_until_answers(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Wait for 200 to a small GET; raises RuntimeError with what the server wrote."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection.request("GET", "/small")
            if connection.getresponse().status == 200:
                return
        connection.close()
        time.sleep(0.05)
    raise RuntimeError(f"{process.args!r} does not answer:\n{log.read_text('utf-8', 'replace')}")


def read_cpu(root: int) -> dict[int, float]:
    """Return CPU seconds, user and system, of a process and all that descend from it, by process id."""
    found: dict[int, tuple[int, float]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it ended meanwhile
                # The name, in brackets, may hold anything.
                fields = (entry / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()
                found[int(entry.name)] = (int(fields[1]), (int(fields[11]) + int(fields[12])) / TICKS)
    tree = {root: found[root][1]} if root in found else {}
    grown = True
    while grown:
        grown = False
        for pid, (parent, seconds) in found.items():
            if parent in tree and pid not in tree:
                tree[pid] = seconds
                grown = True
    return tree


def read_memory(pid: int) -> int:
    """Return resident bytes of a process."""
    status = Path(f"/proc/{pid}/status").read_text("utf-8")
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024
