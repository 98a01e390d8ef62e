"""`isthmus doctor`: what would hurt in what runs, before it does.

Decides how findings are told, and the exit code. Refuses to know what is wrong: that is for the rules.
Invariant: nothing is changed by it, and what a rule could not know is not held for good.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import orjson

from isthmus.client import ClientError, add_client_flags, make_client
from isthmus.doctor.facts import ProbeFacts, Snapshot
from isthmus.doctor.finding import Diagnosis, Severity, diagnose
from isthmus.doctor.rules import RULES
from isthmus.logs import escape
from isthmus.wording import count_of

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

NEVER = "never"
# All probes of one node together: 200 of 5 s, 20 at a time.
PROBE_S = 60.0
# A million machines.
GATHER_S = 60.0


def add_parser(verbs: Any) -> None:
    """Add `doctor`."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "doctor",
        help="find what one fault would bring down, and what is wrong already",
        description="Ask a node what it knows, and tell what one fault would bring down, what is wrong "
        "already, and what mends it. Exits with 1 when anything is as bad as --fail-on, else with 0.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--fail-on",
        choices=(*(severity.word for severity in Severity), NEVER),
        default=Severity.WARNING.word,
        help="what makes it exit with 1 [warning]",
    )
    parser.add_argument(
        "--probe",
        action="store_true",
        help="have the node send its checks to a path that nothing serves, to see whether they can fail",
    )
    parser.add_argument(
        "--ignore",
        metavar="RULE[:SUBJECT]",
        action="append",
        default=[],
        help="leave out what a rule finds, everywhere or of one subject; may be repeated",
    )
    add_client_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Ask, judge, print."""
    _check_ignored(args.ignore)
    client = make_client(args)
    try:
        snapshot = msgspec.convert(client.get("/v1/facts", wait_s=GATHER_S), Snapshot)
        if args.probe:
            probes = msgspec.convert(client.post("/v1/facts/probe", wait_s=PROBE_S), tuple[ProbeFacts, ...])
            snapshot = msgspec.structs.replace(snapshot, probes=probes)
    except msgspec.ValidationError as error:
        raise ClientError(f"the node runs another version, whose facts are not understood: {error}") from None
    found = [one for one in diagnose(snapshot, RULES) if not _is_ignored(one, args.ignore)]
    if args.json:
        told = {"node": snapshot.node, "at_ms": snapshot.now_ms, "findings": [one.as_json() for one in found]}
        print(orjson.dumps(told, option=orjson.OPT_INDENT_2).decode())
    else:
        print("\n".join(format_diagnoses(snapshot, found)))
    if args.fail_on == NEVER:
        return 0
    return int(any(one.finding.severity >= Severity[args.fail_on.upper()] for one in found))


def _check_ignored(ignored: Sequence[str]) -> None:
    """Refuse names that no rule has: a typo must not hide, and not pretend to hide."""
    known = {rule.name for rule in RULES}
    for said in ignored:
        name = said.partition(":")[0]
        if name not in known:
            raise ClientError(f"--ignore: there is no rule `{name}`; there are {', '.join(sorted(known))}")


def _is_ignored(one: Diagnosis, ignored: Sequence[str]) -> bool:
    return one.rule in ignored or f"{one.rule}:{one.finding.subject}" in ignored


def format_diagnoses(snapshot: Snapshot, found: Sequence[Diagnosis]) -> Iterator[str]:
    """Yield the lines for a person, the worst first."""
    parts = ((snapshot.present, "node"), (snapshot.apps, "app"), (snapshot.machines, "machine"))
    counts = ", ".join(count_of(len(part), noun) for part, noun in parts)
    yield escape(f"as node {snapshot.node} has it: {counts}")
    for one in found:
        finding = one.finding
        guess = " (a guess)" if finding.guess else ""
        yield ""
        yield escape(f"{finding.severity.word.upper():<9} {finding.subject}: {finding.problem}{guess}")
        yield escape(f"  why     {finding.why}")
        yield escape(f"  hits    {finding.blast}")
        yield escape(f"  mend    {finding.mend}")
        yield escape(f"  rule    {one.rule}")
    yield ""
    tally = [(sum(one.finding.severity is severity for one in found), severity.word) for severity in Severity]
    told = ", ".join(f"{count} {word}" for count, word in reversed(tally) if count) or "nothing"
    quiet = len(RULES) - len({one.rule for one in found})
    yield f"found: {told}; {quiet} of {len(RULES)} rules found nothing"
    if snapshot.probes is None:
        yield "whether checks can fail at all was not tried: --probe"
