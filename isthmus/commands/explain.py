"""`isthmus explain`: why a request would go where it goes, and the proof that has a real one explained.

Decides how an explanation is laid out for a person. Invariant: what is printed is what the node says; nothing
of it is worked out here, and nothing in it drives the terminal.
"""

from __future__ import annotations

import urllib.parse
from typing import TYPE_CHECKING, Any

import orjson

from isthmus.client import ClientError, add_asking_flags, make_client, number_type
from isthmus.commands.listing import format_ago, format_table
from isthmus.logs import escape

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Iterator

_LABEL_CHARS = 10
# Of a list of options; --json has the rest.
_OPTION_CHARS_MAX = 300
_CHOSEN_NAMED_MAX = 4


def add_parser(verbs: Any) -> None:
    """Add `explain`."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "explain",
        help="say where a request would go, and why",
        description="Ask a node what it would do with a request: the route, the app and its options, every "
        "machine with what speaks for or against it, and how old what is known of it is.",
    )
    parser.add_argument("url", metavar="URL", help="of the request, as a client has it")
    parser.add_argument(
        *("-H", "--header"), metavar="LINE", action="append", default=[], help="a field of the request"
    )
    parser.add_argument("-X", "--method", metavar="METHOD", default="GET", help="of the request [GET]")
    parser.add_argument(
        "--from", metavar="REGION", dest="region", default="", help="where it comes in [region of the node]"
    )
    parser.add_argument(
        "--sign",
        action="store_true",
        help="print a header that has requests to this host answered with lines `Isthmus-Trace`",
    )
    parser.add_argument(
        "--ttl",
        metavar="SECONDS",
        type=number_type(1, 3_600, int),
        default=300,
        help="with --sign: how long it is good for [300]",
    )
    add_asking_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Ask, and print."""
    client = make_client(args)
    if args.sign:
        url = args.url if "//" in args.url else f"//{args.url}"
        try:
            host = urllib.parse.urlsplit(url).netloc.rpartition("@")[2]
        except ValueError as error:
            raise ClientError(f"`{args.url}` is no URL: {error}") from None
        proof = client.post("/v1/explain/proof", {"host": host, "ttl_s": args.ttl})
        print(_dump(proof) if args.json else f"{proof['header']}: {proof['value']}")
        return 0
    question = {"url": args.url, "method": args.method, "headers": args.header, "from": args.region}
    answer = client.post("/v1/explain", question)
    print(_dump(answer) if args.json else "\n".join(format_explanation(answer)))
    return 0


def format_explanation(told: dict[str, Any]) -> Iterator[str]:
    """Yield the lines for a person."""
    asked = told["question"]
    yield escape(f"{asked['method']} {asked['url']} from {asked['from']}, as node {told['node']} has it")
    yield ""
    yield from _format_path(told)
    if told["tiers"]:
        yield ""
        yield format_table(
            ("TIER", "REGION", "RTT", "FROM", "ROOM", "MACHINES"), map(_tier_cells, told["tiers"])
        )
    if told["machines"]:
        yield ""
        header = ("MACHINE", "REGION", "NODE", "SHARE", "LOAD", "WEIGHT", "CHECKS", "AGE", "VERDICT")
        yield format_table(header, map(_machine_cells, told["machines"]))
    yield ""
    outcome = told["outcome"]
    yield escape(f"-> {_name_result(told)}" + (f" [{outcome['code']}]" if outcome["code"] else ""))
    yield escape(f"   {outcome['why']}")
    old = {node: ms for node, ms in told["staleness_ms"].items() if ms is None or ms > 0}
    if old:
        yield escape("   what other nodes wrote is known as of: " + ", ".join(_ages(old)))


def _name_result(told: dict[str, Any]) -> str:
    """Return what becomes of the request; where there is a choice, among whom."""
    outcome = told["outcome"]
    chosen = [machine["machine"] for machine in told["machines"] if machine["share"]]
    if outcome["result"] != "machine":
        return f"{outcome['result']} {outcome.get('machine', '')}".strip()
    if len(chosen) > _CHOSEN_NAMED_MAX:
        return f"one of {len(chosen)} machines in {outcome['region']}"
    return " or ".join(chosen) or str(outcome["machine"])


def _format_path(told: dict[str, Any]) -> Iterator[str]:
    """Yield what the request passes before a machine is chosen."""
    route, app, service = told["route"], told["app"], told["service"]
    if route is None:
        is_refused = told["outcome"]["result"] == "refused"
        yield _line("route", "not looked for" if is_refused else "no app is served under this host and path")
    else:
        by = f" (declared by {route['by']})" if route["by"] else ""
        yield _line("route", f"{route['hostname']} {route['path']} -> {route['app']}{by}")
    if app is not None and app["network"] is not None:
        yield _line("app", f"{app['app']}, network {app['network']}")
    if service is not None:
        port = "any port" if not service["port"] else f"port {service['port']}"
        to = f" -> {service['internal_port']}" if service["internal_port"] else ""
        hard = "none" if service["hard_limit"] is None else service["hard_limit"]
        limits = f"soft limit {service['soft_limit']}, hard limit {hard}, by {service['concurrency']}"
        yield _line("service", f"{port}{to}, {limits}")
        options = ", ".join(
            name if value is True else f"{name} {orjson.dumps(value).decode()}"
            for name, value in told["options"].items()
        )
        yield _line("options", options[:_OPTION_CHARS_MAX] or "as usual")
    if told["wish"]:
        said = (f"{name} {','.join(v) if isinstance(v, list) else v}" for name, v in told["wish"].items())
        yield _line("wish", ", ".join(said))


def _line(label: str, text: str) -> str:
    return escape(f"{label.ljust(_LABEL_CHARS)}{text}")


def _tier_cells(tier: dict[str, Any]) -> tuple[str, ...]:
    order = "-" if tier["order"] is None else str(tier["order"])
    rtt = "-" if tier["rtt_ms"] is None else f"{tier['rtt_ms']:.1f} ms"
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in tier["verdicts"].items())
    return order, tier["region"], rtt, tier["rtt_from"], f"{tier['with_room']}/{tier['machines']}", verdicts


def _machine_cells(machine: dict[str, Any]) -> tuple[str, ...]:
    share = f"{machine['share'] * 100:.0f} %" if machine["share"] else "-"
    checks = ", ".join(f"{check['name']} {check['status']}" for check in machine["checks"]) or "-"
    verdict, left_out = machine["verdict"], machine["left_out"]
    if left_out is not None and left_out["workers"]:
        verdict += f"; {left_out['workers']} workers here leave it out"
        verdict += f" after {left_out['failures']} failures in a row"
    keys = (machine[key] for key in ("machine", "region", "node"))
    load, weight = str(machine["load"]), str(machine["weight"])
    return *keys, share, load, weight, checks, format_ago(machine["staleness_ms"]), verdict


def _ages(staleness: dict[str, int | None]) -> Iterable[str]:
    return (f"{node} {format_ago(ms)}" for node, ms in sorted(staleness.items()))


def _dump(answer: Any) -> str:
    return orjson.dumps(answer, option=orjson.OPT_INDENT_2).decode()
