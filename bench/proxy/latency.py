"""Latency at half load, beside nginx.

Both proxies get as many requests a second as keep a worker of isthmus busy for half of the time: 64
connections that wait for a random time before each request. Wall time, on a machine with other work: rounds
alternate, and the ratio of the medians is what counts.
"""

import re
import statistics
import subprocess
from pathlib import Path

from .processes import Program

CONNECTIONS = 64
ROUNDS = 5
ROUND_S = 4
# wrk waits for whole milliseconds; the sum of two uniform waits has the wanted mean.
SCRIPT = """
function delay() return math.random(0, @mean@) + math.random(0, @mean@) end
"""
UNITS_MS = {"us": 0.001, "ms": 1.0, "s": 1000.0}


def measure_latency(
    wrk: str, folder: Path, programs: list[Program], cpu_us: float
) -> dict[str, tuple[float, float]]:
    """Return the median and the 99th percentile in ms of each program, medians of rounds.

    `cpu_us` is what a request costs isthmus: it sets the rate.
    """
    script = write_script(folder, 0.5 / (cpu_us / 1e6))
    rounds: dict[str, list[tuple[float, float]]] = {program.name: [] for program in programs}
    for _ in range(ROUNDS):
        for program in programs:
            rounds[program.name].append(run_round(wrk, script, program))
    return {
        name: (statistics.median(half for half, _ in seen), statistics.median(tail for _, tail in seen))
        for name, seen in rounds.items()
    }


def write_script(folder: Path, rate: float) -> Path:
    """Write the script that makes wrk ask so many times a second, if answers take no time."""
    file = folder / "delay.lua"
    file.write_text(SCRIPT.replace("@mean@", str(max(1, round(CONNECTIONS / rate * 1000)))), "utf-8")
    return file


def run_round(wrk: str, script: Path, program: Program) -> tuple[float, float]:
    """Return the median and the 99th percentile of one round in ms; raises RuntimeError on an error."""
    command = [wrk, "-t1", f"-c{CONNECTIONS}", f"-d{ROUND_S}s", "--latency", "-s", str(script)]
    command.append(f"http://127.0.0.1:{program.port}/small")
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=ROUND_S + 30).stdout
    found = {share: (value, unit) for share, value, unit in re.findall(r"(\d+)%\s+([\d.]+)(us|ms|s)\b", said)}
    if "99" not in found or "Non-2xx" in said or "Socket errors" in said:
        raise RuntimeError(f"{program.name}:\n{said}")
    half, tail = (float(found[share][0]) * UNITS_MS[found[share][1]] for share in ("50", "99"))
    return half, tail
