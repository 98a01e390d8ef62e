"""`isthmus deploy` and `isthmus rollback`: begin one on a node, and look on until it is over."""

from __future__ import annotations

import getpass
import socket
import sys
import time
from typing import TYPE_CHECKING, Any

import orjson

from isthmus.client import ClientError, add_client_flags, make_client, number_type, quote
from isthmus.logs import escape

if TYPE_CHECKING:
    import argparse

    from isthmus.client import AdminClient

STRATEGIES = ("rolling", "canary", "bluegreen")
SECONDS = number_type(0, 86_400)
LOOK_S = 0.2
# An agent that is restarted goes on with its deploys; so long it may be away.
AWAY_S = 60.0
_COLOURS = {"complete": "32", "rolled back": "33", "failed": "31", "abandoned": "31"}
# What a stage of a step waits for, as it is told on a terminal.
_WAITS = {
    "ready": "until machines are ready",
    "known": "until all nodes know",
    "watch": "watching",
    "drain": "until old machines have finished",
}


def add_parser(verbs: Any) -> None:
    """Add `deploy` and `rollback`."""
    deploy: argparse.ArgumentParser = verbs.add_parser(
        "deploy",
        help="bring another release of an app into service, and back if it does not work",
        description="Bring another release of an app into service: some machines at a time, each gated by "
        "its checks. When one fails, all goes back by itself. The node that is asked conducts it, so it goes "
        "on when this terminal is gone.",
    )
    deploy.add_argument("app", metavar="APP")
    deploy.add_argument("release", metavar="RELEASE", nargs="?", default="", help="a tag or an image")
    deploy.add_argument(
        "--machine",
        metavar="HOST:PORT[@REGION]",
        action="append",
        default=[],
        help="a machine that runs the release already, in place of those that serve; may be repeated",
    )
    deploy.add_argument("--strategy", choices=STRATEGIES, help="how it takes over (rolling)")
    deploy.add_argument("--follow", action="store_true", help="look on at the one that runs")
    deploy.add_argument("--cancel", action="store_true", help="have the one that runs go back")
    _add_flags(deploy)
    deploy.set_defaults(run=run_deploy)

    rollback: argparse.ArgumentParser = verbs.add_parser(
        "rollback",
        help="bring an earlier release of an app back",
        description="Bring an earlier release back, by a deploy: with the same steps and the same checks.",
    )
    rollback.add_argument("app", metavar="APP")
    rollback.add_argument(
        "version",
        metavar="VERSION",
        nargs="?",
        type=number_type(0, 10**9, int),
        default=0,
        help="which one (the one before)",
    )
    rollback.add_argument("--strategy", choices=STRATEGIES, help="how it takes over (rolling)")
    _add_flags(rollback)
    rollback.set_defaults(run=run_rollback)


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-unavailable",
        metavar="N",
        type=number_type(0.001, 1_000_000),
        help="machines at a time, or a share below 1 (a third)",
    )
    parser.add_argument(
        "--timeout",
        metavar="S",
        type=SECONDS,
        dest="ready_s",
        help="seconds for machines to get ready (300)",
    )
    parser.add_argument(
        "--watch",
        metavar="S",
        type=SECONDS,
        dest="watch_s",
        help="seconds that new machines are watched with requests (2; canary and bluegreen 10)",
    )
    parser.add_argument(
        "--drain",
        metavar="S",
        type=SECONDS,
        dest="drain_s",
        help="seconds for old machines without a driver to finish what they have (10)",
    )
    parser.add_argument("--detach", action="store_true", help="do not look on")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each line")
    add_client_flags(parser)


def run_deploy(args: argparse.Namespace) -> int:
    """Begin, cancel or follow a deploy."""
    client = make_client(args)
    if args.cancel:
        release = client.post(f"/v1/deploys/{quote(args.app)}/cancel?by={quote(find_whoami())}")
        return _follow(client, release, args)
    if args.follow:
        return _follow(client, client.get(f"/v1/releases/{quote(args.app)}/last"), args)
    machines = [_parse_machine(text) for text in args.machine]
    return _begin(client, args, {"release": args.release, "machines": machines})


def run_rollback(args: argparse.Namespace) -> int:
    """Begin a rollback."""
    return _begin(make_client(args), args, {"to": args.version})


def _parse_machine(text: str) -> dict[str, str]:
    address, _, region = text.partition("@")
    return {"address": address, **({"region": region} if region else {})}


def find_whoami() -> str:
    """Return who asks for a change, for those who look at it later: in ASCII, as the node wants it."""
    try:
        who = f"{getpass.getuser()}@{socket.gethostname()}"
    except (KeyError, OSError):
        who = socket.gethostname()
    return who.encode("ascii", "replace").decode()[:128]


def _begin(client: AdminClient, args: argparse.Namespace, order: dict[str, Any]) -> int:
    names = ("strategy", "max_unavailable", "ready_s", "watch_s", "drain_s")
    order |= {"app": args.app, "by": find_whoami()}
    order |= {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return _follow(client, client.post("/v1/deploys", order), args)


def _follow(client: AdminClient, release: dict[str, Any], args: argparse.Namespace) -> int:
    """Print what is done until the release is over; returns the exit code."""
    app, version = release["app"], release["version"]
    if args.detach:
        print(f"release {version} of {app} is under way: isthmus deploy {app} --follow")
        return 0
    screen = _Screen(is_json=args.json)
    after, lost = 0, 0.0
    try:
        while True:
            try:
                seen = client.get(f"/v1/releases/{quote(app)}/{version}?after={after}")
                lost = 0.0
            except ClientError:
                lost = lost or time.monotonic()
                if time.monotonic() - lost > AWAY_S:
                    raise
                time.sleep(LOOK_S)
                continue
            if seen["node"] != release["node"]:
                raise ClientError(
                    f"release {version} of {app} was begun on node {seen['node']} at the same moment, with "
                    f"{seen['release']}; this one was given up, so deploy again"
                )
            for line in seen["lines"]:
                after = max(after, line["number"])
                screen.tell(line)
            if seen["finished_ms"]:
                return screen.end(seen)
            screen.show(seen)
            time.sleep(LOOK_S)
    except KeyboardInterrupt:
        screen.clear()
        sys.stderr.write(
            f"release {version} of {app} goes on; isthmus deploy {app} --follow looks on, --cancel ends it\n"
        )
        return 130


class _Screen:
    """Lines of progress; on a terminal with one below them that says where it is."""

    def __init__(self, *, is_json: bool) -> None:
        self._is_json = is_json
        self._is_live = not is_json and sys.stdout.isatty()
        self._started = time.monotonic()

    def clear(self) -> None:
        if self._is_live:
            sys.stdout.write("\r\x1b[K")
            sys.stdout.flush()

    def tell(self, line: dict[str, Any]) -> None:
        """Print what was done."""
        self.clear()
        if self._is_json:
            print(orjson.dumps(line).decode(), flush=True)
            return
        at = time.strftime("%H:%M:%S", time.localtime(line["at_ms"] / 1000))
        print(f"{at}  {escape(line['text'])}", flush=True)

    def show(self, release: dict[str, Any]) -> None:
        """Say on a terminal what is waited for."""
        if self._is_live:
            back = ", going back" if release["status"] == "rolling back" else ""
            step = f"{min(release['batch'] + 1, release['batches'])}/{release['batches']}"
            passed = time.monotonic() - self._started
            waits = _WAITS.get(release["stage"], "preparing")
            sys.stdout.write(f"\r\x1b[K… step {step}{back}: {waits} ({passed:.0f} s)")
            sys.stdout.flush()

    def end(self, release: dict[str, Any]) -> int:
        """Say what became of it."""
        self.clear()
        status = release["status"]
        if self._is_json:
            print(orjson.dumps({key: release[key] for key in release if key != "lines"}).decode())
        else:
            shown = f"\x1b[{_COLOURS[status]}m{status}\x1b[0m" if self._is_live else status
            problem = f": {escape(release['problem'])}" if release["problem"] else ""
            print(f"release {release['version']} of {release['app']} is {shown}{problem}")
        return 0 if status == "complete" else 1
