"""The first message of a TLS client, read without taking part in the handshake.

Decides which name the client asks for, and which versions and protocols it offers. Refuses to know sockets,
keys and certificates. Invariant: it raises nothing but `ClientHelloError`, whatever the bytes, and never asks
for more than `HELLO_BYTES_MAX` of them.

Formats: RFC 8446 sections 4.1.2, 4.2.1 and 5.1 (the same bytes in TLS 1.2), RFC 6066 section 3, RFC 7301.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

# Post-quantum key shares make 2 KB usual; OpenSSL refuses what is longer than a record anyway.
MESSAGE_BYTES_MAX: Final = 16_384
# With the headers of records, of which a client may make many small ones, within reason.
HELLO_BYTES_MAX: Final = 2 * MESSAGE_BYTES_MAX

HANDSHAKE_RECORD: Final = 22
_RECORD_HEADER_BYTES: Final = 5
_MESSAGE_HEADER_BYTES: Final = 4
_CLIENT_HELLO: Final = 1
_SERVER_NAME: Final = 0
_ALPN: Final = 16
_SUPPORTED_VERSIONS: Final = 43
# As OpenSSL calls them. What else clients offer is too old, or made up to keep servers tolerant (RFC 8701).
_VERSIONS: Final[dict[bytes, str]] = {b"\x03\x03": "TLSv1.2", b"\x03\x04": "TLSv1.3"}
_NAME: Final = re.compile(rb"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,251}[A-Za-z0-9_])?\.?")


class ClientHelloError(Exception):
    """These bytes do not begin a TLS connection."""


@dataclass(frozen=True, slots=True)
class ClientHello:
    """What a client asks for: `server_name` in lower case without a final dot, None when it names none.

    Of the versions it offers, `versions` has those that are not out of use.
    """

    server_name: str | None
    alpn: tuple[bytes, ...]
    versions: frozenset[str]


def parse_client_hello(data: bytes) -> ClientHello | int:
    """Return the message that `data` begins with, or how many bytes it takes, at least, to know more.

    What follows the message is ignored. Raises ClientHelloError.
    """
    message = b""
    at = 0
    while True:
        if len(data) < at + _RECORD_HEADER_BYTES:
            if data[at : at + 1] not in {b"", b"\x16"}:
                raise ClientHelloError("no handshake record")
            return _bounded(at + _RECORD_HEADER_BYTES)
        length = int.from_bytes(data[at + 3 : at + 5], "big")
        if data[at] != HANDSHAKE_RECORD or data[at + 1] != 3 or not 0 < length <= MESSAGE_BYTES_MAX:
            raise ClientHelloError("no handshake record")
        at += _RECORD_HEADER_BYTES
        message += data[at : at + length]
        if message[0:1] not in {b"", b"\x01"}:
            raise ClientHelloError("no ClientHello")
        if len(message) >= _MESSAGE_HEADER_BYTES:
            size = int.from_bytes(message[1:4], "big")
            if size > MESSAGE_BYTES_MAX:
                raise ClientHelloError("a ClientHello that is too long")
            if len(message) >= _MESSAGE_HEADER_BYTES + size:
                return _parse_message(message[_MESSAGE_HEADER_BYTES : _MESSAGE_HEADER_BYTES + size])
        if len(data) < at + length:
            return _bounded(at + length)
        at += length


def _bounded(needed: int) -> int:
    if needed > HELLO_BYTES_MAX:
        raise ClientHelloError("a ClientHello in too many records")
    return needed


class _Reader:
    """Takes length-prefixed fields off the front of bytes."""

    __slots__ = ("_at", "_data")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, size: int) -> bytes:
        taken = self._data[self._at : self._at + size]
        if len(taken) != size:
            raise ClientHelloError("a ClientHello that ends within a field")
        self._at += size
        return taken

    def take_vector(self, length_bytes: int) -> bytes:
        return self.take(int.from_bytes(self.take(length_bytes), "big"))

    @property
    def ended(self) -> bool:
        return self._at == len(self._data)


def _parse_message(body: bytes) -> ClientHello:
    fields = _Reader(body)
    # Whoever speaks TLS 1.3 says so in an extension, and TLS 1.2 here (RFC 8446 section 4.2.1).
    versions = frozenset(("TLSv1.2",) if fields.take(2) >= b"\x03\x03" else ())
    fields.take(32)  # random
    fields.take_vector(1)  # session
    fields.take_vector(2)  # cipher suites
    fields.take_vector(1)  # compression
    server_name: str | None = None
    alpn: tuple[bytes, ...] = ()
    if not fields.ended:
        extensions = _Reader(fields.take_vector(2))
        seen: set[int] = set()
        while not extensions.ended:
            kind = int.from_bytes(extensions.take(2), "big")
            value = extensions.take_vector(2)
            if kind in seen:
                raise ClientHelloError("an extension that occurs twice")
            seen.add(kind)
            if kind == _SERVER_NAME:
                server_name = _parse_server_name(value)
            elif kind == _ALPN:
                alpn = _parse_alpn(value)
            elif kind == _SUPPORTED_VERSIONS:
                versions = _parse_versions(value)
    if not fields.ended:
        raise ClientHelloError("bytes behind the extensions")
    return ClientHello(server_name, alpn, versions)


def _parse_server_name(value: bytes) -> str:
    names = _Reader(_Reader(value).take_vector(2))
    kind = names.take(1)
    name = names.take_vector(2)
    # RFC 6066: one name of a kind, and there is only one kind.
    if kind != b"\0" or not names.ended or not _NAME.fullmatch(name):
        raise ClientHelloError("a server name that is no host name")
    return name.decode("ascii").lower().removesuffix(".")


def _parse_alpn(value: bytes) -> tuple[bytes, ...]:
    offers = _Reader(_Reader(value).take_vector(2))
    found = []
    while not offers.ended:
        found.append(offers.take_vector(1))
    return tuple(found)


def _parse_versions(value: bytes) -> frozenset[str]:
    offers = _Reader(_Reader(value).take_vector(1))
    found = set()
    while not offers.ended:
        found.add(_VERSIONS.get(offers.take(2), ""))
    return frozenset(found - {""})
