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
from routing.catalog import WEIGHT_MAX, parse_address
from routing.types import WEIGHT_USUAL

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


# The driver of machines that have a command.
PROCESS = "process"
FLY_API = "https://api.machines.dev"
# When the node stops, others have so long to hear that its machines do, and to finish what they have there.
SHUT_DOWN_DRAIN_S = 2.0


class MachineConfig(_Section, frozen=True):
    """`[[apps.machines]]`: one instance of the app, owned and checked by this node."""

    address: str
    id: str = ""
    region: str = ""
    weight: Annotated[int, Meta(ge=1, le=WEIGHT_MAX)] = WEIGHT_USUAL
    driver: str = ""
    command: tuple[Annotated[str, Meta(min_length=1)], ...] = ()
    env: dict[str, str] = {}
    directory: str = ""
    restart: Literal["on-failure", "always", "never"] = "on-failure"
    kill_timeout_ms: Annotated[int, Meta(ge=0, le=300_000)] = 5_000

    def __post_init__(self) -> None:
        check("address", _parse_machine, self.address)
        if self.id:
            check("id", lambda name: check_identifier(name, "a machine"), self.id)
        if self.driver and self.command:
            raise ValueOfKeyError("driver", "a machine has a command or a driver, not both")
        for text in (*self.command, *self.env, *self.env.values(), self.directory):
            if "\0" in text:
                raise ValueOfKeyError("command", "no text of a command can hold a NUL")
        if not self.command and (self.env or self.directory):
            raise ValueOfKeyError("command", "env and directory are for machines with a command")

    @property
    def driver_name(self) -> str:
        """What starts and stops it, as its row has it."""
        return PROCESS if self.command else self.driver


class DriverConfig(_Section, frozen=True):
    """`[drivers.<name>]`: what starts and stops machines of this node that are no processes of its own."""

    type: Literal["webhook", "fly"]
    url: str = ""
    secret: str = ""
    token: str = ""
    app: str = ""
    timeout_ms: Annotated[int, Meta(ge=1, le=600_000)] = 30_000

    def __post_init__(self) -> None:
        if self.url and re.fullmatch(r"https?://[!-~]+", self.url) is None:
            raise ValueOfKeyError("url", f"`{self.url}` is no URL of http or https")
        if self.type == "webhook" and not (self.url and self.secret):
            raise ValueOfKeyError("url" if self.secret else "secret", "a webhook needs url and secret")
        if self.type == "fly" and not self.token:
            raise ValueOfKeyError("token", "the Machines API wants a token")


class MachinesConfig(_Section, frozen=True):
    """`[machines]`: what all machines of this node have in common that have a driver."""

    idle_ms: Annotated[int, Meta(ge=100, le=DAY_MS)] = 300_000
    ready_timeout_ms: Annotated[int, Meta(ge=100, le=DAY_MS)] = 60_000
    drain_ms: Annotated[int, Meta(ge=0, le=DAY_MS)] = 10_000
