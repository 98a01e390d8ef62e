"""Who is the parent of a trace's next span: `traceparent` and `tracestate`, W3C Trace Context.

Decides what of a request's fields is believed, which traces are recorded, and what machines are told. Refuses
to know spans. Invariant: at most one `traceparent` leaves, and it is well-formed.

A field that is no valid one starts a new trace, without the old one's state (section 3.2.3). One whose
trace is not recorded here is passed on as it came, for this proxy has no span that could be a parent.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

SAMPLED: Final = 1
# Level 1 knows the first flag; level 2 says by the second one that trace ids are random.
_FLAGS_KEPT: Final = 3
_TRACEPARENT: Final = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_NO_TRACE: Final = b"0" * 32
_NO_SPAN: Final = b"0" * 16
# What of an id decides whether its trace is recorded, as in other tracers: the last 56 bits.
_RANDOM_DIGITS: Final = 14
_RANDOM_MAX: Final = 1 << 56


class TraceContext(NamedTuple):
    """A span that others can be children of; ids in hexadecimal."""

    trace_id: bytes
    span_id: bytes
    flags: int

    @property
    def is_sampled(self) -> bool:
        """True when the trace is recorded."""
        return bool(self.flags & SAMPLED)


def parse_traceparent(value: bytes) -> TraceContext | None:
    """Return what the field says, or None if it is not valid; a newer version is read as the known one."""
    match = _TRACEPARENT.fullmatch(value.strip())
    if match is None or match[1] == b"ff" or (match[1] == b"00" and match[5] is not None):
        return None
    if match[2] == _NO_TRACE or match[3] == _NO_SPAN:
        return None
    return TraceContext(match[2], match[3], int(match[4], 16) & _FLAGS_KEPT)


def render_traceparent(context: TraceContext) -> bytes:
    """Return the line that tells a machine whose child it is."""
    return b"traceparent: 00-%b-%b-%02x\r\n" % (context.trace_id, context.span_id, context.flags)


class TraceIds:
    """A source of ids, and the choice of traces that are recorded: `ratio` of those that begin here."""

    __slots__ = ("_bound", "_getrandbits")

    def __init__(self, getrandbits: Callable[[int], int], ratio: float) -> None:
        self._getrandbits = getrandbits
        self._bound = int(ratio * _RANDOM_MAX)

    def begin(self) -> TraceContext:
        """Return the first span of a new trace."""
        trace_id = b"%032x" % (self._getrandbits(128) | 1)
        sampled = int(trace_id[-_RANDOM_DIGITS:], 16) < self._bound
        return TraceContext(trace_id, self.next_span(), SAMPLED if sampled else 0)

    def next_span(self) -> bytes:
        """Return the id of a new span."""
        return b"%016x" % (self._getrandbits(64) | 1)


def split_context(lines: list[bytes], *, believed: bool) -> tuple[TraceContext | None, bytes, list[bytes]]:
    """Return the parent that a request names, its tracestate, and its other lines.

    `believed` is False where clients are not to say which trace they are part of.
    """
    parents: list[bytes] = []
    states: list[bytes] = []
    others: list[bytes] = []
    for line in lines:
        name, _, value = line.partition(b":")
        name = name.lower()
        if name == b"traceparent":
            parents.append(value)
        elif name == b"tracestate":
            states.append(value.strip())
        else:
            others.append(line)
    parent = parse_traceparent(parents[0]) if believed and len(parents) == 1 else None
    return parent, b",".join(states) if parent is not None else b"", others
