"""Reading the head of a machine's answer.

Decides whether an answer is acceptable, what it says and how its body is framed. Refuses to know
who gets it. Invariant: a head that is returned has one framing, and its lines can be written to a
client as they are.

Found by experiment (llhttp in httptools 0.9) to be let through, and closed here: versions 0.9 and
2.0, statuses outside of 100-599, control bytes in the reason, transfer codings other than chunked,
Transfer-Encoding in HTTP/1.0, a 204 with a length.
"""

from __future__ import annotations

import re
from typing import Final

import httptools

from . import fields
from .errors import ResponseError
from .fields import RESPONSE_KINDS, response_kind

REPLAY_TYPE: Final = b"application/vnd.fly.replay+json"
SWITCHING_PROTOCOLS: Final = 101
NO_CONTENT: Final = 204
NOT_MODIFIED: Final = 304

_BODILESS: Final = frozenset((NO_CONTENT, NOT_MODIFIED))
_STATUS_LINE: Final = re.compile(rb"HTTP/1\.[01] [1-5][0-9][0-9](?: [\t -~\x80-\xff]*)?")
_LENGTH: Final = re.compile(rb"[0-9]{1,18}")
_KEEP_ALIVE: Final = [b"keep-alive"]
# Status lines as they came -> status, minor version, and the line as it is sent. Few in practice; emptied
# when full.
_LINES_MAX: Final = 1_024
_status_lines: dict[bytes, tuple[int, int, bytes]] = {}


class ResponseHead:
    """One answer's head. httptools calls on_header; `parse_response_head` sets the rest."""

    __slots__ = (
        "chunked",
        "connection",
        "content_length",
        "keep_alive",
        "lines",
        "minor",
        "replay_cache",
        "replay_json",
        "replays",
        "status",
        "status_line",
        "upgrade",
    )

    def __init__(self) -> None:
        self.status = 0
        self.minor = 1
        self.status_line = b""  # in our version, with its CRLF
        self.lines: list[bytes] = []  # `name: value` of all fields that are forwarded
        self.content_length = -1  # -1: not given
        self.chunked = False
        self.keep_alive = True  # whether the machine will take another request on this connection
        self.connection: list[bytes] | None = None
        self.upgrade: bytes | None = None  # in lower case
        self.replays: list[bytes] | None = None  # values of fly-replay
        self.replay_json = False  # the body is a replay instruction
        self.replay_cache: list[tuple[bytes, bytes]] | None = None  # (lower-case name, value)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Sort one field by what its name means."""
        kind = RESPONSE_KINDS.get(name)
        if kind is None:
            kind = response_kind(name)
        if kind == fields.PASS:
            self.lines.append(name + b": " + value)
        elif kind == fields.CONTENT_LENGTH:
            if self.content_length >= 0 or not _LENGTH.fullmatch(value.rstrip()):
                raise ResponseError("malformed or repeated Content-Length")
            self.content_length = int(value)
        elif kind == fields.CONTENT_TYPE:
            self.lines.append(name + b": " + value)
            if value[: len(REPLAY_TYPE)].lower() == REPLAY_TYPE:
                self.replay_json = True
        elif kind != fields.DROP:
            self._take(kind, name, value.rstrip())

    def _take(self, kind: int, name: bytes, value: bytes) -> None:
        if kind == fields.CONNECTION:
            self.connection = [*(self.connection or ()), value]
        elif kind == fields.TRANSFER_ENCODING:
            if self.chunked or value.lower() != b"chunked":
                raise ResponseError("a transfer coding other than chunked")
            self.chunked = True
        elif kind == fields.UPGRADE:
            self.upgrade = value.lower()
        elif kind == fields.REPLAY_CACHE:
            self.replay_cache = [*(self.replay_cache or ()), (name.lower(), value)]
        else:
            self.replays = [*(self.replays or ()), value]

    def is_bodiless(self, *, to_head: bool) -> bool:
        """True when no body follows, whatever the fields say (RFC 9112 section 6.3)."""
        return to_head or self.status in _BODILESS or self.status < 200


def parse_response_head(raw: bytes) -> ResponseHead:
    """Return the head in `raw`, which ends with the first empty line. Raises ResponseError."""
    head = ResponseHead()
    parser = httptools.HttpResponseParser(head)
    try:
        parser.feed_data(raw)
    except httptools.HttpParserUpgrade:
        pass  # the head is complete; what follows it never gets to this parser
    except httptools.HttpParserError as error:
        cause = error.__context__
        if isinstance(cause, ResponseError):
            raise cause from error
        # llhttp pauses for any 101; whether that one was asked for is judged by the exchange.
        if not raw.startswith((b"HTTP/1.1 101 ", b"HTTP/1.1 101\r")) or not parser.should_upgrade():
            raise ResponseError(str(error.args[0]) if error.args else "malformed head") from error
    line = raw[: raw.find(b"\r\n")]
    read = read_status_line(line)
    if read is None:
        raise ResponseError("malformed status line")
    head.status, head.minor, head.status_line = read
    if head.connection is None:
        head.keep_alive = head.minor == 1
    else:
        _apply_connection(head, head.connection)
    if head.chunked and (head.content_length >= 0 or head.minor == 0):
        raise ResponseError("Transfer-Encoding with Content-Length or in HTTP/1.0")
    if head.status == NO_CONTENT or head.status < 200:
        if head.chunked or head.content_length > 0:
            raise ResponseError(f"a body with status {head.status}")
        head.content_length = -1
    return head


def read_status_line(line: bytes) -> tuple[int, int, bytes] | None:
    """Return status, minor version and the line to send, with its CRLF; None when it is malformed."""
    read = _status_lines.get(line)
    if read is None:
        if not _STATUS_LINE.fullmatch(line):
            return None
        if len(_status_lines) >= _LINES_MAX:
            _status_lines.clear()
        # RFC 9112 section 4: the space after the status is there even when no reason follows.
        remade = b"HTTP/1.1 " + line[9:12] + b" " + line[13:] + b"\r\n"
        read = _status_lines[line] = int(line[9:12]), line[7] - 48, remade
    return read


def _apply_connection(head: ResponseHead, values: list[bytes]) -> None:
    if values == _KEEP_ALIVE:  # by far the most frequent
        head.upgrade = None
        return
    tokens = {token.strip() for value in values for token in value.lower().split(b",")}
    head.keep_alive = b"close" not in tokens and (head.minor == 1 or b"keep-alive" in tokens)
    if b"upgrade" not in tokens:
        head.upgrade = None
    tokens -= {b"close", b"keep-alive", b"upgrade", b""}
    if tokens:
        head.lines = [line for line in head.lines if line[: line.find(b":")].lower() not in tokens]
