"""Names for requests: a ULID and the region, as in Fly-Request-Id.

Decides nothing but uniqueness; time and randomness come from outside. Invariant: within one process
no id comes twice as long as the clock does not go back; between processes 60 random bits stand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

# Crockford's base 32: no I, L, O, U.
_ALPHABET: Final = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_PAIRS: Final = [(a + b).encode() for a in _ALPHABET for b in _ALPHABET]
_COUNTER_MAX: Final = 1 << 20


def _encode(value: int, pairs: int) -> bytes:
    return b"".join(_PAIRS[value >> shift & 1023] for shift in range((pairs - 1) * 10, -1, -10))


class RequestIds:
    """A source of ids for one process. `getrandbits` is only asked once per 2**20 ids."""

    __slots__ = ("_counter", "_getrandbits", "_millisecond", "_prefix", "_random", "_suffix")

    def __init__(self, getrandbits: Callable[[int], int], region: str) -> None:
        self._getrandbits = getrandbits
        self._suffix = b"-" + region.encode("ascii")
        self._random = _encode(getrandbits(60), 6)
        self._counter = 0
        self._millisecond = -1
        self._prefix = b""

    def next(self, now_ms: int) -> bytes:
        """Return a new id: 48 bits of time, 60 of randomness, 20 of a counter, then the region."""
        counter = self._counter = self._counter + 1
        if counter >= _COUNTER_MAX:
            counter = self._counter = 0
            self._random = _encode(self._getrandbits(60), 6)
            self._millisecond = -1
        if now_ms != self._millisecond:
            self._millisecond = now_ms
            self._prefix = _encode(now_ms & (1 << 48) - 1, 5) + self._random
        return self._prefix + _PAIRS[counter >> 10] + _PAIRS[counter & 1023] + self._suffix
