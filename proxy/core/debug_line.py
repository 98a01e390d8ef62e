"""The `flyio-debug` field of an answer: how its request got where it went.

Decides what is said, to clients that send `flyio-debug: doit`. Refuses to know why a machine was chosen: that
is for `explain`. Invariant: nothing in it comes from a client, and all of it is printable ASCII.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from .exchange import Exchange

_ASKED: Final = (b"flyio-debug", b"doit")


def render_debug(exchange: Exchange) -> bytes:
    """Return the line for an exchange that is being answered; empty if the client did not ask for it.

    `nr`, `sr` and `sid` are Fly's names.
    """
    routing, target = exchange.head.routing, exchange.target
    if routing is None or _ASKED not in routing or target is None:
        return b""
    settings, replays = exchange.plane.settings, exchange.replays
    said = {
        "n": settings.node,
        "nr": settings.region,
        "app": target.app,
        "sid": target.id,
        "sr": target.region,
        "attempts": exchange.attempts,
        "replays": 0 if replays is None else replays.count,
    }
    return b"flyio-debug: %b\r\n" % json.dumps(said, separators=(",", ":")).encode("ascii")
