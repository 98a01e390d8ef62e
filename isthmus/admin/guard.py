"""Who may use the admin listener.

Decides from the head of a request alone. Invariant: without a token only programs on this machine get in,
and no web page that a browser on this machine shows can act through it.
"""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING

from aiohttp import web

from isthmus.config import is_loopback

if TYPE_CHECKING:
    from aiohttp.typedefs import Handler, Middleware

# The dashboard's page holds no data: it asks for the token, and then for the data with it.
_OPEN_PATHS = frozenset({"/", "/healthz"})


def refuse(request: web.Request, token: str) -> str | None:
    """Return why the request may not go on, or None.

    A name other than loopback in Host means that a foreign page has pointed its own name at us (DNS
    rebinding); an Origin other than our own, that one posts to us (CSRF). With a token, neither helps an
    attacker, since browsers do not send it by themselves.
    """
    if token:
        given = request.headers.get("Authorization", "")
        if not hmac.compare_digest(given.encode("utf-8", "surrogateescape"), f"Bearer {token}".encode()):
            return "the admin token is missing or wrong: send `Authorization: Bearer <token>`"
        return None
    host = request.host.rsplit(":", 1)[0] if not request.host.endswith("]") else request.host
    if not is_loopback(host.strip("[]")):
        return f"`{host}` is no loopback name, and without admin.token only this machine may ask"
    origin = request.headers.get("Origin")
    if origin is not None and origin != f"http://{request.host}":
        return "requests from other web pages are refused"
    return None


def make_guard(token: str) -> Middleware:
    """Return the middleware that lets in whom `refuse` does."""

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        problem = None if request.path in _OPEN_PATHS else refuse(request, token)
        if problem is not None:
            if token:
                return web.json_response(
                    {"error": problem}, status=401, headers={"WWW-Authenticate": "Bearer"}
                )
            return web.json_response({"error": problem}, status=403)
        response = await handler(request)
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Cache-Control"] = "no-store"
        return response

    return guard
