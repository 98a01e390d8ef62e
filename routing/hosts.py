"""From a host and a path to the name of an app.

Decides which hostname row a request belongs to: the most specific name (exact, then the longest
'*.suffix', then '*'), then, among the rows of that name only, the longest path prefix on a segment
boundary. A name that matches without a matching prefix leads nowhere: a less specific name never
gets a second chance, so a wildcard cannot catch what an exact name leaves out.

Refuses to know apps, services and machines. Invariant: paths are normalised for the match alone;
what is forwarded is never touched here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import unquote_to_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

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


class _Site:
    """The path prefixes of one hostname."""

    __slots__ = ("longest", "only", "prefixes")

    def __init__(self) -> None:
        self.prefixes: dict[bytes, str] = {}
        self.longest = 0  # bytes of the longest prefix; set by every change
        self.only: str | None = None  # the app when '/' is the only prefix, which spares reading the path

    def put(self, prefix: bytes, app: str) -> None:
        self.prefixes[prefix] = app
        self._derive()

    def drop(self, prefix: bytes) -> None:
        del self.prefixes[prefix]
        self._derive()

    def _derive(self) -> None:
        self.longest = max(map(len, self.prefixes), default=0)
        self.only = self.prefixes.get(b"/") if len(self.prefixes) == 1 else None

    def find(self, path: bytes) -> str | None:
        candidate = normalise_path(path)
        if len(candidate) > self.longest:
            # No prefix is longer, so the walk below is bounded by our rows and not by the client.
            boundary = candidate.rfind(b"/", 0, self.longest + 1)
            candidate = candidate[:boundary]
        while candidate:
            app = self.prefixes.get(candidate)
            if app is not None:
                return app
            candidate = candidate[: candidate.rfind(b"/")]
        return self.prefixes.get(b"/")


class HostIndex:
    """All hostname rows, by name."""

    __slots__ = ("_any", "_exact", "_suffixes")

    def __init__(self) -> None:
        self._exact: dict[bytes, _Site] = {}
        self._suffixes: dict[bytes, _Site] = {}  # '.suffix' of each '*.suffix'
        self._any: dict[bytes, _Site] = {}  # under b'*', at most one

    def _book(self, hostname: str) -> tuple[dict[bytes, _Site], bytes]:
        key = hostname.encode("ascii")
        if key == b"*":
            return self._any, key
        if key.startswith(b"*."):
            return self._suffixes, key[1:]
        return self._exact, key

    def put(self, hostname: str, prefix: str, app: str) -> None:
        """Lead this hostname and prefix, both in canonical form, to the app."""
        book, key = self._book(hostname)
        book.setdefault(key, _Site()).put(prefix.encode(), app)

    def drop(self, hostname: str, prefix: str) -> None:
        """Forget a hostname and prefix that was put before."""
        book, key = self._book(hostname)
        site = book[key]
        site.drop(prefix.encode())
        if not site.prefixes:
            del book[key]

    def find(self, host: bytes, path: bytes) -> str | None:
        """Return the name of the app for a host (as the client sent it) and a path, or None."""
        site = self._exact.get(host) or self._find_site(normalise_host(host))
        if site is None:
            return None
        return site.only or site.find(path)

    def _find_site(self, host: bytes) -> _Site | None:
        if not host:
            return None
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

    def routes(self) -> Iterator[tuple[str, str, str]]:
        """Yield (hostname, path prefix, app) of every row, in no particular order."""
        for book, star in ((self._exact, ""), (self._suffixes, "*"), (self._any, "")):
            for key, site in book.items():
                for prefix, app in site.prefixes.items():
                    yield star + key.decode("ascii"), prefix.decode(), app
