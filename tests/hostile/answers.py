"""Answers of machines that are wrong, or that parsers read in two ways: raw bytes by class.

Used like tests/hostile/requests.py. The classes are those of docs/security.md.
"""

from __future__ import annotations

from typing import NamedTuple

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
POISON = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison"


class Answer(NamedTuple):
    """What a machine sends in answer to one GET, before it closes the connection or waits."""

    about: str
    raw: bytes


def ok(lines: bytes, body: bytes = b"", line: bytes = b"HTTP/1.1 200 OK") -> bytes:
    return line + b"\r\n" + lines + b"\r\n" + body


CL = b"Content-Length: "
CHUNKED = b"Transfer-Encoding: chunked\r\n"

# Nothing of these reaches a client: it gets a 502, and the connection is not used again.
BROKEN: list[Answer] = [
    *(
        Answer("response framing", raw)
        for raw in (
            ok(CL + b"2\r\n" + CHUNKED, b"0\r\n\r\n"), ok(CHUNKED + CL + b"2\r\n", b"0\r\n\r\n"),
            ok(CL + b"2\r\n" + CL + b"2\r\n", b"ok"), ok(CL + b"2\r\n" + CL + b"3\r\n", b"ok"),
            ok(CL + b"2, 2\r\n", b"ok"), ok(CL + b"-2\r\n", b"ok"), ok(CL + b"+2\r\n", b"ok"),
            ok(CL + b"0x2\r\n", b"ok"),
            ok(CL + b"2" * 20 + b"\r\n", b"ok"), ok(CL + b"\r\n", b"ok"), ok(CL + b"two\r\n", b"ok"),
            ok(b"Transfer-Encoding: gzip\r\n", b"ok"), ok(b"Transfer-Encoding: gzip, chunked\r\n",
            b"0\r\n\r\n"),
            ok(b"Transfer-Encoding: identity\r\n", b"ok"), ok(b"Transfer-Encoding: chunked, gzip\r\n",
            b"0\r\n\r\n"),
            ok(CHUNKED + CHUNKED, b"0\r\n\r\n"), ok(CHUNKED, b"0\r\n\r\n", b"HTTP/1.0 200 OK"),
            ok(CL + b"2\r\n", b"ok", b"HTTP/1.1 204 No"), ok(CHUNKED, b"0\r\n\r\n", b"HTTP/1.1 204 No"),
            ok(CHUNKED, b"x\r\n"), ok(CHUNKED, b"2\nok\n0\n\n"), ok(CHUNKED, b"+2\r\nok\r\n0\r\n\r\n"),
            ok(CHUNKED, b"2 \r\nok\r\n0\r\n\r\n"), ok(CHUNKED, b"2\r\nokX\r\n0\r\n\r\n"),
            ok(CHUNKED, b"1" * 17 + b"\r\n"), ok(b"Transfer-Encoding : chunked\r\n", b"0\r\n\r\n"),
        )
    ),
    *(
        Answer("informational", raw)
        for raw in (
            b"HTTP/1.1 101 Switching\r\n\r\n",
            b"HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
            b"HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\nPRI * HTTP/2.0\r\n\r\n",
            b"HTTP/1.1 100 Continue\r\n\r\n" * 100 + OK,
            b"HTTP/1.1 103 Early\r\nContent-Length: 5\r\n\r\nhello" + OK,
            b"HTTP/1.1 100 Continue\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + OK,
        )
    ),
    *(
        Answer("response head", raw)
        for raw in (
            ok(CL + b"0\r\n", line=b"HTTP/2.0 200 OK"), ok(CL + b"0\r\n", line=b"HTTP/0.9 200 OK"),
            ok(CL + b"0\r\n", line=b"http/1.1 200 OK"), ok(CL + b"0\r\n", line=b"ICY 200 OK"),
            ok(CL + b"0\r\n", line=b"HTTP/1.1 999 No"), ok(CL + b"0\r\n", line=b"HTTP/1.1 099 No"),
            ok(CL + b"0\r\n", line=b"HTTP/1.1 20 OK"), ok(CL + b"0\r\n", line=b"HTTP/1.1 2000 OK"),
            ok(CL + b"0\r\n", line=b"HTTP/1.1 OK"), ok(CL + b"0\r\n", line=b"HTTP/1.1  200 OK"),
            ok(CL + b"0\r\n", line=b"HTTP/1.1 200 O\x01K"), ok(CL + b"0\r\n", line=b"HTTP/1.1 200 O\rK"),
            ok(CL + b"0\r\n", line=b"HTTP/1.1 200 O\0K"),
            b"HTTP/1.1 200 OK\nContent-Length: 0\n\r\n\r\n", ok(b"A: b\nX: y\r\n" + CL + b"0\r\n"),
            ok(b"A: b\r\n c\r\n" + CL + b"0\r\n"), ok(b"A: b\0\r\n" + CL + b"0\r\n"),
            ok(b"A: b\rX: y\r\n" + CL + b"0\r\n"),
            ok(b"A: b\x7f\r\n" + CL + b"0\r\n"), ok(b"A : b\r\n" + CL + b"0\r\n"),
            ok(b": b\r\n" + CL + b"0\r\n"),
            ok(b"A\r\n" + CL + b"0\r\n"), ok(b"A b: c\r\n" + CL + b"0\r\n"),
            ok(b"\xe9: c\r\n" + CL + b"0\r\n"),
            ok(b"A: " + b"b" * 100_000), ok(b"A: b\r\n" * 20_000 + CL + b"0\r\n"), b"nonsense\r\n\r\n",
            b"\r\n\r\n",
            b"\r\n" + OK, b"\0" * 2_000 + b"\r\n\r\n", b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        )
    ),
]  # fmt: skip

# These are passed on, and what stands behind their end goes to nobody.
SERVED: list[Answer] = [
    *(
        Answer("plain", raw)
        for raw in (
            OK, ok(CHUNKED, b"2\r\nok\r\n0\r\n\r\n"), ok(b"", b"ok"), ok(CL + b"0\r\n"), ok(CL + b"2\r\n",
            b"ok", b"HTTP/1.0 200 OK"),
            ok(b"", line=b"HTTP/1.1 204 No Content"), ok(CL + b"2\r\n", line=b"HTTP/1.1 304 Not Modified"),
            ok(CL + b"2\r\n", b"ok", b"HTTP/1.1 200"), ok(CL + b"2\r\n", b"ok", b"HTTP/1.1 200 \xe9\xff\tx"),
            ok(b"Transfer-Encoding: Chunked\r\n", b"2;x=y\r\nok\r\n0\r\nX-T: 1\r\n\r\n"),
            ok(b"A: \xe9\xff\r\n" + CL + b"2\r\n", b"ok"),
            ok(CL + b"2\r\n", b"ok", b"HTTP/1.1 418 I"), ok(CL + b"2\r\n", b"ok", b"HTTP/1.1 599 I"),
            b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + OK,
            b"HTTP/1.1 102 Processing\r\n\r\n" * 3 + OK,
        )
    ),
    *(
        Answer("poison", raw)
        for raw in (
            OK + POISON, ok(CHUNKED, b"2\r\nok\r\n0\r\n\r\n" + POISON),
            ok(CL + b"0\r\n", POISON), OK + b"\r\n", OK + b"x",
            ok(CL + b"2\r\n", b"ok" + POISON, b"HTTP/1.1 304 Not Modified"), ok(b"", POISON,
            b"HTTP/1.1 204 No Content"),
            ok(CHUNKED, b"0\r\n\r\n", b"HTTP/1.1 304 Not Modified"),
        )
    ),
]  # fmt: skip

# Cut short by their machine: the client sees that too, and never a whole answer.
CUT: list[Answer] = [
    Answer("cut", raw)
    for raw in (
        ok(CL + b"5\r\n", b"hell"), ok(CHUNKED, b"5\r\nhello\r\n"), ok(CHUNKED, b"5\r\nhe"), ok(CHUNKED,
        b"2\r\nok\r\n0\r\n"),
        ok(CHUNKED, b"2\r\nok\r\n0\r\nA: b\r\n"), ok(CHUNKED, b""), ok(CL + b"100000\r\n", b"x" * 99_999),
    )
]  # fmt: skip
