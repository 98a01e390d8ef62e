"""How a connection is not read for a while, how little of it waits unsent, and how it is cut.

Decides where bytes wait; refuses to know who holds them back and why. Invariant: what was sent before the end
of a connection is delivered before its end is.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from typing import Any, Final, cast

# Linux lets a socket take megabytes that it cannot send yet, for each slow reader. tcp(7); not in `socket`.
_TCP_NOTSENT_LOWAT: Final = 25
# Closing throws away what is not sent and tells the peer so.
_NO_LINGER: Final = struct.pack("ii", 1, 0)

# An early answer is an error page at most; of a longer one this is the beginning, and then it is cut.
_LEFT_BYTES_MAX: Final = 65_536


def bound_unsent(transport: asyncio.Transport, size: int) -> None:
    """Let the kernel take no more than about `size` bytes that it cannot send yet."""
    transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, size)


def reset(transport: asyncio.Transport) -> None:
    """Cut the connection so that its peer knows this for no end in good order."""
    # One that ended by itself may be closed before its protocol is told; uvloop has a ValueError for that.
    with contextlib.suppress(OSError, ValueError):
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
    transport.abort()


def read_left(transport: asyncio.Transport) -> bytes:
    """Return what came before a connection broke and was not delivered, as when a write found that."""
    if not transport.can_write_eof():
        return b""  # of TLS only ciphertext is left
    with contextlib.suppress(OSError, ValueError):
        return os.read(transport.get_extra_info("socket").fileno(), _LEFT_BYTES_MAX)
    return b""


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
