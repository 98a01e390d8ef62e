"""The PROXY protocol, versions 1 and 2: who a connection comes from, told by the proxy in front.

Decides what is a header and what it says, as HAProxy's `doc/proxy-protocol.txt` has it. Refuses to know
who may send one. Invariant: the same bytes mean the same however they are cut into reads, and what is not
a header is an error after the first byte that shows it.
"""

from __future__ import annotations

import ipaddress
import re
import struct
from typing import Final, NamedTuple

from .addresses import name_peer, parse_address

# The longest line of version 1, with two IPv6 addresses.
V1_BYTES_MAX: Final = 107
# Addresses and what senders add about TLS; the protocol allows 64 KiB, which nobody sends.
V2_BYTES_MAX: Final = 4_096

_V1: Final = b"PROXY "
_V2: Final = b"\r\n\r\n\x00\r\nQUIT\n"
_V1_LINE: Final = re.compile(
    rb"PROXY (TCP4|TCP6) ([0-9A-Fa-f:.]{2,45}) ([0-9A-Fa-f:.]{2,45}) (0|[1-9][0-9]{0,4}) (0|[1-9][0-9]{0,4})"
)
_HEAD: Final = struct.Struct(">12sBBH")
_LOCAL: Final = 0x20
_PROXY: Final = 0x21
# Family and transport -> size of one address; 0: not told.
_FAMILIES: Final = {0x00: 0, 0x11: 4, 0x21: 16}

Endpoint = tuple[str, int]


class ProxyHeaderError(Exception):
    """What came is no header of the PROXY protocol."""


class Announced(NamedTuple):
    """What a header says. Without a source the connection is the sender's own, as for its checks."""

    source: Endpoint | None
    destination: Endpoint | None
    size: int  # of the header


def parse_announcement(data: bytes) -> Announced | None:
    """Return what the header at the start of `data` says, or None when more is needed.

    Raises ProxyHeaderError.
    """
    if data.startswith(_V1):
        return _parse_v1(data)
    if data.startswith(_V2):
        return _parse_v2(data)
    if _V1.startswith(data) or _V2.startswith(data):
        return None
    raise ProxyHeaderError("the connection does not begin with a PROXY header")


def _parse_v1(data: bytes) -> Announced | None:
    end = data.find(b"\r\n", 0, V1_BYTES_MAX)
    if end < 0:
        if len(data) >= V1_BYTES_MAX:
            raise ProxyHeaderError("the PROXY line is too long")
        return None
    line = data[:end]
    if line == b"PROXY UNKNOWN" or line.startswith(b"PROXY UNKNOWN "):
        return Announced(None, None, end + 2)
    match = _V1_LINE.fullmatch(line)
    if match is None:
        raise ProxyHeaderError("malformed PROXY line")
    version = 4 if match[1] == b"TCP4" else 6
    source, destination = (_parse_text(match[at], match[at + 2], version) for at in (2, 3))
    return Announced(source, destination, end + 2)


def _parse_text(address: bytes, port: bytes, version: int) -> Endpoint:
    try:
        parsed = ipaddress.ip_address(address.decode("ascii"))
    except ValueError:
        raise ProxyHeaderError("malformed address in the PROXY line") from None
    if parsed.version != version or int(port) > 65_535:
        raise ProxyHeaderError("an address of another family, or a port above 65535, in the PROXY line")
    return name_peer(str(parsed)), int(port)


def _parse_v2(data: bytes) -> Announced | None:
    if len(data) < _HEAD.size:
        return None
    _, command, family, length = _HEAD.unpack_from(data)
    if command not in {_LOCAL, _PROXY}:
        raise ProxyHeaderError("unknown version or command of the PROXY protocol")
    if family not in _FAMILIES and command == _PROXY:
        raise ProxyHeaderError("the PROXY header is not about TCP")
    size = _HEAD.size + length
    if size > V2_BYTES_MAX:
        raise ProxyHeaderError("the PROXY header is too long")
    if len(data) < size:
        return None
    width = _FAMILIES.get(family, 0)
    if command == _LOCAL or not width:
        return Announced(None, None, size)
    start = _HEAD.size + 2 * width + 4
    if start > size:
        raise ProxyHeaderError("the PROXY header is too short for its addresses")
    _check_extensions(data[start:size])
    packed = data[_HEAD.size : start]
    ports = struct.unpack_from(">HH", packed, 2 * width)
    source = name_peer(str(ipaddress.ip_address(packed[:width]))), ports[0]
    destination = name_peer(str(ipaddress.ip_address(packed[width : 2 * width]))), ports[1]
    return Announced(source, destination, size)


def _check_extensions(data: bytes) -> None:
    """Walk over what follows the addresses: kind, length, value, and so on, up to the end."""
    at = 0
    while at < len(data):
        if at + 3 > len(data):
            raise ProxyHeaderError("malformed extension of the PROXY header")
        at += 3 + int.from_bytes(data[at + 1 : at + 3], "big")
    if at != len(data):
        raise ProxyHeaderError("malformed extension of the PROXY header")


def announce_client(version: str, client: str, ends: tuple[Endpoint, Endpoint] | None, port: int) -> bytes:
    """Return the header for the client at this address, whose connection to our port has these ends."""
    source, destination = ends or ((client, 0), ("127.0.0.1", port))
    # One that a proxy in front named in X-Forwarded-For: nobody told its port.
    return render_announcement(version, source if source[0] == client else (client, 0), destination)


def render_announcement(version: str, source: Endpoint, destination: Endpoint) -> bytes:
    """Return a header of version `v1` or `v2`; addresses of two families are both written as IPv6."""
    shown = [parse_address(host) for host, _ in (source, destination)]
    name, family = b"TCP4", 0x11
    if any(address.version == 6 for address in shown):
        shown = [ipaddress.IPv6Address(f"::ffff:{a}") if a.version == 4 else a for a in shown]
        name, family = b"TCP6", 0x21
    if version == "v1":
        hosts = b" ".join(str(address).encode("ascii") for address in shown)
        return b"PROXY %b %b %d %d\r\n" % (name, hosts, source[1], destination[1])
    body = b"".join(address.packed for address in shown)
    body += struct.pack(">HH", source[1], destination[1])
    return _HEAD.pack(_V2, _PROXY, family, len(body)) + body
