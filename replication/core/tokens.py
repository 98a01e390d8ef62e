"""What names a write to those who read elsewhere, and who waits for which.

Decides when a write counts as here: when all that its site wrote up to it has arrived, so that who wrote
several times needs only the last token. Knows nothing of what is parked, and of no clock. Invariant: nobody
waits for what is here already, and each who waits is called once, or forgotten.
"""

import heapq
import itertools
import re
from collections.abc import Callable
from typing import NamedTuple

from replication.core.clock import SITE_BYTES, SiteId

# A version fits into SQLite's integers.
_TOKEN = re.compile(rf"([0-9a-f]{{{2 * SITE_BYTES}}}):([1-9][0-9]{{0,18}})", re.ASCII)
_VERSION_MAX = 2**63 - 1


class Token(NamedTuple):
    """A write: the changeset that holds it. Its text is `SITEHEX:VERSION`."""

    site: SiteId
    version: int

    def __str__(self) -> str:
        return f"{self.site.hex()}:{self.version}"


def parse_token(text: str) -> Token:
    """Return what a token's text stands for; raises ValueError for any other text."""
    match = _TOKEN.fullmatch(text)
    if match is None or int(match[2]) > _VERSION_MAX:
        raise ValueError(f"{text[:64]!r} is not a token: 32 hex digits, a colon, a version")
    return Token(SiteId(bytes.fromhex(match[1])), int(match[2]))


class _Waiter(NamedTuple):
    version: int
    number: int  # in order of coming
    act: Callable[[], None]


class Arrivals:
    """Those who wait for a site's versions."""

    def __init__(self, head: Callable[[SiteId], int], waiting_max: int) -> None:
        self._head = head
        self._waiting_max = waiting_max
        self._count = 0
        self._numbers = itertools.count()
        self._waiting: dict[SiteId, list[_Waiter]] = {}  # heaps, by version

    def __len__(self) -> int:
        return self._count

    @property
    def is_full(self) -> bool:
        """Whether nobody else may wait."""
        return self._count >= self._waiting_max

    def wait(self, token: Token, act: Callable[[], None]) -> Callable[[], None]:
        """Call `act` when the write is here, at once if it is; return what ends the wait."""
        waiter = _Waiter(token.version, next(self._numbers), act)
        heapq.heappush(self._waiting.setdefault(token.site, []), waiter)
        self._count += 1
        self.handle_seen(token.site)
        return lambda: self._forget(token.site, waiter)

    def handle_seen(self, site: SiteId) -> None:
        """Take note that more of a site's versions are here."""
        waiting = self._waiting.get(site)
        if waiting is None:
            return
        head = self._head(site)
        while waiting and waiting[0].version <= head:
            self._count -= 1
            heapq.heappop(waiting).act()
        if not waiting:
            self._waiting.pop(site, None)

    def _forget(self, site: SiteId, waiter: _Waiter) -> None:
        waiting = self._waiting.get(site, [])
        if waiter in waiting:
            waiting.remove(waiter)
            heapq.heapify(waiting)
            self._count -= 1
            if not waiting:
                del self._waiting[site]
