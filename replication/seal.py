"""Who may talk: seals datagrams and stream records with the cluster's keys, and opens those of others.

Decides which bytes come from a holder of a key, once, and unaltered. Knows nothing of what they mean.
Invariant: no (key, nonce) pair seals twice: every process and every stream direction derives its own
key from fresh random salt, and counts.

Layout of a datagram: magic 1, sender session 16, counter 8, ciphertext with tag. The header is
authenticated. Layout of a stream: both sides send magic 4, salt 32, tag 16 (the tag proves the key
before anything is answered); then records: length 4, ciphertext with tag.
Key derivation is HKDF-SHA256 (RFC 5869), sealing is ChaCha20-Poly1305 (RFC 8439).
"""

import hashlib
import hmac
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from replication.errors import ReplicationError

KEY_BYTES = 32
TAG_BYTES = 16
SESSION_BYTES = 16
SALT_BYTES = 32
# Old and new key, and one more so that a rotation may overtake another.
KEYS_MAX = 4

DATAGRAM_MAGIC = b"\xd1"
PLAIN_DATAGRAM_MAGIC = b"\xd0"
STREAM_MAGIC = b"IST\x01"
PLAIN_STREAM_MAGIC = b"ISP\x01"
DATAGRAM_OVERHEAD_BYTES = 1 + SESSION_BYTES + 8 + TAG_BYTES
HANDSHAKE_BYTES = 4 + SALT_BYTES + TAG_BYTES

# How many datagrams of one sender may overtake each other; the bitmap is one int.
REPLAY_WINDOW = 1024
# One session per living peer and a few for the restarted; only holders of a key can fill it.
SESSIONS_MAX = 8192


class SealError(ReplicationError):
    """Bytes that no holder of our keys sealed for us now; `reason` is fit for a metric's label."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class StreamBox(Protocol):
    """Seals and opens the records of one established stream."""

    overhead_bytes: int

    def seal(self, data: bytes) -> bytes:
        """Return the next record's bytes."""

    def open(self, data: bytes) -> bytes:
        """Return what the next record of the other side holds; raises SealError."""


class Handshake(Protocol):
    """One side of a stream's opening: our first bytes, then a box once theirs are checked."""

    def first_bytes(self) -> bytes:
        """Return what to send; the accepting side calls it after `finish`."""

    def finish(self, data: bytes) -> StreamBox:
        """Check the other side's first bytes and return the box; raises SealError."""


class Seal(Protocol):
    """All that the transport needs to keep strangers out."""

    secret: bool  # whether it hides and proves anything; if not, its bytes must not leave this machine

    def seal_datagram(self, data: bytes) -> bytes:
        """Return the bytes to send."""

    def open_datagram(self, data: bytes) -> bytes:
        """Return what a datagram holds; raises SealError."""

    def dial(self) -> Handshake:
        """Start a stream as the one who connects."""

    def accept(self) -> Handshake:
        """Start a stream as the one who is connected to."""

    def holds(self, box: StreamBox) -> bool:
        """Return whether the key that a stream was made with is still in use."""

    def watch(self, on_replaced: Callable[[], None]) -> None:
        """Have a callback called after the keys were replaced."""


def make_seal(keys: Sequence[bytes], cluster: str) -> Seal:
    """Return the seal for a key ring, or the plain framing if the ring is empty."""
    return KeyRing(keys, cluster) if keys else PlainSeal(cluster)


def _derive(key: bytes, salt: bytes, purpose: str, cluster: str) -> ChaCha20Poly1305:
    info = f"isthmus {purpose} {cluster}".encode()
    return ChaCha20Poly1305(HKDF(SHA256(), KEY_BYTES, salt, info).derive(key))


def _nonce(counter: int) -> bytes:
    return counter.to_bytes(12, "big")


@dataclass(slots=True)
class ReplayWindow:
    """Which of the last REPLAY_WINDOW counters of a sender were seen; bit i of `seen` is `newest - i`."""

    newest: int = -1
    seen: int = 0

    def admit(self, counter: int) -> bool:
        """Return whether the counter is new, and mark it; call it for authentic datagrams only."""
        if counter > self.newest:
            shift = counter - self.newest
            # A jump over the whole window forgets it; shifting by 2^60 would ask for that much memory.
            kept = self.seen << shift if shift < REPLAY_WINDOW else 0
            self.seen = kept & ((1 << REPLAY_WINDOW) - 1) | 1
            self.newest = counter
            return True
        age = self.newest - counter
        if age >= REPLAY_WINDOW or self.seen >> age & 1:
            return False
        self.seen |= 1 << age
        return True


@dataclass(slots=True)
class _Sender:
    """A peer's datagram session: made at its first authentic datagram, dropped when least recently used."""

    key: bytes
    aead: ChaCha20Poly1305
    window: ReplayWindow


class KeyRing:
    """Seals with the first key, opens with any; streams live for as long as their key is in the ring."""

    secret = True

    def __init__(
        self, keys: Sequence[bytes], cluster: str, *, random: Callable[[int], bytes] = os.urandom
    ) -> None:
        self._cluster = cluster
        self._random = random
        self._senders: OrderedDict[bytes, _Sender] = OrderedDict()
        self._openings: OrderedDict[bytes, None] = OrderedDict()  # salts of the last streams dialled to us
        self._watchers: list[Callable[[], None]] = []
        self._keys: tuple[bytes, ...] = ()
        self._session = b""
        self._aead: ChaCha20Poly1305  # set by `replace`, as is the counter
        self.replace(keys)

    def replace(self, keys: Sequence[bytes]) -> None:
        """Adopt a key ring; sessions sealed with a key that is gone stop being opened."""
        if not 0 < len(keys) <= KEYS_MAX or any(len(key) != KEY_BYTES for key in keys):
            raise ValueError(f"a key ring holds 1 to {KEYS_MAX} keys of {KEY_BYTES} bytes")
        if self._keys[:1] != tuple(keys[:1]):
            if self._session:
                # What we sealed in the session that ends must not come back to us as somebody else's.
                spent = ReplayWindow(newest=2**64 + REPLAY_WINDOW)
                self._senders[self._session] = _Sender(self._keys[0], self._aead, spent)
            self._session = self._random(SESSION_BYTES)
            self._counter = 0
            self._aead = _derive(keys[0], self._session, "datagram v1", self._cluster)
        self._keys = tuple(keys)
        # Replay windows of senders that stay readable are kept, or a rotation would let old datagrams in.
        for session in [session for session, sender in self._senders.items() if sender.key not in keys]:
            del self._senders[session]
        for on_replaced in self._watchers:
            on_replaced()

    def seal_datagram(self, data: bytes) -> bytes:
        """Return the bytes to send."""
        counter = self._counter
        self._counter += 1
        header = DATAGRAM_MAGIC + self._session + counter.to_bytes(8, "big")
        return header + self._aead.encrypt(_nonce(counter), data, header)

    def open_datagram(self, data: bytes) -> bytes:
        """Return what a datagram holds; raises SealError."""
        if len(data) < DATAGRAM_OVERHEAD_BYTES:
            raise SealError("truncated")
        if data[:1] != DATAGRAM_MAGIC:
            raise SealError("magic")
        header, body = data[: 1 + SESSION_BYTES + 8], data[1 + SESSION_BYTES + 8 :]
        session, counter = header[1 : 1 + SESSION_BYTES], int.from_bytes(header[1 + SESSION_BYTES :], "big")
        if session == self._session:
            raise SealError("reflected")
        sender = self._senders.get(session)
        if sender is not None:
            plain = _open(sender.aead, counter, body, header)
            self._senders.move_to_end(session)
        else:
            plain, sender = self._open_first(session, counter, body, header)
        if not sender.window.admit(counter):
            raise SealError("replayed")
        return plain

    def _open_first(self, session: bytes, counter: int, body: bytes, header: bytes) -> tuple[bytes, _Sender]:
        for key in self._keys:
            aead = _derive(key, session, "datagram v1", self._cluster)
            try:
                plain = _open(aead, counter, body, header)
            except SealError:
                continue
            sender = self._senders[session] = _Sender(key, aead, ReplayWindow())
            if len(self._senders) > SESSIONS_MAX:
                self._senders.popitem(last=False)
            return plain, sender
        raise SealError("tag")

    def dial(self) -> Handshake:
        """Start a stream as the one who connects."""
        return _Dial(self._keys[0], self._cluster, self._random(SALT_BYTES))

    def accept(self) -> Handshake:
        """Start a stream as the one who is connected to."""
        return _Accept(self._keys, self._cluster, self._random(SALT_BYTES), self._admit_opening)

    def _admit_opening(self, salt: bytes) -> bool:
        """Return whether the opening of a stream, which a holder of a key has made, is new; and note it."""
        if salt in self._openings:
            return False
        self._openings[salt] = None
        if len(self._openings) > SESSIONS_MAX:
            self._openings.popitem(last=False)
        return True

    def holds(self, box: StreamBox) -> bool:
        """Return whether the key that a stream was made with is still in the ring."""
        return isinstance(box, _Box) and box.key in self._keys

    def watch(self, on_replaced: Callable[[], None]) -> None:
        """Have a callback called after each `replace`."""
        self._watchers.append(on_replaced)


def _open(aead: ChaCha20Poly1305, counter: int, body: bytes, header: bytes | None) -> bytes:
    try:
        return aead.decrypt(_nonce(counter), body, header)
    except InvalidTag:
        raise SealError("tag") from None


def _split_handshake(data: bytes) -> tuple[bytes, bytes]:
    if data[:4] != STREAM_MAGIC:
        raise SealError("magic")
    if len(data) != HANDSHAKE_BYTES:
        raise SealError("truncated")
    return data[4 : 4 + SALT_BYTES], data[4 + SALT_BYTES :]


def _proof(key: bytes, salt: bytes, purpose: str, cluster: str) -> bytes:
    return _derive(key, salt, purpose, cluster).encrypt(_nonce(0), b"", None)


class _Dial:
    def __init__(self, key: bytes, cluster: str, salt: bytes) -> None:
        self._key, self._cluster, self._salt = key, cluster, salt

    def first_bytes(self) -> bytes:
        """Return our salt and the proof that we hold the key."""
        return STREAM_MAGIC + self._salt + _proof(self._key, self._salt, "dial v1", self._cluster)

    def finish(self, data: bytes) -> StreamBox:
        """Check the accepting side's proof, which covers both salts."""
        salt, proof = _split_handshake(data)
        salts = self._salt + salt
        if not hmac.compare_digest(proof, _proof(self._key, salts, "accept v1", self._cluster)):
            raise SealError("tag")
        return _Box(
            self._key,
            sealer=_derive(self._key, salts, "stream v1 dialer", self._cluster),
            opener=_derive(self._key, salts, "stream v1 accepter", self._cluster),
        )


class _Accept:
    def __init__(
        self, keys: tuple[bytes, ...], cluster: str, salt: bytes, admit: Callable[[bytes], bool]
    ) -> None:
        self._keys, self._cluster, self._salt, self._admit = keys, cluster, salt, admit
        self._answer = b""  # set by finish

    def first_bytes(self) -> bytes:
        """Return our salt and proof; a stranger never gets this far."""
        assert self._answer, "finish comes first: nothing is said to a stranger"
        return self._answer

    def finish(self, data: bytes) -> StreamBox:
        """Find the key that the dialer holds."""
        salt, proof = _split_handshake(data)
        for key in self._keys:
            if hmac.compare_digest(proof, _proof(key, salt, "dial v1", self._cluster)):
                break
        else:
            raise SealError("tag")
        if not self._admit(salt):
            raise SealError("replayed")  # whoever plays it again could not go on, but is not answered either
        salts = salt + self._salt
        self._answer = STREAM_MAGIC + self._salt + _proof(key, salts, "accept v1", self._cluster)
        return _Box(
            key,
            sealer=_derive(key, salts, "stream v1 accepter", self._cluster),
            opener=_derive(key, salts, "stream v1 dialer", self._cluster),
        )


class _Box:
    """A key and a counter for each direction; a lost, repeated or reordered record fails to open."""

    overhead_bytes = TAG_BYTES

    def __init__(self, key: bytes, sealer: ChaCha20Poly1305, opener: ChaCha20Poly1305) -> None:
        self.key = key  # of the ring, from which both others derive
        self._sealer, self._opener = sealer, opener
        self._sealed = 0
        self._opened = 0

    def seal(self, data: bytes) -> bytes:
        """Return the next record's bytes."""
        record = self._sealer.encrypt(_nonce(self._sealed), data, None)
        self._sealed += 1
        return record

    def open(self, data: bytes) -> bytes:
        """Return what the next record holds; after a failure the stream is beyond use."""
        if len(data) < TAG_BYTES:
            raise SealError("truncated")
        plain = _open(self._opener, self._opened, data, None)
        self._opened += 1
        return plain


class PlainSeal:
    """No secrecy: keeps clusters apart by name and nothing more, so it is for loopback only."""

    secret = False

    def __init__(self, cluster: str) -> None:
        self._mark = hashlib.sha256(cluster.encode()).digest()[:8]

    def seal_datagram(self, data: bytes) -> bytes:
        """Return the data behind the cluster's mark."""
        return PLAIN_DATAGRAM_MAGIC + self._mark + data

    def open_datagram(self, data: bytes) -> bytes:
        """Return what is behind the mark; raises SealError."""
        if data[:1] != PLAIN_DATAGRAM_MAGIC:
            raise SealError("magic")
        if data[1:9] != self._mark:
            raise SealError("cluster")
        return data[9:]

    def dial(self) -> Handshake:
        """Start a stream as the one who connects."""
        return _PlainHandshake(self._mark)

    def accept(self) -> Handshake:
        """Start a stream as the one who is connected to."""
        return _PlainHandshake(self._mark)

    def holds(self, box: StreamBox) -> bool:  # noqa: ARG002 - there is no key that could go
        """Return True."""
        return True

    def watch(self, on_replaced: Callable[[], None]) -> None:
        """Do nothing: there are no keys, and none can come."""


class _PlainHandshake:
    def __init__(self, mark: bytes) -> None:
        self._mark = mark

    def first_bytes(self) -> bytes:
        """Return the cluster's mark, padded to the size of the sealed handshake."""
        return (PLAIN_STREAM_MAGIC + self._mark).ljust(HANDSHAKE_BYTES, b"\0")

    def finish(self, data: bytes) -> StreamBox:
        """Check the other side's mark; raises SealError."""
        if data[:4] != PLAIN_STREAM_MAGIC:
            raise SealError("magic")
        if data != self.first_bytes():
            raise SealError("cluster")
        return _PlainBox()


class _PlainBox:
    overhead_bytes = 0

    def seal(self, data: bytes) -> bytes:
        """Return the data as it is."""
        return data

    def open(self, data: bytes) -> bytes:
        """Return the data as it is."""
        return data
