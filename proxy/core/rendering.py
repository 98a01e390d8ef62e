"""Heads as they go out: of a request to its machine, of an answer to its client.

Decides the order of lines and which of them are the proxy's own. Refuses to know connections, and changes
nothing. Invariant: every head is made anew; nothing is copied into it but lines that were found to be sound.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from routing.balancer import ANYWHERE

from .debug_line import render_debug

if TYPE_CHECKING:
    from .exchange import Exchange
    from .response_head import ResponseHead

_VIA: Final = b"Via: 1.1 isthmus\r\n"


def render_request(exchange: Exchange) -> bytes:
    """Return the head of the request for the machine that it goes to."""
    head = exchange.head
    extra = exchange.extra
    want, target = exchange.want, exchange.target
    if want is not ANYWHERE and target is not None and want.prefer_instance not in {None, target.id}:
        extra += b"fly-preferred-instance-unavailable: %b\r\n" % (want.prefer_instance or "").encode("ascii")
    if head.upgrade is not None:
        extra += b"Connection: Upgrade\r\nUpgrade: %b\r\n" % head.upgrade
    if head.chunked:
        extra += b"Transfer-Encoding: chunked\r\n"
    elif head.content_length >= 0:
        extra += b"Content-Length: %d\r\n" % head.content_length
    if head.expects and not exchange.continued:
        extra += b"Expect: 100-continue\r\n"
    return b"".join(
        (
            head.method,
            b" ",
            head.target,
            b" HTTP/1.1\r\nHost: ",
            head.host,
            b"\r\n",
            _join(head.lines),
            exchange.forwarded,
            b"Fly-Request-Id: ",
            exchange.request_id,
            b"\r\nX-Request-Start: t=%d\r\n" % exchange.started_us,
            extra,
            b"\r\n",
        )
    )


def render_response(exchange: Exchange, head: ResponseHead) -> bytes:
    """Return the head of the final answer, whose framing was decided."""
    request = exchange.head
    own = b""
    if head.content_length >= 0:
        own = b"Content-Length: %d\r\n" % head.content_length
    elif exchange.chunk_response:
        own = b"Transfer-Encoding: chunked\r\n"
    if not exchange.keeps_client():
        own += b"Connection: close\r\n"
    elif request.minor == 0:
        own += b"Connection: keep-alive\r\n"
    if request.routing is not None:
        own += render_debug(exchange)
    lines = _join(head.lines)
    options = exchange.service.options
    if options is not None and (options.pristine or options.hides_id):
        return b"".join((head.status_line, lines, own, b"" if options.pristine else _VIA, b"\r\n"))
    return b"".join(
        (head.status_line, lines, own, _VIA, b"Fly-Request-Id: ", exchange.request_id, b"\r\n\r\n")
    )


def render_informational(head: ResponseHead) -> bytes:
    """Return the head of a 1xx other than 101."""
    return b"".join((head.status_line, _join(head.lines), b"\r\n"))


def render_switch(exchange: Exchange, head: ResponseHead) -> bytes:
    """Return the head of a 101 that was asked for."""
    upgrade = b"Connection: Upgrade\r\nUpgrade: %b\r\n" % (head.upgrade or b"")
    own = (_VIA, b"Fly-Request-Id: ", exchange.request_id, b"\r\n\r\n")
    return b"".join((head.status_line, _join(head.lines), upgrade, *own))


def _join(lines: list[bytes]) -> bytes:
    return b"\r\n".join(lines) + b"\r\n" if lines else b""
