"""`isthmus staged`: changes that are held back from workers, and what to do with one that kills them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import orjson

from isthmus.client import add_asking_flags, make_client, quote
from isthmus.commands.listing import format_ago, format_table
from isthmus.wording import count_of

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

# Of a change of many rows; --json has them all.
_ROWS_SHOWN = 3


def add_parser(verbs: Any) -> None:
    """Add `staged` with its actions."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "staged",
        help="list changes that are held back from workers; release or drop one",
        description="List the changes of apps, hostnames, services and regions that workers of this node do "
        "not have yet, or are not to have because they died of them.",
    )
    add_asking_flags(parser)
    parser.set_defaults(run=run_list)
    actions = parser.add_subparsers(metavar="ACTION")
    for name, act, help_text in (
        ("release", run_release, "have all nodes try a change again that workers died of"),
        ("drop", run_drop, "write back what was there before a change"),
    ):
        action = actions.add_parser(name, help=help_text)
        action.add_argument("change", metavar="ID", help="as `isthmus staged` shows it")
        add_asking_flags(action)
        action.set_defaults(run=act)


def run_list(args: argparse.Namespace) -> int:
    """Print what is held back, the oldest first."""
    answer = make_client(args).get("/v1/staged")
    if args.json:
        print(orjson.dumps(answer, option=orjson.OPT_INDENT_2).decode())
        return 0
    rows = [line for change in answer["changes"] for line in _lines(change)]
    print(format_table(["ID", "WRITTEN", "BY", "STATE", "WHAT"], rows) if rows else "nothing is held back")
    if not answer["bake_ms"]:
        print("staging.bake_ms is 0: workers of this node get all changes at once")
    return 0


def run_release(args: argparse.Namespace) -> int:
    """Take back what nodes say of a change."""
    answer = make_client(args).post(f"/v1/staged/{quote(args.change)}/release")
    print(orjson.dumps(answer).decode() if args.json else "released: all nodes try it again in their turn")
    return 0


def run_drop(args: argparse.Namespace) -> int:
    """Undo a change everywhere."""
    answer = make_client(args).post(f"/v1/staged/{quote(args.change)}/drop")
    rows = f"{count_of(answer['rows'], 'row')} {'is' if answer['rows'] == 1 else 'are'}"
    print(orjson.dumps(answer).decode() if args.json else f"{rows} as before the change")
    return 0


def _lines(change: dict[str, Any]) -> Iterator[Sequence[str]]:
    written = format_ago(max(0, time.time() * 1000 - change["written_ms"]))
    state = change["state"]
    if change["due_in_ms"] and state == "waiting":
        state += f", {change['due_in_ms'] / 1000:.0f} s more"
    what = [f"{row['change']} {row['table']} {_key(row['key'])}" for row in change["rows"]]
    shown = "; ".join(what[:_ROWS_SHOWN]) + ("; …" if len(what) > _ROWS_SHOWN else "")
    yield change["id"], written, change["writer"] or change["site"][:8], state, shown
    for one in change["accusers"]:
        since = format_ago(max(0, time.time() * 1000 - one["since_ms"]))
        yield "", since, one["node"], one["status"], f"{one['reason']} ({one['deaths']} times)"


def _key(key: Sequence[Any]) -> str:
    return ", ".join(map(str, key))
