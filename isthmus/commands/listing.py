"""`isthmus routes|machines|checks|nodes|regions|apps`: what a node knows, as a table or as JSON."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import orjson

from isthmus.client import add_asking_flags, make_client
from isthmus.logs import escape
from isthmus.wording import count_of

if TYPE_CHECKING:
    import argparse

Cells = Sequence[str]


def add_parser(verbs: Any) -> None:
    """Add the verbs that show."""
    for name, (help_text, _, _) in _LISTINGS.items():
        parser: argparse.ArgumentParser = verbs.add_parser(name, help=help_text)
        add_asking_flags(parser)
        parser.set_defaults(run=run, listing=name)


def run(args: argparse.Namespace) -> int:
    """Fetch and print."""
    answer = make_client(args).get(f"/v1/{args.listing}")
    if args.json:
        print(orjson.dumps(answer, option=orjson.OPT_INDENT_2).decode())
        return 0
    _, header, cells = _LISTINGS[args.listing]
    rows = [row for item in answer for row in cells(item)]
    print(format_table(header, rows) if rows else f"no {args.listing} yet")
    return 0


def format_table(header: Cells, rows: Iterable[Cells]) -> str:
    """Return aligned columns, two spaces apart; nothing in a cell drives the terminal."""
    lines = [[escape(cell) for cell in line] for line in (header, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _route_rows(route: dict[str, Any]) -> Iterable[Cells]:
    way = (route["host"], route["path"], route["app"])
    if not route["machines"]:
        yield (*way, "none routable", "", "")
    for machine in route["machines"]:
        yield (*way, machine["machine"], machine["region"], machine["address"])


def _machine_rows(machine: dict[str, Any]) -> Iterable[Cells]:
    checks = ", ".join(f"{check['name']} {check['status']}" for check in machine["checks"]) or "-"
    goal, failing = machine["goal"], machine["failing"]
    state = machine["state"]
    if goal is not None and goal["state"] != state:
        state += f" (to be {goal['state']})"
    state += " cordoned" if machine["cordoned"] else ""
    verdict = machine["verdict"] + (f"; {machine['problem']}" if machine["problem"] else "")
    if failing is not None:
        workers = failing["workers"]
        verdict += f"; {count_of(failing['failures'], 'failure')} in a row, " + (
            f"left out by {count_of(workers, 'worker')} here" if workers else "to be tried again"
        )
    version = str(machine["version"] or "-")
    where = (machine[key] for key in ("region", "node", "address"))
    yield (
        machine["machine"],
        machine["app"],
        version,
        *where,
        state,
        _since(machine["since_ms"]),
        checks,
        verdict,
    )


def _check_rows(check: dict[str, Any]) -> Iterable[Cells]:
    when, output = _since(check["updated_ms"]), check["output"]
    if check["last_ms_ago"] is not None:
        when, output = format_ago(check["last_ms_ago"]), check["last_output"]
    keys = ("machine", "name", "status")
    yield (*(check[key] for key in keys), _since(check["since_ms"]), check["node"], when, output)


def _node_rows(node: dict[str, Any]) -> Iterable[Cells]:
    heard = "self" if node["self"] else format_ago(node["heard_ms_ago"])
    rtt = "-" if node["rtt_ms"] is None else f"{node['rtt_ms']:.1f} ms"
    region, address, software = (node[key] or "-" for key in ("region", "address", "software"))
    yield (node["node"], region, node["state"], heard, rtt, address, software)


def _region_rows(region: dict[str, Any]) -> Iterable[Cells]:
    rtt = "-" if region["rtt_ms"] is None else f"{region['rtt_ms']:.1f} ms"
    routable = f"{region['routable']}/{region['machines']}"
    name, order, nodes = region["name"] or "-", str(region["order"]), str(region["nodes"])
    yield (order, region["region"], name, rtt, region["rtt_from"], nodes, routable)


def _app_rows(app: dict[str, Any]) -> Iterable[Cells]:
    yield (app["app"], ", ".join(app["hosts"]) or "-", f"{app['routable']}/{app['machines']}")


def format_ago(ms: float | None) -> str:
    """Return for a person how long ago something was."""
    if ms is None:
        return "never"
    return f"{format_duration(ms)} ago"


def format_duration(ms: float) -> str:
    """Return for a person how long something takes or took."""
    for unit, size in (("d", 86_400_000), ("h", 3_600_000), ("min", 60_000)):
        if ms >= 2 * size:
            return f"{ms / size:.0f} {unit}"
    return f"{ms / 1000:.1f} s"


def _since(at_ms: int) -> str:
    """Return how long ago a time of a row was, by the clock of this machine."""
    return format_ago(max(0.0, time.time() * 1000 - at_ms)) if at_ms else "-"


_LISTINGS: dict[str, tuple[str, Cells, Callable[[dict[str, Any]], Iterable[Cells]]]] = {
    "routes": (
        "show where requests may go now",
        ("HOST", "PATH", "APP", "MACHINE", "REGION", "ADDRESS"),
        _route_rows,
    ),
    "machines": (
        "show every machine",
        ("MACHINE", "APP", "VERSION", "REGION", "NODE", "ADDRESS", "STATE", "SINCE", "CHECKS", "VERDICT"),
        _machine_rows,
    ),
    "checks": (
        "show every check with its last output",
        ("MACHINE", "CHECK", "STATUS", "SINCE", "BY", "WHEN", "OUTPUT"),
        _check_rows,
    ),
    "nodes": (
        "show every node",
        ("NODE", "REGION", "STATE", "HEARD", "RTT", "PROXY", "SOFTWARE"),
        _node_rows,
    ),
    "regions": (
        "show every region in use, nearest first",
        ("ORDER", "REGION", "NAME", "RTT", "FROM", "NODES", "ROUTABLE"),
        _region_rows,
    ),
    "apps": ("show every app", ("APP", "HOSTS", "ROUTABLE"), _app_rows),
}
