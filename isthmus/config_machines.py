"""The sections of the configuration about machines: addresses, checks, what starts and stops them.

Decides names and defaults. Knows neither probes nor processes. Invariant: what a section allows can be done
as it stands; a command is only ever read from a file of the node that runs it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta, Struct

from isthmus.config_values import (
    DAY_MS,
    ValueOfKeyError,
    check,
    check_identifier,
    parse_listen,
)
from routing.catalog import parse_address

if TYPE_CHECKING:
    from collections.abc import Sequence


class _Section(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table of the file: unknown keys are refused, values are fixed once read."""


def _parse_machine(text: str) -> None:
    """Raise ValueError unless routing takes the address; what has no port is told apart from a wrong one."""
    if ":" in text.rpartition("]")[2]:
        parse_listen(text)
    parse_address(text)


class CheckConfig(_Section, frozen=True):
    """`[[apps.checks]]`: a probe of each of the app's machines, run by the node that owns the machine."""

    type: Literal["http", "tcp"] = "http"
    name: Annotated[str, Meta(max_length=64)] = ""
    path: str = "/"
    method: Literal["GET", "HEAD", "OPTIONS"] = "GET"
    interval_ms: Annotated[int, Meta(ge=100, le=DAY_MS)] = 5_000
    timeout_ms: Annotated[int, Meta(ge=1, le=DAY_MS)] = 2_000
    grace_ms: Annotated[int, Meta(ge=0, le=DAY_MS)] = 0
    failures: Annotated[int, Meta(ge=1, le=1_000)] = 2
    successes: Annotated[int, Meta(ge=1, le=1_000)] = 1
    headers: dict[str, Annotated[str, Meta(max_length=4_096)]] = {}
    status: tuple[int | str, ...] = ("200-299",)
    body: Annotated[str, Meta(max_length=1_024)] = ""
    port: Annotated[int, Meta(ge=1, le=65_535)] | None = None
    clear: bool = False

    def __post_init__(self) -> None:
        if re.fullmatch(r"/[\x21-\x7e]*", self.path) is None:
            raise ValueOfKeyError("path", f"`{self.path}` must start with / and hold no spaces")
        for name, value in self.headers.items():
            if re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}", name) is None or name.lower() in _FRAMING:
                raise ValueOfKeyError("headers", f"`{name}` is no header that a check can send")
            if re.fullmatch(r"[!-~](?:[ \t!-~]*[!-~])?|", value) is None:
                raise ValueOfKeyError("headers", f"`{name}` has a value that is not printable ASCII")
        if self.body and self.method == "HEAD":
            raise ValueOfKeyError("body", "an answer to HEAD has none")
        try:
            parse_statuses(self.status)
        except ValueError as error:
            raise ValueOfKeyError("status", str(error)) from None


# What ends a request's head or body is not for a check to say.
_FRAMING = frozenset(("connection", "content-length", "transfer-encoding", "upgrade", "expect"))


def parse_statuses(said: Sequence[int | str]) -> tuple[tuple[int, int], ...]:
    """Return the ranges that statuses (`204`) and ranges (`200-299`) stand for. Raises ValueError."""
    ranges = []
    for item in said:
        match = re.fullmatch(r"([2-5]\d\d)(?:-([2-5]\d\d))?", str(item))
        if match is None or int(match[1]) > int(match[2] or match[1]):
            raise ValueError(f"`{item}` is neither a status nor a range of them such as 200-299")
        ranges.append((int(match[1]), int(match[2] or match[1])))
    if not ranges:
        raise ValueError("no status would do")
    return tuple(ranges)


class MachineConfig(_Section, frozen=True):
    """`[[apps.machines]]`: one instance of the app, owned and checked by this node."""

    address: str
    id: str = ""
    region: str = ""

    def __post_init__(self) -> None:
        check("address", _parse_machine, self.address)
        if self.id:
            check("id", lambda name: check_identifier(name, "a machine"), self.id)
