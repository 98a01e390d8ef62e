"""What both benchmarks print: figures beside their targets, and the machine that they were taken on.

Decides what counts as reached. Knows nothing of how a figure is measured. Invariant: a figure without a
target is printed as it is and never as reached.
"""

import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Target:
    """What a figure must reach: at least, or at most, a limit."""

    limit: float
    at_least: bool

    def compare(self, figure: float) -> str:
        """Return a word on whether it is reached, or by how much it is missed."""
        if figure >= self.limit if self.at_least else figure <= self.limit:
            return "reached"
        by = abs(figure - self.limit) / self.limit
        return f"missed by {by:.0%}" if by >= 0.01 else "missed by under 1%"

    def show(self, unit: str) -> str:
        """Return the target as a cell."""
        return f"{'≥' if self.at_least else '≤'} {show_number(self.limit)}{unit}"


def show_number(value: float) -> str:
    """Return a number with about three digits that count."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table that is readable on a terminal and is Markdown too."""
    # Markdown wants a rule of some length below an empty heading too.
    widths = [max(3, *(len(row[column]) for row in [header, *rows])) for column in range(len(header))]

    def show(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return f"| {' | '.join(padded)} |"

    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    print("\n".join([show(header), f"|{'|'.join(f' {cell} ' for cell in rule)}|", *map(show, rows)]))


def compute_spread(values: Sequence[float]) -> float:
    """Return how far the farthest round is from the median, as a share of it."""
    middle = statistics.median(values)
    return max(abs(value - middle) for value in values) / middle


def describe_machine() -> str:
    """Return processor, cores and versions: what a figure depends on, and nothing that names the machine."""
    facts = Path("/proc/cpuinfo").read_text("utf-8") if Path("/proc/cpuinfo").exists() else ""
    model = next((line.split(":", 1)[1].strip() for line in facts.splitlines() if "model name" in line), "")
    cores = facts.count("processor\t")
    return (
        f"{model or platform.machine()}, {cores or '?'} cores, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}"
    )
