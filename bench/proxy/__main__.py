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
from contextlib import ExitStack
from pathlib import Path

from bench.table import Target, compute_spread, describe_machine, print_table, show_number

from .latency import measure_latency
from .processes import Program, find_port, read_cpu, read_memory, running
from .programs import FILES, ISTHMUS, PLAIN, find, read_version, start_machine, start_proxies
from .wide import MACHINES, write_script

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
VARYING = "varying"
TITLES = {"small": "small GET", VARYING: "varying GET", "64k": "64 KiB", "1m": "1 MiB"}
LIMITS = {
    "nginx": {"small": 1.2, "64k": 0.8, "1m": 0.6},
    "HAProxy": {"small": 1.3, "64k": 1.0, "1m": 0.8},
    "Envoy": {"small": 0.5, "64k": 0.6, "1m": 0.8},
    "Caddy": {"small": 0.4, "64k": 0.5, "1m": 0.7},
}
MEMORY_LIMIT_MB = 60
LATENCY_LIMIT = 1.5
# Another path, page and cookie each time: nothing that the last request said helps with the next one.
VARIED = """
local count = 0
local headers = {}
request = function()
  count = count + 1
  headers["Referer"] = "https://example.com/articles/" .. count
  headers["Cookie"] = "session=" .. count .. "; theme=dark; consent=yes"
  return wrk.format("GET", "/small?" .. count, headers)
end
init = function(arguments)
  for name, value in pairs(wrk.headers) do headers[name] = value end
end
"""
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
            varied = folder / "varied.lua"
            varied.write_text(VARIED, "utf-8")
            for size, title in TITLES.items():
                script = varied if size == VARYING else None
                for program in programs:
                    run_load(wrk, program, size, 1, script)
                for _ in range(options.rounds):
                    for program in programs:
                        measure(wrk, program, size, options.seconds, figures, script)
                print(f"{options.rounds} rounds of {title}", flush=True)
            worker = find_busiest(read_cpu(programs[0].pid))
            cpu = statistics.median(figures["small", ISTHMUS])
            alone = [program for program in programs if program.name in {ISTHMUS, "nginx"}]
            latency = measure_latency(wrk, folder, alone, cpu)
            wide = measure_wide(wrk, folder, machine.port, options.rounds, options.seconds)
    print_figures(figures, [program.name for program in programs if program.name in LIMITS])
    print_others(memory[worker] / 1e6, latency, wide)
    return 0


def measure_wide(wrk: str, folder: Path, upstream: int, rounds: int, seconds: int) -> list[float]:
    """Return the CPU per request of a worker over a small table and over a large one."""
    with ExitStack() as stack:
        programs = []
        for machines in MACHINES:
            port = find_port()
            command = [sys.executable, "-m", "bench.proxy.wide", *map(str, (port, upstream, machines))]
            log = folder / f"wide-{machines}.log"
            programs.append(stack.enter_context(running(f"{machines}", "", command, port, log)))
        figures: Figures = defaultdict(list)
        for _ in range(rounds + 1):
            for program in programs:
                script = write_script(folder, int(program.name))
                measure(wrk, program, "small", seconds, figures, script)
    # The first round meets an empty memory.
    return [statistics.median(figures["small", f"{machines}"][1:]) for machines in MACHINES]


def measure(
    wrk: str, program: Program, size: str, seconds: int, figures: Figures, script: Path | None = None
) -> None:
    """Add one round of one proxy."""
    before = read_cpu(program.pid)
    requests = run_load(wrk, program, size, seconds, script)
    spent = {pid: cpu - before.get(pid, 0.0) for pid, cpu in read_cpu(program.pid).items()}
    figures[size, program.name].append(spent[find_busiest(spent)] / requests * 1e6)
    if program.name == ISTHMUS:
        figures[size, WHOLE].append(sum(spent.values()) / requests * 1e6)


def find_busiest(cpu: dict[int, float]) -> int:
    """Return the process that does the work: nginx has a master beside it, isthmus supervisor and agent."""
    return max(cpu, key=lambda pid: cpu[pid])


def run_load(wrk: str, program: Program, size: str, seconds: int, script: Path | None = None) -> int:
    """Return how many requests were answered; raises RuntimeError when one was not."""
    command = [wrk, "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", "--timeout", "10s"]
    for header in HEADERS:
        command += ["-H", header]
    if script is not None:
        command += ["-s", str(script)]
    command.append(f"http://127.0.0.1:{program.port}/{size if size in FILES else 'small'}")
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=seconds + 30).stdout
    answered = re.search(r"(\d+) requests in", said)
    if answered is None or "Non-2xx" in said or "Socket errors" in said:
        raise RuntimeError(f"{program.name}, {size}:\n{said}")
    return int(answered[1])


def print_figures(figures: Figures, peers: list[str]) -> None:
    """Print CPU per request and the ratios, one line per size and peer."""
    rows = []
    for size, title in TITLES.items():
        ours = figures[size, ISTHMUS]
        for peer in peers:
            theirs = figures[size, peer]
            ratio = statistics.median(ours) / statistics.median(theirs)
            target = Target(LIMITS[peer]["small" if size == VARYING else size], at_least=False)
            rows.append(
                [
                    title,
                    *(show_cpu(ours), peer, show_cpu(theirs)),
                    *(f"{show_number(ratio)} ×", target.show(" ×"), target.compare(ratio)),
                ]
            )
        rows.append([title, show_cpu(figures[size, WHOLE]), "with supervisor, agent", "", "", "", ""])
        if (size, PLAIN) in figures:
            rows.append([title, show_cpu(figures[size, PLAIN]), "as plain Python", "", "", "", ""])
    print()
    print_table(["CPU µs per request", "isthmus", "against", "it", "ratio", "target", ""], rows)
    print("\nMedians of rounds, ± is how far the farthest round is from the median.")


def show_cpu(values: list[float]) -> str:
    """Return the median and the spread."""
    return f"{show_number(statistics.median(values))} ± {compute_spread(values):.0%}"


def print_others(megabytes: float, latency: dict[str, tuple[float, float]], wide: list[float]) -> None:
    """Print the memory of a worker, latencies, and what a large table costs."""
    target = Target(MEMORY_LIMIT_MB, at_least=False)
    rows = [["worker at start, MB", show_number(megabytes), target.show(""), target.compare(megabytes)]]
    for name, (half, tail) in latency.items():
        rows.append([f"{name} at half load, ms: median, p99", f"{half:.2f}, {tail:.2f}", "", ""])
    if len(latency) == 2:
        target = Target(LATENCY_LIMIT, at_least=False)
        ratio = latency[ISTHMUS][1] / latency["nginx"][1]
        rows.append(["p99 against nginx", f"{ratio:.2f} ×", target.show(" ×"), target.compare(ratio)])
    for machines, cpu in zip(MACHINES, wide, strict=True):
        rows.append([f"CPU µs per request, {machines:,} machines", show_number(cpu), "", ""])
    print()
    print_table(["isthmus", "figure", "target", ""], rows)


if __name__ == "__main__":
    raise SystemExit(main())
