"""Reading the head of a request.

Decides whether a head is acceptable and what it says; llhttp does the splitting and most of the
refusing, and what it lets through is refused here. Refuses to know routing and connections.
Invariant: a head that is returned has exactly one meaning in RFC 9112, and its lines can be written
to a machine as they are.

Found by experiment (llhttp in httptools 0.9) to be let through, and closed here: HTTP/0.9, HTTP/2.0
and RTSP versions, two spaces after the method, several Hosts, `gzip, chunked` and `,chunked`,
Transfer-Encoding in HTTP/1.0, Content-Length beyond 2**63, fragments, CONNECT and TRACE. Leading
empty lines, bare CR and LF among them, are dealt with before a head gets here.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import httptools

from . import fields
from .errors import (
    BAD_CODING,
    BAD_EXPECT,
    BAD_FRAMING,
    BAD_HEAD,
    BAD_HOST,
    BAD_METHOD,
    BAD_VERSION,
    HEAD_TOO_LARGE,
    URL_TOO_LONG,
    RequestError,
)
from .fields import REQUEST_KINDS, request_kind

if TYPE_CHECKING:
    from proxy.settings import ProxySettings

# Up to 65535.
_PORT: Final = rb"(?:[0-9]{1,4}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])"
# RFC 9110 section 7.2 without user-info; underscores occur in real names.
HOST: Final = re.compile(rb"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::" + _PORT + rb")?")
_ABSOLUTE: Final = re.compile(rb"[Hh][Tt][Tt][Pp][Ss]?://([^/?]*)([^ ]*)")
# Eighteen digits stay below 2**63 in every machine's arithmetic.
LENGTH: Final = re.compile(rb"[0-9]{1,18}")
_OTHER_VERSION: Final = re.compile(rb"[A-Z-]+ [^ ]+ (?!HTTP/1\.[01]\r)[A-Za-z]+/[0-9.]+\r\n")
# RFC 9110 section 9.2.2: sent twice, they do what they do once.
IDEMPOTENT: Final = frozenset(
    (b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE", b"PROPFIND", b"REPORT", b"QUERY")
)
# Methods with a body in their meaning: without one they go out with Content-Length: 0 (RFC 9110 8.6).
WITH_BODY: Final = frozenset((b"POST", b"PUT", b"PATCH"))
_REFUSED_METHODS: Final = frozenset((b"CONNECT", b"TRACE"))
_KEEP_ALIVE: Final = [b"keep-alive"]
# Fields that decide where a message ends or leads: nobody may have them dropped on the way.
_NOT_FOR_CONNECTION: Final = frozenset((b"content-length", b"transfer-encoding", b"host"))
# Hosts that were found well-formed; emptied when full, since clients can invent them.
_HOSTS_MAX: Final = 4_096
_good_hosts: set[bytes] = set()


class RequestHead:
    """One request's head. httptools calls the on_ methods; `parse_request_head` sets the rest."""

    __slots__ = (
        "chunked",
        "connection",
        "content_length",
        "expects",
        "forwarded",
        "framing",
        "host",
        "hosts",
        "keep_alive",
        "lines",
        "method",
        "minor",
        "routing",
        "target",
        "upgrade",
    )

    def __init__(self) -> None:
        self.method = b""
        self.target = b""  # origin-form, or '*'
        self.minor = 1  # of the HTTP version
        self.host = b""  # where to; of the authority when the target had one
        self.hosts = 0  # Host fields seen
        # `name: value` of all fields that are forwarded. Never changed in place: the next head may share it.
        self.lines: list[bytes] = []
        self.content_length = -1  # -1: not given
        self.chunked = False
        self.keep_alive = True
        self.expects = False  # waits for 100 (Continue)
        self.upgrade: bytes | None = None  # the protocol asked for, in lower case
        self.connection: list[bytes] | None = None  # values of Connection
        self.forwarded: list[tuple[bytes, bytes]] | None = None  # for trusted peers only
        self.routing: list[tuple[bytes, bytes]] | None = None  # (lower-case name, value) of routing wishes
        self.framing: list[tuple[bytes, bytes]] | None = None  # framing fields as they came

    def on_url(self, url: bytes) -> None:
        """Take the request target; llhttp may cut it into pieces."""
        self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Sort one field by what its name means."""
        kind = REQUEST_KINDS.get(name)
        if kind is None:
            kind = request_kind(name)
        if kind == fields.PASS:
            self.lines.append(name + b": " + value)
        elif kind == fields.HOST:
            self.host = value
            self.hosts += 1
        elif kind != fields.DROP:
            self._take(kind, name, value)

    def _take(self, kind: int, name: bytes, value: bytes) -> None:
        value = value.rstrip() if kind not in _FRAMING_KINDS else value
        if kind == fields.CONNECTION:
            self.connection = [*(self.connection or ()), value]
        elif kind in _FRAMING_KINDS:
            self.framing = [*(self.framing or ()), (name, value)]
        elif kind == fields.EXPECT:
            if value.lower() != b"100-continue":
                raise RequestError(BAD_EXPECT)
            self.expects = True
        elif kind == fields.UPGRADE:
            # Two of them are a list that no protocol of ours is equal to.
            self.upgrade = value.lower() if self.upgrade is None else self.upgrade + b"," + value.lower()
        elif kind == fields.FORWARDED:
            self.forwarded = [*(self.forwarded or ()), (name, value)]
        else:
            self.routing = [*(self.routing or ()), (name.lower(), value)]


_FRAMING_KINDS: Final = frozenset((fields.CONTENT_LENGTH, fields.TRANSFER_ENCODING))


def parse_request_head(raw: bytes, settings: ProxySettings) -> RequestHead:
    """Return the head in `raw`, which starts with the request line and ends with the first empty line.

    Raises RequestError.
    """
    if raw.count(b"\r\n") > settings.header_count_max + 2:
        raise RequestError(HEAD_TOO_LARGE, f"more than {settings.header_count_max} fields")
    head = RequestHead()
    parser = httptools.HttpRequestParser(head)
    try:
        parser.feed_data(raw)
    except httptools.HttpParserUpgrade:
        pass  # the head is complete; what follows it never gets to this parser
    except httptools.HttpParserError as error:
        raise _explain(error, head, raw) from error
    head.method = method = parser.get_method()
    _finish_request_line(head, method, raw, settings)
    if head.connection is None:
        head.keep_alive = head.minor == 1
    else:
        _apply_connection(head, head.connection)
    if head.framing is not None:
        _apply_framing(head, head.framing, raw)
    elif method in WITH_BODY:
        head.content_length = 0
    if head.upgrade is not None:
        _apply_upgrade(head, settings)
    if head.expects:
        # Without a body nothing waits for the answer; HTTP/1.0 does not know it (RFC 9110 10.1.1).
        head.expects = head.minor == 1 and (head.chunked or head.content_length > 0)
    if raw.find(b" \r\n") >= 0 or raw.find(b"\t\r\n") >= 0:
        head.lines = [line.rstrip() for line in head.lines]
    return head


def is_host(value: bytes) -> bool:
    """True for what may stand in Host."""
    return HOST.fullmatch(value) is not None


def _finish_request_line(head: RequestHead, method: bytes, raw: bytes, settings: ProxySettings) -> None:
    target = head.target
    if len(target) > settings.url_bytes_max:
        raise RequestError(URL_TOO_LONG, f"more than {settings.url_bytes_max} bytes")
    start = method + b" " + target + b" HTTP/1."
    version = raw[len(start) : len(start) + 3]
    if not raw.startswith(start) or version not in {b"1\r\n", b"0\r\n"}:
        if _has_other_version(raw):
            raise RequestError(BAD_VERSION)
        raise RequestError(BAD_HEAD, "malformed request line")
    head.minor = 1 if version == b"1\r\n" else 0
    if method in _REFUSED_METHODS:
        raise RequestError(BAD_METHOD)
    if head.hosts != 1 and (head.hosts or head.minor):
        raise RequestError(BAD_HOST, "exactly one Host is needed")
    head.host = head.host.rstrip()
    if not target.startswith(b"/") and not (target == b"*" and method == b"OPTIONS"):
        _apply_absolute_form(head, target)
    # find and not in, here and below: in first tries the bytes as a number, which costs three times as much.
    if target.find(b"#") >= 0:
        raise RequestError(BAD_HEAD, "fragment in the request target")
    host = head.host
    if host not in _good_hosts and head.hosts:
        if not HOST.fullmatch(host):
            raise RequestError(BAD_HOST)
        if len(_good_hosts) >= _HOSTS_MAX:
            _good_hosts.clear()
        _good_hosts.add(host)


def _has_other_version(raw: bytes) -> bool:
    return _OTHER_VERSION.match(raw) is not None


def _apply_absolute_form(head: RequestHead, target: bytes) -> None:
    match = _ABSOLUTE.fullmatch(target)
    if match is None:
        raise RequestError(BAD_HEAD, "malformed request target")
    if head.hosts and not HOST.fullmatch(head.host):
        raise RequestError(BAD_HOST)
    # RFC 9112 section 3.2.2: the authority wins, also for what the machine sees as Host.
    head.host = match[1]
    head.hosts = 1
    rest = match[2]
    if not rest and head.method == b"OPTIONS":
        head.target = b"*"
    else:
        head.target = rest if rest.startswith(b"/") else b"/" + rest


def _apply_connection(head: RequestHead, values: list[bytes]) -> None:
    if values == _KEEP_ALIVE:  # by far the most frequent
        head.upgrade = None
        return
    tokens = {token.strip() for value in values for token in value.lower().split(b",")}
    if tokens & _NOT_FOR_CONNECTION:
        raise RequestError(BAD_FRAMING, "Connection names a field that must not be dropped")
    head.keep_alive = b"close" not in tokens and (head.minor == 1 or b"keep-alive" in tokens)
    if b"upgrade" not in tokens:
        head.upgrade = None
    tokens -= {b"close", b"keep-alive", b"upgrade", b""}
    if tokens:
        head.lines = [line for line in head.lines if line[: line.find(b":")].lower() not in tokens]
        if head.forwarded is not None:
            head.forwarded = [pair for pair in head.forwarded if pair[0].lower() not in tokens]


def _apply_framing(head: RequestHead, framing: list[tuple[bytes, bytes]], raw: bytes) -> None:
    # llhttp refuses both kinds together, and Content-Length twice; this does not rely on it.
    if len(framing) != 1:
        raise RequestError(BAD_FRAMING, "more than one framing field")
    name, value = framing[0]
    if request_kind(name) == fields.TRANSFER_ENCODING:
        if value.lower() != b"chunked":
            raise RequestError(BAD_CODING if value.strip().lower() != b"chunked" else BAD_FRAMING)
        if head.minor == 0:
            raise RequestError(BAD_FRAMING, "Transfer-Encoding in HTTP/1.0")
        head.chunked = True
    else:
        if not LENGTH.fullmatch(value):
            raise RequestError(BAD_FRAMING, "malformed Content-Length")
        head.content_length = int(value)
    # Padding before the value is legal and nobody's habit; parsers differ in what they count as padding.
    if name + b": " + value + b"\r\n" not in raw and name + b":" + value + b"\r\n" not in raw:
        raise RequestError(BAD_FRAMING, "padding around a framing field")


def _apply_upgrade(head: RequestHead, settings: ProxySettings) -> None:
    """Keep an upgrade that is served; any other is a request without it (RFC 9110 section 7.8)."""
    if head.connection is None or head.minor == 0 or head.upgrade not in settings.upgrades:
        head.upgrade = None
    elif head.method != b"GET" or head.chunked or head.content_length > 0:
        raise RequestError(BAD_FRAMING, "upgrade of a request that is not a GET, or has a body")


def _explain(error: httptools.HttpParserError, head: RequestHead, raw: bytes) -> RequestError:
    """Return our error for one of llhttp's; errors of ours that were raised in a callback come first."""
    cause = error.__context__
    if isinstance(cause, RequestError):
        return cause
    if isinstance(error, httptools.HttpParserInvalidMethodError):
        return RequestError(BAD_METHOD if raw.split(b" ", 1)[0].isalpha() else BAD_HEAD)
    codings = [v for n, v in head.framing or () if request_kind(n) == fields.TRANSFER_ENCODING]
    if codings and codings[0].lower().strip() != b"chunked":
        return RequestError(BAD_CODING)
    reason = str(error.args[0]) if error.args else "malformed"
    if "Content-Length" in reason or "Transfer-Encoding" in reason:
        return RequestError(BAD_FRAMING, reason)
    if _has_other_version(raw):
        return RequestError(BAD_VERSION)
    return RequestError(BAD_HEAD, reason)
