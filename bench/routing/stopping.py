"""How long other nodes go on sending to a machine that is stopped on its node, and what clients notice.

Three nodes in three regions, real processes on loopback, sealed gossip. In each round the admin API of a node
is told to stop one of its machines, while clients ask through all three nodes. Half of the machines only have
an address and go on answering, so that late requests are seen; the others are processes, which their node
ends. Invariant: whatever a client gets but a 200 from a machine counts as lost.
"""

import argparse
import asyncio
import base64
import contextlib
import json
import os
import random
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from bench.proxy.processes import find_port, running
from bench.table import Target, describe_machine, print_table, show_number
from isthmus.client import AdminClient

ROOT = Path(__file__).resolve().parents[2]
REGIONS = ("ams", "iad", "syd")
ROUNDS = 60
CLIENTS = 8  # for each node
RATE = 600  # requests per second, of all clients
LATE_S = 0.6  # after a stop: how long a late request is looked for, at least
WAIT_S = 30.0
LOOK_S = 0.02
P99_MS = Target(250.0, at_least=False)
ADDRESS, PROCESS = "address", "process"
TITLES = {ADDRESS: "a machine that has only an address", PROCESS: "a machine that is a process of its node"}
SERVE = (sys.executable, "-m", "bench.routing.stopping", "--serve")
RUN = (sys.executable, "-c", "import sys; from isthmus.cli import main; sys.exit(main())", "run", "--config")


class Machine(asyncio.Protocol):
    """Answers each request, all without bodies, with its name and the time at which it arrived."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        *requests, self._rest = (self._rest + data).split(b"\r\n\r\n")
        body = f"{self._name} {time.monotonic()}".encode()
        answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        self._transport.write(answer * len(requests))


async def serve(name: str, port: int) -> None:
    """Be a machine until the process is ended."""
    server = await asyncio.get_running_loop().create_server(lambda: Machine(name), "127.0.0.1", port)
    await server.serve_forever()


@dataclass(frozen=True, slots=True)
class Place:
    """A region: its node, and the ports of its two machines by kind."""

    region: str
    proxy: int
    admin: int
    gossip: int
    machines: dict[str, int]

    def name(self, kind: str) -> str:
        """Return the id of one of its machines."""
        return f"{self.region}-{kind}"


def write_config(place: Place, places: list[Place], key: str, folder: Path) -> Path:
    """Write the configuration of one node. Each has an app of its own, which all nodes serve."""
    join = ", ".join(f'"127.0.0.1:{other.gossip}"' for other in places if other is not place)
    # The first app also has any other name: by that a node is seen to have heard of it.
    hosts = f'"{place.region}.test"' + (', "*"' if place is places[0] else "")
    command = [*SERVE, place.name(PROCESS)]
    file = folder / f"{place.region}.toml"
    file.write_text(
        f"""
node = "{place.region}"
region = "{place.region}"
data = "{folder / place.region}"
proxy.listen = "127.0.0.1:{place.proxy}"
admin.listen = "127.0.0.1:{place.admin}"
[gossip]
listen = "127.0.0.1:{place.gossip}"
join = [{join}]
keys = ["{key}"]
[[apps]]
name = "{place.region}"
hosts = [{hosts}]
[[apps.checks]]
interval_ms = 1000
[[apps.machines]]
id = "{place.name(ADDRESS)}"
address = "127.0.0.1:{place.machines[ADDRESS]}"
[[apps.machines]]
id = "{place.name(PROCESS)}"
address = "127.0.0.1:{place.machines[PROCESS]}"
command = {json.dumps(command)}
directory = "{ROOT}"
""",
        "utf-8",
    )
    return file


@dataclass(slots=True)
class Load:
    """Clients of all nodes that ask for one app at a time. All times are those of time.monotonic."""

    places: list[Place]
    rng: random.Random
    host: str = ""
    asked: int = 0
    lost: list[str] = field(default_factory=list)
    # When a request last arrived, by machine and the region of the node that it came through.
    arrivals: dict[tuple[str, str], float] = field(default_factory=dict)

    async def ask(self, place: Place) -> None:
        """Ask through one node, at random times, until cancelled."""
        while True:
            try:
                await self._use_connection(place)
            except (OSError, EOFError, ValueError) as error:
                self.lost.append(f"{place.region}: {error!r}")
                await asyncio.sleep(0.05)

    async def _use_connection(self, place: Place) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", place.proxy)
        with contextlib.closing(writer):
            is_last = False
            while not is_last:
                await asyncio.sleep(self.rng.expovariate(RATE / CLIENTS / len(self.places)))
                self.asked += 1
                writer.write(f"GET / HTTP/1.1\r\nHost: {self.host}.test\r\n\r\n".encode())
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = int(head.partition(b"content-length: ")[2].split(b"\r\n")[0])
                body = (await reader.readexactly(length)).decode()
                is_last = b"connection: close" in head
                if head.startswith(b"http/1.1 200"):
                    machine, arrived = body.split()
                    key = (machine, place.region)
                    self.arrivals[key] = max(self.arrivals.get(key, 0.0), float(arrived))
                else:
                    self.lost.append(f"{place.region}: {body.strip()}")

    async def reach(self, machine: str) -> None:
        """Wait until the machine has had a request through each node; raises TimeoutError."""
        begun = time.monotonic()
        left = set(REGIONS)
        async with asyncio.timeout(WAIT_S):
            while left:
                await asyncio.sleep(LOOK_S)
                left = {region for region in left if self.arrivals.get((machine, region), 0.0) < begun}


@dataclass(slots=True)
class Outcome:
    """The rounds of one kind: how late requests of other nodes were; what was asked and lost meanwhile."""

    late_ms: list[float] = field(default_factory=list)
    asked: int = 0
    lost: list[str] = field(default_factory=list)


async def run_rounds(places: list[Place], kind: str, rounds: int, load: Load) -> Outcome:
    """Stop and start one machine after the other, by turns of the nodes."""
    outcome = Outcome()
    asked, lost = load.asked, len(load.lost)
    for number in range(rounds):
        place = places[number % len(places)]
        machine, load.host = place.name(kind), place.region
        await load.reach(machine)
        await asyncio.sleep(load.rng.uniform(0.0, 0.2))  # at no set time within the ticks of a node
        stopped_at = time.monotonic()
        await change(place, machine, "stop")
        await wait_until_stopped(place, machine)
        await asyncio.sleep(LATE_S)
        others = (load.arrivals.get((machine, other.region), 0.0) for other in places if other is not place)
        outcome.late_ms.append(max(0.0, max(others) - stopped_at) * 1000)
        await change(place, machine, "start")
        await load.reach(machine)
    outcome.asked, outcome.lost = load.asked - asked, load.lost[lost:]
    return outcome


async def change(place: Place, machine: str, action: str) -> None:
    """Have a node start or stop its machine."""
    client = AdminClient(f"http://127.0.0.1:{place.admin}", "")
    await asyncio.to_thread(client.post, f"/v1/machines/{machine}/{action}")


async def wait_until_stopped(place: Place, machine: str) -> None:
    """Wait until the node says that it is."""
    client = AdminClient(f"http://127.0.0.1:{place.admin}", "")
    state = ""
    while state != "stopped":
        await asyncio.sleep(LOOK_S)
        machines = await asyncio.to_thread(client.get, "/v1/machines")
        state = next(row["state"] for row in machines if row["machine"] == machine)


async def measure(places: list[Place], rounds: int, seed: int) -> dict[str, Outcome]:
    """Return the outcomes by kind of machine."""
    load = Load(places, random.Random(seed), places[0].region)
    clients = [asyncio.create_task(load.ask(place)) for place in places for _ in range(CLIENTS)]
    try:
        return {kind: await run_rounds(places, kind, rounds, load) for kind in TITLES}
    finally:
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)


@contextlib.contextmanager
def start_world(folder: Path) -> Iterator[list[Place]]:
    """Start nodes, and the machines that no node starts."""
    places = [
        Place(region, find_port(), find_port(), find_port(), {kind: find_port() for kind in TITLES})
        for region in REGIONS
    ]
    key = base64.b64encode(secrets.token_bytes(32)).decode()
    with ExitStack() as stack:
        for place in places:
            name, port = place.name(ADDRESS), place.machines[ADDRESS]
            command = [*SERVE, name]
            env = {**os.environ, "PORT": f"{port}"}
            stack.enter_context(running(name, "", command, port, folder / f"{name}.log", env))
        for place in places:
            file = write_config(place, places, key, folder)
            log = folder / f"{place.region}.log"
            stack.enter_context(running(place.region, "", [*RUN, str(file)], place.proxy, log))
        yield places


def main() -> int:
    """Measure and print; or be a machine."""
    parser = argparse.ArgumentParser(prog="make bench-routing", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of each kind of machine")
    parser.add_argument("--seed", type=int, default=1, help="of the times between requests")
    parser.add_argument("--serve", metavar="NAME", help="be a machine, on the port $PORT")
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve(options.serve, int(os.environ["PORT"])))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was started is stopped then too
    print(describe_machine(), flush=True)
    with tempfile.TemporaryDirectory() as name, start_world(Path(name)) as places:
        outcomes = asyncio.run(measure(places, options.rounds, options.seed))
    print_outcomes(outcomes)
    return 0


def print_outcomes(outcomes: dict[str, Outcome]) -> None:
    """Print a line for each kind of machine, and what was lost."""
    rows = []
    for kind, outcome in outcomes.items():
        late = sorted(outcome.late_ms)
        p99 = late[min(len(late) - 1, int(len(late) * 0.99))]
        rows.append(
            (
                *(TITLES[kind], f"{len(late)}", show_number(late[len(late) // 2]), show_number(p99)),
                *(show_number(late[-1]), P99_MS.show(""), P99_MS.compare(p99)),
                *(f"{outcome.asked:,}", f"{len(outcome.lost)}", "none" if not outcome.lost else "missed"),
            )
        )
    header = ("stopped", "rounds", "p50 ms", "p99", "largest", "target", "", "requests", "lost", "target 0")
    print_table(header, rows)
    for outcome in outcomes.values():
        for problem in outcome.lost[:10]:
            print(problem)


if __name__ == "__main__":
    sys.exit(main())
