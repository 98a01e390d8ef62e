"""`isthmus demo`: three regions on this machine, with something to try."""

from __future__ import annotations

import asyncio
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isthmus.client import AdminClient
from isthmus.config import ConfigError
from isthmus.demo.world import MACHINES_PER_REGION, World

if TYPE_CHECKING:
    import argparse

START_S = 60.0


def add_parser(verbs: Any) -> None:
    """Add `demo`."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "demo",
        help="start three regions on this machine",
        description="Start a node in each of ams, iad and syd, and a guestbook with two machines in each. "
        "Stays until Ctrl-C, and leaves nothing behind.",
    )
    parser.add_argument(
        "--base-port", metavar="N", type=int, default=8080, help="ports are counted from here (8080)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the demo until SIGTERM or Ctrl-C."""
    if not 1024 <= args.base_port <= 65400:
        raise ConfigError(f"--base-port takes 1024 to 65400, not {args.base_port}")
    with tempfile.TemporaryDirectory(prefix="isthmus-demo-") as directory:
        return asyncio.run(_run(World(args.base_port, Path(directory)), directory))


async def _run(world: World, directory: str) -> int:
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    print("starting three nodes and six machines …", flush=True)
    try:
        await world.start()
        serving = asyncio.create_task(_wait_until_serving(world))
        stopped = asyncio.create_task(stopping.wait())
        await asyncio.wait((serving, stopped), return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()
            print(describe(world, directory), flush=True)
        else:
            serving.cancel()
        await stopped
    finally:
        print("\nstopping …", flush=True)
        await world.stop()
    print("stopped; nothing is left behind", flush=True)
    return 0


async def _wait_until_serving(world: World) -> None:
    """Wait until every node would route to every machine. Raises ConfigError when that does not come."""
    wanted = len(world.places) * MACHINES_PER_REGION
    deadline = asyncio.get_running_loop().time() + START_S
    for place in world.places:
        while not world.serves(place) or await asyncio.to_thread(_count_routable, place.admin) < wanted:
            name = world.ended()
            if name is not None:
                said = world.log_file(name).read_text("utf-8")
                raise ConfigError(f"{name} ended by itself and said:\n{said}")
            if asyncio.get_running_loop().time() > deadline:
                raise ConfigError(f"node {place.region} does not see all machines after {START_S:.0f} s")
            await asyncio.sleep(0.05)


def _count_routable(admin: str) -> int:
    return sum(app["routable"] for app in AdminClient(admin, "").get("/v1/apps"))


def describe(world: World, directory: str) -> str:
    """Return what listens where, and what to try."""
    ams, iad, syd = world.places
    lines = ["", f"region  {'proxy':<23}{'admin and dashboard':<23}machines"]
    for place in world.places:
        machines = ", ".join(name for name, _ in place.machines)
        proxy, admin = f"http://{place.proxy}", f"http://{place.admin}"
        lines.append(f"{place.region:<8}{proxy:<23}{admin:<23}{machines}")
    tries = [
        ("answered by the nearest machine", f"curl http://{ams.proxy}/"),
        ("the app in syd sends it to iad: fly-replay: region=iad", f"curl http://{syd.proxy}/in/iad"),
        ("the app sends it to one machine: fly-replay: instance=syd-2", f"curl http://{ams.proxy}/on/syd-2"),
        (
            "a write, replayed to the primary region, body and all",
            f"curl -d 'I was here' http://{syd.proxy}/guestbook",
        ),
        ("the routing table, as each node has it", f"curl http://{ams.admin}/v1/routes"),
        ("stop a machine on one node …", f"curl -X POST http://{ams.admin}/v1/machines/ams-1/stop"),
        ("… and it is gone from the tables of all", f"curl -s http://{syd.admin}/v1/routes | grep -c ams-1"),
        ("bring it back", f"curl -X POST http://{ams.admin}/v1/machines/ams-1/start"),
        ("the same as tables", f".venv/bin/isthmus routes --admin {iad.admin}"),
    ]
    for text, command in tries:
        lines += ["", f"# {text}", command]
    return "\n".join([*lines, "", f"logs are in {directory}; Ctrl-C stops everything"])
