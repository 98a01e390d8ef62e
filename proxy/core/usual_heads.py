"""Heads made of usual lines, read without a parser.

Most lines of most heads were seen before, letter by letter: what they mean is remembered, and a head costs
one split and a lookup for each line; the fields of a client that says the same as in its last request cost
one comparison. Decides which lines are usual: one way to write a field, no meaning beyond its name. Refuses
to judge any other head: `parse_request_head` and `parse_response_head` do that. Invariant: a head read here
is equal to what they would return; where there is doubt, None is returned.

Lines can be invented, and some are secret: what is remembered beyond a connection is short, not particular
to one user or resource, and forgotten all at once when there is too much of it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from . import fields
from .fields import REQUEST_KINDS, RESPONSE_KINDS, remember, request_kind, response_kind
from .request_head import HOST, LENGTH, WITH_BODY, RequestHead
from .response_head import NO_CONTENT, REPLAY_TYPE, ResponseHead, read_status_line

if TYPE_CHECKING:
    from collections.abc import Callable

    from proxy.settings import ProxySettings

# Characters of RFC 3986 for a path and a query.
_START: Final = re.compile(
    rb"(GET|HEAD|POST|PUT|PATCH|DELETE|OPTIONS) (/[A-Za-z0-9/._~!$&'()*+,;=:@%?-]*) HTTP/1\.1\r\n"
)
_TOKEN: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_VALUE_CHARS: Final = bytes((9, *range(32, 127), *range(128, 256)))
_SPACE: Final = 32
_ODD: Final = -1  # a line that has to be looked at together with the others
_LINE_BYTES_MAX: Final = 256
# Fields with secrets in them, and fields that are never the same twice.
_UNREMEMBERED: Final = frozenset(
    spelling
    for name in (b"authorization", b"cookie", b"set-cookie", b"x-request-id", b"traceparent", b"location")
    for spelling in (name, name.title())
)


class _Lines:
    """Lines of requests, or of answers: those seen before, and what makes one usual."""

    __slots__ = ("classify", "kinds", "names", "seen")

    def __init__(
        self, names: dict[bytes, int], classify: Callable[[bytes], int], kinds: frozenset[int]
    ) -> None:
        self.seen: dict[bytes, int] = {}  # line -> kind of its field
        self.names = names
        self.classify = classify
        self.kinds = kinds  # which mean nothing beyond the line

    def judge(self, line: bytes) -> int:
        """Return the kind of a line that was not seen before, or _ODD."""
        colon = line.find(b": ")
        name = line[:colon]
        kind = self.names.get(name)
        if kind is None:
            if not _TOKEN.fullmatch(name):
                return _ODD
            kind = self.classify(name)
        if kind not in self.kinds or not _has_usual_value(line, colon) or not _suits(kind, line):
            return _ODD
        if len(line) > _LINE_BYTES_MAX or name in _UNREMEMBERED:
            return kind
        return remember(self.seen, line, kind)


_MESSAGE_KINDS: Final = (fields.PASS, fields.DROP, fields.CONNECTION, fields.CONTENT_LENGTH)
_request_lines: Final = _Lines(
    REQUEST_KINDS, request_kind, frozenset((*_MESSAGE_KINDS, fields.HOST, fields.FORWARDED))
)
_response_lines: Final = _Lines(
    RESPONSE_KINDS, response_kind, frozenset((*_MESSAGE_KINDS, fields.CONTENT_TYPE, fields.TRANSFER_ENCODING))
)


class Fields:
    """What the fields of a request say, all of them usual. Shared by requests, and never changed."""

    __slots__ = ("block", "content_length", "forwarded", "host", "lines")

    def __init__(self, block: bytes) -> None:
        self.block = block  # as they came, up to the empty line
        self.lines: list[bytes] = []  # these as in RequestHead
        self.host = b""
        self.content_length = -1
        self.forwarded: list[tuple[bytes, bytes]] | None = None


def read_usual_request(
    raw: bytes, settings: ProxySettings, last: Fields | None
) -> tuple[RequestHead, Fields] | None:
    """Return the head in `raw`, which has nothing behind it; None when it is not of usual lines only.

    `last` came with the head before it on the same connection.
    """
    start = _START.match(raw)
    if start is None:
        return None
    method, target = start[1], start[2]
    if len(target) > settings.url_bytes_max:
        return None
    block = raw[start.end() :]
    said = last if last is not None and last.block == block else _read_fields(block, settings)
    if said is None:
        return None
    head = RequestHead()
    head.method = method
    head.target = target
    head.hosts = 1
    head.host = said.host
    head.lines = said.lines
    head.forwarded = said.forwarded
    head.content_length = said.content_length
    if said.content_length < 0 and method in WITH_BODY:
        head.content_length = 0
    return head, said


def _read_fields(block: bytes, settings: ProxySettings) -> Fields | None:
    lines = block.split(b"\r\n")
    count = len(lines) - 2
    if count > settings.header_count_max:
        return None
    said = Fields(block)
    hosts = 0
    passed = said.lines
    for index in range(count):
        line = lines[index]
        kind = _request_lines.seen.get(line)
        if kind is None:
            kind = _request_lines.judge(line)
        if kind == fields.PASS:
            passed.append(line)
        elif kind == fields.HOST:
            hosts += 1
            said.host = line[6:]
        elif kind == fields.CONTENT_LENGTH:
            if said.content_length >= 0:
                return None
            said.content_length = int(line[16:])
        elif kind == fields.FORWARDED:
            name, _, value = line.partition(b": ")
            said.forwarded = [*(said.forwarded or ()), (name, value)]
        elif kind == _ODD:
            return None
    return said if hosts == 1 else None


def read_usual_response(raw: bytes) -> ResponseHead | None:
    """Return the head in `raw`, which ends before its empty line; None when it is not of usual lines only."""
    lines = raw.split(b"\r\n")
    status_line = read_status_line(lines[0])
    if status_line is None or status_line[0] < 200 or status_line[0] == NO_CONTENT or status_line[1] == 0:
        return None
    head = ResponseHead()
    head.status, _, head.status_line = status_line
    passed = head.lines
    for index in range(1, len(lines)):
        line = lines[index]
        kind = _response_lines.seen.get(line)
        if kind is None:
            kind = _response_lines.judge(line)
        if kind == fields.PASS or kind == fields.CONTENT_TYPE:  # noqa: PLR1714 - a set costs a look-up
            passed.append(line)
        elif kind == fields.CONTENT_LENGTH:
            if head.content_length >= 0:
                return None
            head.content_length = int(line[16:])
        elif kind == fields.TRANSFER_ENCODING:
            if head.chunked:
                return None
            head.chunked = True
        elif kind == _ODD:
            return None
    return None if head.chunked and head.content_length >= 0 else head


def _has_usual_value(line: bytes, colon: int) -> bool:
    """Return True when a field has a value of sound characters behind one space, and no space behind that."""
    return (
        0 < colon < len(line) - 2
        and line[colon + 2] > _SPACE
        and line[-1] > _SPACE
        and not line.translate(None, _VALUE_CHARS)
    )


def _suits(kind: int, line: bytes) -> bool:
    """Return True when the value is one that fields of this kind usually have."""
    if kind == fields.HOST:
        return HOST.fullmatch(line[6:]) is not None
    if kind == fields.CONTENT_LENGTH:
        return LENGTH.fullmatch(line[16:]) is not None
    if kind == fields.CONNECTION:
        return line[12:].lower() == b"keep-alive"
    if kind == fields.TRANSFER_ENCODING:
        return line[19:].lower() == b"chunked"
    return kind != fields.CONTENT_TYPE or not line[14:].lower().startswith(REPLAY_TYPE)
