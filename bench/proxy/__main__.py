"""`make bench`: CPU per request of isthmus, nginx, HAProxy, Envoy and Caddy, side by side.

CPU per request is the user and system time of a proxy's process over the requests that it answered: other
work on the machine lengthens everything else. Invariant: every round asks each proxy in turn for the same,
and a round with an error fails.
"""

import argparse
import re
import signal
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from bench.table import Target, compute_spread, describe_machine, print_table, show_number

from .processes import Program, read_cpu, read_memory
from .programs import FILES, ISTHMUS, PLAIN, find, read_version, start_machine, start_proxies

ROUNDS = 5
ROUND_S = 2
CONNECTIONS = 64
# With Host and what wrk adds itself: what a browser sends, twelve in all.
HEADERS = (
    "User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0",
    "Accept: text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8",
    "Accept-Language: en-US,en;q=0.5",
    "Accept-Encoding: gzip, deflate, br, zstd",
    "Referer: https://example.com/articles/2026/an-edge-proxy?from=front",
    "Cookie: session=6f1c2a9be0d14c7f; theme=dark; consent=yes",
    "Upgrade-Insecure-Requests: 1",
    "Sec-Fetch-Dest: document",
    "Sec-Fetch-Mode: navigate",
    "Sec-Fetch-Site: same-origin",
    "Priority: u=0, i",
)
TITLES = {"small": "small GET", "64k": "64 KiB", "1m": "1 MiB"}
LIMITS = {
    "nginx": {"small": 1.2, "64k": 0.8, "1m": 0.6},
    "HAProxy": {"small": 1.3, "64k": 1.0, "1m": 0.8},
    "Envoy": {"small": 0.5, "64k": 0.6, "1m": 0.8},
    "Caddy": {"small": 0.4, "64k": 0.5, "1m": 0.7},
}
MEMORY_LIMIT_MB = 60
# CPU microseconds per request of each round, by size and name; the whole tree of isthmus under WHOLE.
Figures = dict[tuple[str, str], list[float]]
WHOLE = "isthmus, all processes"


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seconds", type=int, default=ROUND_S, help="of each round, proxy and size")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was started is stopped then too
    nginx, wrk = find("nginx"), find("wrk")
    if nginx is None or wrk is None:
        print(
            "nginx is the machine behind every proxy and wrk makes the requests: there is no bench without."
        )
        return 1
    figures: Figures = defaultdict(list)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (
            start_machine(nginx, folder) as machine,
            start_proxies(folder, machine.port) as programs,
        ):
            memory = {pid: read_memory(pid) for pid in read_cpu(programs[0].pid)}
            versions = ", ".join(f"{program.name} {program.version}" for program in programs)
            print(f"{describe_machine()}\n{versions}, wrk {read_version(wrk)}", flush=True)
            for size in FILES:
                for program in programs:
                    run_load(wrk, program, size, 1)
                for _ in range(options.rounds):
                    for program in programs:
                        measure(wrk, program, size, options.seconds, figures)
                print(f"{options.rounds} rounds of {TITLES[size]}", flush=True)
            worker = find_busiest(read_cpu(programs[0].pid))
    print_figures(figures, [program.name for program in programs if program.name in LIMITS])
    print_memory(memory[worker] / 1e6)
    return 0


def measure(wrk: str, program: Program, size: str, seconds: int, figures: Figures) -> None:
    """Add one round of one proxy."""
    before = read_cpu(program.pid)
    requests = run_load(wrk, program, size, seconds)
    spent = {pid: cpu - before.get(pid, 0.0) for pid, cpu in read_cpu(program.pid).items()}
    figures[size, program.name].append(spent[find_busiest(spent)] / requests * 1e6)
    if program.name == ISTHMUS:
        figures[size, WHOLE].append(sum(spent.values()) / requests * 1e6)


def find_busiest(cpu: dict[int, float]) -> int:
    """Return the process that does the work: nginx has a master beside it, isthmus supervisor and agent."""
    return max(cpu, key=lambda pid: cpu[pid])


def run_load(wrk: str, program: Program, size: str, seconds: int) -> int:
    """Return how many requests were answered; raises RuntimeError when one was not."""
    command = [wrk, "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", "--timeout", "10s"]
    for header in HEADERS:
        command += ["-H", header]
    command.append(f"http://127.0.0.1:{program.port}/{size}")
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=seconds + 30).stdout
    answered = re.search(r"(\d+) requests in", said)
    if answered is None or "Non-2xx" in said or "Socket errors" in said:
        raise RuntimeError(f"{program.name}, {size}:\n{said}")
    return int(answered[1])


def print_figures(figures: Figures, peers: list[str]) -> None:
    """Print CPU per request and the ratios, one line per size and peer."""
    rows = []
    for size in FILES:
        ours = figures[size, ISTHMUS]
        for peer in peers:
            theirs = figures[size, peer]
            ratio = statistics.median(ours) / statistics.median(theirs)
            target = Target(LIMITS[peer][size], at_least=False)
            rows.append(
                [
                    TITLES[size],
                    *(show_cpu(ours), peer, show_cpu(theirs)),
                    *(f"{show_number(ratio)} ×", target.show(" ×"), target.compare(ratio)),
                ]
            )
        rows.append([TITLES[size], show_cpu(figures[size, WHOLE]), "with supervisor, agent", "", "", "", ""])
        if (size, PLAIN) in figures:
            rows.append([TITLES[size], show_cpu(figures[size, PLAIN]), "as plain Python", "", "", "", ""])
    print()
    print_table(["CPU µs per request", "isthmus", "against", "it", "ratio", "target", ""], rows)
    print("\nMedians of rounds, ± is how far the farthest round is from the median.")


def show_cpu(values: list[float]) -> str:
    """Return the median and the spread."""
    return f"{show_number(statistics.median(values))} ± {compute_spread(values):.0%}"


def print_memory(megabytes: float) -> None:
    """Print the memory of a worker."""
    target = Target(MEMORY_LIMIT_MB, at_least=False)
    print()
    print_table(
        ["isthmus", "figure", "target", ""],
        [["worker at start, MB", show_number(megabytes), target.show(""), target.compare(megabytes)]],
    )


if __name__ == "__main__":
    raise SystemExit(main())
