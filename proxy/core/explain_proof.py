"""Who may have one request explained: the signed value of its field `Isthmus-Explain`.

Decides what is signed and what of it is believed. Refuses to know where keys come from, and what is told
then. Invariant: a proof is good for one host and until a time that is soon, and no machine ever sees one.

It is `1.<expiry>.<mac>`: seconds since the epoch, and HMAC-SHA256 over them and the host in hexadecimal.
"""

from __future__ import annotations

import hmac
import re
from typing import TYPE_CHECKING, Final

from routing.hosts import normalise_host

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .request_head import RequestHead

FIELD: Final = b"isthmus-explain"
# Whoever has a proof sees names and addresses of machines: long enough to look into one fault.
TTL_S_MAX: Final = 3_600
# By how much the clock of the node that signed may be ahead.
_SKEW_S: Final = 60
_VALUE: Final = re.compile(rb"1\.([0-9]{1,12})\.([0-9a-f]{64})")
_PURPOSE: Final = b"isthmus explain v1"


def derive_key(secret: bytes) -> bytes:
    """Return the key that proofs are signed with where this secret is shared; it tells nothing of it."""
    return hmac.digest(secret, _PURPOSE, "sha256")


def make_proof(key: bytes, host: bytes, expires_s: int) -> str:
    """Return a proof for requests to a host, with or without a port, until a time."""
    return f"1.{expires_s}.{_sign(key, normalise_host(host), expires_s).hex()}"


def accepts(keys: Sequence[bytes], value: bytes, host: bytes, now_s: int) -> bool:
    """True for a value that one of the keys made for this host, and that has not expired."""
    match = _VALUE.fullmatch(value)
    if match is None:
        return False
    expires_s = int(match[1])
    if not now_s < expires_s <= now_s + TTL_S_MAX + _SKEW_S:
        return False
    given, name = bytes.fromhex(match[2].decode("ascii")), normalise_host(host)
    return any(hmac.compare_digest(given, _sign(key, name, expires_s)) for key in keys)


def take_proof(head: RequestHead, keys: Sequence[bytes], now_s: int) -> bool:
    """Take the field out of the wishes of a request; True if there was a good one."""
    wishes = head.routing or []
    given = [value for name, value in wishes if name == FIELD]
    if given:
        head.routing = [wish for wish in wishes if wish[0] != FIELD] or None
    return len(given) == 1 and accepts(keys, given[0], head.host, now_s)


def _sign(key: bytes, host: bytes, expires_s: int) -> bytes:
    return hmac.digest(key, b"%d %b" % (expires_s, host), "sha256")
