"""`isthmus status`: how the node itself fares, and what of that needs somebody.

Decides what of all that a node says goes into a few lines. Refuses to know what else may hurt: that is for
`isthmus doctor`. Invariant: without a problem to tell it says so, and what it says is as the node has it.
"""

from __future__ import annotations

import time
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import orjson

from isthmus.client import add_asking_flags, make_client
from isthmus.commands.listing import format_ago, format_duration
from isthmus.logs import escape
from isthmus.wording import count_of

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

Shown = dict[str, Any]

# Of many; --json and the other verbs have all.
_PROBLEMS_SHOWN = 12
# What membership says of a node that does not take part, though nobody has taken it out.
_MISSING = {"suspect": "does not answer", "dead": "is dead", "unknown": "has a row, but is no member"}


def add_parser(verbs: Any) -> None:
    """Add `status`."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "status",
        help="show how the node itself fares",
        description="Show how the node itself fares: its processes, whom it hears, how old what it knows is, "
        "and what needs somebody. --json has more, with counters.",
    )
    add_asking_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Fetch and print."""
    client = make_client(args)
    status = client.get("/v1/status")
    if args.json:
        print(orjson.dumps(status, option=orjson.OPT_INDENT_2).decode())
        return 0
    nodes, apps = client.get("/v1/nodes"), client.get("/v1/apps")
    for name, value in describe_status(status, nodes, apps, time.time() * 1000):
        print(f"{name:<9} {escape(value)}")
    return 0


def describe_status(
    status: Shown, nodes: Sequence[Shown], apps: Sequence[Shown], now_ms: float
) -> Iterator[tuple[str, str]]:
    """Yield what there is to tell, each with its name."""
    own = next((node for node in nodes if node["self"]), None)
    up = f", up {format_duration(max(0, now_ms - own['started_ms']))}" if own and own["started_ms"] else ""
    yield "node", f"{status['node']}, region {status['region']}, {status['software']}{up}"
    yield "workers", f"{len(status['workers_following'])} of {_count_workers(status)} follow the table"
    expected = [node for node in nodes if node["state"] != "left"]
    left = f", {len(nodes) - len(expected)} left" if len(expected) < len(nodes) else ""
    yield "nodes", f"{sum(node['state'] == 'alive' for node in expected)} of {len(expected)} alive{left}"
    yield "table", _tell_age(status["replication"], nodes)
    machines, routable = (sum(app[key] for app in apps) for key in ("machines", "routable"))
    yield "serves", f"{count_of(len(apps), 'app')}, {routable} of {count_of(machines, 'machine')} routable"
    running = status["rollout"]["running"]
    if running is not None:
        yield "rollout", f"{running['kind']} {running['id']} is under way"
    problems = list(find_problems(status, nodes, apps)) or ["none; `isthmus doctor` looks deeper"]
    if len(problems) > _PROBLEMS_SHOWN:
        problems[_PROBLEMS_SHOWN:] = [f"and {len(problems) - _PROBLEMS_SHOWN} more"]
    yield from zip_longest(("problems",), problems, fillvalue="")


def find_problems(status: Shown, nodes: Sequence[Shown], apps: Sequence[Shown]) -> Iterator[str]:
    """Yield what needs somebody, the worst first."""
    if status["replication"]["read_only"]:
        yield f"takes no writes: {status['replication']['read_only']}"
    following, expected = len(status["workers_following"]), _count_workers(status)
    if following < expected:
        yield f"{count_of(expected - following, 'worker')} of {expected} on an old table, or not running"
    for app in apps:
        if app["machines"] and not app["routable"]:
            yield f"app {app['app']} is down: none of its {count_of(app['machines'], 'machine')} is routable"
    for node in nodes:
        if node["state"] in _MISSING:
            yield f"node {node['node']} {_MISSING[node['state']]}"
    yield from _find_in_replication(status["replication"])
    yield from _find_in_changes(status)


def _find_in_replication(replication: Shown) -> Iterator[str]:
    if replication["site_conflict"] is not None:
        yield f"node {replication['site_conflict']['name']} runs with the same site id: one is a copy"
    if replication["schema_problem"]:
        yield f"schema: {replication['schema_problem']}"
    if replication["own_versions_lost"]:
        lost = count_of(replication["own_versions_lost"], "version")
        yield f"the database file is old: only others had {lost} of its own"
    if replication["parked"]:
        yield f"{count_of(replication['parked'], 'changeset')} could not be applied: isthmus db parked"
    if replication["deferred"]:
        yield f"what was written to {', '.join(replication['deferred'])} waits for its limit of writes"


def _find_in_changes(status: Shown) -> Iterator[str]:
    lifecycle = status["lifecycle"]
    for what in ("reload", "upgrade"):
        if lifecycle[f"{what}_problem"]:
            yield f"the last {what} was refused: {lifecycle[f'{what}_problem']}"
    if lifecycle["kept"]:
        yield f"still with its former settings: {lifecycle['kept']}"
    for row in status["rejected_rows"]:
        yield f"a row of {row['table']} cannot be used: {', '.join(row['key'])}: {row['reason']}"
    if status["staged"]["quarantined"]:
        count = count_of(status["staged"]["quarantined"], "change")
        yield f"{count} of the table did harm and wait: isthmus staged"
    for id_ in status["rollout"]["failed"]:
        yield f"this node could not take up {id_}: isthmus rollout show {id_}"


def _count_workers(status: Shown) -> int:
    workers: int = status["workers"]
    return max(1, workers)  # with 0, the one process follows


def _tell_age(replication: Shown, nodes: Sequence[Shown]) -> str:
    """Return how old the oldest part of the table is, and what is known to be missing."""
    ages = [(n["staleness_ms"], n["node"]) for n in nodes if n["state"] == "alive" and not n["self"]]
    unknown = [name for age, name in ages if age is None]
    known = [(age, name) for age, name in ages if age is not None]
    told = "no other node writes to it"
    if unknown:
        told = f"not known yet how old what {unknown[0]} writes is"
    elif known:
        age, name = max(known)
        told = f"has all that others wrote until {format_ago(age)} ({name})"
    gaps = [gap for site in replication["sites"].values() for gap in site["gaps"]]
    missing = sum(last - first + 1 for first, last in gaps)
    waiting = replication["apply_queue"]
    if missing or waiting:
        told += f"; {count_of(missing, 'changeset')} missing, {waiting} to be applied"
    return told
