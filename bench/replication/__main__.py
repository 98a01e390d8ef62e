"""`make bench-replication`: merges, writes, bytes and the time to a peer, with cr-sqlite beside them.

Decides the order of rounds and what is printed. Throughput is counted in CPU time of the process, as other
work on the machine lengthens everything else. Invariant: both sides do each round one after the other.
"""

import argparse
import os
import sqlite3
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from bench.table import Target, compute_spread, describe_machine, print_table, show_number

from .agents import measure_agents
from .crsqlite import CrSqlite, UnavailableError
from .million import ROWS, SITES, measure_million
from .ours import (
    CELLS,
    MODES,
    STEADY_CHANGES,
    STEADY_ROWS,
    WRITERS,
    Round,
    Sizes,
    measure_agent,
    measure_steady,
    run_round,
)
from .visible import WRITES, measure_visible

SIZES = Sizes(rows=5000, batch=1000, singles=2000)
ROUNDS = 5
PEER = "cr-sqlite"


class Measure(NamedTuple):
    """A line of the table of throughput."""

    key: str
    title: str
    units: int
    limit: float | None = None
    ratio: float | None = None  # how many times the peer's it must be


MEASURES = (
    Measure("empty", "merge into empty, cells/s", SIZES.rows * CELLS, 300_000, 10),
    Measure("overwrite", "merge, overwriting, cells/s", SIZES.rows * CELLS, 300_000, 10),
    Measure("stale", "merge of what loses, cells/s", SIZES.rows * CELLS, 300_000, 10),
    Measure("late", "merge of inserts after their updates, cells/s", SIZES.rows * CELLS, 300_000),
    Measure("duplicate", "merge of what was merged, cells/s", SIZES.rows * CELLS, 300_000, 10),
    Measure("single", "merge, one row a transaction, changesets/s", SIZES.singles, 8_000),
    Measure("single_waiting", "the same when many wait, changesets/s", SIZES.singles),
    Measure("local_single", "write, one row a transaction, store, rows/s", SIZES.singles),
    Measure("agent_single", "the same acknowledged by an agent, rows/s", SIZES.singles, 8_000),
    Measure("agent_writers", f"the same of {WRITERS} writers at once, rows/s", SIZES.singles, 8_000),
    Measure("local", "write, 1000 rows a transaction, store, rows/s", SIZES.rows),
    Measure("agent", "the same acknowledged by an agent, rows/s", SIZES.rows, 80_000),
    Measure("plain", "for scale: the table alone, 1000 rows a transaction, rows/s", SIZES.rows),
)
BYTES_LIMIT = {"row": 1.6, "column": 2.0}
BYTES = (
    ("replicated", "bytes on disk / plain table, without the log"),
    ("two_columns", "the same after 2 columns of half of the rows changed"),
)
STEADY = f"{STEADY_ROWS:,} rows, each changed {STEADY_CHANGES} times, all columns; with the log at its bound"
NOTES = """
isthmus writes to files (WAL, synchronous=NORMAL), cr-sqlite holds its tables in memory. A changeset that was
merged is known by its site and version and is not looked at again; cr-sqlite leaves that to what is built on
it. A row has nine cells, its key not counted. ± is how far the farthest round is from the median."""
# What a table can show of something that takes no time to speak of.
RATE_MAX = 1e8


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="make bench-replication", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    rounds = parser.parse_args().rounds
    ours: dict[str, list[Round]] = {mode: [] for mode in MODES}
    theirs: list[Round] = []
    print(f"{describe_machine()}, SQLite {sqlite3.sqlite_version}")
    with ExitStack() as stack:
        stack.enter_context(one_core())  # the peer's process inherits it
        peer = start_peer(stack)
        for number in range(rounds + 1):
            for mode in MODES:
                ours[mode].append(run_ours(mode))
            if peer is not None:
                answer = peer.run_round(SIZES.rows, SIZES.batch, SIZES.singles)
                theirs.append(Round(answer["cpu"], answer["bytes"]))
            print(f"round {number} of {rounds}" if number else "warmed up", flush=True)
    # The first round is for caches and compilers.
    print_rates({mode: found[1:] for mode, found in ours.items()}, theirs[1:])
    print_bytes(ours, theirs)
    with tempfile.TemporaryDirectory() as folder:
        print_visible(measure_visible(Path(folder)))
    million: dict[str, dict[str, float]] = {}
    agents: dict[str, float] = {}
    for mode in MODES:
        with tempfile.TemporaryDirectory() as folder:
            million[mode] = measure_million(Path(folder), mode)
            agents = agents or measure_agents(Path(folder))
    print_million(million)
    print_agents(agents)


@contextmanager
def one_core() -> Iterator[None]:
    """Keep to one core: both sides have one, and threads that hand over do not wake another."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def start_peer(stack: ExitStack) -> CrSqlite | None:
    """Start cr-sqlite, or say why not."""
    try:
        peer = stack.enter_context(CrSqlite())
    except UnavailableError as error:
        print(error)
        return None
    versions = peer.versions
    print(
        f"cr-sqlite {versions['crsqlite']} (WebAssembly, in memory), SQLite {versions['sqlite']}, "
        f"Node {versions['node']}"
    )
    return peer


def run_ours(mode: str) -> Round:
    """Run one round of ours in a folder that does not outlive it."""
    with tempfile.TemporaryDirectory() as folder:
        result = run_round(Path(folder), mode, SIZES)
        result.cpu.update(measure_agent(Path(folder), mode, SIZES))
    return result


def compute_rates(rounds: list[Round], measure: Measure) -> list[float]:
    """Return units per CPU second of each round; none where the side has no such measure."""
    return [
        min(RATE_MAX, measure.units / found.cpu[measure.key]) for found in rounds if measure.key in found.cpu
    ]


def print_rates(ours: Mapping[str, list[Round]], theirs: list[Round]) -> None:
    """Print throughput, one line per measure and mode."""
    rows = []
    for measure in MEASURES:
        for mode in MODES if measure.key != "plain" else MODES[:1]:
            rates = compute_rates(ours[mode], measure)
            other = compute_rates(theirs, measure)
            figure = statistics.median(rates)
            shown = show_number(figure) if figure < RATE_MAX else f"> {show_number(RATE_MAX)}"
            ratio = figure / statistics.median(other) if other else None
            rows.append(
                [
                    measure.title,
                    mode if measure.key != "plain" else "",
                    shown,
                    f"{compute_spread(rates):.0%}" if figure < RATE_MAX else "",
                    *judge(figure, Target(measure.limit, at_least=True) if measure.limit else None, ""),
                    show_number(statistics.median(other)) if other else "",
                    show_ratio(ratio, figure),
                    *judge(ratio, Target(measure.ratio, at_least=True) if measure.ratio else None, " ×"),
                ]
            )
    header = ["per CPU second, medians", "by", "isthmus", "±", "target", "", PEER, "ratio", "target", ""]
    print()
    print_table(header, rows)
    print(NOTES)


def show_ratio(ratio: float | None, figure: float) -> str:
    """Return how many times the peer's a figure is."""
    if ratio is None:
        return ""
    return f"{'> ' if figure >= RATE_MAX else ''}{show_number(ratio)} ×"


def judge(figure: float | None, target: Target | None, unit: str) -> tuple[str, str]:
    """Return the target as a cell, and whether it is reached as another."""
    if target is None or figure is None:
        return "", ""
    return target.show(unit), target.compare(figure)


def print_bytes(ours: Mapping[str, list[Round]], theirs: list[Round]) -> None:
    """Print what replication adds to the file."""
    rows = []
    for key, title in BYTES:
        for mode in MODES:
            found = ours[mode][-1].bytes
            target = Target(BYTES_LIMIT[mode], at_least=False)
            figure = found[key] / found["plain"]
            other = theirs[-1].bytes if theirs and key == "replicated" else None
            shown = f"{show_number(other['replicated'] / other['plain'])} ×" if other else ""
            rows.append([title, mode, f"{show_number(figure)} ×", *judge(figure, target, " ×"), shown])
    for mode in MODES:
        with tempfile.TemporaryDirectory() as folder:
            replicated, plain = measure_steady(Path(folder), mode)
        target = Target(BYTES_LIMIT[mode], at_least=False)
        figure = replicated / plain
        rows.append([STEADY, mode, f"{show_number(figure)} ×", *judge(figure, target, " ×"), ""])
    print()
    print_table([f"{SIZES.rows:,} rows of 10 columns", "by", "isthmus", "target", "", PEER], rows)


def print_visible(latencies: list[float]) -> None:
    """Print how long writes took to the peer."""
    parts = statistics.quantiles(latencies, n=100, method="inclusive")
    rows = [
        [name, f"{show_number(figure)} ms", *judge(figure, target, " ms")]
        for name, figure, target in (
            ("p50", parts[49], Target(10, at_least=False)),
            ("p99", parts[98], Target(50, at_least=False)),
            ("largest", max(latencies), None),
        )
    ]
    print()
    print_table([f"write to visible on a peer, {WRITES} writes", "isthmus", "target", ""], rows)


def print_million(found: Mapping[str, Mapping[str, float]]) -> None:
    """Print what a snapshot of many rows takes, and the memory of each side."""
    rows = []
    for mode, figures in found.items():
        total_s = figures["send_s"] + figures["take_s"]
        for name, figure, unit, target in (
            ("snapshot written and applied, together", total_s, "s", Target(60, at_least=False)),
            ("written", figures["send_s"], "s", None),
            ("applied to a new file", figures["take_s"], "s", None),
            ("most memory of who writes it", figures["send_mb"], "MB", None),
            ("most memory of who applies it", figures["take_mb"], "MB", None),
            ("most memory of a store that opens the file and writes", figures["hold_mb"], "MB", None),
            ("size of the snapshot", figures["snapshot_mb"], "MB", None),
        ):
            shown = f"{show_number(figure)} {unit}"
            rows.append([name, mode, shown, *judge(figure, target, f" {unit}")])
    print()
    print_table([f"{ROWS:,} rows, store to store", "by", "isthmus", "target", ""], rows)


def print_agents(figures: Mapping[str, float]) -> None:
    """Print what a new node takes to have many rows, and the memory of agents."""
    rows = []
    for name, figure, unit, limit in (
        ("from the start of a new node until it has all rows", figures["join_s"], "s", 60),
        ("CPU of both", figures["join_cpu_s"] + figures["holder_cpu_s"], "s", None),
        ("most memory of the new node", figures["join_peak_mb"], "MB", None),
        ("most memory of the node that has them", figures["holder_peak_mb"], "MB", None),
        (f"memory of a node among {SITES:,} members", figures["stand_mb"], "MB", 300),
        ("the most that it had", figures["stand_peak_mb"], "MB", 300),
    ):
        target = Target(limit, at_least=False) if limit else None
        rows.append([name, f"{show_number(figure)} {unit}", *judge(figure, target, f" {unit}")])
    print()
    print_table([f"{ROWS:,} rows of {SITES:,} sites, agents, by row", "isthmus", "target", ""], rows)


if __name__ == "__main__":
    main()
