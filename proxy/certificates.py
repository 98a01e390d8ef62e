"""Certificates in files: found by name, read again when they change.

Decides which certificate answers for a name, and what is good enough to be used. Refuses to know
connections. Invariant: a pair that was good stays in use until a good one takes its place or its file is
gone; what a bad file says never matters.

All pairs are kept as bytes, 1 to 3 KB each; an SSLContext takes 19 KB and a millisecond, so those are made
when a name is first asked for, and the ones used last are kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import logging
import os
import ssl
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from .tls import make_server_context

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from .metrics import Sample

log = logging.getLogger(__name__)

# 20 MB of contexts; names beyond it cost a millisecond more at each handshake.
CONTEXTS_MAX: Final = 1_024
# Names whose expiry is shown: those that expire first. Labels are bounded, however many names there are.
EXPIRIES_SHOWN: Final = 100


class CertificateError(Exception):
    """A file cannot be used; the message says why, without its name."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate with its key, as PEM. `issuers` are the certificates between it and the root."""

    source: str
    own: bytes
    issuers: bytes
    names: tuple[str, ...]
    expires_s: float


Stamp = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """What one look at the files found. `stamps` also has the files that were refused."""

    pairs: dict[str, Pair] = field(default_factory=dict)
    stamps: dict[str, Stamp] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    names: dict[str, Pair] = field(default_factory=dict)
    default: Pair | None = None
    expiring: tuple[Pair, ...] = ()


def load_pair(cert: Path, key: Path) -> Pair:
    """Read a certificate and its key, which must belong together. Raises CertificateError."""
    try:
        cert_pem = cert.read_bytes()
        key_pem = cert_pem if key == cert else key.read_bytes()
    except OSError as error:
        raise CertificateError(f"cannot read {error.filename}: {error.strerror}") from None
    try:
        chain = x509.load_pem_x509_certificates(cert_pem)
    except ValueError:
        raise CertificateError("there is no certificate in it") from None
    try:
        private = load_pem_private_key(key_pem, None, unsafe_skip_rsa_key_validation=True)
    except TypeError:
        raise CertificateError(f"the key in {key} is encrypted") from None
    except (ValueError, UnsupportedAlgorithm):
        raise CertificateError(f"there is no usable key in {key}") from None
    leaf = chain[0]
    spki = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    try:
        if leaf.public_key().public_bytes(*spki) != private.public_key().public_bytes(*spki):
            raise CertificateError(f"the key in {key} is not that of the certificate")
        names = _names_of(leaf)
    except (ValueError, UnsupportedAlgorithm):
        raise CertificateError("the certificate is malformed") from None
    if not names:
        raise CertificateError("the certificate is for no name")
    own = leaf.public_bytes(Encoding.PEM) + _private_part(key_pem)
    issuers = b"".join(issuer.public_bytes(Encoding.PEM) for issuer in chain[1:])
    return Pair(str(cert), own, issuers, names, leaf.not_valid_after_utc.timestamp())


def _names_of(leaf: x509.Certificate) -> tuple[str, ...]:
    """Return the DNS names and addresses that a certificate is for; the common name if it has none."""
    try:
        known = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        common = leaf.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
        return tuple(str(name.value).lower() for name in common)
    names = known.get_values_for_type(x509.DNSName)
    names += map(str, known.get_values_for_type(x509.IPAddress))
    return tuple(name.lower() for name in names)


def _private_part(pem: bytes) -> bytes:
    """Return the key of a file that may hold certificates as well."""
    begin = pem.find(b"-----BEGIN ", 0)
    while begin >= 0:
        line = pem[begin : pem.find(b"\n", begin)]
        end = pem.find(b"-----END ", begin)
        end = pem.find(b"\n", end) + 1 or len(pem)
        if b"PRIVATE KEY-----" in line:
            return pem[begin:end]
        begin = pem.find(b"-----BEGIN ", end)
    raise CertificateError("there is no usable key")


def list_files(sources: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield (certificate, key) of all sources: `CERT:KEY`, a file with both, or a directory.

    In a directory a certificate is `NAME.crt` or `NAME.pem` with the key beside it in `NAME.key` or in the
    same file, and `NAME/fullchain.pem` with `NAME/privkey.pem`, as certbot leaves them.
    """
    for source in sources:
        cert, colon, key = source.partition(":")
        if colon:
            yield cert, key
        elif not Path(cert).is_dir():
            beside = str(Path(cert).with_suffix(".key"))
            yield cert, beside if Path(beside).exists() else cert
        else:
            with contextlib.suppress(OSError):  # unreadable is as empty; what was there is then gone
                yield from _list_directory(cert)


def _list_directory(directory: str) -> Iterator[tuple[str, str]]:
    # Thousands of files, every few seconds: plain strings, and no look at a file but the one for its stamp.
    with os.scandir(directory) as entries:
        found = {entry.name: entry.is_dir() for entry in entries}
    for name in sorted(found):
        path = f"{directory}/{name}"
        if found[name]:
            if Path(path, "fullchain.pem").exists():
                yield f"{path}/fullchain.pem", f"{path}/privkey.pem"
        elif name.endswith((".crt", ".pem")):
            key = f"{name[:-4]}.key"
            yield path, f"{directory}/{key}" if key in found else path


def find_pairs(sources: Sequence[str], before: Found, now_s: float, *, force: bool = False) -> Found:
    """Look at all files and read those that changed since `before`; with `force`, all. Blocks."""
    files = dict(list_files(sources))
    stamps = {cert: _stamp(cert, key) for cert, key in files.items()}
    if stamps == before.stamps and not force:
        return before
    found = Found(stamps=stamps)
    for cert, key in files.items():
        old = before.pairs.get(cert)
        problem = before.problems.get(cert)
        new = old
        if force or stamps[cert] != before.stamps.get(cert):
            new, problem = _read_pair(cert, key, old, now_s)
            if problem != before.problems.get(cert):
                _report(cert, problem, kept=old is not None)
        if problem is not None:
            found.problems[cert] = problem
        if new is not None:
            found.pairs[cert] = new
    return _index(found, list(files)[:1] if sources and not Path(sources[0]).is_dir() else [])


def _index(found: Found, default: Sequence[str]) -> Found:
    issuers: dict[bytes, bytes] = {}
    for cert, pair in found.pairs.items():
        # Most share theirs: one copy will do.
        shared = issuers.setdefault(pair.issuers, pair.issuers)
        if shared is not pair.issuers:
            pair = found.pairs[cert] = replace(pair, issuers=shared)  # noqa: PLW2901 - the same pair, smaller
        for name in pair.names:
            other = found.names.get(name)
            if other is None or pair.expires_s > other.expires_s:
                found.names[name] = pair
    expiring = heapq.nsmallest(EXPIRIES_SHOWN, found.pairs.values(), key=lambda pair: pair.expires_s)
    first = found.pairs.get(default[0]) if default else None
    return replace(found, default=first, expiring=tuple(expiring))


def _read_pair(cert: str, key: str, old: Pair | None, now_s: float) -> tuple[Pair | None, str | None]:
    """Return what the files hold now; or what they held before, and what is wrong with them."""
    try:
        new = load_pair(Path(cert), Path(key))
        if old is not None and new.expires_s <= now_s and new.expires_s < old.expires_s:
            raise CertificateError("it has expired")  # noqa: TRY301 - as all other reasons
        if old is not None and new != old:
            _make_context(new)  # what only OpenSSL refuses: a weak key or signature
    except (CertificateError, ssl.SSLError) as error:
        return old, str(error)
    return new, None


def _report(source: str, problem: str | None, *, kept: bool) -> None:
    if problem is None:
        log.info("a certificate can be used again", extra={"file": source})
    else:
        told = {"file": source, "problem": problem, "kept": "the last good one" if kept else "nothing"}
        log.error("a certificate cannot be used", extra=told)


def _stamp(cert: str, key: str) -> Stamp:
    """Return what differs when one of the files was written or replaced."""
    stamp: Stamp = ()
    for path in (cert, key) if key != cert else (cert,):
        try:
            status = os.stat(path)  # noqa: PTH116 - a Path costs more than the look
        except OSError:
            stamp += (0,)
        else:
            stamp += (status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino)
    return stamp


def _make_context(pair: Pair) -> ssl.SSLContext:
    """Return a context with the certificate. The ssl module reads files only: here, one in memory."""
    context = make_server_context()
    descriptor = os.memfd_create("certificate", os.MFD_CLOEXEC)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(pair.own + pair.issuers)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}", password=lambda: "")
    finally:
        os.close(descriptor)
    return context


class Certificates:
    """The certificates of a worker. `_found` is replaced as a whole, never changed."""

    def __init__(self, sources: Sequence[str], now_s: Callable[[], float]) -> None:
        self._sources = sources
        self._now_s = now_s  # Unix time
        self._found = Found()
        self._contexts: OrderedDict[str, tuple[Pair, ssl.SSLContext]] = OrderedDict()  # the last used is last
        self._changed = asyncio.Event()  # set by `reload`, cleared by `watch`

    def load(self) -> str | None:
        """Read all files. Returns why, if none of what is there can be used.

        Blocks: for a process that does not serve yet.
        """
        self._found = find_pairs(self._sources, self._found, self._now_s())
        now_s = self._now_s()
        for pair in self._found.pairs.values():
            if pair.expires_s <= now_s:
                log.warning("a certificate has expired", extra={"file": pair.source})
        if self._found.pairs:
            return None
        log.warning("there is no certificate yet", extra={"sources": list(self._sources)})
        return next((f"{file}: {why}" for file, why in self._found.problems.items()), None)

    def adopt(self, sources: Sequence[str]) -> None:
        """Have `watch` look at other files, which were found to be good."""
        if sources != self._sources:
            self._sources = sources
            self.reload()

    def reload(self) -> None:
        """Have `watch` read all files again at once."""
        self._changed.set()

    async def watch(self, interval_s: float) -> None:
        """Follow the files until cancelled. Reads in a thread: 10,000 names take a while."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), interval_s)
            force = self._changed.is_set()
            self._changed.clear()
            now_s = self._now_s()
            self._found = await asyncio.to_thread(find_pairs, self._sources, self._found, now_s, force=force)

    def find(self, name: str | None) -> Pair | None:
        """Return what answers for a name in lower case: it itself, `*.` and the rest, or the default."""
        found = self._found
        if name is None:
            return found.default
        return found.names.get(name) or found.names.get(f"*.{name.partition('.')[2]}") or found.default

    def context(self, pair: Pair) -> ssl.SSLContext:
        """Return a context with the certificate; raises ssl.SSLError for what OpenSSL does not take."""
        known = self._contexts.get(pair.source)
        if known is not None and known[0] == pair:
            self._contexts.move_to_end(pair.source)
            return known[1]
        context = _make_context(pair)
        self._contexts[pair.source] = pair, context
        self._contexts.move_to_end(pair.source)
        if len(self._contexts) > CONTEXTS_MAX:
            self._contexts.popitem(last=False)
        return context

    def samples(self) -> Iterator[Sample]:
        """Yield gauges; they are the same in every worker, so one of them tells."""
        found = self._found
        yield "isthmus_tls_certificates", (), float(len(found.pairs))
        yield "isthmus_tls_certificates_refused", (), float(len(found.problems))
        # Two certificates may be for one name, of which the first is to expire and not in use.
        first = {pair.names[0]: pair.expires_s for pair in reversed(found.expiring)}
        for name, expires_s in first.items():
            yield "isthmus_tls_certificate_expiry_seconds", (("name", name),), expires_s
