"""Clients that keep to their machine: what `sticky` of a service makes of a request and of its answer.

Decides what a client's key is, and when it is given a cookie. Refuses to know which machine a key leads to.
Invariant: what a client sends is only ever a wish, and leads to no machine of another app.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from routing.catalog import IDENTIFIER

if TYPE_CHECKING:
    from routing.balancer import Want
    from routing.stickiness import Sticky
    from routing.target import Target

    from .request_head import RequestHead
    from .response_head import ResponseHead

# Longer keys are cut: a session's name is shorter, and all of it is hashed once for every request.
KEY_BYTES_MAX: Final = 256


def keep_to_machine(want: Want, head: RequestHead, sticky: Sticky) -> Want:
    """Return the choice with the client's key or machine in it; a machine it names itself comes first."""
    if want.instance is not None or want.prefer_instance is not None:
        return want
    value = (
        _find_cookie(head.lines, sticky.cookie) if sticky.cookie else _find_header(head.lines, sticky.header)
    )
    if not value:
        return want
    if not sticky.sets:
        return want._replace(key=value[:KEY_BYTES_MAX])
    machine = value.decode("latin-1")
    return want._replace(prefer_instance=machine) if IDENTIFIER.fullmatch(machine) else want


def tell_machine(head: ResponseHead, sticky: Sticky, want: Want, target: Target | None) -> None:
    """Give the client a cookie for the machine that answered, unless it has that one."""
    if sticky.sets and target is not None and want.prefer_instance != target.id:
        machine = target.id.encode("ascii")
        # In a new list: the one that is there may be another head's too.
        head.lines = [
            *head.lines,
            b"Set-Cookie: %b=%b; Path=/; HttpOnly; SameSite=Lax" % (sticky.cookie, machine),
        ]


def _find_header(lines: list[bytes], name: bytes) -> bytes:
    for line in lines:
        colon = line.find(b":")
        if colon == len(name) and line[:colon].lower() == name:
            return line[colon + 1 :].strip()
    return b""


def _find_cookie(lines: list[bytes], name: bytes) -> bytes:
    """Return the first cookie of this name; RFC 6265 section 5.4 lets a client send several."""
    for line in lines:
        if line[:7].lower() == b"cookie:":
            for pair in line[7:].split(b";"):
                key, equals, value = pair.partition(b"=")
                if equals and key.strip() == name:
                    return value.strip()
    return b""
