"""What proves that this node belongs to the cluster: the ring of keys and the certificates.

Decides where they come from, and what may replace them while the node runs. Knows nothing of how they are
used. Invariant: what is in use was read whole and is valid; a file that has become bad changes nothing and
is told in `problem` until it is mended.

A key file has a key in base64 on each line, the one that seals first; what follows `#` is for people.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isthmus.config import ConfigError, decode_key
from proxy.core.explain_proof import derive_key
from replication.seal import KEYS_MAX
from replication.tls import StreamTls, TlsError, TlsFiles

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from isthmus.config import GossipConfig
    from replication.metrics import Sample

log = logging.getLogger(__name__)

# Far more than the keys and a remark on each.
_FILE_BYTES_MAX = 65_536


class Credentials:
    """The keys and certificates that one node uses."""

    def __init__(self, config: GossipConfig) -> None:
        """Read what the configuration names; raises ConfigError."""
        self.keys = read_ring(config)  # as of the last reload that raised nothing, as is `tls`
        self.tls = _make_tls(config)
        self.problem: str | None = None  # of the last reload; None when it went well

    def check(self, config: GossipConfig) -> None:
        """Raise ConfigError, and keep it as the problem, if what a configuration names cannot be used."""
        try:
            read_ring(config)
            _make_tls(config)
        except ConfigError as error:
            self.problem = str(error)
            raise

    def reload(self, config: GossipConfig, replace_keys: Callable[[Sequence[bytes]], None]) -> None:
        """Read what a configuration names, and hand over the keys if they changed; raises ConfigError."""
        try:
            keys = read_ring(config)
            if self.tls is not None:
                self.tls.reload()
        except (ConfigError, TlsError) as error:
            self.problem = str(error)
            raise ConfigError(self.problem) from None
        self.problem = None
        if keys != self.keys:
            self.keys = keys
            replace_keys(keys)
        log.info("keys and certificates were read again", extra=self.describe())

    def describe(self) -> dict[str, Any]:
        """Return which keys are in use, by id, the one that seals first, and what a bad file says."""
        return {"keys": [compute_id(key) for key in self.keys], "problem": self.problem}

    def samples(self) -> Iterator[Sample]:
        """Yield the metrics that METRICS names."""
        yield "isthmus_gossip_keys", (), float(len(self.keys))
        yield "isthmus_credentials_reload_failed", (), float(self.problem is not None)


METRICS: dict[str, tuple[str, str]] = {
    "isthmus_gossip_keys": ("gauge", "Cluster keys in use; more than one during a rotation."),
    "isthmus_credentials_reload_failed": (
        "gauge",
        "1 when the key file or the certificates could not be read again; the last good ones are in use.",
    ),
}


def _make_tls(config: GossipConfig) -> StreamTls | None:
    if not config.tls_cert:
        return None
    try:
        return StreamTls(TlsFiles(Path(config.tls_cert), Path(config.tls_key), Path(config.tls_ca)))
    except TlsError as error:
        raise ConfigError(str(error)) from None


def read_ring(config: GossipConfig) -> tuple[bytes, ...]:
    """Return the keys that a configuration holds or names; raises ConfigError."""
    return read_keys(Path(config.keys_file)) if config.keys_file else config.decoded_keys()


def compute_id(key: bytes) -> str:
    """Return a short name for a key that tells nothing of it."""
    return hashlib.sha256(b"isthmus key id" + key).hexdigest()[:8]


def compute_explain_keys(ring: tuple[bytes, ...], token: str) -> tuple[bytes, ...]:
    """Return the keys by which requests are explained: those of the cluster, else that of the admin API."""
    secrets = ring or ((token.encode(),) if token else ())
    return tuple(derive_key(secret) for secret in secrets)


def read_keys(file: Path) -> tuple[bytes, ...]:
    """Return the keys in a key file, at least one; raises ConfigError with the line that is wrong."""
    keys: list[bytes] = []
    try:
        with file.open("rb") as stream:
            text = stream.read(_FILE_BYTES_MAX).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        problem = getattr(error, "strerror", None) or "it is not text"
        raise ConfigError(f"cannot read the key file {file}: {problem}") from None
    for number, line in enumerate(text.splitlines(), 1):
        word = line.partition("#")[0].strip()
        if not word:
            continue
        try:
            keys.append(decode_key(word))
        except ValueError as error:
            raise ConfigError(f"{file}:{number}: {error}") from None
    if not 0 < len(keys) <= KEYS_MAX or len(set(keys)) != len(keys):
        raise ConfigError(f"{file}: a key file holds 1 to {KEYS_MAX} keys, each of them once")
    return tuple(keys)


def write_keys(file: Path, lines: Sequence[str]) -> None:
    """Replace a key file as a whole, readable by its owner only; raises ConfigError."""
    target = file.resolve()
    name = ""
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)  # mode 0600
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            if target.exists():
                # Whoever runs the node must still be able to read it when root has changed it.
                found = target.stat()
                os.fchown(stream.fileno(), found.st_uid, found.st_gid)
            stream.write("".join(f"{line}\n" for line in lines))
            stream.flush()
            os.fsync(stream.fileno())
        Path(name).replace(target)
    except OSError as error:
        if name:
            with suppress(OSError):
                Path(name).unlink()
        raise ConfigError(f"cannot write the key file {file}: {error.strerror}") from None
