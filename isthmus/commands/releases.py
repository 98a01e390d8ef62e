"""`isthmus releases`: what was deployed, when, by whom, and what became of it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import orjson

from isthmus.client import add_asking_flags, make_client
from isthmus.commands.listing import format_table

if TYPE_CHECKING:
    import argparse

_HEADER = ("APP", "VERSION", "RELEASE", "STATUS", "STRATEGY", "MACHINES", "WHEN", "BY", "NODE", "PROBLEM")


def add_parser(verbs: Any) -> None:
    """Add `releases`."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "releases", help="show the releases of an app, or of all, the newest first"
    )
    parser.add_argument("app", metavar="APP", nargs="?", default="")
    add_asking_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Fetch and print."""
    releases = make_client(args).get(f"/v1/releases?app={quote(args.app, safe='')}")
    if args.json:
        print(orjson.dumps(releases, option=orjson.OPT_INDENT_2).decode())
    else:
        of = f" of {args.app}" if args.app else ""
        print(format_table(_HEADER, map(_cells, releases)) if releases else f"no releases{of} yet")
    return 0


def _cells(release: dict[str, Any]) -> tuple[str, ...]:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(release["created_ms"] / 1000))
    names = ("app", "version", "release", "status", "strategy")
    told = (str(release[name]) or "-" for name in names)
    ends = (release["created_by"] or "-", release["node"], release["problem"] or "-")
    return (*told, str(len(release["machines"])), when, *ends)
