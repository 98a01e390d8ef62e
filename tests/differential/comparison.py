"""The corpus through all three proxies, and the page that says where they disagree and why."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tests.differential import reasons
from tests.differential.peers import ask_all, read_version, running
from tests.differential.verdicts import describe, judge_answer, judge_request
from tests.hostile import answers, requests

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.differential.reasons import Reason

PAGE = Path(__file__).resolve().parents[2] / "docs" / "differences.md"
PEERS = {"nginx": "nginx", "haproxy": "HAProxy"}
CASES = [
    *(*requests.REFUSED, *requests.SERVED, *requests.TOO_LARGE),
    *(case._replace(raw=requests.chunked_with(case.raw)) for case in requests.BROKEN_CHUNKS),
]
ANSWERS = [*answers.BROKEN, *answers.SERVED, *answers.CUT]
_EXAMPLE_CHARS = 60
INTRODUCTION = """\
# Where isthmus does otherwise than nginx and HAProxy

Made by `python -m tests.differential` from a run, and compared with one in the tests; the reasons are in
`tests/differential/reasons.py`. Versions: {versions}, both set up as they usually are.

The same {requests} requests and {answers} answers of machines (`tests/hostile/`), most of them malformed,
go through all three to a machine that records what arrives. Compared are the status or that none came,
each request that arrived (line, Host, framing, body, fields but those that proxies add), and whether the
connection carried another request. nginx does the same as isthmus in {nginx_requests} requests and
{nginx_answers} answers, HAProxy in {haproxy_requests} and {haproxy_answers}. All others are below, with
how many cases it is about. `2 served` means that the request behind the first one was taken for one too;
`kept` and `closed` are about the client's connection.

A status of isthmus says what it does not serve: 405 a method, 414 and 431 a size, 417 an expectation, 501
a transfer coding, 505 a version. The others often have 400 there, or one of their own.
"""


class Disagreement(NamedTuple):
    """One case in which a peer does otherwise than isthmus."""

    peer: str
    about: str
    raw: bytes
    ours: str
    theirs: str


class Comparison(NamedTuple):
    """What came of one run."""

    versions: str
    requests: list[Disagreement]
    answers: list[Disagreement]
    same: Counter[str]  # cases in which a peer does the same, by peer and side


def name_versions() -> str:
    return ", ".join(f"{shown} {read_version(peer)}" for peer, shown in PEERS.items())


async def compare() -> Comparison:
    """Run all cases through all proxies."""
    asked, answered = {}, {}
    with tempfile.TemporaryDirectory(prefix="isthmus-differential-") as folder:
        for name in ("isthmus", *PEERS):
            async with running(name, Path(folder)) as lanes:
                asked[name] = await ask_all(lanes, CASES, judge_request)
                answered[name] = await ask_all(lanes, ANSWERS, judge_answer)
    same: Counter[str] = Counter()
    differ: tuple[list[Disagreement], list[Disagreement]] = ([], [])
    for peer in PEERS:
        for case, ours, theirs in zip(CASES, asked["isthmus"], asked[peer], strict=True):
            if peer in reasons.UNSTEADY and reasons.UNSTEADY[peer] in case.raw:
                continue
            words, others = describe(ours), describe(theirs, ours)
            if words == others:
                same[f"{peer}_requests"] += 1
            else:
                differ[0].append(Disagreement(peer, case.about, case.raw, words, others))
        for answer, ours, theirs in zip(ANSWERS, answered["isthmus"], answered[peer], strict=True):
            if ours == theirs:
                same[f"{peer}_answers"] += 1
            else:
                differ[1].append(Disagreement(peer, answer.about, answer.raw, ours, theirs))
    return Comparison(name_versions(), *differ, same)


def find_unexplained(comparison: Comparison) -> list[str]:
    """Return the disagreements without a reason, and the reasons without a disagreement."""
    found = []
    for known, disagreements in (
        (reasons.REQUESTS, comparison.requests),
        (reasons.ANSWERS, comparison.answers),
    ):
        used: set[Reason] = set()
        for d in disagreements:
            reason = reasons.find(known, d.about, d.ours, d.theirs)
            if reason is None:
                found.append(f"{d.about}: {d.raw[:80]!a}: isthmus {d.ours!r}, {PEERS[d.peer]} {d.theirs!r}")
            else:
                used.add(reason)
        found += [f"no case for the reason {reason[:3]}" for reason in known if reason not in used]
    return found


def render(comparison: Comparison) -> str:
    """Write the page."""
    lines = INTRODUCTION.format(
        versions=comparison.versions, requests=len(CASES), answers=len(ANSWERS), **comparison.same
    ).splitlines()
    for title, known, disagreements in (
        ("Requests", reasons.REQUESTS, comparison.requests),
        ("Answers of machines", reasons.ANSWERS, comparison.answers),
    ):
        lines += ["", f"## {title}", "", "| class | for example | isthmus | nginx | HAProxy | why |"]
        lines.append("|---|---|---|---|---|---|")
        groups: dict[tuple[str, Reason | None], list[Disagreement]] = {}
        for d in disagreements:
            groups.setdefault((d.about, reasons.find(known, d.about, d.ours, d.theirs)), []).append(d)
        for (about, reason), group in sorted(groups.items(), key=lambda item: (item[0][0], item[1][0].raw)):
            why = "**unexplained**" if reason is None else reason.why
            cells = [about, show(group[0].raw), "; ".join(sorted({d.ours for d in group}))]
            cells += [tell(d.theirs for d in group if d.peer == peer) for peer in PEERS]
            lines.append(f"| {' | '.join(cells)} | {why} |")
    return "\n".join(lines) + "\n"


def tell(verdicts: Iterable[str]) -> str:
    """Write verdicts with how often they occur."""
    counts = sorted(Counter(verdicts).items())
    return "; ".join(f"{escape(words)} ({count})" for words, count in counts) or "the same"


def escape(text: str) -> str:
    """Keep a text from being taken for markup or for the end of a cell."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;").replace("*", "&#42;")


def show(raw: bytes) -> str:
    """Write the part of a message that makes the case, as it would be typed."""
    text = ascii(raw.replace(b"Host: app.test\r\n", b"", 1).replace(b"Content-Length: 0\r\n", b""))[2:-1]
    text = text.replace("POST / HTTP/1.1\\r\\n", "… ").replace("GET / HTTP/1.1\\r\\n", "… ")
    text = text.replace("HTTP/1.1 200 OK\\r\\n", "… ")
    text = text if len(text) <= _EXAMPLE_CHARS else text[:_EXAMPLE_CHARS] + "…"
    return f"<code>{escape(text)}</code>"
