"""What is counted of TLS with clients.

Decides names and labels; refuses to know how they are shown. Invariant: every label value is one of a few
of our own, or the name of a certificate that the operator installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .metrics import Sample

METRICS: Final[dict[str, tuple[str, str]]] = {
    "isthmus_tls_handshakes_total": (
        "counter",
        "Handshakes with clients that succeeded, by version and by whether a ticket was used.",
    ),
    "isthmus_tls_handshake_failures_total": ("counter", "Connections that got no TLS, by reason."),
    "isthmus_tls_handshakes_pending": ("gauge", "Connections that are before the end of their handshake."),
    "isthmus_tls_certificates": ("gauge", "Certificates in use."),
    "isthmus_tls_certificates_refused": ("gauge", "Certificate files that cannot be used; the log says why."),
    "isthmus_tls_certificate_expiry_seconds": (
        "gauge",
        "Unix time at which a certificate expires, by its first name; the 100 that expire first.",
    ),
}


class TlsMetrics:
    """The counters of one worker."""

    __slots__ = ("failures", "handshakes", "pending")

    def __init__(self) -> None:
        self.handshakes: dict[tuple[str, bool], int] = {}
        self.failures: dict[str, int] = {}
        self.pending = 0

    def count_handshake(self, version: str, *, resumed: bool) -> None:
        """Count one that succeeded."""
        key = version, resumed
        self.handshakes[key] = self.handshakes.get(key, 0) + 1

    def count_failure(self, reason: str) -> None:
        """Count a connection that got no TLS."""
        self.failures[reason] = self.failures.get(reason, 0) + 1

    def samples(self) -> Iterator[Sample]:
        """Yield all of it as (name, labels, value)."""
        for (version, resumed), count in self.handshakes.items():
            labels = ("version", version), ("resumed", "yes" if resumed else "no")
            yield "isthmus_tls_handshakes_total", labels, count
        for reason, count in self.failures.items():
            yield "isthmus_tls_handshake_failures_total", (("reason", reason),), count
        yield "isthmus_tls_handshakes_pending", (), self.pending
