"""The answer that sends a client to the same place over TLS.

Decides status and location. Refuses to know when it is due. Invariant: the location is the request's own
host and target, both of which were checked when the head was read.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from .forwarding import HTTPS_PORT

if TYPE_CHECKING:
    from .request_head import RequestHead

_PORT: Final = re.compile(rb":[0-9]*$")
_REWRITABLE: Final = frozenset((b"GET", b"HEAD"))


def render_redirect(head: RequestHead, https_port: int, request_id: bytes, *, close: bool) -> bytes:
    """Return the whole answer. A request that found its app has a host.

    GET and HEAD get the 301 that Fly gives to all; others 308, after which clients keep method and body.
    """
    status = b"301 Moved Permanently" if head.method in _REWRITABLE else b"308 Permanent Redirect"
    port = b"" if https_port == HTTPS_PORT else b":%d" % https_port
    target = b"/" if head.target == b"*" else head.target
    return b"HTTP/1.1 %b\r\nLocation: https://%b%b%b\r\nContent-Length: 0\r\n%bFly-Request-Id: %b\r\n\r\n" % (
        status,
        _PORT.sub(b"", head.host),
        port,
        target,
        b"Connection: close\r\n" if close else b"",
        request_id,
    )
