"""Which header fields mean something to the proxy.

Decides from a field's name alone what kind of field it is, on both sides. Refuses to know values.
Invariant: a name that some app would take for one that is set by the proxy is never of kind PASS,
whatever its case, and with underscores for dashes too (CGI and WSGI make them equal).
"""

from __future__ import annotations

from typing import Final

# Kinds of request fields. Plain integers: compared once per field of each request.
PASS: Final = 0  # forwarded as it is
DROP: Final = 1  # never forwarded
HOST: Final = 2
CONTENT_LENGTH: Final = 3
TRANSFER_ENCODING: Final = 4
CONNECTION: Final = 5
UPGRADE: Final = 6
EXPECT: Final = 7
FORWARDED: Final = 8  # forwarded when the peer is a trusted proxy
ROUTING: Final = 9  # a wish of the client where to go, consumed here
# Further kinds of response fields.
REPLAY: Final = 10
CONTENT_TYPE: Final = 11
REPLAY_CACHE: Final = 12

_REQUEST: Final[dict[bytes, int]] = {
    b"host": HOST,
    b"content-length": CONTENT_LENGTH,
    b"transfer-encoding": TRANSFER_ENCODING,
    b"connection": CONNECTION,
    b"upgrade": UPGRADE,
    b"expect": EXPECT,
    # Hop by hop (RFC 9110 section 7.6.1), and what only makes sense with it.
    b"keep-alive": DROP,
    b"proxy-connection": DROP,
    b"proxy-authorization": DROP,
    b"te": DROP,
    b"trailer": DROP,
    b"http2-settings": DROP,
    # Identity, as apps and frameworks read it.
    b"x-forwarded-for": FORWARDED,
    b"x-forwarded-proto": FORWARDED,
    b"x-forwarded-port": FORWARDED,
    b"x-forwarded-ssl": FORWARDED,
    b"x-forwarded-host": FORWARDED,
    b"forwarded": DROP,
    b"x-real-ip": DROP,
    b"x-request-start": DROP,
    # Section "Routing headers" of Fly's "Dynamic request routing".
    b"fly-prefer-region": ROUTING,
    b"fly-force-region": ROUTING,
    b"fly-prefer-instance-id": ROUTING,
    b"fly-force-instance-id": ROUTING,
    b"flyio-debug": ROUTING,
    b"isthmus-explain": ROUTING,
    # The only other field of that prefix that belongs to clients.
    b"fly-replay-cache-control": PASS,
}
# Everything else under these prefixes is set by the proxy or by other nodes.
_OWN_PREFIXES: Final = (b"fly-", b"isthmus-")

_RESPONSE: Final[dict[bytes, int]] = {
    b"content-length": CONTENT_LENGTH,
    b"transfer-encoding": TRANSFER_ENCODING,
    b"connection": CONNECTION,
    b"upgrade": UPGRADE,
    b"content-type": CONTENT_TYPE,
    b"fly-replay": REPLAY,
    b"fly-replay-cache": REPLAY_CACHE,
    b"fly-replay-cache-ttl-secs": REPLAY_CACHE,
    b"fly-replay-cache-allow-bypass": REPLAY_CACHE,
    b"fly-request-id": DROP,
    b"fly-proxy-error": DROP,
    b"isthmus-trace": DROP,
    b"keep-alive": DROP,
    b"proxy-connection": DROP,
    b"proxy-authenticate": DROP,
    b"te": DROP,
    b"trailer": DROP,
    b"http2-settings": DROP,
}

# Names are few in practice, but clients can invent them: the memo is emptied when it is full.
MEMO_MAX: Final = 4_096

REQUEST_KINDS: Final[dict[bytes, int]] = {}
RESPONSE_KINDS: Final[dict[bytes, int]] = {}


def request_kind(name: bytes) -> int:
    """Return the kind of a request field by its name in any case; remembered in REQUEST_KINDS."""
    lower = name.lower()
    kind = _REQUEST.get(lower)
    if kind is None:
        dashed = lower.replace(b"_", b"-")
        disguised = dashed != lower and _REQUEST.get(dashed, PASS) != PASS
        kind = DROP if disguised or dashed.startswith(_OWN_PREFIXES) else PASS
    return remember(REQUEST_KINDS, name, kind)


def response_kind(name: bytes) -> int:
    """Return the kind of a response field by its name in any case; remembered in RESPONSE_KINDS."""
    lower = name.lower()
    kind = _RESPONSE.get(lower, PASS)
    if kind == PASS and lower.startswith(b"fly-replay"):
        kind = DROP
    return remember(RESPONSE_KINDS, name, kind)


def remember(memo: dict[bytes, int], name: bytes, kind: int) -> int:
    """Note the kind in a memo, which is emptied when it is full; return it."""
    if len(memo) >= MEMO_MAX:
        memo.clear()
    memo[name] = kind
    return kind
