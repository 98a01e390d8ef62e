"""Mutual TLS for streams: both sides show a certificate that the cluster's authority signed.

Decides what a peer's certificate must be: signed by the authority, valid now. Not for which name: nodes are
reached at addresses that change, and whoever holds a certificate of the authority is a member. Knows nothing
of sockets. Invariant: the contexts in use are made of one set of files that was read whole and fits together.
"""

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from replication.errors import ReplicationError


class TlsError(ReplicationError):
    """The files cannot be used; the message says which and why."""


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files: our certificate with its chain, its key, and the authority's certificates."""

    cert: Path
    key: Path
    ca: Path


class StreamTls:
    """The contexts for both directions, from files that can be read again."""

    def __init__(self, files: TlsFiles) -> None:
        """Read the files; raises TlsError."""
        self._files = files
        self._watchers: list[Callable[[], None]] = []
        self.server: ssl.SSLContext
        self.client: ssl.SSLContext
        self.authority = b""  # what the CA file held; a link made under another one is made anew
        self.reload()

    def reload(self) -> None:
        """Read the files again; raises TlsError, and then what was in use stays."""
        files = self._files
        try:
            authority = files.ca.read_bytes()
            server = self._make(ssl.PROTOCOL_TLS_SERVER, authority)
            client = self._make(ssl.PROTOCOL_TLS_CLIENT, authority)
        except (OSError, ValueError) as error:  # SSLError is an OSError
            names = ", ".join(str(file) for file in (files.cert, files.key, files.ca))
            raise TlsError(f"cannot use {names} for TLS: {error}") from error
        self.server, self.client = server, client
        if authority != self.authority:
            self.authority = authority
            for on_changed in self._watchers:
                on_changed()

    def watch(self, on_changed: Callable[[], None]) -> None:
        """Have a callback called after the authority changed."""
        self._watchers.append(on_changed)

    def _make(self, protocol: int, authority: bytes) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=authority.decode("ascii"))
        # A password would be asked for on the terminal.
        context.load_cert_chain(self._files.cert, self._files.key, password=_refuse_password)
        return context


def _refuse_password() -> str:
    raise ValueError("the private key is encrypted; give one that is not")
