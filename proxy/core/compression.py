"""Compression of answers on their way to the client.

Decides whether an answer is compressed and with which coding (RFC 9110 section 12.5.3), what its head says
then, and makes the bytes. Refuses to know connections. Invariant: whatever was put in by a call is in what
that call returns, so that a stream goes on streaming and nothing is held back; and an answer is only changed
where its machine has not forbidden it.

What an encoder holds does not depend on the length of the answer: at most half a megabyte at usual levels.
"""

from __future__ import annotations

import re
import sys
import zlib
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from .response_head import NO_CONTENT, NOT_MODIFIED

if TYPE_CHECKING:
    from routing.compression import Compression

    from .framing import Data
    from .request_head import RequestHead
    from .response_head import ResponseHead

_PARTIAL: Final = 206
_UNSUITED: Final = frozenset((_PARTIAL, NO_CONTENT, NOT_MODIFIED))
# Of an answer that is encoded already, is a part of one, or has a digest of its bytes as they are.
_FORBIDDING: Final = frozenset(
    (b"content-encoding", b"content-range", b"content-digest", b"repr-digest", b"digest", b"content-md5")
)
# A member of Accept-Encoding; one that is no such thing counts as not said.
_MEMBER: Final = re.compile(
    rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+)(?:[ \t]*;[ \t]*[qQ]=(0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?))?"
)
# Values of Accept-Encoding are few in practice; emptied when full, since clients can invent them.
_CHOICES_MAX: Final = 1_024
_choices: dict[tuple[bytes, tuple[str, ...]], str] = {}
_offered: dict[tuple[str, ...], tuple[str, ...]] = {}
# Compressors whose frame has ended, by level: the next frame owes them nothing, and making one takes 20 us.
_FREE_MAX: Final = 4
_free_zstd: dict[int, list[Any]] = {}
# Imported when the first app wants them.
_LIBRARIES: Final = {
    "gzip": "zlib",
    "br": "brotli",
    "zstd": "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd",
}


class Encoder:
    """The compression of one answer; what it holds is freed with it."""

    __slots__ = ("_stream", "bytes_in", "bytes_out", "coding")

    def __init__(self, coding: str, options: Compression) -> None:
        self.coding = coding
        self.bytes_in = 0
        self.bytes_out = 0
        self._stream = _open_stream(coding, options)

    def encode(self, data: Data, ended: bool) -> bytes:
        """Return all that follows from the data, which may be empty."""
        if not data and not ended:
            return b""
        out = self._stream.encode(data, ended)
        self.bytes_in += len(data)
        self.bytes_out += len(out)
        return out


def start_encoder(
    options: Compression, request: RequestHead, head: ResponseHead, bytes_known: int, *, room: bool
) -> Encoder | None:
    """Have the head say what the client gets; return what makes its body, or None to pass that on as it is.

    `bytes_known` is the length of a body without Content-Length if that is here, else -1. Without `room`
    there are too many encoders already. An answer to HEAD gets the fields that GET would get, as far as they
    do not follow from its body.
    """
    if head.status == NOT_MODIFIED:
        _tell_same(request, head)
    if not _is_suited(options, head):
        return None
    if not any(_names(line, b"vary") and _varies(line) for line in head.lines):
        head.lines = [*head.lines, b"Vary: Accept-Encoding"]
    size = head.content_length if head.content_length >= 0 else bytes_known
    if 0 <= size < options.bytes_min or request.minor == 0 or not room:
        return None
    coding = choose_coding(_join_accepted(request), find_offered(options.codings))
    if not coding:
        return None
    head.lines = [_weaken(line) for line in head.lines if not _names(line, b"accept-ranges")]
    head.lines.append(b"Content-Encoding: " + coding.encode())
    head.content_length = -1
    return None if request.method == b"HEAD" else Encoder(coding, options)


def _tell_same(request: RequestHead, head: ResponseHead) -> None:
    """Have a 304 name the answer that the client has: its ETag is a weak one if that was compressed."""
    asked = b",".join(line for line in request.lines if _names(line, b"if-none-match"))
    for line in head.lines:
        if _names(line, b"etag") and _weaken(line)[len(b"ETag: ") :] in asked:
            head.lines = [_weaken(line) for line in head.lines]
            return


def _is_suited(options: Compression, head: ResponseHead) -> bool:
    """True when the type is one that is compressed, and nothing forbids to."""
    if head.status in _UNSUITED:
        return False
    suits = False
    for line in head.lines:
        name, _, value = line.partition(b":")
        name = name.lower()
        if name == b"content-type":
            suits = options.suits(value.partition(b";")[0].strip().lower())
        elif name in _FORBIDDING or (name == b"cache-control" and b"no-transform" in value.lower()):
            return False
    return suits


def _join_accepted(request: RequestHead) -> bytes:
    """Return all of the client's Accept-Encoding; nothing if it wants nobody to change the answer."""
    values: list[bytes] = []
    for line in request.lines:
        if _names(line, b"accept-encoding"):
            values.append(line.partition(b":")[2])
        elif _names(line, b"cache-control") and b"no-transform" in line.lower():
            return b""
    return b",".join(values)


def choose_coding(accepted: bytes, offered: tuple[str, ...]) -> str:
    """Return the coding that the client prefers, of equals the one offered first; empty for none."""
    key = accepted, offered
    choice = _choices.get(key)
    if choice is None:
        if len(_choices) >= _CHOICES_MAX:
            _choices.clear()
        choice = _choices[key] = _negotiate(accepted, offered)
    return choice


def _negotiate(accepted: bytes, offered: tuple[str, ...]) -> str:
    weights: dict[str, float] = {}
    for member in accepted.split(b","):
        match = _MEMBER.fullmatch(member.strip())
        if match is not None:
            name = match[1].decode("ascii").lower()
            weights["gzip" if name == "x-gzip" else name] = float(match[2] or 1)
    # Uncompressed is what is left when nothing else is wanted, unless the client says that it wants it more.
    best, choice = weights.get("identity", 0.0), ""
    for coding in offered:
        weight = weights.get(coding, weights.get("*", 0.0))
        if weight > 0 and (weight > best or (not choice and weight == best)):
            best, choice = weight, coding
    return choice


def _names(line: bytes, name: bytes) -> bool:
    return line[len(name) : len(name) + 1] == b":" and line[: len(name)].lower() == name


def _varies(line: bytes) -> bool:
    told = [name.strip().lower() for name in line.partition(b":")[2].split(b",")]
    return b"*" in told or b"accept-encoding" in told


def _weaken(line: bytes) -> bytes:
    """A strong ETag is of the bytes as the machine sent them (RFC 9110 section 8.8.1)."""
    if not _names(line, b"etag"):
        return line
    tag = line.partition(b":")[2].strip()
    return line if tag.startswith(b"W/") else b"ETag: W/" + tag


# Codings


class _Gzip:
    """RFC 1952; a quarter of a megabyte."""

    __slots__ = ("_deflate",)

    def __init__(self, options: Compression) -> None:
        self._deflate = zlib.compressobj(options.gzip_level, zlib.DEFLATED, 16 + zlib.MAX_WBITS)

    def encode(self, data: Data, ended: bool) -> bytes:
        """Return all that follows from the data."""
        start = self._deflate.compress(data)
        return start + self._deflate.flush(zlib.Z_FINISH if ended else zlib.Z_SYNC_FLUSH)


class _Brotli:
    """RFC 7932; with this window a third of a megabyte, with the usual one two."""

    __slots__ = ("_compressor",)

    def __init__(self, options: Compression) -> None:
        library = import_module(_LIBRARIES["br"])
        self._compressor: Any = library.Compressor(quality=options.br_level, lgwin=17)

    def encode(self, data: Data, ended: bool) -> bytes:
        """Return all that follows from the data."""
        start: bytes = self._compressor.process(data)
        rest: bytes = self._compressor.finish() if ended else self._compressor.flush()
        return start + rest


class _Zstandard:
    """RFC 8878; with these tables half a megabyte, with the usual ones two, to send one hundredth less."""

    __slots__ = ("_compressor", "_free")

    def __init__(self, options: Compression) -> None:
        self._free = _free_zstd.setdefault(options.zstd_level, [])
        if self._free:
            self._compressor: Any = self._free.pop()
            return
        library = import_module(_LIBRARIES["zstd"])
        names = library.CompressionParameter
        self._compressor = library.ZstdCompressor(
            options={
                names.compression_level: options.zstd_level,
                names.window_log: 17,
                names.hash_log: 15,
                names.chain_log: 14,
            }
        )

    def encode(self, data: Data, ended: bool) -> bytes:
        """Return all that follows from the data."""
        compressor = self._compressor
        out: bytes = compressor.compress(data, compressor.FLUSH_FRAME if ended else compressor.FLUSH_BLOCK)
        if ended and len(self._free) < _FREE_MAX:
            self._free.append(compressor)
        return out


def _open_stream(coding: str, options: Compression) -> _Gzip | _Brotli | _Zstandard:
    if coding == "gzip":
        return _Gzip(options)
    return _Brotli(options) if coding == "br" else _Zstandard(options)


def find_offered(codings: tuple[str, ...]) -> tuple[str, ...]:
    """Return those codings whose library is installed; imports them, which takes some milliseconds once."""
    offered = _offered.get(codings)
    if offered is None:
        offered = _offered[codings] = tuple(coding for coding in codings if _has_library(coding))
    return offered


def _has_library(coding: str) -> bool:
    try:
        import_module(_LIBRARIES[coding])
    except ImportError:
        return False
    return True
