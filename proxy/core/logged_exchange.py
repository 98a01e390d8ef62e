"""An exchange that is written to the access log when it is over.

Decides what the log says of an exchange. Used in place of `Exchange` while there is a log, so that
without one nothing is counted or asked for it. Invariant: one entry for each exchange.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .access_line import Entry
from .exchange import Exchange
from .forwarding import read_client

if TYPE_CHECKING:
    from routing.balancer import Want
    from routing.table import Service

    from .framing import Data
    from .plane import Client, Plane
    from .request_head import RequestHead
    from .response_head import ResponseHead


class LoggedExchange(Exchange):
    """Counts what an `Exchange` has no use for."""

    __slots__ = ("error", "first_byte", "retries")

    def __init__(
        self, plane: Plane, client: Client, head: RequestHead, service: Service, want: Want, forwarded: bytes
    ) -> None:
        super().__init__(plane, client, head, service, want, forwarded)
        self.error = ""  # code of an answer of the proxy's own
        self.first_byte = 0.0  # when the answer began; 0 before
        self.retries = 0

    def handle_response(self, head: ResponseHead, body: Data, ended: bool) -> None:
        """Note when the answer began."""
        if head.replays is None and not head.replay_json:
            self.first_byte = self.plane.now()
        super().handle_response(head, body, ended)

    def handle_client_lost(self, code: str = "") -> None:
        """Note why."""
        self.error = code
        super().handle_client_lost(code)

    def _take_retry(self) -> bool:
        taken = super()._take_retry()
        self.retries += taken
        return taken

    def _fail(self, code: str, detail: str, page: str = "") -> None:
        self.error = code
        super()._fail(code, detail, page)

    def _close_books(self, status: int) -> None:
        target = self.target
        super()._close_books(status)
        log = self.plane.access_log
        if log is None or not log.samples():  # it may have been switched off meanwhile
            return
        duration_s = self.plane.now() - self.started
        head = self.head
        if self.replays is not None:
            self.replays.restore_request()
        log.add(
            Entry(
                started_us=self.started_us,
                request_id=self.request_id,
                client=read_client(self.forwarded),
                method=head.method,
                host=head.host,
                target=head.target,
                minor=head.minor,
                lines=head.lines,
                status=status,
                bytes_in=self.body_bytes,
                bytes_out=self.bytes_out,
                duration_s=duration_s,
                first_byte_s=self.first_byte - self.started if self.first_byte else 0.0,
                app=self.service.app,
                machine=target.id if target is not None else "",
                region=target.region if target is not None else "",
                retries=self.retries,
                replays=self.replays.count if self.replays is not None else 0,
                error=self.error,
            )
        )
