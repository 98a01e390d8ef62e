"""Whether another node runs with our site id: a copied database, or a volume that is mounted twice.

Decides what is a sign of a living twin and what is only an echo of ourselves, or of our own life before this
one. Knows nothing of messages. Invariant: a rumour that was under way before this life began is no proof.
"""

import math
from collections import deque

from replication.core.member import MemberInfo

# What a node sent before it was restarted elsewhere has long arrived or is lost.
_FORMER_LIFE_MS = 10_000
# A former life whose clock was ahead of ours is refuted once and then silent; only what lives refutes back.
_REFUTED_AGAIN = 3
_WINDOW_MS = 60_000
# How often it is told, and how long it stands in the status after the last sign.
_TOLD_EVERY_MS = 60_000
_STANDS_MS = 300_000
# Two twins would refute each other with every rumour, and flood the cluster.
_REFUTES_EVERY_MS = 1_000


class TwinWatch:
    """What one node has noticed of a twin."""

    def __init__(self, me: MemberInfo) -> None:
        self._me = me
        self._started_ms = 0.0  # set by `start`
        self._had = deque([me.incarnation], maxlen=64)  # our incarnations of this life
        self._claims_ms: deque[float] = deque(maxlen=_REFUTED_AGAIN)  # when our refutations were outbid
        self._twin: tuple[MemberInfo, float] | None = None  # and when the last sign came
        self._told_ms = -math.inf

    def start(self, now_ms: float) -> None:
        """Take note of when this life began."""
        self._started_ms = now_ms

    def note_refutation(self, me: MemberInfo) -> None:
        """Take note of our new incarnation."""
        self._me = me
        self._had.append(me.incarnation)

    def is_refuted_later(self, now_ms: float) -> bool:
        """Return whether a twin's claim has to wait for its refutation."""
        twin = self.get(now_ms)
        return twin is not None and bool(self._claims_ms) and now_ms - self._claims_ms[-1] < _REFUTES_EVERY_MS

    def get(self, now_ms: float) -> MemberInfo | None:
        """Return the twin as of its last sign, or None when there was none for five minutes."""
        if self._twin is None or now_ms - self._twin[1] > _STANDS_MS:
            return None
        return self._twin[0]

    def handle_message(self, info: MemberInfo, now_ms: float) -> bool:
        """Take a datagram that has our site as its sender; True when a twin is to be told of."""
        if now_ms - self._started_ms < _FORMER_LIFE_MS:
            return False
        return self.handle_hello(info, now_ms)

    def handle_hello(self, info: MemberInfo, now_ms: float) -> bool:
        """Take a stream whose other end has our site; True when a twin is to be told of.

        To dial oneself is harmless: the other end is then one of our own incarnations.
        """
        if self._is_us(info):
            return False
        return self._note(info, now_ms)

    def handle_claim(self, info: MemberInfo, now_ms: float) -> bool:
        """Take a rumour that outbids our incarnation; True when a twin is to be told of."""
        self._claims_ms.append(now_ms)
        if len(self._claims_ms) < _REFUTED_AGAIN or now_ms - self._claims_ms[0] > _WINDOW_MS:
            return False
        return self._note(info, now_ms)

    def _is_us(self, info: MemberInfo) -> bool:
        same = info.name == self._me.name and info.address == self._me.address
        return same and info.incarnation in self._had

    def _note(self, info: MemberInfo, now_ms: float) -> bool:
        self._twin = (info, now_ms)
        if now_ms - self._told_ms < _TOLD_EVERY_MS:
            return False
        self._told_ms = now_ms
        return True
