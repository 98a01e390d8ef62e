"""`isthmus simulate`: a cluster in virtual time, with faults, from a seed."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

    from replication.simulator.simulation import Report, Scenario


def add_parser(verbs: Any) -> None:
    """Add `simulate`."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "simulate",
        help="run the replication of many nodes in virtual time, with faults",
        description="Run replicas in one process and virtual time, let things go wrong, and check that "
        "nothing is lost or torn and that all nodes end up equal. The same seed makes the same run.",
    )
    parser.add_argument("--nodes", type=int, default=5, help="how many (5)")
    parser.add_argument("--seed", type=int, default=1, help="what the run follows from (1)")
    parser.add_argument("--seeds", type=int, default=1, help="run as many, counting from --seed (1)")
    parser.add_argument("--seconds", type=float, default=30.0, help="of virtual time with faults (30)")
    parser.add_argument("--writes", type=float, default=4.0, help="per second, of the whole cluster (4)")
    parser.add_argument(
        "--faults",
        default="all",
        help="which, with commas between: see docs/simulation.md; all, or none (all)",
    )
    parser.add_argument("--regions", type=int, default=10, help="over which the nodes are dealt out (10)")
    parser.add_argument("--loss", type=float, default=0.0, help="of packets, all the time, 0 to 1 (0)")
    parser.add_argument("--joined", action="store_true", help="every node knows all others from the start")
    parser.add_argument("--trace", metavar="FILE", help="write each event to a file")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run, and return 1 at the first failure."""
    from replication.simulator import simulation  # noqa: PLC0415 - other verbs start without it
    from replication.simulator.faults import USUAL  # noqa: PLC0415

    named = {"all": USUAL, "none": ()}
    faults = named[args.faults] if args.faults in named else tuple(args.faults.split(","))
    for seed in range(args.seed, args.seed + args.seeds):
        try:
            scenario = simulation.Scenario(
                seed=seed,
                nodes=args.nodes,
                seconds=args.seconds,
                faults=faults,
                writes_per_s=args.writes,
                regions=args.regions,
                loss=args.loss,
                joined=args.joined,
            )
        except ValueError as error:
            sys.stderr.write(f"isthmus: {error}\n")
            return 2
        with contextlib.ExitStack() as files:
            sink = files.enter_context(open(args.trace, "wb")) if args.trace else None  # noqa: PTH123 - may be /dev/stdout
            report = simulation.run(scenario, trace=sink)
        if report.failure is not None:
            print(format_failure(report, args.faults))
            return 1
        print(format_summary(report) if args.seeds == 1 else format_line(report), flush=True)
    return 0


def format_line(report: Report) -> str:
    """Return one of many runs in a line."""
    return (
        f"seed {report.scenario.seed}: ok, {report.writes} writes, {sum(report.fired.values())} faults, "
        f"{sum(report.checks.values())} checks, equal after {_seconds(report.converged_ms)}"
    )


def format_summary(report: Report) -> str:
    """Return what came of a run."""
    counters, scenario = report.counters, report.scenario
    rows = [
        ("seed", f"{scenario.seed}, {scenario.nodes} nodes, {scenario.seconds:g} s of virtual time"),
        ("writes", f"{report.writes} acknowledged, {report.durable} of them on disk to stay"),
        (
            "messages",
            f"{counters['datagrams']} datagrams, {counters['frames']} frames, {counters['bytes']} bytes",
        ),
        ("payloads", f"{report.payloads_per_node:.2f} copies of a changeset per node"),
        ("repair", f"{counters['sync_rounds']} sync rounds, {counters['snapshots_adopted']} snapshots"),
        ("faults", _counts(report.fired)),
        ("checks", _counts(report.checks)),
        ("equal", f"{_seconds(report.converged_ms)} after everything had healed"),
        ("trace", f"{report.trace_lines} events, {report.trace_hash}"),
    ]
    return "\n".join(f"{name:9} {value}" for name, value in rows)


def format_failure(report: Report, faults: str) -> str:
    """Return what failed, what led to it, and how to see it again."""
    assert report.failure is not None, "there is a failure to tell of"
    return "\n".join(
        [
            *report.timeline,
            "",
            f"seed {report.scenario.seed} FAILED: {report.failure}",
            f"again: {format_command(report.scenario, faults)}",
        ]
    )


def format_command(scenario: Scenario, faults: str) -> str:
    """Return the command that makes the same run."""
    options = [
        f"isthmus simulate --nodes {scenario.nodes} --seed {scenario.seed} --seconds {scenario.seconds!r}",
        f"--writes {scenario.writes_per_s!r} --faults {faults} --regions {scenario.regions}",
        *([f"--loss {scenario.loss!r}"] if scenario.loss else []),
        *(["--joined"] if scenario.joined else []),
    ]
    return " ".join(options)


def _counts(counter: dict[str, int]) -> str:
    return ", ".join(f"{name} {counter[name]}" for name in sorted(counter)) or "none"


def _seconds(ms: int | None) -> str:
    return "never" if ms is None else f"{ms / 1000:.1f} s"
