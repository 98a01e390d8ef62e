"""Compression of answers: for whom, of what, that it streams, and what it costs."""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import sys
import zlib
from typing import TYPE_CHECKING, Any

import brotli
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core import compression
from proxy.core.compression import Encoder, choose_coding
from proxy.core.request_head import parse_request_head
from proxy.core.response_head import parse_response_head
from proxy.settings import ProxySettings
from routing.compression import BYTES_MIN, CODINGS, parse_compression
from tests.proxy.edge import Edge, wait_for

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

if TYPE_CHECKING:
    from tests.fakes.client import RawClient, Response
    from tests.fakes.machine import Connection

SETTINGS = ProxySettings("node1", "ams")
USUAL = parse_compression({})
assert USUAL is not None
TEXT = b"".join(b"%d: the same and the same again, %d\n" % (n, n * n) for n in range(2_000))
DECODERS = {
    "gzip": lambda: zlib.decompressobj(31).decompress,
    "br": lambda: brotli.Decompressor().process,
    "zstd": lambda: zstd.ZstdDecompressor().decompress,
}


def answer(*lines: bytes, body: bytes = TEXT) -> bytes:
    head = b"\r\n".join((b"HTTP/1.1 200 OK", b"Content-Length: %d" % len(body), *lines))
    return head + b"\r\n\r\n" + body


HTML = answer(b"Content-Type: text/html; charset=utf-8")


async def serve(edge: Edge, raw: bytes, wishes: object = True, **settings: object) -> RawClient:
    edge.put_app("app", "app.test", options=json.dumps({"compression": wishes}))
    await edge.machine(answer=lambda r: raw)
    await edge.start(**settings)
    return await edge.client()


def decode(response: Response) -> bytes:
    (coding,) = response.values(b"content-encoding")
    return DECODERS[coding.decode()]()(response.body)


@pytest.mark.parametrize("coding", CODINGS)
async def test_an_answer_is_compressed_as_the_client_takes_it(edge: Edge, coding: str) -> None:
    client = await serve(edge, HTML)
    response = await client.get(b"/", b"Accept-Encoding: " + coding.encode())
    assert decode(response) == TEXT
    assert len(response.body) < len(TEXT) / 3
    assert response.values(b"vary") == [b"Accept-Encoding"]
    plain = await client.get()
    assert (plain.body, plain.values(b"content-encoding")) == (TEXT, [])
    assert plain.values(b"vary") == [b"Accept-Encoding"]
    assert plain.values(b"content-length") == [b"%d" % len(TEXT)]


async def test_an_app_that_does_not_ask_for_it_is_left_alone(edge: Edge) -> None:
    client = await serve(edge, HTML, wishes=False)
    response = await client.get(b"/", b"Accept-Encoding: gzip")
    assert (response.body, response.values(b"vary")) == (TEXT, [])


@pytest.mark.parametrize(
    ("accepted", "chosen"),
    [
        (b"", ""),
        (b"gzip", "gzip"),
        (b"x-gzip", "gzip"),
        (b"GZIP", "gzip"),
        (b"gzip, deflate, br, zstd", "zstd"),
        (b"gzip, deflate, br", "br"),
        (b"gzip;q=1.0, br;q=0.9, zstd;q=0.8", "gzip"),
        (b"gzip;q=0", ""),
        (b"gzip;q=0.000, br ; q=0.001", "br"),
        (b"deflate", ""),
        (b"*", "zstd"),
        (b"*;q=0", ""),
        (b"zstd;q=0, *;q=0.5", "br"),
        (b"gzip;q=0.5, *;q=0.1", "gzip"),
        (b"identity", ""),
        (b"identity, gzip", "gzip"),
        (b"identity;q=1, gzip;q=0.5", ""),
        (b"identity;q=0.5, gzip;q=0.5", "gzip"),
        (b"identity;q=0", ""),
        (b"gzip;q=2, br;q=-1, zstd;q=0.1234", ""),
        (b"gzip;level=9", ""),
        (b",, gzip ,", "gzip"),
        (b"gzip\xff", ""),
    ],
)
def test_the_coding_that_the_client_prefers_is_chosen(accepted: bytes, chosen: str) -> None:
    assert choose_coding(accepted, CODINGS) == chosen


def test_the_order_of_equals_is_the_apps() -> None:
    assert choose_coding(b"gzip, br, zstd", ("gzip", "br")) == "gzip"
    assert choose_coding(b"gzip, br;q=0.9, zstd", ("br", "gzip")) == "gzip"


@given(st.binary(max_size=60) | st.text("gzipbrtsd;q=01., *-", max_size=60).map(str.encode))
def test_whatever_a_client_accepts_something_is_chosen(accepted: bytes) -> None:
    assert choose_coding(accepted, CODINGS) in ("", *CODINGS)


def start(
    *lines: bytes, request: bytes = b"GET / HTTP/1.1", asked: tuple[bytes, ...] = (), **wishes: Any
) -> tuple[Encoder | None, list[bytes]]:
    """What becomes of an answer with these lines, and of its head."""
    told = b"\r\n".join((request, b"Host: a", b"Accept-Encoding: gzip", *asked, b"", b""))
    status, *rest = lines if lines[0].isdigit() else (b"200", *lines)
    raw = b"\r\n".join((b"HTTP/1.1 %b OK" % status, *rest, b"", b""))
    options = parse_compression(wishes)
    assert options is not None
    head = parse_response_head(raw)
    encoder = compression.start_encoder(options, parse_request_head(told, SETTINGS), head, -1, room=True)
    return encoder, head.lines


@pytest.mark.parametrize(
    "lines",
    [
        (b"Content-Type: image/png",),
        (b"X-Type: text/html",),
        (b"204", b"Content-Type: text/html"),
        (b"304", b"Content-Type: text/html"),
        (b"206", b"Content-Type: text/html"),
        (b"Content-Type: text/html", b"Content-Range: bytes 0-1/2"),
        (b"Content-Type: text/html", b"Content-Encoding: gzip"),
        (b"Content-Type: text/html", b"Content-Encoding: none"),
        (b"Content-Type: text/html", b"Cache-Control: public, No-Transform"),
        (b"Content-Type: text/html", b"Repr-Digest: sha-256=:AA==:"),
    ],
)
def test_what_must_not_be_changed_is_passed_on_as_it_is(lines: tuple[bytes, ...]) -> None:
    encoder, told = start(*lines)
    assert encoder is None
    assert told == [line for line in lines if not line.isdigit()]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (b'If-None-Match: "x", W/"abc"', b'ETag: W/"abc"'),
        (b'If-None-Match: "abc"', b'ETag: "abc"'),
        (b"If-None-Match: *", b'ETag: "abc"'),
    ],
)
def test_an_answer_that_nothing_changed_names_the_one_that_the_client_has(asked: bytes, told: bytes) -> None:
    encoder, lines = start(b"304", b'ETag: "abc"', b"X-A: b", asked=(asked,))
    assert encoder is None
    assert lines == [told, b"X-A: b"]


@pytest.mark.parametrize(
    ("request_line", "asked", "length"),
    [
        (b"GET / HTTP/1.0", (), b"5000"),
        (b"GET / HTTP/1.1", (b"Cache-Control: no-transform",), b"5000"),
        (b"GET / HTTP/1.1", (), b"%d" % (BYTES_MIN - 1)),
    ],
)
def test_an_answer_that_could_be_compressed_for_others_says_so(
    request_line: bytes, asked: tuple[bytes, ...], length: bytes
) -> None:
    encoder, told = start(
        b"Content-Type: text/css", b"Content-Length: " + length, request=request_line, asked=asked
    )
    assert encoder is None
    assert told == [b"Content-Type: text/css", b"Vary: Accept-Encoding"]


def test_the_head_says_what_becomes_of_the_body() -> None:
    encoder, told = start(
        b"Content-Type: Application/LD+JSON;x=y", b'ETag: "abc"', b"Vary: Origin", b"Accept-Ranges: bytes"
    )
    assert encoder is not None
    assert told == [
        b"Content-Type: Application/LD+JSON;x=y",
        b'ETag: W/"abc"',
        b"Vary: Origin",
        b"Vary: Accept-Encoding",
        b"Content-Encoding: gzip",
    ]


@pytest.mark.parametrize("vary", [b"Vary: *", b"vary: Cookie, accept-encoding"])
def test_what_varies_already_is_not_said_twice(vary: bytes) -> None:
    encoder, told = start(b"Content-Type: text/html", vary, b'ETag: W/"abc"')
    assert encoder is not None
    assert told == [b"Content-Type: text/html", vary, b'ETag: W/"abc"', b"Content-Encoding: gzip"]


@pytest.mark.parametrize(
    ("types", "media_type", "suits"),
    [
        (["text/css"], b"text/css", True),
        (["text/css"], b"text/html", False),
        (["text/*"], b"text/html", True),
        (["*+json"], b"application/problem+json", True),
        (["*+json"], b"application/json", False),
        ([], b"text/html", False),
        (["Text/HTML"], b"text/html", True),
    ],
)
def test_types_are_those_that_the_app_names(types: list[str], media_type: bytes, suits: bool) -> None:
    options = parse_compression({"types": types})
    assert options is not None
    assert options.suits(media_type) is suits


@pytest.mark.parametrize(
    ("wishes", "problem"),
    [
        (1, "an object, true or false"),
        ({"level": 1}, "unknown option"),
        ({"codings": ["deflate"]}, "some of zstd, br, gzip"),
        ({"codings": []}, "some of"),
        ({"codings": ["gzip", "gzip"]}, "some of"),
        ({"codings": "gzip"}, "list of texts"),
        ({"types": [1]}, "list of texts"),
        ({"types": ["*"]}, "like text/css"),
        ({"types": ["text/*"] * 65}, "at most 64"),
        ({"bytes_min": -1}, "from 0"),
        ({"gzip_level": 0}, "from 1 to 9"),
        ({"br_level": 10}, "from 0 to 9"),
        ({"zstd_level": True}, "a whole number"),
    ],
)
def test_wishes_that_make_no_sense_are_refused(wishes: object, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse_compression(wishes)


@pytest.mark.parametrize("framing", [b"Content-Length: %d" % len(TEXT), b"Transfer-Encoding: chunked"])
async def test_a_head_request_gets_the_fields_that_its_get_would_get(edge: Edge, framing: bytes) -> None:
    start = b'HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nETag: "1"\r\n' + framing + b"\r\n\r\n"
    body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(TEXT), TEXT) if framing.endswith(b"chunked") else TEXT
    client = await serve(edge, start)
    edge.machines[0].answer = lambda r: start if r.line.startswith(b"HEAD") else start + body
    client.send(b"HEAD / HTTP/1.1\r\nHost: app.test\r\nAccept-Encoding: br\r\n\r\n")
    said = await client.read_response(to_head=True)
    told = (await client.get(b"/", b"Accept-Encoding: br")).fields
    of_body = {b"content-length", b"transfer-encoding", b"fly-request-id"}
    assert [pair for pair in said.fields if pair[0] not in of_body] == [
        p for p in told if p[0] not in of_body
    ]
    assert said.values(b"content-length") == []
    assert edge.metrics.compressing == 0


async def test_a_short_answer_is_compressed_as_a_whole_and_a_long_one_in_chunks(edge: Edge) -> None:
    client = await serve(edge, answer(b"Content-Type: text/plain", body=TEXT[:3_000]))
    response = await client.get(b"/", b"Accept-Encoding: gzip")
    assert response.values(b"content-length") == [b"%d" % len(response.body)]
    assert gzip.decompress(response.body) == TEXT[:3_000]
    large = TEXT * 20
    edge.machines[0].answer = lambda r: answer(b"Content-Type: text/plain", body=large)
    response = await client.get(b"/", b"Accept-Encoding: gzip")
    assert response.values(b"transfer-encoding") == [b"chunked"]
    assert gzip.decompress(response.body) == large


@pytest.mark.parametrize("coding", CODINGS)
async def test_events_reach_the_client_one_by_one(edge: Edge, coding: str) -> None:
    more = asyncio.Event()

    async def behave(connection: Connection) -> None:
        await connection.read_request()
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.writer.write(head)
        for n in range(3):
            connection.writer.write(b"9\r\ndata: %d\n\n\r\n" % n)
            await more.wait()
            more.clear()
        connection.writer.write(b"0\r\n\r\n")
        await connection.read()

    edge.put_app("app", "app.test", options='{"compression": true}')
    await edge.machine(behave=behave)
    await edge.start()
    client = await edge.client()
    client.send(b"GET / HTTP/1.1\r\nHost: app.test\r\nAccept-Encoding: %b\r\n\r\n" % coding.encode())
    head = await client.reader.readuntil(b"\r\n\r\n")
    assert b"Content-Encoding: " + coding.encode() in head
    decoded, decoder = b"", DECODERS[coding]()
    for n in range(3):
        size = int(await client.reader.readuntil(b"\r\n"), 16)
        decoded += decoder((await client.reader.readexactly(size + 2))[:-2])
        assert decoded == b"".join(b"data: %d\n\n" % k for k in range(n + 1))
        more.set()
    assert (await client.reader.readuntil(b"0\r\n\r\n")).endswith(b"0\r\n\r\n")


@given(st.lists(st.binary(max_size=300), max_size=8), st.sampled_from(CODINGS))
def test_what_is_put_in_comes_out_at_once_in_any_pieces(pieces: list[bytes], coding: str) -> None:
    encoder, decoder = Encoder(coding, USUAL), DECODERS[coding]()
    out = b""
    for n, piece in enumerate(pieces):
        out += decoder(encoder.encode(piece, False))
        assert out == b"".join(pieces[: n + 1])
    decoder(encoder.encode(b"", True))
    assert encoder.bytes_in == sum(map(len, pieces))


@pytest.mark.parametrize("coding", CODINGS)
def test_answers_that_are_compressed_at_the_same_time_are_apart(coding: str) -> None:
    def decode_both(first: Encoder, second: Encoder) -> list[bytes]:
        decoders = [DECODERS[coding](), DECODERS[coding]()]
        out = [b"", b""]
        for n in range(20):
            for i, encoder in enumerate((first, second)):
                out[i] += decoders[i](encoder.encode(b"%d of %d\n" % (n, i), n == 19))
        return out

    expected = [b"".join(b"%d of %d\n" % (n, i) for n in range(20)) for i in range(2)]
    for _ in range(3):
        assert decode_both(Encoder(coding, USUAL), Encoder(coding, USUAL)) == expected


async def test_what_a_client_leaves_unread_frees_its_encoder(edge: Edge) -> None:
    async def behave(connection: Connection) -> None:
        await connection.read_request()
        connection.writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 9999999\r\n\r\n" + TEXT
        )
        await connection.read()

    edge.put_app("app", "app.test", options='{"compression": true}')
    await edge.machine(behave=behave)
    await edge.start()
    client = await edge.client()
    client.send(b"GET / HTTP/1.1\r\nHost: app.test\r\nAccept-Encoding: br\r\n\r\n")
    await client.read_body_of(100)
    assert edge.metrics.compressing == 1
    client.close()
    await wait_for(lambda: not edge.metrics.compressing)
    assert edge.metrics.compressed["br"][0] == len(TEXT)


async def test_a_client_that_does_not_read_stops_the_machine(edge: Edge) -> None:
    """A small request for a huge answer holds no more than buffers, compressed or not."""
    noise = random.Random(1).randbytes(65_536)

    async def behave(connection: Connection) -> None:
        await connection.read_request()
        connection.writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nConnection: close\r\n\r\n")
        while True:
            connection.writer.write(noise)
            await connection.writer.drain()

    edge.put_app("app", "app.test", options='{"compression": {"codings": ["zstd"]}}')
    await edge.machine(behave=behave)
    await edge.start()
    client = await edge.client()
    client.send(b"GET / HTTP/1.1\r\nHost: app.test\r\nAccept-Encoding: zstd\r\n\r\n")
    pool = edge.server._pool
    assert pool is not None
    await wait_for(lambda: any(upstream._paused for upstream in pool.connections))
    assert edge.metrics.compressing == 1


async def test_more_than_a_worker_compresses_at_a_time_goes_uncompressed(edge: Edge) -> None:
    client = await serve(edge, HTML, compressions_max=0)
    response = await client.get(b"/", b"Accept-Encoding: gzip")
    assert (response.body, response.values(b"vary")) == (TEXT, [b"Accept-Encoding"])


async def test_bytes_are_counted_before_and_after(edge: Edge) -> None:
    client = await serve(edge, HTML)
    response = await client.get(b"/", b"Accept-Encoding: zstd")
    assert edge.metrics.compressed == {"zstd": (len(TEXT), len(response.body))}
    assert edge.metrics.app("app").bytes_out == len(response.body)
    assert edge.metrics.compressing == 0


def test_a_coding_whose_library_is_missing_is_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "brotli", None)
    compression.find_offered(("br", "gzip"))
    fresh = ("gzip", "br")
    monkeypatch.setattr(compression, "_offered", {})
    assert compression.find_offered(fresh) == ("gzip",)


async def test_a_field_that_the_app_sets_itself_is_there_besides(edge: Edge) -> None:
    options = {"compression": True, "response_headers": {"Vary": "Origin", "Server": False}}
    edge.put_app("app", "app.test", options=json.dumps(options))
    await edge.machine(answer=lambda r: answer(b"Content-Type: text/html", b"Server: x"))
    await edge.start()
    response = await edge.get(b"/", b"Accept-Encoding: gzip")
    assert gzip.decompress(response.body) == TEXT
    assert response.values(b"vary") == [b"Origin", b"Accept-Encoding"]
