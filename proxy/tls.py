"""What this proxy speaks as TLS, on both sides.

Decides versions, ciphers and protocols. Refuses to know files and connections. Invariant: nothing below
TLS 1.2, no renegotiation, no compression, and only suites with forward secrecy and authenticated encryption.
"""

from __future__ import annotations

import hashlib
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from routing.options import TLS_VERSIONS

if TYPE_CHECKING:
    import asyncio

    from routing.machine_tls import MachineTls

# Mozilla's "intermediate" without its finite-field suites: all clients of the last ten years. The suites of
# TLS 1.3 are not named here; OpenSSL offers all three.
CIPHERS: Final = (
    "ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256:"
    "ECDHE-ECDSA-AES256-GCM-SHA384:ECDHE-RSA-AES256-GCM-SHA384:"
    "ECDHE-ECDSA-CHACHA20-POLY1305:ECDHE-RSA-CHACHA20-POLY1305"
)
PROTOCOLS: Final = ["http/1.1"]


@dataclass(frozen=True, slots=True)
class TlsSettings:
    """Limits of one worker's TLS listener."""

    # Pending at a time: each takes a descriptor, and some 50 KB once its first message is here.
    handshakes_max: int = 1_024
    # From the connection to the end of the handshake: two round trips, with a packet lost on a bad line.
    handshake_timeout_s: float = 10.0


def make_server_context(versions: frozenset[str] = TLS_VERSIONS) -> ssl.SSLContext:
    """Return a context for clients, without a certificate."""
    context = _restrict(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
    if "TLSv1.2" not in versions:
        context.minimum_version = ssl.TLSVersion.TLSv1_3
    if "TLSv1.3" not in versions:
        context.maximum_version = ssl.TLSVersion.TLSv1_2
    return context


def make_machine_context(tls: MachineTls, certificate: str) -> ssl.SSLContext:
    """Return a context for machines of a service. Blocks; raises OSError.

    `certificate` is `CERT:KEY`, or one file with both, that machines are shown if they ask; or empty.
    """
    context = _restrict(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    if tls.fingerprint or not tls.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif tls.ca:
        context.load_verify_locations(cadata=tls.ca)
    else:
        context.load_default_certs()
    if certificate:
        cert, _, key = certificate.partition(":")
        context.load_cert_chain(cert, key or None, password=lambda: "")
    return context


def has_fingerprint(transport: asyncio.BaseTransport, tls: MachineTls) -> bool:
    """True unless only one certificate will do and the machine has shown another one."""
    shown = transport.get_extra_info("ssl_object").getpeercert(True) or b""
    return not tls.fingerprint or hashlib.sha256(shown).hexdigest() == tls.fingerprint


def _restrict(context: ssl.SSLContext) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(CIPHERS)
    # Phones without AES in hardware prefer ChaCha20, and know better than we do.
    context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.set_alpn_protocols(PROTOCOLS)
    return context
