"""`isthmus scale`: how many machines an app has, and in which regions."""

from __future__ import annotations

import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import orjson

from isthmus.client import add_asking_flags, make_client, number_type, quote
from isthmus.commands.listing import format_table

if TYPE_CHECKING:
    import argparse

# A driver may take its time for each machine that it makes.
_MAKE_S = 600.0


def add_parser(verbs: Any) -> None:
    """Add `scale` with its actions."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "scale", help="change how many machines an app has, and where"
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    count = actions.add_parser(
        "count",
        help="have so many machines, spread over regions",
        description="Have so many machines in all, spread over the regions as evenly as can be. Those that "
        "are missing are started, or made by their driver; those that are too many are stopped and kept out.",
    )
    count.add_argument("count", metavar="N", type=number_type(0, 1_000, int))
    count.add_argument("--app", metavar="APP", help="which app (the only one, if there is one)")
    count.add_argument("--region", metavar="CODE,CODE", help="where (where it has machines)")
    count.add_argument("--dry-run", action="store_true", help="only say what would be done")
    add_asking_flags(count)
    count.set_defaults(run=run_count)
    show = actions.add_parser("show", help="show how many machines there are by region")
    show.add_argument("--app", metavar="APP", help="which app (all)")
    add_asking_flags(show)
    show.set_defaults(run=run_show)


def run_count(args: argparse.Namespace) -> int:
    """Scale, and print what was done; fails when something is left for a person to do."""
    client = make_client(args)
    app = args.app
    if app is None:
        apps = [found["app"] for found in client.get("/v1/apps")]
        if len(apps) != 1:
            sys.stderr.write(f"isthmus: which app? --app {'|'.join(apps) or 'NAME'}\n")
            return 2
        (app,) = apps
    regions = [code.strip() for code in (args.region or "").split(",") if code.strip()]
    wish = {"count": args.count, "regions": regions, "dry_run": args.dry_run}
    answer = client.post(f"/v1/apps/{quote(app)}/scale", wish, wait_s=_MAKE_S)
    if args.json:
        print(orjson.dumps(answer, option=orjson.OPT_INDENT_2).decode())
    else:
        for change in answer["changes"]:
            print(f"{change['region']}: {change['done']} {change['machine']}".rstrip())
        if not answer["changes"] and not answer["advice"]:
            print("nothing to do")
        for line in answer["advice"]:
            sys.stderr.write(f"{line}\n")
    return 1 if answer["advice"] else 0


def run_show(args: argparse.Namespace) -> int:
    """Print how many machines are in which state, by app and region."""
    machines = make_client(args).get("/v1/machines")
    counts: Counter[tuple[str, str, str]] = Counter()
    for machine in machines:
        if args.app in {None, machine["app"]}:
            state = "cordoned" if machine["cordoned"] else machine["state"]
            counts[machine["app"], machine["region"], state] += 1
    shown = [
        {"app": app, "region": region, "state": state, "machines": count}
        for (app, region, state), count in sorted(counts.items())
    ]
    if args.json:
        print(orjson.dumps(shown, option=orjson.OPT_INDENT_2).decode())
        return 0
    rows = [tuple(str(value) for value in row.values()) for row in shown]
    print(format_table(("APP", "REGION", "STATE", "MACHINES"), rows) if rows else "no machines yet")
    return 0
