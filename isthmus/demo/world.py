"""Start and stop the demo's processes: real nodes and real machines, on loopback.

Decides ports and configuration files. Knows the processes only from outside, as an operator does.
Invariant: what `start` began, `stop` has ended, whatever happened between.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from isthmus.config import ConfigError
from isthmus.demo import PRIMARY_REGION
from isthmus.supervisor import read_node_info

if TYPE_CHECKING:
    from pathlib import Path

REGIONS = ("ams", PRIMARY_REGION, "syd")
MACHINES_PER_REGION = 2

# Ports are counted from a base: proxies from 1, admin listeners from 11, gossip from 21, machines from 31.
PROXY, ADMIN, GOSSIP, MACHINE = 1, 11, 21, 31
HOST = "127.0.0.1"

STOP_S = 20.0


@dataclass(frozen=True)
class Place:
    """One region of the demo with its node and machines."""

    region: str
    proxy: str
    admin: str
    gossip: str
    machines: tuple[tuple[str, str], ...]


def plan_places(base_port: int) -> list[Place]:
    """Return the three regions with every address in them."""
    places = []
    for i, region in enumerate(REGIONS):
        first = base_port + MACHINE + i * MACHINES_PER_REGION
        machines = tuple((f"{region}-{n + 1}", f"{HOST}:{first + n}") for n in range(MACHINES_PER_REGION))
        proxy, admin, gossip = (f"{HOST}:{base_port + part + i}" for part in (PROXY, ADMIN, GOSSIP))
        places.append(Place(region, proxy, admin, gossip, machines))
    return places


def refuse_taken_ports(places: list[Place]) -> None:
    """Raise ConfigError that names the first port that another program has."""
    for place in places:
        for address in (place.proxy, place.admin, place.gossip, *(address for _, address in place.machines)):
            port = int(address.rsplit(":", 1)[1])
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((HOST, port))
                except OSError as error:
                    if error.errno != errno.EADDRINUSE:
                        raise
                    raise ConfigError(
                        f"port {port} is taken by another program (see `ss -ltnp 'sport = :{port}'`); "
                        "stop it, or let the demo use others: --base-port 9500 (make demo BASE_PORT=9500)"
                    ) from None


def node_config(place: Place, places: list[Place], data: Path) -> str:
    """Return the TOML file of one node."""
    join = ", ".join(f'"{other.gossip}"' for other in places if other is not place)
    machines = "".join(
        f'\n[[apps.machines]]\nid = "{name}"\naddress = "{address}"\n' for name, address in place.machines
    )
    return f"""\
node = "{place.region}"
region = "{place.region}"
data = "{data}"

[proxy]
listen = "{place.proxy}"

[admin]
listen = "{place.admin}"

[gossip]
listen = "{place.gossip}"
join = [{join}]

[[apps]]
name = "guestbook"
hosts = ["*"]

[[apps.checks]]
type = "http"
path = "/healthz"
interval_ms = 500
timeout_ms = 1000
{machines}"""


class World:
    """The processes of the demo. `_processes` holds (name, process) in order of start."""

    def __init__(self, base_port: int, directory: Path) -> None:
        self.places = plan_places(base_port)
        self._directory = directory
        self._processes: list[tuple[str, asyncio.subprocess.Process]] = []

    async def start(self) -> None:
        """Start machines and nodes; they may not serve yet when this returns."""
        refuse_taken_ports(self.places)
        for place in self.places:
            for name, address in place.machines:
                database = self._directory / f"guestbook-{place.region}.db"
                await self._spawn(name, "isthmus.demo.app", place.region, name, address, str(database))
        for place in self.places:
            data = self._directory / place.region
            data.mkdir()
            config = data / "isthmus.toml"
            config.write_text(node_config(place, self.places, data), "utf-8")
            await self._spawn(place.region, "isthmus.cli", "run", "--config", str(config))

    async def stop(self) -> None:
        """Stop everything, nodes before machines, so that nobody is asked in vain."""
        for _, process in reversed(self._processes):
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
        waits = asyncio.gather(*(process.wait() for _, process in self._processes))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(waits, STOP_S)
        for _, process in self._processes:
            if process.returncode is None:
                process.kill()
                await process.wait()

    def ended(self) -> str | None:
        """Return the name of a process that ended by itself, or None."""
        return next((name for name, process in self._processes if process.returncode is not None), None)

    def serves(self, place: Place) -> bool:
        """Return whether a node has said that all its processes serve."""
        return read_node_info(self._directory / place.region) is not None

    def log_file(self, name: str) -> Path:
        """Return where a process writes what it says."""
        return self._directory / f"{name}.log"

    async def _spawn(self, name: str, module: str, *args: str) -> None:
        with self.log_file(name).open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                module,
                *args,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the demo, which stops its world in order
            )
        self._processes.append((name, process))
