"""Where a body ends.

Decides how many bytes of a stream belong to a body, and undoes the chunked coding. Refuses to know
heads and connections. Invariant: the bodies found do not depend on how the stream was cut into
reads, and whatever RFC 9112 section 7.1 does not allow raises BodyError.

llhttp's own chunk parser is not used because it cannot stop behind a message: bytes of a pipelined
request would be parsed before their turn.
"""

from __future__ import annotations

import re
from typing import Final, TypeAlias

Data: TypeAlias = bytes | memoryview
# Below it a copy costs less than a second piece to send.
COPIED_BYTES_MAX: Final = 4_096

# A size with a little padding. Fifteen digits stay far below what overflows anybody's integer.
_SIZE_LINE: Final = re.compile(rb"([0-9A-Fa-f]{1,15})(?:;[\t !-~]*)?\r\n")
_TRAILER_LINE: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[\t -~\x80-\xff]*\r\n")
# Extensions are dropped. Nobody uses them, so a long one is an attack on somebody's line buffer.
SIZE_LINE_BYTES_MAX: Final = 256
TRAILER_BYTES_MAX: Final = 8_192
# Framing that a request may cost beyond twice its payload: allows any sane client, and ends a body of
# one-byte chunks after some 5,000 of them.
OVERHEAD_BYTES_MAX: Final = 16_384


class BodyError(Exception):
    """The stream is not a body in the announced framing."""


class BodyTooLargeError(BodyError):
    """The body is longer than `bytes_max`."""


class FixedBody:
    """A body of known length, which is above 0."""

    __slots__ = ("ended", "left", "rest")

    def __init__(self, length: int) -> None:
        assert length > 0
        self.left = length
        self.ended = False  # set when the last byte was seen
        self.rest = b""  # what followed the body in the read that ended it

    def feed(self, data: Data) -> Data:
        """Return what of the data belongs to the body."""
        size = len(data)
        if size < self.left:
            self.left -= size
            return data
        self.ended = True
        if size > self.left:
            self.rest = bytes(data[self.left :])
            data = data[: self.left]
        self.left = 0
        return data


class UntilClose:
    """A body that ends with the connection."""

    __slots__ = ("ended", "rest")

    def __init__(self) -> None:
        self.ended = False
        self.rest = b""

    def feed(self, data: Data) -> Data:
        """Return all of it."""
        return data


class ChunkedBody:
    """A body in chunked coding; extensions and trailers are checked and dropped."""

    __slots__ = (
        "_held",
        "_left",
        "_overhead",
        "_overhead_max",
        "_trailer_left",
        "bytes_max",
        "ended",
        "rest",
    )

    def __init__(self, *, bound_overhead: bool) -> None:
        self.ended = False
        self.rest = b""
        self.bytes_max = 2**62  # less what chunks have announced
        self._held = b""  # an incomplete line, kept for the next read
        self._left = 0  # of the chunk being read, with its CRLF; 0 between chunks
        self._overhead = 0  # bytes of framing, less twice those of payload
        self._overhead_max = OVERHEAD_BYTES_MAX if bound_overhead else 2**62
        self._trailer_left = -1  # bytes that trailers may still take; -1 before the last chunk

    def feed(self, data: bytes) -> bytes:
        """Return the decoded body bytes of this read; they may be empty. Raises BodyError."""
        if self._held:
            data = self._held + data
            self._held = b""
        pieces: list[bytes] = []
        position = 0
        size = len(data)
        while position < size:
            if self._left:
                position = self._take_chunk(data, position, pieces)
                continue
            end = data.find(b"\n", position, position + SIZE_LINE_BYTES_MAX + TRAILER_BYTES_MAX) + 1
            if self._trailer_left >= 0:
                if not end:
                    self._hold(data[position:], self._trailer_left)
                    break
                self._take_trailer(data[position:end])
                position = end
                if self.ended:
                    self.rest = data[position:]
                    break
                continue
            if not end:
                self._hold(data[position:], SIZE_LINE_BYTES_MAX)
                break
            self._take_size(data[position:end])
            position = end
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _hold(self, line: bytes, most: int) -> None:
        if len(line) > most:
            raise BodyError("a line of the chunked coding is too long")
        # A lone CR in the middle can never become right; say so before more is read.
        if b"\r" in line[:-1]:
            raise BodyError("bare CR in the chunked coding")
        self._held = line

    def _take_size(self, line: bytes) -> None:
        match = _SIZE_LINE.fullmatch(line) if len(line) <= SIZE_LINE_BYTES_MAX else None
        if match is None:
            raise BodyError("malformed chunk size")
        length = int(match[1], 16)
        if not length:
            self._trailer_left = TRAILER_BYTES_MAX
            return
        self._overhead = max(self._overhead + len(line) + 2 - 2 * length, 0)
        if self._overhead > self._overhead_max:
            raise BodyError("too many tiny chunks")
        self.bytes_max -= length
        if self.bytes_max < 0:
            raise BodyTooLargeError("it goes on beyond the limit")
        self._left = length + 2

    def _take_chunk(self, data: bytes, position: int, pieces: list[bytes]) -> int:
        end = min(position + self._left, len(data))
        payload_end = min(position + self._left - 2, end)
        if payload_end > position:
            pieces.append(data[position:payload_end])
        # What is here of the CRLF behind the chunk: its last `self._left - taken` bytes may be missing.
        start = max(position, payload_end)
        self._left -= end - position
        expected = b"\r\n"[2 - self._left - (end - start) : 2 - self._left] if end > start else b""
        if data[start:end] != expected:
            raise BodyError("a chunk does not end where its size says")
        return end

    def _take_trailer(self, line: bytes) -> None:
        self._trailer_left -= len(line)
        if self._trailer_left < 0:
            raise BodyError("the trailers are too large")
        if line == b"\r\n":
            self.ended = True
        elif not _TRAILER_LINE.fullmatch(line):
            raise BodyError("malformed trailer")


Body = FixedBody | ChunkedBody | UntilClose


def encode_chunk(data: Data) -> bytes:
    """Return the data as one chunk; it must not be empty, for that would end the body."""
    return b"".join((b"%x\r\n" % len(data), data, b"\r\n"))


LAST_CHUNK: Final = b"0\r\n\r\n"
