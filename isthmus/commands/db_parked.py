"""`isthmus db parked`: the changesets that a node holds and could not apply, and what to do with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

from isthmus.client import add_asking_flags, make_client, quote
from isthmus.commands.listing import format_table
from isthmus.logs import escape

if TYPE_CHECKING:
    import argparse


def add_parked_parser(actions: Any) -> None:
    """Add `parked` with its actions to those of `db`."""
    parked: argparse.ArgumentParser = actions.add_parser(
        "parked", help="list the changesets that could not be applied, try them again, or give one up"
    )
    add_asking_flags(parked)
    parked.set_defaults(run=run_list)
    steps = parked.add_subparsers(metavar="ACTION")

    retry = steps.add_parser("retry", help="try all of them now, instead of with the next round")
    add_asking_flags(retry)
    retry.set_defaults(run=run_retry)

    drop = steps.add_parser("drop", help="give one up on this node")
    drop.add_argument("site", metavar="SITE", help="who wrote it")
    drop.add_argument("version", metavar="VERSION", type=int, help="its number")
    add_asking_flags(drop)
    drop.set_defaults(run=run_drop)


def run_list(args: argparse.Namespace) -> int:
    """Print what is parked, the oldest first."""
    answer = make_client(args).get("/v1/db/parked")
    if args.json:
        print(orjson.dumps(answer, option=orjson.OPT_INDENT_2).decode())
    else:
        rows = [
            [entry["site"], str(entry["version"]), str(entry["bytes"]), escape(entry["reason"])]
            for entry in answer["parked"]
        ]
        print(format_table(["SITE", "VERSION", "BYTES", "REASON"], rows) if rows else "nothing is parked")
    return 0


def run_retry(args: argparse.Namespace) -> int:
    """Try them, and say how many remain."""
    answer = make_client(args).post("/v1/db/parked/retry")
    print(orjson.dumps(answer).decode() if args.json else f"{answer['parked']} still parked")
    return 0


def run_drop(args: argparse.Namespace) -> int:
    """Give one up."""
    answer = make_client(args).delete(f"/v1/db/parked/{quote(args.site)}/{args.version}")
    print(
        orjson.dumps(answer).decode()
        if args.json
        else f"version {args.version} of site {args.site} is given up on this node"
    )
    return 0
