"""`isthmus app add|remove`: what the cluster serves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from isthmus.client import add_client_flags, make_client, quote
from routing.options import PROXY_PROTOCOLS

if TYPE_CHECKING:
    import argparse


def add_parser(verbs: Any) -> None:
    """Add `app` with its actions."""
    parser: argparse.ArgumentParser = verbs.add_parser("app", help="add or remove an app")
    actions = parser.add_subparsers(metavar="ACTION", required=True)

    add = actions.add_parser("add", help="add an app, or change what leads to it")
    add.add_argument("app", metavar="NAME")
    add.add_argument("--host", metavar="HOST", action="append", help="a host name, `*.suffix` or `*` (any)")
    add.add_argument("--path-prefix", metavar="PATH", help="serve only below this path")
    add.add_argument(
        "--machine", metavar="HOST:PORT", action="append", help="a machine of it; may be repeated"
    )
    add.add_argument("--check", metavar="PATH", help="probe each machine at this path")
    add.add_argument(
        "--soft-limit", metavar="N", type=int, help="requests in flight before others are preferred"
    )
    add.add_argument(
        "--hard-limit", metavar="N", type=int, help="requests in flight that a machine never exceeds"
    )
    add.add_argument(
        "--proxy-protocol", choices=PROXY_PROTOCOLS, help="tell machines the client with a PROXY header"
    )
    add_client_flags(add)
    add.set_defaults(run=run_add)

    remove = actions.add_parser("remove", help="remove an app and its machines")
    remove.add_argument("app", metavar="NAME")
    add_client_flags(remove)
    remove.set_defaults(run=run_remove)


def run_add(args: argparse.Namespace) -> int:
    """Add the app."""
    body: dict[str, Any] = {"name": args.app}
    for key in ("path_prefix", "soft_limit", "hard_limit", "proxy_protocol"):
        if getattr(args, key) is not None:
            body[key] = getattr(args, key)
    if args.host:
        body["hosts"] = args.host
    if args.machine:
        body["machines"] = [{"address": address} for address in args.machine]
    if args.check:
        body["checks"] = [{"path": args.check}]
    answer = make_client(args).post("/v1/apps", body)
    print(f"app {answer['app']}")
    for machine in answer["machines"]:
        print(f"machine {machine}")
    return 0


def run_remove(args: argparse.Namespace) -> int:
    """Remove the app."""
    make_client(args).delete(f"/v1/apps/{quote(args.app)}")
    print(f"app {args.app} removed")
    return 0
