"""Real processes for end-to-end tests: nodes, machines, and relays that can cut gossip.

Everything listens on loopback, on ports that nobody else had or may get. What is started is stopped by
its owner's `close`; nothing is ended but by its own process id.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import count, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

ROOT = Path(__file__).resolve().parents[2]
# Generous: the machines that run this are shared. A wait ends as soon as its condition holds.
DEADLINE_S = 30.0


def wait_for(what: str, condition: Callable[[], Any], deadline_s: float = DEADLINE_S) -> Any:
    """Return the first true value of the condition; fails with `what` when none comes."""
    deadline = time.monotonic() + deadline_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"waited {deadline_s} s in vain: {what}"
        time.sleep(0.02)


def _count_ports() -> Iterator[int]:
    """Yield ports for ever, below those that the system gives to anybody; 0 where it gives all."""
    first, end = 10_000, int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    if end < first + 1_000:
        return repeat(0)
    return (first + number % (end - first) for number in count(os.getpid() * 97))


_ports = _count_ports()


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port that nobody has, nor gets by chance before it is bound."""
    while True:
        with suppress(OSError), socket.socket() as stream, socket.socket(type=socket.SOCK_DGRAM) as datagrams:
            stream.bind((host, next(_ports)))
            port = int(stream.getsockname()[1])
            datagrams.bind((host, port))
            return port


@dataclass
class Answer:
    """What an HTTP request got."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    def json(self) -> Any:
        return json.loads(self.body)


def request(
    address: str,
    path: str = "/",
    method: str = "GET",
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    timeout: float = 20.0,
) -> Answer:
    """Send one request on a connection of its own."""
    connection = http.client.HTTPConnection(address, timeout=timeout)
    try:
        connection.request(method, path, body, dict(headers or {}))
        response = connection.getresponse()
        found = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, found, response.read())
    finally:
        connection.close()


class Program:
    """One process of ours and what it says, in a file."""

    def __init__(self, name: str, directory: Path, *args: str, env: Mapping[str, str] | None = None) -> None:
        self.name = name
        self.log = directory / f"{name}.log"
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *args],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=clean_environment(env),
                start_new_session=True,
            )

    def said(self) -> str:
        return self.log.read_text("utf-8", "replace")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> int:
        """Ask the process to stop, and return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"{self.name} did not stop; it said:\n{self.said()}") from None


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return this environment without what would configure a node."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ISTHMUS_", "FLY_"))}
    return {**kept, **(extra or {})}


class Guestbook(Program):
    """A machine of the demo's app."""

    def __init__(self, region: str, name: str, directory: Path, port: int = 0) -> None:
        self.address = f"127.0.0.1:{port or free_port()}"
        self.region = region
        database = str(directory / f"guestbook-{region}.db")
        super().__init__(
            f"machine-{name}", directory, "isthmus.demo.app", region, name, self.address, database
        )
        self.id = name
        wait_for(f"machine {name} to serve", self._serves)

    def _serves(self) -> bool:
        assert self.process.poll() is None, self.said()
        with suppress(OSError, http.client.HTTPException):
            return request(self.address, "/healthz").status == 200
        return False


class Node(Program):
    """An isthmus node as an operator runs it, from a configuration file."""

    def __init__(self, name: str, directory: Path, config: str, env: Mapping[str, str] | None = None) -> None:
        self.data = directory / name
        self.data.mkdir(exist_ok=True)
        file = directory / f"{name}.toml"
        file.write_text(f'node = "{name}"\ndata = "{self.data}"\n{config}', "utf-8")
        super().__init__(f"node-{name}", directory, "isthmus.cli", "run", "--config", str(file), env=env)
        self.id = name
        self.info = wait_for(f"node {name} to start", self._info)
        self.proxy: str = self.info["listen"]
        self.admin: str = self.info["admin"]
        self.gossip: str = self.info["gossip"]

    def _info(self) -> Any:
        assert self.process.poll() is None, self.said()
        with suppress(OSError, ValueError):
            return json.loads((self.data / "node.json").read_text("utf-8"))
        return None

    def get(self, path: str, **kwargs: Any) -> Answer:
        """Ask the proxy."""
        return request(self.proxy, path, **kwargs)

    def show(self, view: str) -> Any:
        """Ask the admin API."""
        answer = request(self.admin, f"/v1/{view}")
        assert answer.status == 200, answer.text
        return answer.json()

    def change(self, path: str, body: Any = None, method: str = "POST") -> Any:
        """Change something through the admin API."""
        payload = None if body is None else json.dumps(body).encode()
        answer = request(self.admin, f"/v1/{path}", method, payload, {"Content-Type": "application/json"})
        assert answer.status < 300, answer.text
        return answer.json()

    def routable(self) -> set[str]:
        """Return the machines that this node would send requests to."""
        return {machine["machine"] for route in self.show("routes") for machine in route["machines"]}

    def metric(self, name: str) -> float:
        """Return the sum of a metric over its labels."""
        lines = request(self.admin, "/metrics").text.splitlines()
        values = [line.rsplit(" ", 1) for line in lines if line.startswith((f"{name} ", f"{name}{{"))]
        return sum(float(value) for _, value in values)

    def agent_pid(self) -> int:
        return int(self.show("status")["agent_pid"])

    def worker_pids(self) -> list[int]:
        """Return the process ids of the workers that follow the agent."""
        return [int(worker.split("/")[1]) for worker in self.show("status")["workers_following"]]


@contextmanager
def closing_all() -> Iterator[list[Any]]:
    """Close everything that is put into the list, the last first, whatever happens."""
    started: list[Any] = []
    with ExitStack() as stack:
        try:
            yield started
        finally:
            for item in started:
                stack.callback(item.close)
