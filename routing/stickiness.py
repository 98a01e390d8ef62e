"""Which machine a client keeps to: the option `sticky` of a service, and rendezvous hashing.

Decides what a service may ask for and which machine a key belongs to; refuses to know requests. Invariant:
when a machine goes, only the keys that it had move, and when one comes, only those that it gets: a key is for
the machine with the highest score of the two together (Thaler, Ravishankar 1998; weights as in Schindelhauer,
Schomaker 2005).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from zlib import crc32

if TYPE_CHECKING:
    from .target import Target

_TOKEN: Final = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,64}")
_RANGE: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class Sticky:
    """Where a client's key is found. With `sets` the proxy sets the cookie itself, to the machine."""

    cookie: bytes = b""
    header: bytes = b""  # in lower case
    sets: bool = False


def parse_sticky(value: object) -> Sticky | None:
    """Return what the option says, or None when that is nothing. Raises ValueError."""
    if value is None or value is False or value == {}:
        return None
    if not isinstance(value, dict) or set(value) - {"cookie", "header", "set"}:
        raise ValueError('sticky must be {"cookie": name} or {"header": name}')
    cookie, header, sets = value.get("cookie", ""), value.get("header", ""), value.get("set", False)
    if bool(cookie) == bool(header) or not isinstance(sets, bool) or (sets and not cookie):
        raise ValueError("sticky takes a cookie or a header, and `set`, true or false, for a cookie")
    if not isinstance(cookie or header, str) or not _TOKEN.fullmatch(cookie or header):
        raise ValueError(f"sticky: {ascii(cookie or header)[:80]} is no name")
    return Sticky(cookie.encode("ascii"), header.lower().encode("ascii"), sets)


def hash_key(key: bytes) -> int:
    """Return what `score` wants of a key; the same in all processes of all nodes."""
    return crc32(key)


def score(key: int, target: Target) -> float:
    """Return how well a machine suits a key."""
    # A checksum of both alone would leave the order of two machines to a few bits of the key.
    mixed = crc32(target.id.encode("ascii"), key) & 0x3FFFFFFF
    mixed = ((mixed ^ (mixed >> 15)) * 0x2C1B3C6D) & 0x3FFFFFFF
    mixed = ((mixed ^ (mixed >> 12)) * 0x297A2D39) & 0x3FFFFFFF
    mixed ^= mixed >> 15
    return -target.weight / math.log((mixed + 0.5) / _RANGE)
