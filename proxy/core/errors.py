"""Every error that a client can see: its code, its status, and how it is written.

Decides the words and bytes of an error; refuses to know what led to it.
Invariant: an error without an entry in ERRORS cannot be raised or written.

The codes of Fly's list (docs, "Error codes") keep their meaning; PH and PL are our own, for requests
that are refused as they are and for what is too much.
"""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Final

BAD_HEAD: Final = "PH01"
BAD_FRAMING: Final = "PH02"
BAD_HOST: Final = "PH03"
HEAD_TOO_LARGE: Final = "PH04"
URL_TOO_LONG: Final = "PH05"
BAD_METHOD: Final = "PH06"
BAD_VERSION: Final = "PH07"
BAD_EXPECT: Final = "PH08"
REQUEST_TIMEOUT: Final = "PH09"
BAD_BODY: Final = "PH10"
BAD_CODING: Final = "PH11"
BAD_ROUTING_FIELD: Final = "PH12"
NO_ROUTE: Final = "PH13"
BODY_OVER_LIMIT: Final = "PH14"
MISDIRECTED: Final = "PH15"
PLAIN_HTTP: Final = "PT10"

OVERLOADED: Final = "PL01"
TOO_MANY_CONNECTIONS: Final = "PL02"
MAINTENANCE: Final = "PL03"

BODY_TOO_LARGE: Final = "PA01"
TOO_MANY_REPLAYS: Final = "PA02"
BAD_REPLAY: Final = "PA03"
BAD_RESPONSE: Final = "PU02"
CONNECT_REFUSED: Final = "PC01"
UPSTREAM_RESET: Final = "PC03"
UPSTREAM_TIMEOUT: Final = "PC05"
CONNECT_FAILED: Final = "PC06"
RETRIES_EXHAUSTED: Final = "PR03"
START_TIMEOUT: Final = "PM03"

# code -> (status, what it means); what happened in the case at hand is added by whoever raises it.
ERRORS: Final[dict[str, tuple[int, str]]] = {
    BAD_HEAD: (400, "the request head is malformed"),
    BAD_FRAMING: (400, "it is ambiguous where the request ends"),
    BAD_HOST: (400, "the Host is missing or malformed"),
    HEAD_TOO_LARGE: (431, "the request head is too large"),
    URL_TOO_LONG: (414, "the URL is too long"),
    BAD_METHOD: (405, "the method is not served"),
    BAD_VERSION: (505, "the HTTP version is not served"),
    BAD_EXPECT: (417, "the expectation cannot be met"),
    REQUEST_TIMEOUT: (408, "the request took too long to arrive"),
    BAD_BODY: (400, "the request body is malformed"),
    BAD_CODING: (501, "the transfer coding is not served"),
    BAD_ROUTING_FIELD: (400, "a routing header is malformed"),
    NO_ROUTE: (404, "no app is served under this host and path"),
    BODY_OVER_LIMIT: (413, "the request body is larger than is served"),
    MISDIRECTED: (421, "the connection was opened for another app"),
    PLAIN_HTTP: (400, "this port speaks TLS; ask for https://"),
    OVERLOADED: (503, "this node has more to do than it can"),
    MAINTENANCE: (503, "the app is under maintenance"),
    TOO_MANY_CONNECTIONS: (429, "this client has too many connections"),
    BODY_TOO_LARGE: (413, "the request body is too large to be replayed"),
    TOO_MANY_REPLAYS: (508, "the request was replayed too often"),
    BAD_REPLAY: (502, "the app asked for a replay that cannot be done"),
    "PA04": (502, "the app asked for a replay to an app that does not exist"),
    "PA05": (502, "the app asked for a replay to an app that it may not reach"),
    BAD_RESPONSE: (502, "the machine did not answer properly"),
    CONNECT_REFUSED: (502, "the machine refused the connection"),
    UPSTREAM_RESET: (502, "the machine closed the connection before it answered"),
    UPSTREAM_TIMEOUT: (504, "the machine did not answer in time"),
    CONNECT_FAILED: (502, "the machine could not be reached"),
    "PR01": (503, "no machine of the app can take the request"),
    "PR02": (502, "the machine asked for does not exist"),
    RETRIES_EXHAUSTED: (502, "no machine of the app could be reached"),
    "PR04": (503, "all machines of the app are at their limit"),
    START_TIMEOUT: (503, "no machine of the app could be started in time"),
}
# Long enough for a machine to start or a burst to pass, short enough that nobody gives up.
RETRY_AFTER_S: Final = 1
_PASSING: Final = frozenset((HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.TOO_MANY_REQUESTS))

_REASONS: Final[dict[int, bytes]] = {
    status: f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n".encode()
    for status in sorted({status for status, _ in ERRORS.values()})
}


class ProxyError(Exception):
    """An exchange fails with `code`; `detail` is safe to show to the client."""

    def __init__(self, code: str, detail: str = "") -> None:
        super().__init__(f"[{code}] {detail or ERRORS[code][1]}")
        self.code = code
        self.detail = detail


class RequestError(ProxyError):
    """The client is to blame: answer, and close its connection."""


class ResponseError(ProxyError):
    """The machine is to blame: its connection is closed and not used again."""

    def __init__(self, detail: str) -> None:
        super().__init__(BAD_RESPONSE, detail)


def render_error(
    code: str,
    detail: str,
    request_id: bytes,
    *,
    plain: bool,
    close: bool,
    with_body: bool = True,
    page: str = "",
) -> bytes:
    """Return a whole answer, head and body, for an error.

    `plain` writes text/plain for people, else JSON; a `page` takes the place of both. Without a body
    (answers to HEAD) the Content-Length is what it would have been.
    """
    status, meaning = ERRORS[code]
    message = f"{meaning}: {detail}" if detail else meaning
    shown_id = request_id.decode("ascii")
    if page:
        body = page.encode()
        markup = b"html" if page.lstrip().startswith("<") else b"plain"
        content_type = b"text/%b; charset=utf-8" % markup
    elif plain:
        body = f"[{code}] {message}\nrequest {shown_id}\n".encode()
        content_type = b"text/plain; charset=utf-8"
    else:
        body = json.dumps({"error": code, "message": message, "request_id": shown_id}).encode() + b"\n"
        content_type = b"application/json"
    lines = [
        _REASONS[status],
        b"Content-Type: %b\r\nContent-Length: %d\r\n" % (content_type, len(body)),
        b"Cache-Control: no-store\r\nfly-proxy-error: %b\r\n" % code.encode(),
        b"Fly-Request-Id: %b\r\n" % request_id,
    ]
    if status in _PASSING:
        lines.append(b"Retry-After: %d\r\n" % RETRY_AFTER_S)
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        lines.append(b"Allow: GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS\r\n")
    if close:
        lines.append(b"Connection: close\r\n")
    lines.append(b"\r\n")
    if with_body:
        lines.append(body)
    return b"".join(lines)


def count_body(answer: bytes) -> int:
    """Return how many bytes of a whole answer are its body."""
    return len(answer) - answer.find(b"\r\n\r\n") - 4


def prefers_plain(lines: list[bytes]) -> bool:
    """True when the request's Accept names text and no JSON: a person with a browser, not a program."""
    for line in lines:
        if line[:7].lower() == b"accept:":
            accept = line.lower()
            return b"text/" in accept and b"json" not in accept
    return False
