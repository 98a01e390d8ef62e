"""What nodes say to each other on a connection that passes requests on.

Decides the bytes. Refuses to know sockets and machines. Invariant: whatever the bytes, the reader raises
nothing but `FrameError`, and keeps little more than `CONTROL_BYTES_MAX` of them.

One connection carries one session after the other. The node that connects says which machine it wants
(OPEN) and what the machine is to get (DATA), without waiting for an answer; the other says whether the
machine was reached (OPENED, REFUSED), what came from it (DATA), and when the machine ends its connection
(ENDED). The node that connected ends a session with RELEASE, once it has all that it asked for, or else by
closing.

    frame    kind 1, length 4, payload
    HELLO    version, name of the node; the first frame, of the one that is connected to
    OPEN     machine, app, service, port, nodes passed, milliseconds, `fresh` or `kept`
    OPENED   `kept` when the connection to the machine had carried a session before, else `fresh`
    REFUSED  code, why
    ENDED    `clean`, or `lost`
    RELEASE  bytes of DATA that came in this session
    GOODBYE  nothing: open no more sessions; one that is on its way is served
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from .framing import COPIED_BYTES_MAX, Data

HELLO: Final = 1
OPEN: Final = 2
OPENED: Final = 3
REFUSED: Final = 4
DATA: Final = 5
ENDED: Final = 6
RELEASE: Final = 7
GOODBYE: Final = 8

VERSION: Final = 1
HEADER_BYTES: Final = 5
# Names are at most 64 characters each, and a reason is one sentence.
CONTROL_BYTES_MAX: Final = 1_024
DATA_BYTES_MAX: Final = 2**32 - 1
REASON_CHARS_MAX: Final = 256

FRESH: Final = b"fresh"
KEPT: Final = b"kept"
CLEAN: Final = b"clean"
LOST: Final = b"lost"

_CODE: Final = re.compile(r"P[A-Z][0-9]{2}")
_NUMBER: Final = re.compile(rb"[0-9]{1,10}")


class FrameError(Exception):
    """The other node does not speak as it should; its connection is of no more use."""


class Order(NamedTuple):
    """What one session is to be."""

    machine: str
    app: str
    service: int  # the public port that the service is for; 0: any
    port: int  # of the machine
    passed: int  # how many nodes have passed it on, the one that says this among them
    timeout_ms: int  # for the connection to the machine
    fresh: bool  # only a new connection will do


def encode_frame(kind: int, payload: bytes) -> bytes:
    """Return a whole frame."""
    return encode_header(kind, len(payload)) + payload


def encode_header(kind: int, length: int) -> bytes:
    """Return what goes before a payload of this length."""
    return bytes((kind,)) + length.to_bytes(4, "big")


def encode_data(data: Data) -> tuple[Data, ...]:
    """Return a frame in pieces: one, unless copying costs more than a piece more does."""
    header = encode_header(DATA, len(data))
    return (header + data,) if len(data) <= COPIED_BYTES_MAX else (header, data)


def encode_hello(node: str) -> bytes:
    """Return the frame that a connection begins with."""
    return encode_frame(HELLO, b"%d %b" % (VERSION, node.encode("ascii")))


def encode_open(order: Order) -> bytes:
    """Return the frame that begins a session."""
    text = f"{order.machine} {order.app} {order.service} {order.port} {order.passed} {order.timeout_ms} "
    return encode_frame(OPEN, text.encode("ascii") + (FRESH if order.fresh else KEPT))


def encode_refusal(code: str, reason: str) -> bytes:
    """Return the frame that ends a session before it has begun; nothing got to the machine."""
    shown = reason[:REASON_CHARS_MAX].encode("ascii", "replace")
    return encode_frame(REFUSED, code.encode("ascii") + b" " + shown)


def encode_release(received: int) -> bytes:
    """Return the frame that ends a session in good order."""
    return encode_frame(RELEASE, b"%d" % received)


def parse_hello(payload: bytes) -> str:
    """Return the name of the node. Raises FrameError."""
    version, _, name = payload.partition(b" ")
    if version != b"%d" % VERSION:
        raise FrameError("it speaks another version")
    return _decode(name)


def parse_open(payload: bytes) -> Order:
    """Return what is wanted; words beyond those known are passed over. Raises FrameError."""
    words = payload.split(b" ")
    if len(words) < 7 or words[6] not in {FRESH, KEPT}:
        raise FrameError("malformed OPEN")
    service, port, passed, timeout_ms = (_parse_number(word) for word in words[2:6])
    machine, app, fresh = _decode(words[0]), _decode(words[1]), words[6] == FRESH
    return Order(machine, app, service, port, passed, timeout_ms, fresh)


def parse_refusal(payload: bytes) -> tuple[str, str]:
    """Return the code and the reason; what is unprintable in it is not shown. Raises FrameError."""
    code, _, reason = _decode(payload).partition(" ")
    if not _CODE.fullmatch(code):
        raise FrameError("malformed REFUSED")
    return code, "".join(c if c.isprintable() else "?" for c in reason[:REASON_CHARS_MAX])


def parse_release(payload: bytes) -> int:
    """Return how many bytes the other node has got. Raises FrameError."""
    return _parse_number(payload, re.compile(rb"[0-9]{1,19}"))


def _parse_number(word: bytes, form: re.Pattern[bytes] = _NUMBER) -> int:
    if not form.fullmatch(word):
        raise FrameError("a number that is none")
    return int(word)


def _decode(word: bytes) -> str:
    try:
        return word.decode("ascii")
    except UnicodeDecodeError:
        raise FrameError("a text that is not ASCII") from None


class FrameReader:
    """Takes frames off a stream. DATA is handed on as it comes, in pieces."""

    __slots__ = ("_data_left", "_rest")

    def __init__(self) -> None:
        self._rest = b""  # an incomplete header, or control frame
        self._data_left = 0  # of a DATA frame that is not complete

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """Return what these bytes complete as (kind, payload). Raises FrameError."""
        frames: list[tuple[int, bytes]] = []
        if self._rest:
            data = self._rest + data
            self._rest = b""
        at, end = 0, len(data)
        while at < end:
            if self._data_left:
                piece = data[at : at + self._data_left]
                self._data_left -= len(piece)
                at += len(piece)
                frames.append((DATA, piece))
                continue
            if end - at < HEADER_BYTES:
                break
            kind = data[at]
            length = int.from_bytes(data[at + 1 : at + HEADER_BYTES], "big")
            if kind == DATA:
                self._data_left = length
                at += HEADER_BYTES
                continue
            if length > CONTROL_BYTES_MAX:
                raise FrameError("a frame that is too long")
            if end - at < HEADER_BYTES + length:
                break
            frames.append((kind, data[at + HEADER_BYTES : at + HEADER_BYTES + length]))
            at += HEADER_BYTES + length
        self._rest = data[at:]
        return frames
