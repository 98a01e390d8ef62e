"""What a fuzzer starts from, and the pieces that it puts in: the corpus of tests/hostile and some more."""

from __future__ import annotations

import contextlib
import json
import ssl
import struct

from tests.fuzz.targets import ASKED
from tests.hostile import answers, requests

# A seed longer than this teaches nothing that a shorter one does not, and takes its time.
_SEED_BYTES_MAX = 3_000
SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"

TOKENS = (
    *(b"\r\n", b"\r\n\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b": ", b",", b";", b"0\r\n\r\n",
    b"5\r\nhello\r\n"),
    *(b"HTTP/1.1", b"HTTP/1.0", b"GET ", b"POST ", b"HEAD ", b"OPTIONS ", b"PUT ", b"http://app.test", b"/",
    b"*"),
    *(b"Host: app.test\r\n", b"Content-Length: ", b"Content-Length: 5\r\n",
    b"Transfer-Encoding: chunked\r\n"),
    *(b"Connection: ", b"close", b"keep-alive", b"Upgrade", b"websocket", b"Expect: 100-continue\r\n",
    b"Trailer: x\r\n"),
    *(b"fly-replay: instance=app", b"fly-replay: region=ams,any;state=x", b"fly-force-instance-id: app\r\n"),
    *(b"application/vnd.fly.replay+json", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 200 OK\r\n",
    b"chunked"),
    *(b"HTTP/1.1 101 Switching Protocols\r\n", b"HTTP/1.1 204 No Content\r\n",
    b"HTTP/1.1 304 Not Modified\r\n"),
    *(b"\xff", b"\x80", b"\x7f", b"%00", b"%2f", b"..", b"\\", b"{", b"}", b'"', b"=", b"true", b"10s",
    b"elsewhere"),
)  # fmt: skip

REPLAYS = (
    *(b"region=ams", b"instance=app", b"app=other;state=x", b'region="ams,any";elsewhere=true;timeout=10s'),
    *(b"app=other;fallback=force_self", b"prefer_instance=app;state=\"a;b\\\"c\"", b"region=ams\xc3\xa9"),
    *(
        json.dumps(fields).encode()
        for fields in ({"region": "ams"}, {"app": "other", "state": "a;b"}, {"timeout": "1s"})
    ),
)  # fmt: skip


def _hello() -> bytes:
    """What a client of this Python begins a TLS connection with."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["h2", "http/1.1"])
    client = context.wrap_bio(incoming, outgoing, server_hostname="app.test")
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


def _browsers() -> list[bytes]:
    """Heads as they usually are; most of the corpus is not."""
    lines = (
        b"Host: app.test\r\nUser-Agent: Mozilla/5.0 (X11)\r\nAccept: text/html,*/*;q=0.8\r\n"
        b"Accept-Encoding: gzip, br\r\nCookie: a=b; c=d\r\nConnection: keep-alive\r\n"
    )
    return [
        b"GET /a?b=c HTTP/1.1\r\n" + lines + b"\r\n",
        (b"GET / HTTP/1.1\r\n" + lines + b"\r\n") * 2,
        b"POST /a HTTP/1.1\r\n" + lines + b"Content-Length: 5\r\nX-Forwarded-For: 6.6.6.6\r\n\r\nhello",
        b"HEAD / HTTP/1.1\r\n" + lines + b"fly-prefer-region: ams\r\nTraceparent: 00-1-1-01\r\n\r\n",
    ]


def _announcements() -> list[bytes]:
    addresses = bytes((192, 0, 2, 7, 198, 51, 100, 1)) + struct.pack(">HH", 4711, 443)
    return [
        b"PROXY TCP4 192.0.2.7 198.51.100.1 4711 443\r\nGET",
        b"PROXY TCP6 2001:db8::7 2001:db8::1 0 65535\r\n",
        b"PROXY UNKNOWN\r\n",
        SIGNATURE + struct.pack(">BBH", 0x21, 0x11, 12) + addresses,
        SIGNATURE + struct.pack(">BBH", 0x21, 0x11, 17) + addresses + b"\x04\x00\x02ab",
        SIGNATURE + struct.pack(">BBH", 0x20, 0, 0),
    ]


def make_seeds() -> dict[str, list[bytes]]:
    """Return the inputs to start from, by target."""
    asked = [*_browsers(), *(case.raw for case in (*requests.REFUSED, *requests.SERVED))]
    bodies = [case.raw for case in requests.BROKEN_CHUNKS]
    answered = [a.raw for a in (*answers.BROKEN, *answers.SERVED, *answers.CUT)]
    json_type = b"Content-Type: application/vnd.fly.replay+json\r\n"
    instructions = [
        answers.ok(json_type + b"Content-Length: %d\r\n" % len(replay), replay)
        if replay[:1] == b"{"
        else answers.ok(b"fly-replay: " + replay + b"\r\nContent-Length: 0\r\n")
        for replay in REPLAYS
    ]
    switched = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nhello"
    large = answers.ok(b"Content-Length: 1000000\r\n", b"the beginning of it")
    chunked = map(requests.chunked_with, bodies)
    paths = [case.raw.split(b" ")[1] for case in requests.SERVED if case.about == "paths"]
    seeds = {
        "requests": [bytes((n % 7,)) + raw for n, raw in enumerate([*asked, *chunked])],
        "answers": [
            bytes((n % len(ASKED), n % 5)) + raw
            for n, raw in enumerate([*answered, *instructions, large] * 2)
        ] + [bytes((5, 1)) + switched],
        "request_head": asked,
        "response_head": answered,
        "chunks": [bytes((n % 7,)) + body for n, body in enumerate([*bodies,
        b"5\r\nhello\r\n0\r\nA: b\r\n\r\nGET"])],
        "replay": [*REPLAYS],
        "wishes": [b"ams\n\nm1\n", b"ams,any\ngru\n"],
        "client_hello": [_hello()],
        "announcement": _announcements(),
        "names": [*paths, b"App.Test:80", b"[::1]:80"],
    }  # fmt: skip
    return {name: [raw for raw in raws if len(raw) <= _SEED_BYTES_MAX] for name, raws in seeds.items()}
