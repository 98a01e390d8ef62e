"""`make bench-routing`: a table of a million machines, and how loads spread over machines in virtual time.

Decides what is measured and what it is held against. Invariant: the simulated figures follow from the seed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.table import Target, describe_machine, print_table, show_number

from .million import APPS, make_file
from .plot import draw
from .simulation import POLICIES, WINDOW_S, Outcome, simulate

DOCS = Path(__file__).resolve().parents[2] / "docs"
LIMITS = (
    ("routing decision, any of 100,000 apps, p50", "decision_any_p50_us", " µs", 3.0),
    ("routing decision, any of 100,000 apps, p99", "decision_any_p99_us", " µs", 10.0),
    ("the same app each time, p50", "decision_one_p50_us", " µs", 5.0),
    ("table load from SQLite", "load_s", " s", 10.0),
    ("memory of the process with it", "memory_mb", " MB", 600.0),
    ("one change applied to it, p50", "change_p50_us", " µs", 10.0),
)
IMBALANCE_MAX = 1.15
# Nodes with two machines each: what the same decision costs in a small table.
SMALL_APPS = 1


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="make bench-routing", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="loads of the table; the median counts")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plot", type=Path, default=DOCS / "balancing.svg")
    parser.add_argument("--only", choices=("table", "simulation"))
    options = parser.parse_args()
    print(describe_machine(), flush=True)
    if options.only != "simulation":
        measure_table(options.rounds)
    if options.only != "table":
        measure_spread(options.seed, options.plot)
    return 0


def measure_table(rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        figures = {}
        for apps in (SMALL_APPS, APPS):
            file = Path(folder) / f"{apps}.db"
            make_file(file, apps)
            runs = [measure_in_process(file, apps) for _ in range(rounds)]
            figures[apps] = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    large, small = figures[APPS], figures[SMALL_APPS]
    print(f"100,000 apps, 1,000,000 machines; {'compiled' if large['compiled'] else 'plain Python'}\n")
    rows = []
    for title, name, unit, limit in LIMITS:
        target = Target(limit, at_least=False)
        figure = large[name]
        rows.append((title, f"{show_number(figure)}{unit}", target.show(unit), target.compare(figure)))
    for title, name, unit in (
        ("decision with 10 machines in the table, p50", "decision_one_p50_us", " µs"),
        ("one change applied, p99", "change_p99_us", " µs"),
    ):
        figure = (small if "10 machines" in title else large)[name]
        rows.append((title, f"{show_number(figure)}{unit}", "", ""))
    rows.append(("CPU of the load", f"{show_number(large['load_cpu_s'])} s", "", ""))
    rows.append(("memory while loading", f"{show_number(large['peak_mb'])} MB", "", ""))
    print_table(("measure", "figure", "target", ""), rows)


def measure_in_process(file: Path, apps: int) -> dict[str, float]:
    run = subprocess.run(
        [sys.executable, "-m", "bench.routing.million", str(file), str(apps)],
        stdout=subprocess.PIPE,
        check=True,
        timeout=600,
    )
    figures: dict[str, float] = json.loads(run.stdout)
    return figures


def measure_spread(seed: int, plot: Path) -> None:
    outcomes: dict[str, dict[str, Outcome]] = {}
    for title, uneven in (("equal machines", 0.0), ("machines that differ by up to 25 %", 0.25)):
        outcomes[title] = {name: simulate(policy, seed, uneven=uneven) for name, policy in POLICIES.items()}
        print(f"\n{title}\n")
        rows = [(name, *describe(outcome)) for name, outcome in outcomes[title].items()]
        print_table(
            (
                f"max/mean over {WINDOW_S:.0f} s",
                *("mean", "worst", "at a moment", "had to wait", "wait p99", "p99.9"),
            ),
            rows,
        )
    target = Target(IMBALANCE_MAX, at_least=False)
    figure = outcomes["equal machines"]["isthmus"].imbalance
    print(f"\nimbalance {show_number(figure)}, target {target.show('')}: {target.compare(figure)}")
    draw(outcomes["equal machines"], plot)


def describe(outcome: Outcome) -> tuple[str, ...]:
    waits = sorted(outcome.waits_s)
    moment = max(outcome.snapshot) / statistics.mean(outcome.snapshot)
    waited = sum(wait > 0 for wait in waits) / len(waits)
    percentiles = (waits[int(len(waits) * share)] * 1000 for share in (0.99, 0.999))
    loads = (f"{value:.2f}" for value in (outcome.imbalance, max(outcome.imbalances), moment))
    return (*loads, f"{waited:.1%}", *(f"{value:.0f} ms" for value in percentiles))


if __name__ == "__main__":
    sys.exit(main())
