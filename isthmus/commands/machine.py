"""`isthmus machine add|remove|start|stop|suspend|drain|cordon|uncordon`: the instances of apps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from isthmus.client import add_client_flags, make_client, number_type, quote
from routing.catalog import WEIGHT_MAX

if TYPE_CHECKING:
    import argparse

_ACTIONS = {
    "start": "take requests; one with a driver is started",
    "stop": "finish what is in flight and take no more requests; one with a driver is stopped",
    "suspend": "as stop, but its driver keeps what it has in memory",
    "drain": "finish what is in flight and take no more requests; it goes on running",
    "cordon": "take no new requests, stay as it is otherwise",
    "uncordon": "take new requests again",
}


def add_parser(verbs: Any) -> None:
    """Add `machine` with its actions."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "machine", help="add, remove, start, stop, suspend, drain or cordon a machine"
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)

    add = actions.add_parser("add", help="add a machine, owned and checked by the node that is asked")
    add.add_argument("app", metavar="APP")
    add.add_argument("address", metavar="HOST:PORT")
    add.add_argument("--id", metavar="ID", help="its id (made from node, app and address)")
    add.add_argument("--region", metavar="CODE", help="where it is (the node's region)")
    add.add_argument("--driver", metavar="NAME", help="what of the node's drivers starts and stops it")
    add.add_argument(
        "--weight", metavar="N", type=number_type(1, WEIGHT_MAX, int), help="its share of requests (100)"
    )
    add_client_flags(add)
    add.set_defaults(run=run_add)

    remove = actions.add_parser("remove", help="remove a machine")
    remove.add_argument("machine", metavar="ID")
    add_client_flags(remove)
    remove.set_defaults(run=run_remove)

    for action, help_text in _ACTIONS.items():
        change = actions.add_parser(action, help=help_text)
        change.add_argument("machine", metavar="ID")
        add_client_flags(change)
        change.set_defaults(run=run_change, action=action)


def run_add(args: argparse.Namespace) -> int:
    """Add the machine."""
    body = {"app": args.app, "address": args.address}
    keys = ("id", "region", "driver", "weight")
    body.update({key: getattr(args, key) for key in keys if getattr(args, key)})
    print(f"machine {make_client(args).post('/v1/machines', body)['machine']}")
    return 0


def run_remove(args: argparse.Namespace) -> int:
    """Remove the machine."""
    make_client(args).delete(f"/v1/machines/{quote(args.machine)}")
    print(f"machine {args.machine} removed")
    return 0


def run_change(args: argparse.Namespace) -> int:
    """Do one of _ACTIONS; one that a driver has to carry out is only under way then."""
    answer = make_client(args).post(f"/v1/machines/{quote(args.machine)}/{args.action}")
    rest = (
        f" (asked of {answer['asked']}; `isthmus machines` shows when it is done)" if answer["asked"] else ""
    )
    print(f"machine {args.machine}: {args.action}{rest}")
    return 0
