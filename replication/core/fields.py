"""Check what msgpack hands out: one reader per kind of value.

Decides what a number, a text or a row in a message may be. Knows nothing of which messages there are.
Invariant: a reader returns a value of the declared type and range, or raises WireError.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from replication.core.clock import SITE_BYTES, SiteId
from replication.errors import ReplicationError

T = TypeVar("T")
Reader = Callable[[Any], T]


class WireError(ReplicationError):
    """The peer sent bytes that are not a message; `reason` is one of few words, fit for a metric's label."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def whole(first: int, last: int) -> Reader[int]:
    """Return a reader of whole numbers from first to last."""

    def read(value: Any) -> int:
        # `type(…) is` because True is an int to isinstance.
        if type(value) is not int or not first <= value <= last:
            raise WireError("field")
        return value

    return read


def text(chars_max: int) -> Reader[str]:
    """Return a reader of texts that can be shown on a terminal."""

    def read(value: Any) -> str:
        if type(value) is not str or not 0 < len(value) <= chars_max or not value.isprintable():
            raise WireError("field")
        return value

    return read


def blob(bytes_max: int, bytes_min: int = 0) -> Reader[bytes]:
    """Return a reader of bytes."""

    def read(value: Any) -> bytes:
        if type(value) is not bytes or not bytes_min <= len(value) <= bytes_max:
            raise WireError("field")
        return value

    return read


def read_site(value: Any) -> SiteId:
    """Return a site."""
    if type(value) is not bytes or len(value) != SITE_BYTES:
        raise WireError("field")
    return SiteId(value)


def read_flag(value: Any) -> bool:
    """Return a flag."""
    if type(value) is not bool:
        raise WireError("field")
    return value


def read_row(value: Any, arity: int) -> tuple[Any, ...]:
    """Return a row of so many values."""
    if type(value) is not tuple or len(value) != arity:
        raise WireError("field")
    return value


def rows(read: Reader[T], limit: int) -> Reader[tuple[T, ...]]:
    """Return a reader of up to `limit` values."""

    def read_all(value: Any) -> tuple[T, ...]:
        if type(value) is not tuple or len(value) > limit:
            raise WireError("field")
        return tuple(read(item) for item in value)

    return read_all


def by_site(read: Reader[T], limit: int) -> Reader[dict[SiteId, T]]:
    """Return a reader of a map with a value for each of up to `limit` sites."""

    def read_map(value: Any) -> dict[SiteId, T]:
        if type(value) is not dict or len(value) > limit:
            raise WireError("field")
        return {read_site(site): read(item) for site, item in value.items()}

    return read_map


def optional(read: Reader[T]) -> Reader[T | None]:
    """Return a reader of a value or None."""
    return lambda value: None if value is None else read(value)
