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
_PLAIN_KINDS: Final = frozenset((fields.PASS, fields.DROP, fields.FORWARDED))
# Fields with secrets in them, and fields that are never the same twice.
_UNREMEMBERED: Final = frozenset(
    spelling
    for name in (b"authorization", b"cookie", b"set-cookie", b"x-request-id", b"traceparent", b"location")
    for spelling in (name, name.title())
)

# Lines seen before -> the kind of their field.
_request_lines: Final[dict[bytes, int]] = {}
_response_lines: Final[dict[bytes, int]] = {}


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
        kind = _request_lines.get(line)
        if kind is None:
            kind = _judge_request_line(line)
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
        kind = _response_lines.get(line)
        if kind is None:
            kind = _judge_response_line(line)
        if kind == fields.PASS:
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


def _judge_request_line(line: bytes) -> int:
    colon = line.find(b": ")
    name = line[:colon]
    kind = REQUEST_KINDS.get(name)
    if kind is None:
        if not _TOKEN.fullmatch(name):
            return _ODD
        kind = request_kind(name)
    if not _is_usual(line, colon):
        return _ODD
    if kind == fields.HOST:
        usual = HOST.fullmatch(line[6:]) is not None
    elif kind == fields.CONTENT_LENGTH:
        usual = LENGTH.fullmatch(line[16:]) is not None
    elif kind == fields.CONNECTION:
        usual = line[12:].lower() == b"keep-alive"
    else:
        usual = kind in _PLAIN_KINDS
    return _remember(_request_lines, line, name, kind) if usual else _ODD


def _judge_response_line(line: bytes) -> int:
    colon = line.find(b": ")
    name = line[:colon]
    kind = RESPONSE_KINDS.get(name)
    if kind is None:
        if not _TOKEN.fullmatch(name):
            return _ODD
        kind = response_kind(name)
    if not _is_usual(line, colon):
        return _ODD
    if kind == fields.CONTENT_TYPE:
        usual = line[14 : 14 + len(REPLAY_TYPE)].lower() != REPLAY_TYPE
        kind = fields.PASS
    elif kind == fields.CONTENT_LENGTH:
        usual = LENGTH.fullmatch(line[16:]) is not None
    elif kind == fields.CONNECTION:
        usual = line[12:].lower() == b"keep-alive"
    elif kind == fields.TRANSFER_ENCODING:
        usual = line[19:].lower() == b"chunked"
    else:
        usual = kind in _PLAIN_KINDS
    return _remember(_response_lines, line, name, kind) if usual else _ODD


def _is_usual(line: bytes, colon: int) -> bool:
    """True when a field has a value of sound characters behind one space, and no space behind that."""
    return (
        0 < colon < len(line) - 2
        and line[colon + 2] > _SPACE
        and line[-1] > _SPACE
        and not line.translate(None, _VALUE_CHARS)
    )


def _remember(memo: dict[bytes, int], line: bytes, name: bytes, kind: int) -> int:
    if len(line) > _LINE_BYTES_MAX or name in _UNREMEMBERED:
        return kind
    return remember(memo, line, kind)
