"""Why isthmus does otherwise than nginx or HAProxy: every disagreement has one of these.

A reason is for the cases of a class whose verdicts match its patterns (`fnmatch`); the first that does
counts. One that nothing matches any more is an error too.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import NamedTuple


class Reason(NamedTuple):
    about: str
    ours: str
    theirs: str
    why: str


REQUESTS = [
    Reason(
        "*", "[45]*", "[45]*",
        "Refused by all, with another status.",
    ),
    Reason(
        "CL and TE", "400*", "served*",
        "HAProxy drops Content-Length where there is a Transfer-Encoding, as RFC 9112 allows. isthmus "
        "refuses: nobody sends both by accident, and whoever stands in front may have counted by the "
        "other one.",
    ),
    Reason(
        "CL twice", "400*", "*served*",
        "HAProxy folds equal values into one (RFC 9112 section 6.3). isthmus refuses; a proxy in front "
        "may have folded otherwise.",
    ),
    Reason(
        "CL malformed", "400*", "*served*",
        "White space around a length is legal. isthmus refuses more of it than one space, since parsers "
        "differ in what they strip.",
    ),
    Reason(
        "TE other", "400*", "*served*",
        "White space around `chunked`, a fold that makes the field part of another one, a bare LF that "
        "begins a field, or HTTP/1.0: each is a known way to hide the field from one of two parsers.",
    ),
    Reason(
        "framing by Connection", "400*", "*served*",
        "Naming a framing field or Host in Connection asks the next proxy to drop it. The others ignore "
        "that; isthmus takes it for the attack that it is.",
    ),
    Reason(
        "bare LF", "400*", "served*",
        "RFC 9112 lets a recipient take LF for CRLF; two that differ in it can be played against each "
        "other.",
    ),
    Reason(
        "control bytes", "400*", "served*",
        "Both pass most control bytes on as part of a value, HAProxy a NUL too. isthmus refuses all but "
        "tab.",
    ),
    Reason(
        "field syntax", "400*", "served*",
        "HAProxy joins folded lines (RFC 9112 section 5.2 leaves the choice); nginx drops a field without "
        "a colon.",
    ),
    Reason(
        "bytes in names", "400*", "served*",
        "nginx drops such a field in silence, HAProxy takes a tab for a fold. isthmus refuses, so that "
        "nobody wonders where it went.",
    ),
    Reason(
        "request line", "400*", "served*",
        "More than one space, white space or bytes beyond ASCII in the target, a fragment, another "
        "scheme: whoever splits the line otherwise sees another target.",
    ),
    Reason(
        "version", "400*", "served*",
        "HTTP/0.9, which has neither heads nor an end of answers.",
    ),
    Reason(
        "version", "505*", "served*",
        "A minor version above 1, or another protocol's: isthmus speaks 1.0 and 1.1 and promises no more.",
    ),
    Reason(
        "blank lines", "400*", "served*",
        "One empty line before a request is forgiven (RFC 9112 section 2.2); more are somebody's "
        "leftovers.",
    ),
    Reason(
        "method", "405*", "served*",
        "HAProxy passes any token, CONNECT and TRACE too, nginx some. isthmus opens no tunnels by "
        "CONNECT, reflects nothing by TRACE, and serves the methods that its parser knows, in capitals "
        "only.",
    ),
    Reason(
        "Host", "400*", "served*",
        "Two Hosts, none, or one that is no host: routing goes by it, so it has to be exactly one name "
        "and port.",
    ),
    Reason(
        "Host", "served*", "400*",
        "nginx does not strip a tab behind the name. It is legal white space.",
    ),
    Reason(
        "Host", "served*", "served, another Host*",
        "nginx's `$host` is in lower case and without port and final dot. isthmus passes on what came, "
        "and compares as nginx does.",
    ),
    Reason(
        "absolute form", "served*", "400*",
        "HAProxy insists that Host and authority are equal and that there is a path, and nginx knows no "
        "`*`. RFC 9112 section 3.2.2 has the authority win and Host rewritten.",
    ),
    Reason(
        "absolute form", "served*", "served, another*",
        "HAProxy passes the absolute form on, nginx takes Host from elsewhere. Machines of isthmus always "
        "get the origin form, with the authority as Host.",
    ),
    Reason(
        "paths", "served*", "400*",
        "nginx refuses paths that climb above the root or hold a NUL. isthmus forwards them as they came, "
        "and normalises for the choice of an app alone.",
    ),
    Reason(
        "Expect", "417*", "served*",
        "The others ignore expectations that they do not know. RFC 9110 section 10.1.1 has 417 for them.",
    ),
    Reason(
        "Expect", "*served*", "*served, with expect*",
        "HAProxy passes the expectation on though no body waits for it.",
    ),
    Reason(
        "Expect", "*served*", "*served, without expect*",
        "nginx answers 100 by itself; isthmus lets the machine decide.",
    ),
    Reason(
        "HTTP/1.0", "*served*", "*another request line*",
        "HAProxy passes the version on. isthmus speaks HTTP/1.1 to machines, as a proxy is to.",
    ),
    Reason(
        "HTTP/1.0", "served*", "400*",
        "HAProxy refuses an upgrade in HTTP/1.0. RFC 9110 section 7.8 has it ignored.",
    ),
    Reason(
        "*", "*served*", "*another framing*",
        "nginx collects a body before it forwards it and so knows its length, and HAProxy sends a POST "
        "without a body as it came; isthmus streams, and says `Content-Length: 0` (RFC 9110 section 8.6).",
    ),
    Reason(
        "chunked", "*served*", "*trailers passed*",
        "HAProxy passes trailers on, also those that name framing or the client. isthmus checks their "
        "form and drops them.",
    ),
    Reason(
        "identity", "served*", "*forged*",
        "The others remove what they are told to remove. isthmus removes all that an application could "
        "take for the proxy's word, with underscores for dashes too.",
    ),
    Reason(
        "hop by hop", "served*", "served, with*",
        "The others pass on some fields that end at a proxy (RFC 9110 section 7.6.1).",
    ),
    Reason(
        "upgrade", "*served*", "*with*",
        "The others pass on Upgrade or HTTP2-Settings of a request that is not upgraded. isthmus removes "
        "both; h2c is never tunnelled.",
    ),
    Reason(
        "upgrade", "*served*", "400*",
        "HAProxy refuses h2c among the protocols; isthmus serves the request without an upgrade (RFC 9110 "
        "section 7.8).",
    ),
    Reason(
        "upgrade", "400*", "served*",
        "An upgrade to WebSocket with a body, or by POST: what follows could be either side's.",
    ),
    Reason(
        "values", "served*", "served, without*",
        "nginx drops names with other than letters, digits, dashes. All these characters are legal.",
    ),
    Reason(
        "size", "4*", "served*",
        "Other limits: isthmus allows 100 fields and a URL of 8 KiB by default.",
    ),
    Reason(
        "chunk size", "400*", "*served*",
        "White space, leading or behind the size, and line ends that are not CRLF are taken by the "
        "others; extensions with control bytes too.",
    ),
    Reason(
        "chunk data", "400*", "*served*",
        "LF for CRLF behind a chunk or the last one.",
    ),
    Reason(
        "trailers", "400*", "*served*",
        "The others do not look closely at what they drop or pass on.",
    ),
]  # fmt: skip

ANSWERS = [
    Reason(
        "informational", "502*", "101*",
        "nginx relays a 101 that nobody asked for. Behind it the client would take any bytes for the "
        "answer.",
    ),
    Reason(
        "informational", "502*", "200*",
        "A hundred 100s before the answer; isthmus gives up after 16.",
    ),
    Reason(
        "informational", "502*", "cut*",
        "nginx takes a 1xx with a body for HTTP/0.9 or gives up without a word.",
    ),
    Reason(
        "plain", "200, kept", "200, closed",
        "HAProxy closes behind an answer that ends with the machine's connection; isthmus makes chunks of "
        "it and keeps the client.",
    ),
    Reason(
        "response framing", "502*", "20*",
        "The others take one of two framings, ignore codings that they do not know, or strip what the "
        "status forbids. What they took for the body may be an answer to somebody else.",
    ),
    Reason(
        "response framing", "502*", "cut*",
        "nginx has passed the head on when it finds that the body is wrong, and so it has nothing left "
        "but to cut. isthmus looks at what came with the head first; later it cuts as well.",
    ),
    Reason(
        "response head", "502*", "[29]*",
        "Statuses, versions, control bytes and folded lines that no client should have to make sense of; "
        "nginx and HAProxy pass on or drop many of them.",
    ),
    Reason(
        "response head", "502*", "cut*",
        "What does not begin like HTTP/1 is taken for HTTP/0.9, and relayed, or cut.",
    ),
]  # fmt: skip


# By peer, parts of requests that it takes in one run and refuses in the next; they are not compared.
UNSTEADY = {"haproxy": b"0\r\nA : b\r\n\r\n"}


def find(reasons: list[Reason], about: str, ours: str, theirs: str) -> Reason | None:
    """Return the reason for one disagreement, or None: it is unexplained."""
    for reason in reasons:
        if all(map(fnmatchcase, (about, ours, theirs), (reason.about, reason.ours, reason.theirs))):
            return reason
    return None
