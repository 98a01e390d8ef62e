"""From a host and a path to an app.

Decides which hostname row a request belongs to: the most specific name (exact, then the longest
'*.suffix', then '*'), then, among the rows of that name only, the longest path prefix on a segment
boundary. A name that matches without a matching prefix leads nowhere: a less specific name never
gets a second chance, so a wildcard cannot catch what an exact name leaves out. '*' is for requests
without a host (HTTP/1.0) as well.

Refuses to know what an app is, and services and machines. Invariant: paths are normalised for the match
alone; what is forwarded is never touched here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar
from urllib.parse import unquote_to_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

T = TypeVar("T")  # what stands for an app; never None

# RFC 1035 section 2.3.4; one more for a trailing dot, and room for ':65535'.
HOST_BYTES_MAX = 253 + 1 + 6


def normalise_host(host: bytes) -> bytes:
    """Return the host in lower case without its port and trailing dot; empty when it cannot be a name."""
    if len(host) > HOST_BYTES_MAX:
        return b""
    if host.startswith(b"["):
        return host[: host.find(b"]") + 1].lower()
    name, _, _ = host.partition(b":")
    return name.removesuffix(b".").lower()


def normalise_path(path: bytes) -> bytes:
    """Return the path as a machine might read it at its most lenient: for matching, never for forwarding.

    The query is dropped, percent-encoding is undone once, backslashes count as slashes, empty and
    dot segments are resolved (RFC 3986 section 5.2.4) and never climb above the root.
    """
    end = len(path)
    for mark in (b"?", b"#"):
        found = path.find(mark, 0, end)
        if found >= 0:
            end = found
    path = path[:end]
    if path.startswith(b"/") and not (b"%" in path or b"//" in path or b"/." in path or b"\\" in path):
        return path if path == b"/" else path.removesuffix(b"/")
    segments: list[bytes] = []
    for segment in unquote_to_bytes(path).replace(b"\\", b"/").split(b"/"):
        if segment == b"..":
            if segments:
                segments.pop()
        elif segment not in {b"", b"."}:
            segments.append(segment)
    return b"/" + b"/".join(segments)


class _Site(Generic[T]):
    """The path prefixes of one hostname, with the app and who manages the row."""

    __slots__ = ("longest", "only", "prefixes")

    def __init__(self) -> None:
        self.prefixes: dict[bytes, tuple[T, str]] = {}
        self.longest = 0  # bytes of the longest prefix; set by every change
        self.only: T | None = None  # the app when '/' is the only prefix, which spares reading the path

    def put(self, prefix: bytes, app: T, managed_by: str) -> None:
        self.prefixes[prefix] = (app, managed_by)
        self._derive()

    def drop(self, prefix: bytes) -> None:
        del self.prefixes[prefix]
        self._derive()

    def _derive(self) -> None:
        self.longest = max(map(len, self.prefixes), default=0)
        self.only = None
        if len(self.prefixes) == 1 and b"/" in self.prefixes:
            self.only = self.prefixes[b"/"][0]

    def find(self, path: bytes) -> T | None:
        candidate = normalise_path(path)
        if len(candidate) > self.longest:
            # No prefix is longer, so the walk below is bounded by our rows and not by the client.
            boundary = candidate.rfind(b"/", 0, self.longest + 1)
            candidate = candidate[:boundary]
        while candidate:
            found = self.prefixes.get(candidate)
            if found is not None:
                return found[0]
            candidate = candidate[: candidate.rfind(b"/")]
        found = self.prefixes.get(b"/")
        return None if found is None else found[0]


class HostIndex(Generic[T]):
    """All hostname rows, by name.

    Most names have one prefix, '/', and nobody who manages them: their app stands where a _Site would.
    """

    __slots__ = ("_any", "_exact", "_suffixes")

    def __init__(self) -> None:
        self._exact: dict[bytes, T | _Site[T]] = {}
        self._suffixes: dict[bytes, T | _Site[T]] = {}  # '.suffix' of each '*.suffix'
        self._any: dict[bytes, T | _Site[T]] = {}  # under b'*', at most one

    def _book(self, hostname: str) -> tuple[dict[bytes, T | _Site[T]], bytes]:
        key = hostname.encode("ascii")
        if key == b"*":
            return self._any, key
        if key.startswith(b"*."):
            return self._suffixes, key[1:]
        return self._exact, key

    def get(self, hostname: str, prefix: str) -> tuple[T, str] | None:
        """Return the app that exactly this row leads to, and who manages it."""
        if not hostname.isascii():
            return None
        book, key = self._book(hostname)
        site = book.get(key)
        if isinstance(site, _Site):
            return site.prefixes.get(prefix.encode("utf-8", "replace"))
        return None if site is None or prefix != "/" else (site, "")

    def put(self, hostname: str, prefix: str, app: T, managed_by: str = "") -> None:
        """Lead this hostname and prefix, both in canonical form, to the app."""
        book, key = self._book(hostname)
        site = book.get(key)
        if not isinstance(site, _Site):
            if prefix == "/" and not managed_by:
                book[key] = app
                return
            before = site
            site = book[key] = _Site()
            if before is not None:
                site.put(b"/", before, "")
        site.put(prefix.encode(), app, managed_by)

    def drop(self, hostname: str, prefix: str) -> None:
        """Forget a hostname and prefix that was put before."""
        book, key = self._book(hostname)
        site = book[key]
        if isinstance(site, _Site):
            site.drop(prefix.encode())
            if site.prefixes:
                return
        del book[key]

    def find(self, host: bytes, path: bytes) -> T | None:
        """Return the app for a host (as the client sent it) and a path, or None."""
        site = self._exact.get(host)
        if site is None:
            site = self._find_site(normalise_host(host))
        if isinstance(site, _Site):
            return site.only if site.only is not None else site.find(path)
        return site

    def _find_site(self, host: bytes) -> T | _Site[T] | None:
        site = self._exact.get(host)
        if site is not None:
            return site
        if self._suffixes:
            dot = host.find(b".", 1)  # an empty first label is no name
            while dot >= 0:
                site = self._suffixes.get(host[dot:])
                if site is not None:
                    return site
                dot = host.find(b".", dot + 1)
        return self._any.get(b"*")

    def routes(self) -> Iterator[tuple[str, str, T, str]]:
        """Yield (hostname, path prefix, app, managed by) of every row, in no particular order."""
        for book, star in ((self._exact, ""), (self._suffixes, "*"), (self._any, "")):
            for key, site in book.items():
                name = star + key.decode("ascii")
                if isinstance(site, _Site):
                    for prefix, (app, managed_by) in site.prefixes.items():
                        yield name, prefix.decode(), app, managed_by
                else:
                    yield name, "/", site, ""
