"""A proxy in a process of its own that may open few files.

`python -m tests.fakes.small_proxy FILES MACHINE_PORT [HOST PORT]` prints its port, and ends when its standard
input does.
"""

from __future__ import annotations

import asyncio
import random
import resource
import sys

import uvloop

from proxy.metrics import ProxyMetrics
from proxy.server import Server
from proxy.settings import ProxySettings
from routing.balancer import Balancer
from routing.table import RoutingTable


async def main(files: int, machine_port: int, host: str = "127.0.0.1", port: str = "0") -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    table = RoutingTable("node1")
    table.apply("apps", ("app",), ("app", "default", ""))
    table.apply("hostnames", ("*", "/"), ("*", "/", "app", ""))
    table.apply("services", ("app", 0), ("app", 0, None, "requests", 1_000, None, "[]", ""))
    address = f"127.0.0.1:{machine_port}"
    table.apply("machines", ("m1",), ("m1", "app", "node1", "ams", address, "started", 0, ""))
    settings = ProxySettings("node1", "ams", linger_s=0.2)
    server = Server(settings, table, Balancer(table, "ams", random.Random(1)), ProxyMetrics())
    await server.start(host, int(port))
    sys.stdout.write(f"{server.port}\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)
    await server.close()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]))
