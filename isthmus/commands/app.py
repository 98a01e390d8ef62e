"""`isthmus app add|set|remove`: what the cluster serves."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from isthmus.client import ClientError, add_client_flags, make_client, quote, tell_warnings
from routing.options import PROXY_PROTOCOLS
from routing.scaling import AUTOSTOPS, NAMES

# As in the configuration.
HANDLERS = {"tls,http": ["tls", "http"], "tls": ["tls"], "none": []}


def add_parser(verbs: Any) -> None:
    """Add `app` with its actions."""
    parser: argparse.ArgumentParser = verbs.add_parser("app", help="add, change or remove an app")
    actions = parser.add_subparsers(metavar="ACTION", required=True)

    add = actions.add_parser("add", help="add an app, or change what leads to it")
    add.add_argument("app", metavar="NAME")
    add.add_argument(
        "--host",
        metavar="HOST",
        action="append",
        help="a host name, `*.suffix` or `*` (any, as for a new app without one)",
    )
    add.add_argument("--path-prefix", metavar="PATH", help="serve only below this path")
    add.add_argument(
        "--machine", metavar="HOST:PORT", action="append", help="a machine of it; may be repeated"
    )
    _add_options(add)
    add_client_flags(add)
    add.set_defaults(run=run_add)

    change = actions.add_parser("set", help="change what the proxy does for an app; the rest stays")
    change.add_argument("app", metavar="NAME")
    _add_options(change)
    change.add_argument("--no-maintenance", action="store_true", help="serve the app again")
    change.add_argument(
        "--keep-header", metavar="NAME", action="append", help="no longer add, replace or remove it"
    )
    add_client_flags(change)
    change.set_defaults(run=run_set)

    remove = actions.add_parser("remove", help="remove an app and its machines")
    remove.add_argument("app", metavar="NAME")
    add_client_flags(remove)
    remove.set_defaults(run=run_remove)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--check", metavar="PATH", help="probe each machine at this path")
    parser.add_argument(
        "--soft-limit", metavar="N", type=int, help="requests in flight before others are preferred"
    )
    parser.add_argument(
        "--hard-limit", metavar="N", type=int, help="requests in flight that a machine never exceeds"
    )
    parser.add_argument(
        "--proxy-protocol", choices=PROXY_PROTOCOLS, help="tell machines the client with a PROXY header"
    )
    parser.add_argument(
        "--response-header",
        metavar="'NAME: VALUE'",
        action="append",
        help="add to each answer, in place of what the app says; may be repeated",
    )
    parser.add_argument(
        "--remove-header", metavar="NAME", action="append", help="remove from each answer; may be repeated"
    )
    parser.add_argument(
        "--force-https",
        action=argparse.BooleanOptionalAction,
        help="send requests without TLS to the same place over it",
    )
    parser.add_argument(
        "--compression",
        action=argparse.BooleanOptionalAction,
        help="compress answers of suitable types for clients that take that",
    )
    parser.add_argument(
        "--handlers",
        choices=HANDLERS,
        metavar="HANDLERS",
        help="what is done to connections: `tls,http`, as usual; `tls`: ended, and bytes passed on; "
        "`none`: bytes as they are",
    )
    parser.add_argument(
        "--autostart",
        action=argparse.BooleanOptionalAction,
        help="have requests start machines with a driver",
    )
    parser.add_argument(
        "--autostop", choices=AUTOSTOPS, help="what is done with machines with a driver that nobody needs"
    )
    parser.add_argument(
        "--min-machines-running",
        metavar="N",
        type=int,
        help="so many in the primary region are never stopped",
    )
    parser.add_argument("--primary-region", metavar="CODE", help="where that minimum counts")
    parser.add_argument(
        "--sticky",
        metavar="KIND:NAME",
        help="keep clients to a machine, by cookie:NAME, header:NAME or set:NAME (our own cookie); or none",
    )
    parser.add_argument(
        "--slow-start-ms", metavar="N", type=int, help="until a machine that is new gets its whole share"
    )
    parser.add_argument(
        "--panic-percent",
        metavar="N",
        type=int,
        help="with fewer machines healthy than this, of 100, checks are ignored",
    )
    parser.add_argument(
        "--maintenance", metavar="FILE", help="answer all requests with 503 and this page, HTML or text"
    )


def _read_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the flags say, as the API takes it."""
    options: dict[str, Any] = {"checks": [{"path": args.check}]} if args.check else {}
    headers: dict[str, Any] = dict.fromkeys(args.remove_header or (), False)
    for line in args.response_header or ():
        name, colon, value = line.partition(":")
        if not colon:
            raise ClientError(f"--response-header: `{line}` is not of the form NAME: VALUE")
        headers.setdefault(name, []).append(value.strip())
    if headers:
        options["response_headers"] = headers
    if args.proxy_protocol:
        options["proxy_protocol"] = args.proxy_protocol
    if args.force_https is not None:
        options["force_https"] = args.force_https
    if args.handlers:
        options["handlers"] = HANDLERS[args.handlers]
    if args.compression is not None:
        options["compression"] = args.compression
    if args.sticky is not None:
        options["sticky"] = _read_sticky(args.sticky)
    names = (*NAMES, "soft_limit", "hard_limit", "slow_start_ms", "panic_percent")
    options |= {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.maintenance:
        try:
            options["maintenance"] = Path(args.maintenance).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ClientError(f"--maintenance: cannot read {args.maintenance}: {error}") from None
    return options


def _read_sticky(text: str) -> dict[str, Any]:
    kind, _, name = text.partition(":")
    said: dict[str, Any] = {"cookie": name, "set": True} if kind == "set" else {kind: name}
    if text == "none":
        return {}
    if kind not in {"cookie", "header", "set"} or not name:
        raise ClientError(f"--sticky: `{text}` is none of cookie:NAME, header:NAME, set:NAME, none")
    return said


def run_set(args: argparse.Namespace) -> int:
    """Change options of the app."""
    changes = _read_options(args)
    if args.keep_header:
        changes.setdefault("response_headers", {}).update(dict.fromkeys(args.keep_header))
    if args.no_maintenance:
        changes["maintenance"] = None
    if "sticky" in changes:
        # What is said takes the place of all that was, and is not added to it.
        changes["sticky"] = dict.fromkeys(("cookie", "header", "set")) | changes["sticky"]
    tell_warnings(make_client(args).post(f"/v1/apps/{quote(args.app)}/options", changes))
    print(f"app {args.app} changed")
    return 0


def run_add(args: argparse.Namespace) -> int:
    """Add the app."""
    body: dict[str, Any] = {"name": args.app}
    client = make_client(args)
    if args.path_prefix is not None:
        body["path_prefix"] = args.path_prefix
    if args.host:
        body["hosts"] = args.host
    elif args.path_prefix is None and any(
        app["app"] == args.app and app["hosts"] for app in client.get("/v1/apps")
    ):
        body["hosts"] = []  # it keeps those that it has, and does not become that of all others
    if args.machine:
        body["machines"] = [{"address": address} for address in args.machine]
    body |= _read_options(args)
    answer = client.post("/v1/apps", body)
    tell_warnings(answer)
    print(f"app {answer['app']}")
    for machine in answer["machines"]:
        print(f"machine {machine}")
    return 0


def run_remove(args: argparse.Namespace) -> int:
    """Remove the app."""
    make_client(args).delete(f"/v1/apps/{quote(args.app)}")
    print(f"app {args.app} removed")
    return 0
