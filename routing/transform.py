"""What a replay in its JSON form says beside where to go: changes of the request, and what to remember.

Decides whether both are well-formed. Refuses to know which header fields are the proxy's own: that is for
whoever changes the request. Invariant: every name, value and path that is returned can be written into a
head as it is.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

# What a browser sends as a path: visible ASCII; a fragment never leaves it.
_PATH: Final = re.compile(r"/[!\"$-~]*")
_NAME: Final = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,128}")
_VALUE: Final = re.compile(r"[!-~](?:[ \t!-~]*[!-~])?|")
PATH_CHARS_MAX: Final = 8_192  # what clients may send by default
HEADERS_MAX: Final = 100  # as many as clients may send by default
VALUE_CHARS_MAX: Final = 8_192


class Transform(NamedTuple):
    """Changes of one replayed request: fields are deleted first, then set."""

    path: bytes | None = None  # with the query; None: as it was
    deleted: tuple[bytes, ...] = ()  # names in lower case
    added: tuple[tuple[bytes, bytes], ...] = ()  # (name, value); takes the place of all of that name


class CacheWish(NamedTuple):
    """What a replay says of being remembered. What is wrong with it is judged when it is to be."""

    prefix: str = ""
    ttl_s: int = 0
    allow_bypass: bool = False
    invalidate: bool = False


def parse_transform(value: object) -> Transform:
    """Return what `transform` says. Raises ValueError."""
    if not isinstance(value, dict):
        raise ValueError("transform must be an object, in the JSON form")  # noqa: TRY004 - one kind of error for all
    _check_keys("transform", value, ("path", "delete_headers", "set_headers"))
    path = value.get("path")
    if path is not None and (
        not isinstance(path, str) or len(path) > PATH_CHARS_MAX or not _PATH.fullmatch(path)
    ):
        raise ValueError("transform.path must begin with '/' and be visible ASCII without '#'")
    return Transform(
        None if path is None else path.encode("ascii"),
        tuple(_parse_name(name) for name in _list(value, "delete_headers")),
        tuple(_parse_field(field) for field in _list(value, "set_headers")),
    )


def _list(value: dict[str, object], key: str) -> list[object]:
    items = value.get(key)
    if items is None:
        return []
    if not isinstance(items, list) or len(items) > HEADERS_MAX:
        raise ValueError(f"transform.{key} must be a list of at most {HEADERS_MAX}")
    return items


def _parse_name(name: object) -> bytes:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"{ascii(name)[:80]} is not the name of a header")
    return name.lower().encode("ascii")


def _parse_field(field: object) -> tuple[bytes, bytes]:
    if not isinstance(field, dict) or field.keys() != {"name", "value"}:
        raise ValueError("an entry of transform.set_headers must have a name and a value")
    name, value = field["name"], field["value"]
    _parse_name(name)
    if not isinstance(value, str) or len(value) > VALUE_CHARS_MAX or not _VALUE.fullmatch(value):
        raise ValueError(f"the value for header {name!r} is not printable ASCII")
    return name.encode("ascii"), value.encode("ascii")


def parse_cache(value: object, allow_bypass: object) -> CacheWish | None:
    """Return what `cache`, and `allow_bypass` in it or beside it, say. Raises ValueError."""
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise ValueError("cache must be an object, in the JSON form")  # noqa: TRY004 - as above
    _check_keys("cache", value, ("prefix", "ttl", "allow_bypass", "invalidate"))
    prefix, ttl_s = value.get("prefix", ""), value.get("ttl", 0)
    if not isinstance(prefix, str) or not isinstance(ttl_s, int) or isinstance(ttl_s, bool):
        raise ValueError("cache.prefix must be a string and cache.ttl a whole number of seconds")  # noqa: TRY004 - as above
    bypass = value.get("allow_bypass", False if allow_bypass is None else allow_bypass)
    invalidate = value.get("invalidate", False)
    if not isinstance(bypass, bool) or not isinstance(invalidate, bool):
        raise ValueError("allow_bypass and cache.invalidate must be true or false")  # noqa: TRY004 - as above
    return CacheWish(prefix, ttl_s, bypass, invalidate) if value else None


def read_cache_fields(fields: list[tuple[bytes, bytes]]) -> CacheWish | None:
    """Return what the fields beside `fly-replay` say: (lower-case name, value) pairs.

    A field that is given twice, or says what cannot be read, makes a wish that will not be granted: the
    replay itself is in order.
    """
    said: dict[bytes, bytes] = {}
    for name, value in fields:
        said[name] = value if name not in said else b"\n"
    prefix = said.get(b"fly-replay-cache")
    if prefix is None:
        return None
    if prefix.lower() == b"invalidate":
        return CacheWish(invalidate=True)
    ttl = said.get(b"fly-replay-cache-ttl-secs", b"")
    return CacheWish(
        prefix.decode("latin-1"),
        int(ttl) if ttl.isdigit() and len(ttl) < 10 else 0,
        said.get(b"fly-replay-cache-allow-bypass", b"").lower() in {b"yes", b"true"},
    )


def _check_keys(where: str, value: dict[str, object], known: tuple[str, ...]) -> None:
    for key in value:
        if key not in known:
            raise ValueError(f"unknown field {ascii(key)[:80]} in {where}")
