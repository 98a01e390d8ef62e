"""What a node proves to other nodes with, when requests go through them, and they to it.

Decides which certificates are shown and accepted: those of `gossip.tls_cert` and its authority where they are
set, else certificates that are made from the cluster's keys. Knows nothing of connections. Invariant: whoever
is accepted holds a key of the ring, or a certificate of the authority, that is in use now.

Each key stands for an authority: HKDF (RFC 5869) makes an Ed25519 key of it, so all holders of the key have
the same authority and nobody else can sign in its name. A process makes itself a certificate, under the first
key, that is good for as long as the key is; no time in it, since a clock that is wrong must not stop traffic.
What a stranger can see, a signature and a public key, tells nothing of 32 random bytes.
"""

from __future__ import annotations

import hashlib
import logging
import os
import ssl
from pathlib import Path
from typing import TYPE_CHECKING

from isthmus.config import ConfigError
from isthmus.credentials import compute_id, read_keys
from replication.tls import StreamTls, TlsError, TlsFiles

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Sequence

    from isthmus.config import GossipConfig

log = logging.getLogger(__name__)

_PURPOSE = b"isthmus peering authority v1 "


class PeerIdentity:
    """The certificates of one process."""

    def __init__(self, config: GossipConfig, node: str) -> None:
        """Read what the configuration names; raises ConfigError."""
        self._config = config
        self._node = node
        self._stamp: list[tuple[int, ...]] | None = self._look()  # of the files, when they were read last
        self._keys = self._read_keys()
        self._made: tuple[ssl.SSLContext, ssl.SSLContext] | None = None  # from the keys, when first asked for
        try:
            self._tls = (
                StreamTls(TlsFiles(Path(config.tls_cert), Path(config.tls_key), Path(config.tls_ca)))
                if config.tls_cert
                else None
            )
        except TlsError as error:
            raise ConfigError(str(error)) from None

    @property
    def keys(self) -> tuple[bytes, ...]:
        """The keys of the ring, as they were read last."""
        return self._keys

    def contexts(self) -> tuple[ssl.SSLContext, ssl.SSLContext] | None:
        """Return what to speak as the one connected to and as the one who connects; None: in the clear.

        Takes a tenth of a second the first time, and may be called in a thread for that.
        """
        if self._tls is not None:
            return self._tls.server, self._tls.client
        made, keys = self._made, self._keys
        if made is None and keys:
            made = make_contexts(keys, self._config.cluster, self._node)
            if keys is self._keys:  # and not replaced meanwhile
                self._made = made
        return made

    def label(self, transport: asyncio.BaseTransport) -> str:
        """Return what the other side has proved itself with."""
        if self._tls is not None:
            return self._name_authority(self._tls)
        certificate = transport.get_extra_info("peercert")
        if not certificate:
            return ""
        return str(dict(pair for part in certificate["issuer"] for pair in part)["commonName"])

    def accepts(self, label: str) -> bool:
        """True while that is still good."""
        if self._tls is not None:
            return label == self._name_authority(self._tls)
        return label in {_name(key) for key in self._keys} if self._keys else not label

    def adopt(self, config: GossipConfig) -> None:
        """Have the next `refresh` read what another configuration names."""
        if config != self._config:
            self._config, self._stamp = config, None

    def refresh(self) -> bool:
        """Read files that have changed again; True when others are accepted now than before.

        What is wrong with a file is logged, and what was in use stays.
        """
        stamp = self._look()
        if stamp == self._stamp:
            return False
        self._stamp = stamp
        try:
            keys = self._read_keys()
            if self._tls is not None:
                self._tls.reload()
        except (ConfigError, TlsError) as error:
            log.error("node to node: keys and certificates stay as they were", extra={"problem": str(error)})  # noqa: TRY400 - the message says it all
            return False
        if keys != self._keys:
            self._keys = keys
            self._made = None
        return True

    def _read_keys(self) -> tuple[bytes, ...]:
        config = self._config
        return read_keys(Path(config.keys_file)) if config.keys_file else config.decoded_keys()

    def _look(self) -> list[tuple[int, ...]]:
        found: list[tuple[int, ...]] = []
        config = self._config
        for file in (config.keys_file, config.tls_cert, config.tls_key, config.tls_ca):
            try:
                status = Path(file).stat()
            except OSError:
                found.append(())
            else:
                found.append((status.st_mtime_ns, status.st_size, status.st_ino))
        return found

    def _name_authority(self, tls: StreamTls) -> str:
        return hashlib.sha256(tls.authority).hexdigest()


def _name(key: bytes) -> str:
    return f"isthmus {compute_id(key)}"


def make_contexts(keys: Sequence[bytes], cluster: str, node: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Return contexts, as `contexts` does, for a ring of keys."""
    # Importing here keeps cryptography, 10 MB, out of workers that do not need it.
    from isthmus.peer_certificates import make_authority, make_certificate  # noqa: PLC0415 — see above

    authorities = [make_authority(_derive(key, cluster), _name(key)) for key in keys]
    pair = make_certificate(_derive(keys[0], cluster), _name(keys[0]), node)
    trusted = b"".join(authorities).decode("ascii")
    return _make(ssl.PROTOCOL_TLS_SERVER, trusted, pair), _make(ssl.PROTOCOL_TLS_CLIENT, trusted, pair)


def _derive(key: bytes, cluster: str) -> bytes:
    """Return the 32 bytes that an authority is made of: HKDF-SHA256 with no salt."""
    from cryptography.hazmat.primitives.hashes import SHA256  # noqa: PLC0415 — as above
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF  # noqa: PLC0415 — as above

    return HKDF(SHA256(), 32, None, _PURPOSE + cluster.encode()).derive(key)


def _make(protocol: int, trusted: str, pair: bytes) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=trusted)
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0  # connections are kept instead
    # The ssl module reads files only: here, one in memory.
    descriptor = os.memfd_create("certificate", os.MFD_CLOEXEC)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(pair)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
    return context
