"""One line of the access log for one request.

Decides which fields a line has and how foreign bytes are written in it. Refuses to know where lines
go. Invariant: whatever a client sent, a line is one line of printable ASCII, and no field can be taken
for another.
"""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

# What neither format needs to escape.
_PLAIN: Final = re.compile(rb"[ !#-\[\]-~]*")
_ESCAPED: Final = re.compile(rb"[^ !#-\[\]-~]")
_MONTHS: Final = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


class _Moment:
    """A second, as both formats write it: most lines are of the same one as the line before."""

    __slots__ = ("day", "iso", "second")

    def __init__(self) -> None:
        self.set(0)

    def set(self, second: int) -> None:
        """Take another second since the epoch."""
        moment = datetime.fromtimestamp(second, UTC)
        self.second = second
        self.iso = moment.strftime("%Y-%m-%dT%H:%M:%S").encode()
        # Not %b, which speaks the language of the machine.
        self.day = f"{moment:%d}/{_MONTHS[moment.month - 1]}/{moment:%Y:%H:%M:%S} +0000".encode()


_moment: Final = _Moment()


class Entry(NamedTuple):
    """What is known of a request that is over; empty or 0 where it did not come so far."""

    started_us: int  # since the epoch
    request_id: bytes
    client: bytes
    method: bytes
    host: bytes
    target: bytes
    minor: int  # of the HTTP version; below 0 when it was none
    lines: list[bytes]  # of the request's head
    status: int
    bytes_in: int
    bytes_out: int
    duration_s: float
    first_byte_s: float
    app: str
    machine: str
    region: str
    retries: int
    replays: int
    error: str


def render_json(entry: Entry) -> bytes:
    """Return the entry as one JSON object."""
    method, host, target = entry.method, entry.host, entry.target
    if not _PLAIN.fullmatch(method + host + target):
        method, host, target = _escape_json(method), _escape_json(host), _escape_json(target)
    second, micros = divmod(entry.started_us, 1_000_000)
    if second != _moment.second:
        _moment.set(second)
    # Ids, names from the routing table, parsed addresses and codes of ours hold nothing to escape.
    return (
        b'{"time":"%b.%03dZ","request_id":"%b","client":"%b","method":"%b","host":"%b","path":"%b",'
        b'"status":%d,"bytes_in":%d,"bytes_out":%d,"duration_ms":%d,"first_byte_ms":%d,"app":"%b",'
        b'"machine":"%b","region":"%b","retries":%d,"replays":%d,"error":"%b"}\n'
    ) % (
        _moment.iso,
        micros // 1_000,
        entry.request_id,
        entry.client,
        method,
        host,
        target,
        entry.status,
        entry.bytes_in,
        entry.bytes_out,
        entry.duration_s * 1_000,
        entry.first_byte_s * 1_000,
        entry.app.encode(),
        entry.machine.encode(),
        entry.region.encode(),
        entry.retries,
        entry.replays,
        entry.error.encode(),
    )


def render_combined(entry: Entry) -> bytes:
    """Return the entry as Apache's and nginx's `combined` have it."""
    second = entry.started_us // 1_000_000
    if second != _moment.second:
        _moment.set(second)
    line = b"-"
    if entry.method:
        line = b"%b %b" % (entry.method, entry.target)
        if entry.minor >= 0:
            line += b" HTTP/1.%d" % entry.minor
    return b'%b - - [%b] "%b" %d %d "%b" "%b"\n' % (
        entry.client or b"-",
        _moment.day,
        _escape(line),
        entry.status,
        entry.bytes_out,
        _escape(find_field(entry.lines, b"referer:", b"-")),
        _escape(find_field(entry.lines, b"user-agent:", b"-")),
    )


RENDERERS: Final[dict[str, Callable[[Entry], bytes]]] = {"json": render_json, "combined": render_combined}


def find_field(lines: list[bytes], name: bytes, missing: bytes) -> bytes:
    """Return the value of the first field of that name, which is in lower case and ends with a colon."""
    for line in lines:
        if line[: len(name)].lower() == name:
            return line[len(name) :].strip()
    return missing


def _escape_json(value: bytes) -> bytes:
    return json.dumps(value.decode("utf-8", "backslashreplace")).encode("ascii")[1:-1]


def _escape(value: bytes) -> bytes:
    if _PLAIN.fullmatch(value):
        return value
    return _ESCAPED.sub(lambda match: b"\\x%02X" % match[0][0], value)
