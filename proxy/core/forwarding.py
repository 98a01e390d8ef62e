"""What machines are told about the client.

Decides which client address and scheme are believed, and writes the lines that say so. Refuses to
know sockets. Invariant: what an untrusted peer says of itself never gets into these lines.

Fields as in Fly's "Request headers" page, with one difference: X-Forwarded-For ends with the peer
and not with an address of the app, because apps have no addresses of their own here.
"""

from __future__ import annotations

import ipaddress
import re
from typing import TYPE_CHECKING, Final

from .addresses import Networks

if TYPE_CHECKING:
    from collections.abc import Sequence

VIA: Final = b"1.1 isthmus"
_PORT: Final = re.compile(rb"[0-9]{1,5}")
_HOST: Final = re.compile(rb"[A-Za-z0-9._:\[\]-]{1,255}")
_SCHEMES: Final = frozenset((b"http", b"https"))
# In the lines about a client whose connection is not encrypted.
INSECURE: Final = b"\r\nX-Forwarded-Proto: http\r\n"
HTTPS_PORT: Final = 443
# More hops than any real chain; bounds the line that is sent on.
_HOPS_MAX: Final = 32


class Forwarding:
    """The rules of one listener, over TLS or not; `https_port` is where its clients can have TLS."""

    __slots__ = ("_port", "_region", "_scheme", "_trusted", "https_port", "secure")

    def __init__(
        self,
        trusted: Sequence[str],
        region: str,
        port: int,
        *,
        secure: bool = False,
        https_port: int = HTTPS_PORT,
    ) -> None:
        self._scheme = b"https" if secure else b"http"
        self.secure = secure
        self.https_port = https_port
        self._trusted = Networks(trusted)
        self._region = region.encode("ascii")
        self._port = b"%d" % port

    def trusts(self, address: str) -> bool:
        """True when the peer's own X-Forwarded-* are believed."""
        return self._trusted.contain(address)

    def lines_for_peer(self, address: str) -> bytes:
        """Return the lines for a peer that is not believed; the same for all its requests."""
        client = address.encode("ascii")
        return self._lines(client, client, self._scheme, self._port)

    def lines_for_trusted(self, address: str, fields: list[tuple[bytes, bytes]]) -> bytes:
        """Return the lines for a request of a trusted proxy with these X-Forwarded-* fields.

        The client is the last address of the chain that is not itself a trusted proxy.
        """
        said: dict[bytes, bytes] = {}
        hops: list[str] = []
        for name, value in fields:
            lower = name.lower()
            if lower == b"x-forwarded-for":
                hops += [hop.strip() for hop in value.decode("latin-1").split(",")]
            else:
                said[lower] = value
        chain = [address]
        client = address
        for hop in reversed(hops[-_HOPS_MAX:]):
            if not _is_address(hop):
                break
            chain.append(hop)
            client = hop
            if not self.trusts(hop):
                break
        scheme = said.get(b"x-forwarded-proto", b"").lower()
        scheme = scheme if scheme in _SCHEMES else self._scheme
        port = said.get(b"x-forwarded-port", b"")
        lines = self._lines(
            client.encode("ascii"),
            ", ".join(reversed(chain)).encode("ascii"),
            scheme,
            port if _PORT.fullmatch(port) else self._port,
        )
        host = said.get(b"x-forwarded-host", b"")
        return lines + b"X-Forwarded-Host: %b\r\n" % host if _HOST.fullmatch(host) else lines

    def _lines(self, client: bytes, chain: bytes, scheme: bytes, port: bytes) -> bytes:
        secure = b"on" if scheme == b"https" else b"off"
        return (
            b"Fly-Client-IP: %b\r\nFly-Forwarded-Port: %b\r\nFly-Forwarded-Proto: %b\r\n"
            b"Fly-Forwarded-SSL: %b\r\nFly-Region: %b\r\nX-Forwarded-For: %b\r\nX-Forwarded-Port: %b\r\n"
            b"X-Forwarded-Proto: %b\r\nX-Forwarded-SSL: %b\r\nVia: %b\r\n"
        ) % (client, port, scheme, secure, self._region, chain, port, scheme, secure, VIA)


def read_client(lines: bytes) -> bytes:
    """Return the client's address from lines that a `Forwarding` made: their first says it."""
    return lines[len(b"Fly-Client-IP: ") : lines.find(b"\r")]


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
