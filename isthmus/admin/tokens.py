"""`?after=TOKEN`: a request that reads waits until a write has arrived; and what is said when it has not.

Decides how long a request may wait, and which status and code each refusal has. Knows nothing of what has
arrived: the replication agent does. Invariant: what a request with a token does, it does when that write is
here.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

from aiohttp import web

from replication.core.tokens import Token, parse_token
from replication.errors import BehindError, ParkedError, RateLimitedError, ReplicationError

if TYPE_CHECKING:
    from aiohttp.typedefs import Handler

# A push takes one way through the network, a sync some round trips. Longer than a minute no client's own
# patience lasts.
WAIT_MS = 5_000
WAIT_MS_MAX = 60_000


class Replica(Protocol):
    """What is needed of the replication agent."""

    async def wait_for(self, token: Token, timeout_ms: float) -> None:
        """Return when a write is here."""


class TokenError(ReplicationError):
    """What was given is no token, or no time to wait."""


REFUSALS: dict[type[ReplicationError], tuple[int, str]] = {
    TokenError: (400, "token"),
    ParkedError: (409, "parked"),
    RateLimitedError: (429, "rate_limited"),
    BehindError: (504, "behind"),
}


@web.middleware
async def answer_refusals(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer an error of REFUSALS, whichever route it comes from, with its status and code."""
    try:
        return await handler(request)
    except tuple(REFUSALS) as error:
        status, code = REFUSALS[type(error)]
        headers = {}
        if isinstance(error, RateLimitedError):
            headers["Retry-After"] = str(math.ceil(error.retry_after_ms / 1000))
        return web.json_response({"error": str(error), "code": code}, status=status, headers=headers)


async def wait_for_write(request: web.Request, replica: Replica) -> None:
    """Wait for the write that the query string names, if it does; raises an error of REFUSALS, BusyError."""
    text = request.query.get("after")
    if text is None:
        return
    try:
        token = parse_token(text)
        wait_ms = int(request.query.get("wait_ms", WAIT_MS))
    except ValueError as error:
        raise TokenError(str(error)) from None
    if not 0 <= wait_ms <= WAIT_MS_MAX:
        raise TokenError(f"`wait_ms` is up to {WAIT_MS_MAX}")
    await replica.wait_for(token, wait_ms)
