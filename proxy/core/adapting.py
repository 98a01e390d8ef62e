"""What an app has the proxy do with the answers of its machines: fields removed and added, compression.

Decides nothing that is not in the service's options, and refuses to know connections. Called for services
that have options. Invariant: what the options add to a head is there whatever else changes it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .compression import start_encoder

if TYPE_CHECKING:
    from routing.options import ServiceOptions

    from .compression import Encoder
    from .framing import Data
    from .plane import Plane
    from .request_head import RequestHead
    from .response_head import ResponseHead


def adapt_response(
    options: ServiceOptions, plane: Plane, request: RequestHead, head: ResponseHead, body: Data, ended: bool
) -> tuple[Encoder | None, Data]:
    """Change the head; return what makes the rest of the body, and what is sent of it now.

    An encoder that is returned is counted as running, and must be given to `ProxyMetrics.end_compression`.
    """
    if options.headers_removed:
        removed = options.headers_removed
        head.lines = [line for line in head.lines if line[: line.find(b":")].lower() not in removed]
        head.lines += options.headers_added
    if options.compression is None:
        return None, body
    room = plane.metrics.compressing < plane.settings.compressions_max
    known = len(body) if ended and request.method != b"HEAD" else -1
    encoder = start_encoder(options.compression, request, head, known, room=room)
    if encoder is None:
        return None, body
    plane.metrics.compressing += 1
    body = encoder.encode(body, ended)
    if ended:
        # All of it is here: no need for chunks.
        head.content_length = len(body)
    return encoder, body
