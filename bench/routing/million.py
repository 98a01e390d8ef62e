"""A table of 100,000 apps and 1,000,000 machines in 40 regions: how large, how fast.

Decides what is in it: each app has ten machines, in one to ten regions. Invariant: rows are read from a file
as a worker reads them, and each figure is taken in a process of its own.
"""

import gc
import json
import random
import resource
import sqlite3
import sys
import time
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

import isthmus.compiled
from isthmus.route_feed import RouteFeed, routing_schema
from replication.store import Store
from routing.balancer import Balancer
from routing.geo import BUILT_IN
from routing.table import RoutingTable

APPS = 100_000
MACHINES_EACH = 10
REGIONS = list(BUILT_IN)[:40]
DECISIONS = 200_000
CHANGES = 50_000


def make_file(file: Path, apps: int) -> None:
    """Write the table. Triggers are taken out first: nobody replicates it."""
    Store.open(file, routing_schema()).close()
    with closing(sqlite3.connect(file)) as connection:
        names = connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall()
        for (name,) in names:
            connection.execute(f'DROP TRIGGER "{name}"')
        numbers = range(apps)
        put = connection.executemany
        put("INSERT INTO apps (name) VALUES (?)", ((f"app-{n}",) for n in numbers))
        hosts = ((f"app-{n}.example.com", f"app-{n}") for n in numbers)
        put("INSERT INTO hostnames (hostname, app) VALUES (?, ?)", hosts)
        services = ((f"app-{n}",) for n in numbers)
        put("INSERT INTO services (app, internal_port, hard_limit) VALUES (?, 8080, 25)", services)
        put(
            "INSERT INTO machines (id, app, node, region, address) VALUES (?, ?, ?, ?, ?)",
            (machine_row(app, number) for app in numbers for number in range(MACHINES_EACH)),
        )
        connection.commit()


def machine_row(app: int, number: int, port: int = 8080) -> tuple[str, ...]:
    regions = app % MACHINES_EACH + 1
    region = REGIONS[(app * 7 + number % regions * 3) % len(REGIONS)]
    address = f"10.{app >> 10 & 255}.{app >> 2 & 255}.{(app & 3) * 60 + number + 1}:{port}"
    return f"{app:06x}{number:08x}", f"app-{app}", f"node-{region}-{app % 25}", region, address


def measure(file: Path, apps: int) -> dict[str, float]:
    """Load the table and use it."""
    before = read_memory_mb()
    table = RoutingTable("nobody")
    started, used = time.perf_counter(), time.process_time()
    RouteFeed(table, file).load()
    figures = {
        "load_s": time.perf_counter() - started,
        "load_cpu_s": time.process_time() - used,
        "memory_mb": read_memory_mb(),
        "table_mb": read_memory_mb() - before,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        "compiled": float(isthmus.compiled.is_compiled()),
    }
    rng = random.Random(1)
    balancer = Balancer(table, "ams", random.Random(2))
    hosts = [f"app-{rng.randrange(apps)}.example.com".encode() for _ in range(DECISIONS)]
    decide(table, balancer, hosts)  # regions of an app are put in order when it is first asked for
    for name, asked in (("any", hosts), ("one", hosts[:1] * DECISIONS)):
        gc.collect()
        took = decide(table, balancer, asked)
        figures |= {
            f"decision_{name}_p50_us": took[len(took) // 2],
            f"decision_{name}_p99_us": took[-len(took) // 100],
        }
    rows = [machine_row(rng.randrange(apps), rng.randrange(MACHINES_EACH), 9090) for _ in range(CHANGES)]
    changed = change(table, ((*row, rng.choice(("started", "stopped")), 0, "") for row in rows))
    return figures | {
        "change_p50_us": changed[len(changed) // 2],
        "change_p99_us": changed[-len(changed) // 100],
    }


def decide(table: RoutingTable, balancer: Balancer, hosts: Iterable[bytes]) -> list[float]:
    """Return how long each decision took, sorted, in microseconds."""
    took, clock = [], time.perf_counter_ns
    for host in hosts:
        started = clock()
        service = table.find(host, b"/cart?item=7", 443)
        if service is not None:
            balancer.choose(service, 1.0)
        took.append((clock() - started) / 1e3)
    return sorted(took)


def change(table: RoutingTable, rows: Iterable[tuple[object, ...]]) -> list[float]:
    """Return how long each change took, sorted, in microseconds."""
    took, clock = [], time.perf_counter_ns
    for row in rows:
        started = clock()
        table.apply("machines", row[:1], row)
        took.append((clock() - started) / 1e3)
    return sorted(took)


def read_memory_mb() -> float:
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * resource.getpagesize() / 1e6


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]), int(sys.argv[2]))))
