"""The figure in docs/balancing.md, written by hand as SVG.

Decides what is drawn. Invariant: the same outcomes give the same file.
"""

from collections.abc import Mapping
from pathlib import Path

from .simulation import MACHINES, SLOTS, Outcome

WIDTH, PANEL, GAP, TOP, LEFT = 760, 96, 26, 30, 118
COLOURS = {"isthmus": "#1668b8", "random": "#777", "round robin": "#777", "least loaded": "#b8441b"}


def draw(outcomes: Mapping[str, Outcome], file: Path) -> None:
    """Draw the load of every machine at one moment, sorted, one panel for each policy."""
    loads_max = max(max(outcome.snapshot) for outcome in outcomes.values())
    height = TOP + len(outcomes) * (PANEL + GAP) + 6
    box = f'viewBox="0 0 {WIDTH} {height}"'
    title = f"Requests at each of {MACHINES} machines at one moment, the busiest on the right"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {box} font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        f'<text x="{LEFT}" y="18">{title}</text>',
    ]
    for number, (name, outcome) in enumerate(outcomes.items()):
        parts += _draw_panel(name, outcome, TOP + number * (PANEL + GAP), loads_max)
    file.write_text("\n".join([*parts, "</svg>", ""]), "utf-8")


def _draw_panel(name: str, outcome: Outcome, top: int, loads_max: int) -> list[str]:
    bottom, step = top + PANEL, (WIDTH - LEFT - 16) / MACHINES
    waits = sorted(outcome.waits_s)
    longest = waits[len(waits) * 999 // 1000]
    waited = sum(wait > 0 for wait in waits) / len(waits)
    limit = bottom - PANEL * SLOTS / loads_max
    lines = [
        f'<text x="8" y="{top + 16}" font-weight="bold">{name}</text>',
        f'<text x="8" y="{top + 34}">max/mean {outcome.imbalance:.2f}</text>',
        f'<text x="8" y="{top + 50}">{waited:.1%} wait</text>',
        f'<text x="8" y="{top + 66}">p99.9 {longest * 1000:.0f} ms</text>',
    ]
    for place, load in enumerate(sorted(outcome.snapshot)):
        tall = PANEL * load / loads_max
        lines.append(
            f'<rect x="{LEFT + place * step:.1f}" y="{bottom - tall:.1f}" width="{step - 1:.1f}" '
            f'height="{tall:.1f}" fill="{COLOURS.get(name, "#777")}"/>'
        )
    right = WIDTH - 16
    lines.append(f'<path d="M{LEFT} {limit:.1f}H{right}" stroke="#000" stroke-dasharray="3 3" opacity=".5"/>')
    lines.append(f'<text x="{right}" y="{limit - 3:.1f}" text-anchor="end" font-size="10">soft limit</text>')
    lines.append(f'<path d="M{LEFT} {bottom}H{right}" stroke="#999"/>')
    return lines
