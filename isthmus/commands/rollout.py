"""`isthmus rollout`: settings or tables for all nodes, some first, watched, then all, or back."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from isthmus.client import ClientError, add_asking_flags, make_client, quote
from isthmus.commands.deploy import find_whoami
from isthmus.commands.listing import format_ago, format_table
from isthmus.logs import escape

if TYPE_CHECKING:
    import argparse

    from isthmus.client import AdminClient

_LOOK_S = 0.2
# An agent that takes up other tables is away for a moment, or for as long as that takes.
_AWAY_S = 60.0


def add_parser(verbs: Any) -> None:
    """Add `rollout` and its actions."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "rollout",
        help="have all nodes take up settings or tables, some of them first",
        description="List what was rolled out to all nodes, or roll out more: one node takes it up and is "
        "watched, then others, then all. If it does harm to one of them, all go back.",
    )
    add_asking_flags(parser)
    parser.set_defaults(run=run_list)
    actions = parser.add_subparsers(metavar="ACTION")
    for kind, what in (("config", "settings as TOML"), ("schema", "a schema file with all tables of yours")):
        begin = actions.add_parser(kind, help=f"roll out {what}")
        begin.add_argument("file", metavar="FILE", type=Path, help=f"{what}; - for standard input")
        begin.add_argument(
            "--bake", metavar="SECONDS", type=float, default=30.0, help="how long each step is watched (30)"
        )
        begin.add_argument(
            "--canary",
            metavar="NODE",
            action="append",
            default=[],
            help="a node of the first step (one of the region that gets changes first)",
        )
        begin.add_argument("--dry-run", action="store_true", help="only say what would be done")
        begin.add_argument("--detach", action="store_true", help="do not wait for the end")
        add_asking_flags(begin)
        begin.set_defaults(run=run_begin, kind=kind)
    for name, act, help_text in (
        ("show", run_show, "show how one goes, and what is in it"),
        ("cancel", run_cancel, "have all nodes go back"),
        ("retry", run_retry, "have nodes that could not take up what all others have try once more"),
    ):
        action = actions.add_parser(name, help=help_text)
        action.add_argument("rollout", metavar="ID", help="as `isthmus rollout` shows it")
        add_asking_flags(action)
        action.set_defaults(run=act)


def run_list(args: argparse.Namespace) -> int:
    """Print all rollouts, the newest first."""
    rollouts = make_client(args).get("/v1/rollouts")
    if args.json:
        _print_json(rollouts)
    elif not rollouts:
        print("nothing was rolled out yet")
    else:
        print(format_table(["ID", "KIND", "BEGUN", "BY", "STATUS", "NODES", "WHY"], map(_row, rollouts)))
    return 0


def run_begin(args: argparse.Namespace) -> int:
    """Begin a rollout, and look on."""
    order: dict[str, Any] = {"kind": args.kind, "body": _read(args.file), "bake_s": args.bake}
    order |= {"canaries": args.canary, "by": find_whoami(), "dry_run": args.dry_run}
    client = make_client(args)
    rollout = client.post("/v1/rollouts", order)
    if args.dry_run or args.detach:
        if args.json:
            _print_json(rollout)
        else:
            _tell_plan(rollout)
            print("nothing was begun" if args.dry_run else f"under way: isthmus rollout show {rollout['id']}")
        return 0
    if not args.json:
        _tell_plan(rollout)
    return _follow(client, rollout["id"], is_json=args.json)


def run_show(args: argparse.Namespace) -> int:
    """Print one rollout."""
    rollout = make_client(args).get(f"/v1/rollouts/{quote(args.rollout)}")
    if args.json:
        _print_json(rollout)
        return 0
    _tell_plan(rollout)
    for node in rollout["nodes"]:
        print(_tell_node(node))
    print(_tell_end(rollout) if rollout["finished_ms"] else "it goes on")
    print(f"\n{rollout['body'].rstrip()}")
    return 0


def run_cancel(args: argparse.Namespace) -> int:
    """Have all nodes go back."""
    return _act(args, f"cancel?by={quote(find_whoami())}", "all nodes go back")


def run_retry(args: argparse.Namespace) -> int:
    """Have nodes that failed try again."""
    return _act(args, "retry", "nodes that failed try again")


def _act(args: argparse.Namespace, action: str, told: str) -> int:
    rollout = make_client(args).post(f"/v1/rollouts/{quote(args.rollout)}/{action}")
    if args.json:
        _print_json(rollout)
    else:
        print(told)
    return 0


def _row(rollout: dict[str, Any]) -> list[str]:
    ago = format_ago(time.time() * 1000 - rollout["created_ms"])
    told = [rollout["created_by"], rollout["status"], _count(rollout), rollout["reason"]]
    return [rollout["id"], rollout["kind"], ago, *told]


def _read(file: Path) -> str:
    try:
        return sys.stdin.read() if str(file) == "-" else file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ClientError(f"{file}: {getattr(error, 'strerror', None) or error}") from None


def _follow(client: AdminClient, id_: str, *, is_json: bool) -> int:
    """Print what nodes say until the rollout is over; returns the exit code."""
    told: dict[str, Any] = {}
    lost = 0.0
    try:
        while True:
            try:
                seen = client.get(f"/v1/rollouts/{id_}")
                lost = 0.0
            except ClientError:
                lost = lost or time.monotonic()
                if time.monotonic() - lost > _AWAY_S:
                    raise
                time.sleep(_LOOK_S)
                continue
            for node in seen["nodes"]:
                if told.get(node["node"]) != node["state"]:
                    told[node["node"]] = node["state"]
                    print(orjson.dumps(node).decode() if is_json else _tell_node(node), flush=True)
            if seen["finished_ms"]:
                del seen["body"]
                print(orjson.dumps(seen).decode() if is_json else _tell_end(seen))
                return 0 if seen["status"] == "done" else 1
            time.sleep(_LOOK_S)
    except KeyboardInterrupt:
        sys.stderr.write(
            f"it goes on; isthmus rollout show {id_} says how, isthmus rollout cancel {id_} ends it\n"
        )
        return 130


def _tell_plan(rollout: dict[str, Any]) -> None:
    bake_s = rollout["bake_ms"] / 1000
    print(f"rollout {rollout['id']} of {rollout['kind']}, each step watched for {bake_s:g} s")
    for text in rollout.get("plan", ()):
        print(f"  {escape(text)}")
    for number, step in enumerate(rollout["steps"], 1):
        print(f"  step {number}: {', '.join(step)}")


def _tell_node(node: dict[str, Any]) -> str:
    at = time.strftime("%H:%M:%S", time.localtime(node["at_ms"] / 1000))
    detail = f": {escape(node['detail'])}" if node["detail"] else ""
    return f"{at}  {node['node']} is {node['state']}{detail}"


def _tell_end(rollout: dict[str, Any]) -> str:
    if rollout["status"] == "done":
        return f"rollout {rollout['id']} is done"
    return f"rollout {rollout['id']} goes back on all nodes: {escape(rollout['reason'])}"


def _count(rollout: dict[str, Any]) -> str:
    good = sum(node["state"] == "good" for node in rollout["nodes"])
    failed = [node["node"] for node in rollout["nodes"] if node["state"] == "failed"]
    return f"{good} good" + (f", failed: {', '.join(failed)}" if failed else "")


def _print_json(data: Any) -> None:
    print(orjson.dumps(data, option=orjson.OPT_INDENT_2).decode())
