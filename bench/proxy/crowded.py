"""`make bench-idle`, second part: what good clients notice of thousands that do nothing, or little.

A constant rate of requests over kept connections, in rounds that alternate: alone, and beside each crowd.
Decides what is compared. Invariant: a request of a good client that fails, fails the run.
"""

import argparse
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.table import Target, describe_machine, print_table
from isthmus import compiled

from .idle import CONNECTIONS, SPARE_FILES, raise_files_limit
from .latency import CONNECTIONS as GOOD
from .latency import run_round, write_script
from .processes import Program
from .programs import ISTHMUS, find, start_isthmus, start_machine

ROUNDS = 5
# Of good clients: a tenth of what a worker can do.
RATE = 2_000
ALONE = "alone"
TITLES = {
    "idle": "idle connections",
    "heads": "heads, a byte a second",
    "cut": "such heads while all are cut",
    "readers": "readers of 1 MiB, 4 KB a second",
}
# What a machine keeps of an answer that is read slowly, half a megabyte if nobody bounds it, is no matter of
# the proxy; but here it comes out of the same memory.
MACHINE = "sndbuf=64k"
# What kernel and machine keep for a slow reader, all connections together, of what this kernel has for TCP.
READER_BYTES = 450_000
TCP_MEMORY = Path("/proc/sys/net/ipv4/tcp_mem")
# Heads are cut 15 s after they began: none of them during a round, or all.
SETTLE_S = {"idle": 1.0, "heads": 5.0, "cut": 13.0, "readers": 5.0}
RATIO = Target(2.0, at_least=False)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.proxy.crowded", description=__doc__)
    parser.add_argument("--connections", type=int, default=CONNECTIONS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--crowds", nargs="+", choices=TITLES, default=list(TITLES))
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was started is stopped then too
    nginx, wrk = find("nginx"), find("wrk")
    if nginx is None or wrk is None:
        print("nginx is the machine behind the proxy, wrk the good clients: there is no bench without.")
        return 1
    # A worker takes half as many connections as it may open files: each may need one to a machine.
    count = min(options.connections, raise_files_limit(3 * options.connections) // 2 - SPARE_FILES) - GOOD
    counts = {**dict.fromkeys(TITLES, count), "readers": min(count, count_readers())}
    figures: dict[str, list[tuple[float, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        machine = stack.enter_context(start_machine(nginx, folder, MACHINE))
        wish = "1" if compiled.is_compiled() else "0"
        node = stack.enter_context(start_isthmus(ISTHMUS, folder, machine.port, wish))
        print(describe_machine(), flush=True)
        script = write_script(folder, RATE)
        run_round(wrk, script, node)
        for _ in range(options.rounds):
            for crowd in options.crowds:
                figures[ALONE].append(run_round(wrk, script, node))
                with crowding(crowd, node, counts[crowd]):
                    figures[crowd].append(run_round(wrk, script, node))
    print_figures(figures, counts)
    return 0


def count_readers() -> int:
    """Return how many slow readers this kernel has memory for before it begins to be sparing."""
    return int(TCP_MEMORY.read_text("ascii").split()[1]) * resource.getpagesize() // READER_BYTES


@contextmanager
def crowding(name: str, node: Program, count: int) -> Iterator[None]:
    """Have a crowd connected."""
    kind = "heads" if name == "cut" else name
    command = [sys.executable, "-m", "bench.proxy.crowd", kind, str(node.port), str(count)]
    crowd = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert crowd.stdin is not None
    assert crowd.stdout is not None
    try:
        if crowd.stdout.readline() != "ready\n":
            raise RuntimeError(f"the crowd of {name} is not served")
        time.sleep(SETTLE_S[name])
        yield
    finally:
        crowd.stdin.close()
        print(f"{TITLES[name]}: cut and connected again {crowd.stdout.read().strip()} times", flush=True)
        crowd.wait()
    if crowd.returncode:
        raise RuntimeError(f"the crowd of {name} is gone")


def print_figures(figures: dict[str, list[tuple[float, float]]], counts: dict[str, int]) -> None:
    """Print a line for each crowd."""
    middles = {
        name: [statistics.median(seen[at] for seen in rounds) for at in (0, 1)]
        for name, rounds in figures.items()
    }
    rows = []
    for name, (half, tail) in middles.items():
        title = f"{counts[name]:,} {TITLES[name]}" if name in TITLES else f"without, {RATE:,} requests/s"
        ratio = tail / middles[ALONE][1]
        held = [f"{ratio:.2f} ×", RATIO.show(" ×"), RATIO.compare(ratio)] if name in TITLES else [""] * 3
        rows.append([title, f"{half:.2f}", f"{tail:.2f}", *held])
    print_table(["good clients beside", "p50 ms", "p99 ms", "p99 against without", "target", ""], rows)


if __name__ == "__main__":
    raise SystemExit(main())
