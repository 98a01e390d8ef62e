"""Tell the service manager how the node is, where there is one: sd_notify(3).

Decides nothing. Invariant: whoever listens or does not, the node goes on.
"""

from __future__ import annotations

import contextlib
import os
import socket


def notify(state: str) -> None:
    """Send a state such as `READY=1` to the socket that NOTIFY_SOCKET names, if it does."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] not in ("/", "@"):
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.sendto(state.encode("ascii"), address.replace("@", "\0", 1) if address[0] == "@" else address)
