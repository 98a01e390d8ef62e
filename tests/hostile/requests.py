"""Requests that parsers read in two ways, or that cost more than they should: raw bytes by class.

One corpus for the table of tests/proxy/test_smuggling.py, for the comparison with nginx and HAProxy in
tests/differential/ and for the seeds of tests/fuzz/. The classes are those of docs/security.md. Most that
carry a body are followed by NEXT, which nobody may ever take for a request of its own when the body is
refused.
"""

from __future__ import annotations

from typing import NamedTuple

HOST = b"Host: app.test\r\n"
NEXT = b"GET /smuggled HTTP/1.1\r\nHost: app.test\r\n\r\n"
CL, TE = b"Content-Length: ", b"Transfer-Encoding: "
CHUNKED = TE + b"chunked\r\n"
EMPTY = b"0\r\n\r\n"


class Case(NamedTuple):
    """A request, its class, and the status of what isthmus answers to it (200: it is forwarded)."""

    about: str
    status: int
    raw: bytes


def post(lines: bytes, body: bytes = b"") -> bytes:
    return b"POST / HTTP/1.1\r\n" + HOST + lines + b"\r\n" + body


def get(lines: bytes = b"", line: bytes = b"GET / HTTP/1.1") -> bytes:
    return line + b"\r\n" + HOST + lines + b"\r\n"


def _all(about: str, status: int, *raws: bytes) -> list[Case]:
    return [Case(about, status, raw) for raw in raws]


REFUSED: list[Case] = [
    *_all(
        "CL and TE", 400,
        post(CL + b"5\r\n" + CHUNKED, EMPTY + NEXT),
        post(CHUNKED + CL + b"5\r\n", EMPTY + NEXT),
        post(CHUNKED + CL + b"0\r\n", EMPTY + NEXT),
        post(CL + b"5\r\n" + TE + b"identity\r\n", b"hello" + NEXT),
        b"GET / HTTP/1.0\r\n" + HOST + CL + b"5\r\n" + CHUNKED + b"\r\n" + EMPTY,
    ),
    *_all(
        "CL twice", 400,
        post(CL + b"5\r\n" + CL + b"6\r\n", b"hello" + NEXT),
        post(CL + b"5\r\n" + CL + b"5\r\n", b"hello" + NEXT),
        post(CL + b"0\r\n" + CL + b"44\r\n", NEXT),
        post(CL + b"5, 5\r\n", b"hello" + NEXT),
        post(CL + b"5, 6\r\n", b"hello" + NEXT),
    ),
    *(
        Case("CL malformed", 400, post(CL + value + b"\r\n", b"hello" + NEXT))
        for value in (
            b"+5", b"0x5", b" 5 ", b"5 ", b" 5", b"\t5", b"-1", b"5.0", b"5" * 20, b"", b"5 5", b"5;", b"5e0",
            b"5_0", b"\xb2", b"18446744073709551621", b"five", b"5\x0b",
        )
    ),
    *(
        Case("TE other", 501, post(TE + value + b"\r\n", EMPTY + NEXT))
        for value in (
            b"xchunked", b"identity", b"gzip, chunked", b",chunked", b'"chunked"', b"chunked;q=1", b"gzip",
            b"x", b"chunke", b"chunkedd", b"cow",
        )
    ),
    *(
        Case("TE other", 400, post(TE + value + b"\r\n", EMPTY + NEXT))
        for value in (
            b"chunked, identity", b"chunked, chunked", b"chunked ", b" chunked", b"\tchunked", b"chunked\t",
            b"", b"\x0bchunked", b"chunked\x0b", b"\x00chunked",
        )
    ),
    *_all(
        "TE other", 400,
        post(CHUNKED + CHUNKED, EMPTY + NEXT),
        post(TE + b"identity\r\n" + CHUNKED, EMPTY + NEXT),
        b"POST / HTTP/1.0\r\n" + HOST + CHUNKED + b"\r\n" + EMPTY + NEXT,
        post(b"Transfer-Encoding : chunked\r\n", EMPTY + NEXT),
        post(b"Transfer-Encoding\t: chunked\r\n", EMPTY + NEXT),
        post(b" Transfer-Encoding: chunked\r\n", EMPTY + NEXT),
        post(b"X: y\r\n Transfer-Encoding: chunked\r\n", EMPTY + NEXT),
        post(b"X: y\rTransfer-Encoding: chunked\r\n", EMPTY + NEXT),
        post(b"X: y\nTransfer-Encoding: chunked\r\n", EMPTY + NEXT),
        post(b"Transfer-Encoding:\r\n chunked\r\n", EMPTY + NEXT),
    ),
    *_all(
        "framing by Connection", 400,
        post(CHUNKED + b"Connection: Transfer-Encoding\r\n", EMPTY + NEXT),
        post(CL + b"5\r\nConnection: close, content-length\r\n", b"hello" + NEXT),
        get(b"Connection: host\r\n"),
    ),
    *_all("bare LF", 400,
        get(b"A: b\nX: y\r\n"),
        b"GET / HTTP/1.1\nHost: app.test\n\n",
        b"GET / HTTP/1.1\r\nHost: app.test\n\r\n",
        b"GET / HTTP/1.1\r\nHost: app.test\r\n\n",
        b"GET / HTTP/1.1\nHost: app.test\r\n\r\n",
        b"\n" + get(),
    ),
    *(
        Case("control bytes", 400, raw)
        for byte in (b"\r", b"\0", b"\x01", b"\x0b", b"\x0c", b"\x1f", b"\x7f")
        for raw in (get(b"A: b" + byte + b"X: y\r\n"), get(b"A: " + byte + b"\r\n"),
        get(b"A" + byte + b": b\r\n"))
    ),
    *_all(
        "field syntax", 400,
        get(b"A: b\r\n c\r\n"), get(b"A: b\r\n\tc\r\n"), get(b"A:\r\n b\r\n"), get(b"A : b\r\n"),
        get(b"A\t: b\r\n"),
        get(b"A\r\n"), get(b": b\r\n"), get(b" : b\r\n"), b"GET / HTTP/1.1\r\n Host: app.test\r\n\r\n",
        get(b"A b: c\r\n"),
    ),
    *(
        Case("bytes in names", 400, get(byte + b"A: b\r\n"))
        for byte in (b"(", b")", b",", b"/", b";", b"<", b"=", b"@", b"[", b"\\", b'"', b"{", b"\xc3\xa9",
        b"\xff", b"\t")
    ),
    *(
        Case("request line", 400, get(line=line))
        for line in (
            b"GET  / HTTP/1.1", b"GET /\tHTTP/1.1", b"GET / HTTP/1.1 ", b"GET /a b HTTP/1.1",
            b"GET /  HTTP/1.1",
            b"GET\t/ HTTP/1.1", b"GET /\x01 HTTP/1.1", b"GET /\x7f HTTP/1.1", b"GET /\0 HTTP/1.1",
            b"GET /\xe9 HTTP/1.1", b"GET /a#b HTTP/1.1", b"GET b HTTP/1.1", b"GET * HTTP/1.1",
            b"GET ?x HTTP/1.1",
            b"GET http://u@app.test/ HTTP/1.1", b"GET http:///x HTTP/1.1", b"GET ftp://app.test/ HTTP/1.1",
            b"GET http://app.test,other.test/ HTTP/1.1", b"GET //app.test:80:80 x HTTP/1.1", b"GET HTTP/1.1",
            b" GET / HTTP/1.1", b"G(T / HTTP/1.1", b"G\0T / HTTP/1.1", b"\xc7ET / HTTP/1.1",
        )
    ),
    *(
        Case("version", 505, get(line=line))
        for line in (
            b"GET / HTTP/0.9", b"GET / HTTP/1.2", b"GET / HTTP/2.0", b"GET / http/1.1",
            b"DESCRIBE / RTSP/1.0",
            b"PRI * HTTP/2.0", b"GET / HTTP/1.10", b"GET / HTTP/01.1", b"GET / HTTP/3", b"GET / ICAP/1.0",
        )
    ),
    *_all("version", 400, b"GET /\r\n\r\n", b"GET /\r\n" + HOST + b"\r\n", get(line=b"GET / HTTP/1,1")),
    *_all("blank lines", 400, b"\r\n\r\n" + get(), b" " + get(), b"\t" + get(), b"\r" + get(), b"\0" + get()),
    *(
        Case("method", 405, get(line=line))
        for line in (
            b"CONNECT app.test:80 HTTP/1.1", b"TRACE / HTTP/1.1", b"get / HTTP/1.1", b"NOSUCH / HTTP/1.1",
            b"Get / HTTP/1.1",
        )
    ),
    *_all(
        "Host", 400,
        b"GET / HTTP/1.1\r\n\r\n", get(HOST), get(b"Host: other.test\r\n"), get(b"host:app.test\r\n"),
        get(line=b"GET http://app.test/ HTTP/1.1", lines=HOST),
    ),
    *(
        Case("Host", 400, b"GET / HTTP/1.1\r\nHost: " + host + b"\r\n\r\n")
        for host in (
            b"u@app.test", b"app.test/x", b"app.test,other.test", b"app.test:x", b"app.test:123456", b"",
            b"app test",
            b"[::1", b"app.test?x", b"app.test#x", b"app.test:80:80", b"app.test\\x", b"app.test%00",
            b"app.test\0",
            b"app.test:", b"\xe9.test", b"app.test\tx", b"http://app.test", b"::1", b"app.test:-1",
        )
    ),
    Case("Expect", 417, post(CL + b"5\r\nExpect: something\r\n", b"hello")),
    Case("Expect", 417, get(b"Expect: 100-continue, x\r\n")),
    Case("upgrade", 400, get(b"Connection: upgrade\r\nUpgrade: websocket\r\nContent-Length: 3\r\n") + b"abc"),
    Case("upgrade", 400,
    b"POST / HTTP/1.1\r\n" + HOST + b"Connection: upgrade\r\nUpgrade: websocket\r\n\r\n"),
]  # fmt: skip

# Bodies behind a head with `Transfer-Encoding: chunked`; NEXT follows.
BROKEN_CHUNKS: list[Case] = [
    *(
        Case("chunk size", 400, body)
        for body in (
            b"0x5\r\nhello\r\n" + EMPTY, b"+5\r\nhello\r\n" + EMPTY, b"-0\r\n\r\n", b"1" * 17 + b"\r\n",
            b"\r\nhello",
            b" 5\r\nhello\r\n" + EMPTY, b"5 \r\nhello\r\n" + EMPTY, b"5 ;a\r\nhello\r\n" + EMPTY,
            b"5;a\rb\r\nhello\r\n" + EMPTY, b"5;a\nb\r\nhello\r\n" + EMPTY, b"5;a\0b\r\nhello\r\n" + EMPTY,
            b"5;" + b"a" * 100_000, b"5\nhello\r\n" + EMPTY, b"5\rhello\r\n" + EMPTY,
            b"5\r\r\nhello\r\n" + EMPTY,
            b"g\r\n", b"5h\r\nhello\r\n" + EMPTY, b"5_0\r\nhello", b"FFFFFFFFFFFFFFFF\r\n",
            b"100000000000000005\r\nhello",
        )
    ),
    *(
        Case("chunk data", 400, body)
        for body in (
            b"5\r\nhelloXX" + EMPTY, b"5\r\nhello\n" + EMPTY, b"5\r\nhello" + EMPTY, b"5\r\nhello\r" + EMPTY,
            b"5\r\nhello!\r\n" + EMPTY, b"5\r\nhell\r\n" + EMPTY, b"5\r\nhello\r\n0\n\n",
            b"5\r\nhello\r\n0\r\nX\r\n\r\n",
            b"5\r\nhello\r\n0\r\n\n", b"5\r\nhello\r\n00\n\r\n",
        )
    ),
    *(
        Case("trailers", 400, body)
        for body in (
            b"5\r\nhello\r\n0\r\nA : b\r\n\r\n", b"0\r\nA: b\r\n c\r\n\r\n", b"0\r\n: b\r\n\r\n",
            b"0\r\nA: \0\r\n\r\n",
            b"0\r\n" + b"A: b\r\n" * 2000,
        )
    ),
    Case("tiny chunks", 400, b"1\r\nx\r\n" * 10_000),
]  # fmt: skip

# Odd, and served: what the machine gets is looked at in the tests.
SERVED: list[Case] = [
    *_all("plain", 200, get(), post(CL + b"5\r\n", b"hello"), post(CHUNKED, b"5\r\nhello\r\n" + EMPTY),
    post(b"")),
    *_all(
        "pipelined", 200,
        get() + NEXT,
        post(CL + b"5\r\n", b"hello" + NEXT),
        post(CHUNKED, b"5\r\nhello\r\n" + EMPTY + NEXT),
        post(CL + b"0\r\n", NEXT),
    ),
    *_all(
        "GET with a body", 200,
        get(CL + b"5\r\n") + b"hello" + NEXT, get(CHUNKED) + b"5\r\nhello\r\n" + EMPTY + NEXT,
        get(CL + b"0\r\n") + NEXT,
        b"HEAD / HTTP/1.1\r\n" + HOST + CL + b"5\r\n\r\nhello" + NEXT,
        b"DELETE / HTTP/1.1\r\n" + HOST + CL + b"5\r\n\r\nhello" + NEXT,
        b"OPTIONS / HTTP/1.1\r\n" + HOST + CL + b"5\r\n\r\nhello" + NEXT,
    ),
    *_all(
        "chunked", 200,
        post(TE + b"Chunked\r\n", b"5\r\nhello\r\n" + EMPTY), post(TE + b"CHUNKED\r\n",
        b"5\r\nhello\r\n" + EMPTY),
        post(b"transfer-encoding:chunked\r\n", b"5\r\nhello\r\n" + EMPTY),
        post(CHUNKED, b"5;x=y\r\nhello\r\n" + EMPTY), post(CHUNKED, b"005\r\nhello\r\n000\r\n\r\n"),
        post(CHUNKED, b"5;\r\nhello\r\n" + EMPTY), post(CHUNKED, b'5;x="y z"\r\nhello\r\n0;last\r\n\r\n'),
        post(CHUNKED, b"A\r\nhellohello\r\n" + EMPTY), post(CHUNKED, b"1\r\nh\r\n4\r\nello\r\n" + EMPTY),
        post(CHUNKED, b"0\r\nX-Trailer: 1\r\nContent-Length: 7\r\nHost: other.test\r\n\r\n" + NEXT),
        post(CHUNKED, b"0\r\nTransfer-Encoding: chunked\r\nFly-Client-IP: 6.6.6.6\r\n\r\n"),
        post(CL + b"005\r\n", b"hello"),
    ),
    *_all(
        "absolute form", 200,
        b"GET http://app.test/x?y HTTP/1.1\r\nHost: other.test\r\n\r\n",
        b"GET HTTP://app.test:80 HTTP/1.1\r\nHost: other.test\r\n\r\n",
        b"GET http://app.test?q HTTP/1.1\r\nHost: app.test\r\n\r\n",
        b"GET https://app.test/ HTTP/1.1\r\nHost: app.test\r\n\r\n",
        b"OPTIONS http://app.test HTTP/1.1\r\nHost: app.test\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: app.test\r\n\r\n",
    ),
    *(
        Case("paths", 200, get(line=b"GET " + path + b" HTTP/1.1"))
        for path in (
            b"/a%2Fb", b"/a/../b", b"//x", b"/%2e%2e/x", b"/a\\b", b"/%00", b"/?a=/../b", b'/"<>^`{|}',
            b"/%zz", b"/..",
            b"/./x", b"/a//b", b"/a/%2e/b", b"/..;/x", b"/%c0%ae/", b"/a?b?c", b"/a;b=c", b"/%0d%0aX:%20y",
            b"/..%5cx",
        )
    ),
    *_all(
        "values", 200,
        get(b"X-A: \xe9\xff\tx \t\r\nX-Empty:\r\n"), get(b"X-A:y\r\n"), get(b"X-A: \t y\r\n"),
        get(b"!#$%&'*+-.^_`|~0a: y\r\n"), get(b"X: " + b"y" * 3000 + b"\r\n"), get(b"A: 1\r\na: 2\r\n"),
    ),
    *_all("blank lines", 200, b"\r\n" + get(), get() + b"\r\n" + NEXT),
    *_all(
        "HTTP/1.0", 200,
        b"GET / HTTP/1.0\r\nHost: app.test\r\n\r\n", b"GET / HTTP/1.0\r\nHost: app.test\r\n\r\n" + NEXT,
        b"GET / HTTP/1.0\r\nHost: app.test\r\nConnection: keep-alive\r\n\r\n" + NEXT,
        b"POST / HTTP/1.0\r\nHost: app.test\r\nContent-Length: 5\r\n\r\nhello",
        b"GET / HTTP/1.0\r\nHost: app.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    ),
    *_all(
        "upgrade", 200,
        get(b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMA\r\n") + NEXT,
        get(b"Connection: Upgrade\r\nUpgrade: h2c, websocket\r\n") + NEXT,
        get(b"Upgrade: websocket\r\n") + NEXT,
        get(b"Connection: Upgrade\r\nUpgrade: TLS/1.0\r\n") + NEXT,
        post(CL + b"5\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n", b"hello" + NEXT),
    ),
    *_all(
        "Expect", 200,
        get(b"Expect: 100-continue\r\n") + NEXT, post(CL + b"5\r\nExpect: 100-continue\r\n", b"hello" + NEXT),
        post(CL + b"0\r\nExpect: 100-Continue\r\n", NEXT),
    ),
    *(
        Case("identity", 200, get(name + b": 6.6.6.6\r\n"))
        for name in (
            b"X-Forwarded-For", b"x-forwarded-for", b"X_Forwarded_For", b"X-Forwarded-Proto",
            b"X-Forwarded-Host",
            b"Forwarded", b"X-Real-IP", b"Fly-Client-IP", b"FLY_CLIENT_IP", b"fly-replay-src", b"isthmus-hop",
        )
    ),
    *_all(
        "hop by hop", 200,
        get(b"X-Hop: 1\r\nConnection: x-hop\r\n"),
        get(b"Connection: close, x-forwarded-for, fly-client-ip\r\n"),
        get(b"Keep-Alive: 5\r\nProxy-Connection: keep-alive\r\nTE: trailers\r\nProxy-Authorization: x\r\n"),
        get(b"Connection: \r\n"), get(b"Connection: ,,\r\n"),
        get(b"Connection: keep-alive, close\r\n") + NEXT,
        get(b"Connection: close\r\n") + NEXT,
    ),
    *(
        Case("method", 200, get(line=method + b" / HTTP/1.1"))
        for method in (b"PUT", b"DELETE", b"PATCH", b"OPTIONS", b"HEAD", b"PROPFIND", b"REPORT",
        b"M-SEARCH", b"PURGE")
    ),
    *(
        Case("Host", 200, b"GET / HTTP/1.1\r\nHost: " + host + b"\r\n\r\n")
        for host in (b"APP.test", b"app.test:80", b"app.test.", b"app.test:0", b"app.test \t")
    ),
]  # fmt: skip

# What must be refused before it is complete, by its size alone.
TOO_LARGE: list[Case] = [
    Case("size", 431, get(b"A: b\r\n" * 200)),
    Case("size", 431, get(b"A: b\r\n" * 100_000)),
    Case("size", 431, b"GET / HTTP/1.1\r\nHost: app.test\r\nA: " + b"b" * 100_000),
    Case("size", 431, get(b"A: " + b"b" * 40_000 + b"\r\n")),
    Case("size", 431, b"GET / HTTP/1.1\r\nHost: app.test\r\n" + b"b" * 10_000_000),
    Case("size", 414, get(line=b"GET /" + b"a" * 10_000 + b" HTTP/1.1")),
    Case("size", 414, b"GET /" + b"a" * 1_000_000),
]


def chunked_with(body: bytes) -> bytes:
    return post(CHUNKED, body + NEXT)
