"""Answers to requests that never become an exchange: refusals, and redirects to TLS.

Decides what is counted and logged of them. Refuses to know connections, and when such an answer is due.
Invariant: each is counted once, and logged as that of a machine would be.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .access_line import Entry
from .errors import count_body, prefers_plain, render_error
from .redirect import render_redirect

if TYPE_CHECKING:
    from .plane import Plane
    from .request_head import RequestHead


def refuse(
    plane: Plane,
    client: str,
    code: str,
    detail: str,
    head: RequestHead | None,
    *,
    close: bool,
    logged: bool = False,
) -> bytes:
    """Return the answer for an error; `logged`: the request is in the log already.

    One without a head was malformed.
    """
    plane.metrics.count_error(code)
    request_id = plane.request_ids.next(plane.wall_us() // 1000)
    answer = render_error(
        code,
        detail,
        request_id,
        plain=head is not None and prefers_plain(head.lines),
        close=close,
        with_body=head is None or head.method != b"HEAD",
    )
    if not logged:
        _log(plane, client, answer, request_id, head, code)
    return answer


def redirect(
    plane: Plane, client: str, head: RequestHead, app: str, https_port: int, *, close: bool
) -> bytes:
    """Return what sends the client of an app to the same place over TLS."""
    request_id = plane.request_ids.next(plane.wall_us() // 1000)
    answer = render_redirect(head, https_port, request_id, close=close)
    plane.metrics.record(app, None, 301, 0.0, 0, 0)
    _log(plane, client, answer, request_id, head, app=app)
    return answer


def _log(
    plane: Plane,
    client: str,
    answer: bytes,
    request_id: bytes,
    head: RequestHead | None,
    code: str = "",
    app: str = "",
) -> None:
    log = plane.access_log
    if log is None or not log.samples():
        return
    entry = Entry(
        started_us=plane.wall_us(),
        request_id=request_id,
        client=client.encode("ascii"),
        method=head.method if head is not None else b"",
        host=head.host if head is not None else b"",
        target=head.target if head is not None else b"",
        minor=head.minor if head is not None else 1,
        lines=head.lines if head is not None else [],
        status=int(answer[9:12]),
        bytes_in=0,
        bytes_out=count_body(answer),
        duration_s=0.0,
        first_byte_s=0.0,
        app=app,
        machine="",
        region="",
        retries=0,
        replays=0,
        error=code,
    )
    log.add(entry)
