"""What all sections of the configuration are made of.

Decides how a wrong value is told. Knows no setting. Invariant: whatever is wrong is a ValueError.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

from msgspec import Meta

from routing.catalog import IDENTIFIER

if TYPE_CHECKING:
    from collections.abc import Callable

# Numbers end up in SQLite's integers and in timers; beyond this is a mistake.
Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]
NotNegative = Annotated[int, Meta(ge=0, le=2**31 - 1)]
DAY_MS = 86_400_000


class ValueOfKeyError(ValueError):
    """The value of one key of a section is wrong; `key` is a path below that section."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(problem)
        self.key = key


def check(key: str, parse: Callable[[str], object], *values: str) -> None:
    """Raise an error that names the key unless `parse` takes each of its values."""
    for value in values:
        try:
            parse(value)
        except ValueError as error:
            raise ValueOfKeyError(key, str(error)) from None


def parse_listen(text: str) -> tuple[str, int]:
    """Split `host:port` or `[v6]:port`; port 0 lets the system choose. Raises ValueError."""
    match = re.fullmatch(r"\[([0-9A-Fa-f:.]+)\]:(\d{1,5})|([^\s:\[\]/@]+):(\d{1,5})", text)
    if match is None:
        raise ValueError(f"`{text}` is not an address of the form host:port or [v6]:port")
    host, port = (match[1], match[2]) if match[1] is not None else (match[3], match[4])
    if int(port) > 65535:
        raise ValueError(f"`{text}` has a port above 65535")
    return host, int(port)


def check_identifier(name: str, what: str) -> None:
    """Raise ValueError unless routing takes the name for a node or a machine."""
    if IDENTIFIER.fullmatch(name) is None:
        raise ValueError(f"`{name}` is no name for {what}: up to 64 letters, digits and . - _")
