"""Replays that an app wants remembered, so that the next such request goes to the target at once.

Decides what may be remembered, under which key, for how long, and what is forgotten when there is too
much: the app with the most loses what it has used least, so that nobody can displace another. Refuses to
know requests in flight. Invariants: nothing is shared between hosts; `Service.cached_replays` is None
exactly while nothing is remembered for the service, so that one without pays a comparison for each request.

Fly's "Replay caching"; where it is silent the reading is the one that asks the app once more.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING, Final, cast

from routing.hosts import normalise_host, normalise_path
from routing.replay_options import TTL_S_MAX, TTL_S_MIN, is_below, parse_prefix

from .transforms import find_cookie, find_values

if TYPE_CHECKING:
    from proxy.metrics import ProxyMetrics
    from routing.replay import Replay
    from routing.replay_options import ReplayRule
    from routing.table import Service
    from routing.target import Target
    from routing.transform import CacheWish

    from .request_head import RequestHead

# Host, path prefix, and the digest of cookie or header with its name; that is empty for all of the path.
Key = tuple[bytes, bytes, bytes]
# Of a digest: values may be long, and are known to clients, so only a good one will do.
_DIGEST_BYTES: Final = 16


class Entry:
    """One remembered replay."""

    __slots__ = ("allow_bypass", "expires", "key", "replay", "service", "source")

    def __init__(
        self, key: Key, service: Service, source: Target, replay: Replay, expires: float, allow_bypass: bool
    ) -> None:
        self.key = key
        self.service = service  # whose requests it is for
        self.source = source  # who asked for it
        self.replay = replay
        self.expires = expires
        self.allow_bypass = allow_bypass


class _Book:
    """What is remembered for one service: `Service.cached_replays`."""

    __slots__ = ("entries", "longest", "service")

    def __init__(self, service: Service) -> None:
        self.service = service
        self.entries: dict[Key, Entry] = {}  # the one used longest ago first
        self.longest = 0  # bytes of the longest prefix that there was


class ReplayCache:
    """What is remembered by one worker."""

    __slots__ = ("_books", "_entries_max", "_metrics", "_size")

    def __init__(self, entries_max: int, metrics: ProxyMetrics) -> None:
        self._entries_max = entries_max
        self._metrics = metrics
        self._books: list[_Book] = []  # those with entries
        self._size = 0  # entries in all of them

    def adopt(self, entries_max: int) -> None:
        """Go on with another bound."""
        self._entries_max = entries_max
        while self._size > entries_max:
            self._drop_oldest(None)

    def find(self, service: Service, head: RequestHead, now: float) -> Entry | None:
        """Return the replay remembered for a request: of the longest prefix, and a session's before all's."""
        if service.cached_replays is None:
            return None
        book = cast("_Book", service.cached_replays)
        host, path = normalise_host(head.host), normalise_path(head.target)
        found = self._look_up(book, _find_key(service, head, host, path), now)
        prefix = path
        if len(prefix) > book.longest:
            # No prefix is longer, so the walk is bounded by what apps say and not by clients.
            prefix = prefix[: prefix.rfind(b"/", 0, book.longest + 1)] or b"/"
        while prefix and (found is None or len(prefix) > len(found.key[1])):
            entry = self._look_up(book, (host, prefix, b""), now)
            if entry is not None:
                found = entry
                break
            prefix = b"" if prefix == b"/" else prefix[: prefix.rfind(b"/")] or b"/"
        if found is not None:
            # Now the last of all to go.
            book.entries[found.key] = book.entries.pop(found.key)
        return found

    def _look_up(self, book: _Book, key: Key | None, now: float) -> Entry | None:
        entry = None if key is None else book.entries.get(key)
        if entry is not None and entry.expires <= now:
            self.drop(entry)
            return None
        return entry

    def learn(self, service: Service, source: Target, replay: Replay, head: RequestHead, now: float) -> str:
        """Remember a replay that `source` has asked for, if it or the service wants that.

        Returns what became of it: empty when nobody wanted it, `stored`, or the reason why not.
        """
        options = service.options
        rules = () if options is None else options.replay.rules
        wish = replay.cache
        if (wish is None and not rules) or not self._entries_max:
            return ""
        host, path = normalise_host(head.host), normalise_path(head.target)
        key: Key | None
        if wish is not None:
            key, outcome = _judge_wish(wish, host, path)
            ttl_s, allow_bypass = wish.ttl_s, wish.allow_bypass
        else:
            outcome = ""
            rule, key = _find_rule(rules, head, host, path)
            if rule is not None:
                ttl_s, allow_bypass = rule.ttl_s, rule.allow_bypass
        if key is None:
            return outcome
        outcome = _find_obstacle(replay)
        if not outcome:
            outcome = "stored"
            self._put(Entry(key, service, source, replay, now + ttl_s, allow_bypass))
        return outcome

    def _put(self, entry: Entry) -> None:
        service, key = entry.service, entry.key
        book = cast("_Book | None", service.cached_replays)
        if book is None:
            self._forget_gone()
            book = _Book(service)
            service.cached_replays = book
            self._books.append(book)
        if key in book.entries:
            self.drop(book.entries[key], keep_book=True)
        elif self._size >= self._entries_max:
            self._drop_oldest(book)
        book.entries[key] = entry
        book.longest = max(book.longest, len(key[1]))
        self._size += 1
        self._metrics.replay_cache_entries = self._size

    def _drop_oldest(self, needed: _Book | None) -> None:
        """Forget what the app that has most used longest ago; the needed book stays, also when empty."""
        largest = max(self._books, key=lambda book: len(book.entries))
        self.drop(next(iter(largest.entries.values())), keep_book=largest is needed)

    def drop(self, entry: Entry, *, keep_book: bool = False) -> None:
        """Forget one; nothing happens if that was done already."""
        book = cast("_Book | None", entry.service.cached_replays)
        if book is None or book.entries.get(entry.key) is not entry:
            return
        del book.entries[entry.key]
        self._size -= 1
        self._metrics.replay_cache_entries = self._size
        if not book.entries and not keep_book:
            entry.service.cached_replays = None
            self._books.remove(book)

    def _forget_gone(self) -> None:
        """Forget services that the table no longer has."""
        for book in list(self._books):
            service = book.service
            if service.owner.service(service.port) is not service:
                for entry in list(book.entries.values()):
                    self.drop(entry)


def _find_key(service: Service, head: RequestHead, host: bytes, path: bytes) -> Key | None:
    options = service.options
    return None if options is None else _find_rule(options.replay.rules, head, host, path)[1]


def _find_rule(
    rules: tuple[ReplayRule, ...], head: RequestHead, host: bytes, path: bytes
) -> tuple[ReplayRule | None, Key | None]:
    """Return the rule of the longest prefix whose cookie or header the request has, and its key."""
    for rule in rules:
        if rule.covers(host, path):
            value = (
                find_cookie(head, rule.name) if rule.in_cookie else b",".join(find_values(head, rule.name))
            )
            if value:
                kind = b"c:" if rule.in_cookie else b"h:"
                digest = blake2b(value, digest_size=_DIGEST_BYTES).digest()
                return rule, (host, rule.prefix, kind + rule.name + b":" + digest)
    return None, None


def _judge_wish(wish: CacheWish, host: bytes, path: bytes) -> tuple[Key | None, str]:
    """Return the key for what an answer asks to remember, or None and why it cannot be."""
    try:
        named, prefix = parse_prefix(wish.prefix)
    except ValueError:
        return None, "refused_prefix"
    if named not in {b"", host} or not is_below(path, prefix):
        return None, "refused_prefix"
    if not TTL_S_MIN <= wish.ttl_s <= TTL_S_MAX:
        return None, "refused_ttl"
    return (host, prefix, b""), ""


def _find_obstacle(replay: Replay) -> str:
    """Return why a replay cannot stand for others like it, or nothing."""
    if replay.state is not None:
        return "refused_state"
    if replay.transform is not None:
        return "refused_transform"
    if replay.timeout_ms is not None:
        return "refused_timeout"
    return "refused_fallback" if replay.fallback is not None else ""
