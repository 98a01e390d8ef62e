"""The first bytes of a connection from a proxy in front that announces its clients.

Decides whether a connection has to begin with a PROXY header, and hands it over behind that. Refuses to know
what comes then. Invariant: what follows is never started before the header is complete and sound, and a peer
that is not trusted to announce is never asked for one.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

from .core.proxy_protocol import ProxyHeaderError, parse_announcement
from .sweeper import NEVER

if TYPE_CHECKING:
    from collections.abc import Callable

    from .core.addresses import Networks
    from .core.plane import Plane
    from .downstream import Downstream


class AnnouncedConnection(asyncio.Protocol):
    """An accepted connection before its PROXY header; `make` makes what takes it over."""

    def __init__(
        self,
        plane: Plane,
        announcers: Networks,
        make: Callable[[], Downstream],
        waiting: set[AnnouncedConnection],
    ) -> None:
        self.deadline = NEVER
        self._plane = plane
        self._announcers = announcers
        self._make = make
        self._waiting = waiting  # where the server and the sweeper find it, until it is handed over
        self._transport: asyncio.Transport | None = None
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for a header, if this peer may announce."""
        self._transport = cast("asyncio.Transport", transport)
        peer = transport.get_extra_info("peername")
        if isinstance(peer, tuple) and self._announcers.contain(peer[0].partition("%")[0]):
            self._waiting.add(self)
            self.deadline = self._plane.now() + self._plane.settings.head_timeout_s
        else:
            self._hand_over(self._make(), b"")

    def data_received(self, data: bytes) -> None:
        """Take bytes of the header."""
        self._buffer += data
        try:
            announced = parse_announcement(self._buffer)
        except ProxyHeaderError:
            self._plane.metrics.bad_announcements += 1
            self.abort()
            return
        if announced is not None:
            downstream = self._make()
            if announced.source is not None and announced.destination is not None:
                downstream.announced = announced.source, announced.destination
            self._waiting.discard(self)
            self._hand_over(downstream, self._buffer[announced.size :])

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the reason changes nothing
        """Forget it."""
        self._transport = None
        self._waiting.discard(self)

    def handle_deadline(self) -> None:
        """The header took too long."""
        self._plane.metrics.bad_announcements += 1
        self.abort()

    def abort(self) -> None:
        """Cut the connection."""
        self._waiting.discard(self)
        if self._transport is not None:
            self._transport.abort()

    def _hand_over(self, downstream: Downstream, rest: bytes) -> None:
        transport = self._transport
        assert transport is not None
        transport.set_protocol(downstream)
        downstream.connection_made(transport)
        if rest:
            downstream.data_received(rest)
