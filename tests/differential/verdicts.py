"""What became of a case in a few words, so that two proxies can be compared.

The words are about what a machine and a client saw, never about how it was written: order and case of
fields, and the fields that each proxy adds of its own, say nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tests.differential.peers import Lane
    from tests.fakes.machine import Request
    from tests.hostile.answers import Answer
    from tests.hostile.requests import Case

# Said by the proxies themselves about the client and the connection.
_OWN = frozenset(
    b"x-forwarded-for x-forwarded-proto x-forwarded-port x-forwarded-ssl x-real-ip via connection host "
    b"content-length transfer-encoding x-request-start keep-alive".split()
)
_OWN_PREFIX = b"fly-"
FORGED = b"6.6.6.6"


class Arrived(NamedTuple):
    """One request as a machine got it."""

    line: bytes
    host: bytes
    framing: bytes
    body: bytes
    fields: tuple[tuple[bytes, bytes], ...]
    forged: bool  # what the client said of itself came through
    trailers: bool


class Verdict(NamedTuple):
    """What became of one case at one proxy."""

    statuses: tuple[int, ...]
    arrived: tuple[Arrived, ...]
    after: str


def read_arrived(request: Request) -> Arrived:
    fields = []
    for line in request.head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        lower = name.lower()
        if name and lower not in _OWN and not lower.startswith(_OWN_PREFIX):
            fields.append((lower, value.strip()))
    framing = b"".join((*request.values(b"transfer-encoding"), *request.values(b"content-length")))
    host = b", ".join(request.values(b"host"))
    return Arrived(
        request.line,
        host,
        framing,
        request.body,
        tuple(sorted(fields)),
        FORGED in request.head,
        bool(request.trailers),
    )


async def judge_request(lane: Lane, case: Case) -> Verdict:
    statuses, requests, after = await lane.ask(case.raw)
    return Verdict(tuple(statuses), tuple(map(read_arrived, requests)), after)


def describe(verdict: Verdict, base: Verdict | None = None) -> str:
    """Put a verdict in words; with a base, those in which it differs from that come along."""
    final = [status for status in verdict.statuses if status >= 200]
    if not verdict.arrived:
        return f"{final[0]}, {verdict.after}" if final else "cut without an answer"
    count = len(verdict.arrived)
    words = ["served" if count == 1 else f"{count} served"]
    errors = [status for status in final if status >= 400]
    if errors:
        words.append(f"then {errors[0]}")
    if base is not None and base.arrived:
        words += compare(base.arrived[0], verdict.arrived[0])
    return ", ".join([*words, verdict.after])


def compare(ours: Arrived, theirs: Arrived) -> list[str]:
    words = []
    if ours.line != theirs.line:
        words.append("another request line")
    if ours.host != theirs.host:
        words.append("another Host")
    if ours.framing != theirs.framing:
        words.append("another framing")
    if ours.body != theirs.body:
        words.append("another body")
    mine, others = dict(ours.fields), dict(theirs.fields)
    lost, more = sorted(mine.keys() - others.keys()), sorted(others.keys() - mine.keys())
    changed = sorted(name for name in mine.keys() & others.keys() if mine[name] != others[name])
    forged = theirs.forged and not ours.forged
    if forged:
        words.append("forged address passed")
    for kind, names in (("without", lost), ("with", more), ("another value of", changed)):
        if names and not forged:
            words.append(f"{kind} {', '.join(name.decode('latin-1') for name in names)}")
    if theirs.trailers:
        words.append("trailers passed")
    return words


async def judge_answer(lane: Lane, case: Answer) -> str:
    """What a client gets of a machine's answer, and whether the next request still gets its own."""
    lane.raw = case.raw
    statuses, _, after = await lane.ask(b"GET /case HTTP/1.1\r\nHost: app.test\r\n\r\n")
    answers = lane.answers
    head, _, body = answers.partition(b"\r\n\r\n")
    while head[9:10] == b"1" and body.startswith(b"HTTP/"):
        head, _, body = body.partition(b"\r\n\r\n")
    if b"poison" in answers:
        return "poisoned"
    final = [status for status in statuses if status >= 200]
    if not final:
        return "cut without an answer" if 101 not in statuses else "101"
    words = [str(final[0])]
    head = head.lower()
    if final[0] in {204, 304}:
        pass  # nothing follows, whatever the head says
    elif b"transfer-encoding: chunked" in head and b"\r\n0\r\n" not in b"\r\n" + body:
        words.append("cut")
    elif b"\r\ncontent-length: " in head and after == "closed":
        length = int(head.partition(b"\r\ncontent-length: ")[2].split(b"\r\n")[0] or b"0")
        if len(body) < length:
            words.append("cut")
    return ", ".join([*words, after])
