"""How a connection is not read for a while, so that nothing is lost if it ends meanwhile.

Decides where bytes wait; refuses to know who holds them back and why. Invariant: what was sent before the end
of a connection is delivered before its end is.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast


def hold_reading(transport: asyncio.Transport) -> None:
    """Deliver nothing until `go_on_reading`."""
    transport.pause_reading()
    if not transport.can_write_eof() and not transport.is_closing():
        # Over TLS only delivery stops. Up to 256 KiB would be read on, and dropped at an end that comes
        # without close_notify, as many send none.
        cast("Any", transport).set_read_buffer_limits(1)


def go_on_reading(transport: asyncio.Transport) -> None:
    """Deliver what has waited, and what comes."""
    transport.resume_reading()
    if not transport.can_write_eof():
        # Only once that is delivered: the end may come with the next look at the socket.
        asyncio.get_running_loop().call_soon(_read_on, transport)


def _read_on(transport: asyncio.Transport) -> None:
    if transport.is_reading() and not transport.is_closing():
        cast("Any", transport).set_read_buffer_limits()
