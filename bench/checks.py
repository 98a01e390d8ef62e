"""What thousands of checks cost a node: CPU time of a process that does nothing else.

Run as `python -m bench.checks`. Machines are one program on loopback that answers on many addresses.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time
from collections import Counter

import uvloop

from bench.table import Target, describe_machine, print_table, show_number
from isthmus.checking.checker import Checker
from isthmus.checking.probe import Prober
from isthmus.checking.watchers import Presence
from proxy.reach import Reach
from routing.table import RoutingTable

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CORE_SHARE = Target(0.10, at_least=False)
APP_MACHINES = 10


class Machine(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, _data: bytes) -> None:
        self._transport.write(ANSWER)
        self._transport.close()


async def serve() -> None:
    server = await asyncio.get_running_loop().create_server(Machine, "0.0.0.0", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


class Database:
    """Takes writes and counts them: a steady fleet makes none."""

    def __init__(self) -> None:
        self.counted: Counter[str] = Counter()

    async def execute(self, statements: list[object]) -> None:
        self.counted["rows"] += len(statements)
        self.counted["transactions"] += 1

    async def query(self, *_: object) -> None:
        raise AssertionError("checks read the table in memory")


def fill(table: RoutingTable, port: int, count: int, check: dict[str, object]) -> None:
    for i in range(count):
        if not i % APP_MACHINES:
            app = f"app{i // APP_MACHINES}"
            table.apply("apps", (app,), (app, "default", ""))
            service = (app, 0, None, "requests", 20, None, json.dumps([check]), "", "{}")
            table.apply("services", (app, 0), service)
        address = f"127.{1 + i // 62_500}.{i // 250 % 250}.{1 + i % 250}:{port}"
        row = (f"m{i}", f"app{i // APP_MACHINES}", "n1", "ams", address, "started", 0, "")
        table.apply("machines", (f"m{i}",), row)
    assert not table.rejected


async def measure(port: int, count: int, interval_s: float, run_s: float, kind: str) -> float:
    """Return CPU seconds per second while all checks run."""
    table, database = RoutingTable("n1"), Database()
    fill(table, port, count, {"type": kind, "path": "/healthz", "interval_ms": int(interval_s * 1000)})
    reach = Reach((), "")
    await reach.open(())
    presence = Presence("n1", "ams", time.monotonic())
    checker = Checker(
        table,
        database,
        Prober(reach),
        presence,
        lambda: {"n1": "ams"},
        node="n1",
        rng=random.Random(1),
        clock_ms=lambda: time.time_ns() // 1_000_000,
    )
    await checker.start()
    await asyncio.sleep(interval_s * 1.2)  # all have begun, and their first results are written

    def probes() -> float:
        return sum(value for name, _, value in checker.samples() if name == "isthmus_checks_total")

    before, cpu, started, written = probes(), time.process_time(), time.monotonic(), database.counted["rows"]
    await asyncio.sleep(run_s)
    took_s = time.monotonic() - started
    share = (time.process_time() - cpu) / took_s
    rate = (probes() - before) / took_s
    passing = {labels[0][1]: v for name, labels, v in checker.samples() if name == "isthmus_checks_running"}
    await checker.stop()
    assert passing["passing"] == count, passing
    assert database.counted["rows"] == written == count, "a steady fleet writes nothing"
    name = f"{count:,} {kind} checks, each {interval_s:g} s"
    cells = (name, f"{rate:,.0f}/s", f"{share / rate * 1e6:.0f} us")
    print_table(
        ("checks", "probes", "each", "of a core", "target", ""),
        [(*cells, f"{share:.1%}", f"≤ {show_number(CORE_SHARE.limit * 100)} %", CORE_SHARE.compare(share))],
    )
    return share


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--checks", type=int, default=5_000)
    parser.add_argument("--interval", type=float, default=10.0)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--serve", action="store_true")
    args = parser.parse_args()
    if args.serve:
        uvloop.run(serve())
        return
    machines = subprocess.Popen(
        [sys.executable, "-m", "bench.checks", "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        port = int(machines.stdout.readline())
        print(describe_machine())
        for kind in ("http", "tcp"):
            uvloop.run(measure(port, args.checks, args.interval, args.seconds, kind))
    finally:
        machines.stdin.close()
        machines.wait()


if __name__ == "__main__":
    main()
