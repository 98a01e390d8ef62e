"""What a large routing table costs each request: one listener over a table of few machines, one of many.

`python -m bench.proxy.wide PORT UPSTREAM MACHINES` serves until it is told to stop. Ten machines to an app,
all of them the same server, so that nothing differs but the table; requests are for a thousand apps all over
it. Knows nothing of replication.
"""

import asyncio
import gc
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import uvloop

import isthmus  # noqa: F401 - chooses compiled modules where they are
from proxy.metrics import ProxyMetrics
from proxy.server import Server
from proxy.settings import ProxySettings
from routing.balancer import Balancer
from routing.table import RoutingTable
from routing.types import Pk, Row

MACHINES = (1, 10_000, 1_000_000)
MACHINES_PER_APP = 10
BUSY_APPS = 1_000
REGIONS = ("ams", "fra", "iad", "gru", "syd", "nrt", "jnb", "lax")
# Asks for one of the busy apps each time. wrk calls `request` for each request.
SCRIPT = """
request = function()
  wrk.headers["Host"] = "app-" .. math.random(0, @busy@ - 1) * @step@ .. ".test"
  return wrk.format("GET", "/small")
end
"""


def count_apps(machines: int) -> int:
    """Return how many apps so many machines belong to."""
    return max(1, machines // MACHINES_PER_APP)


def write_script(folder: Path, machines: int) -> Path:
    """Write the script that makes wrk ask for apps all over a table."""
    apps = count_apps(machines)
    busy = min(apps, BUSY_APPS)
    file = folder / f"wide-{machines}.lua"
    file.write_text(SCRIPT.replace("@busy@", str(busy)).replace("@step@", str(apps // busy)), "utf-8")
    return file


def list_rows(machines: int, upstream: int) -> Iterator[tuple[str, Pk, Row]]:
    """Yield the rows of a table with so many machines."""
    for number in range(count_apps(machines)):
        app = f"app-{number}"
        yield "apps", (app,), (app, "default", "")
        yield "hostnames", (f"{app}.test", "/"), (f"{app}.test", "/", app, "")
        yield "services", (app, 0), (app, 0, None, "requests", 20, None, "[]", "", "{}")
    for number in range(machines):
        row = (
            *(f"m-{number}", f"app-{number // MACHINES_PER_APP}", "bench", REGIONS[number % len(REGIONS)]),
            *(f"127.0.0.1:{upstream}", "started", 0, ""),
        )
        yield "machines", row[:1], row
    # What the benchmark asks for to see whether a server answers.
    yield "hostnames", ("127.0.0.1", "/"), ("127.0.0.1", "/", "app-0", "")


async def serve(port: int, upstream: int, machines: int) -> None:
    """Serve a table of so many machines until SIGTERM."""
    table = RoutingTable()
    gc.disable()
    table.load(list_rows(machines, upstream))
    gc.freeze()  # as a worker does
    gc.enable()
    settings = ProxySettings(node="bench", region="ams")
    balancer = Balancer(table, "ams", random.Random(1))
    server = Server(settings, table, balancer, ProxyMetrics())
    await server.start(port=port)
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    await stopped.wait()
    await server.close()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(*map(int, sys.argv[1:])))
