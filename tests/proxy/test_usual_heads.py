"""Heads read by their lines are those that the parser reads."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core import usual_heads
from proxy.core.errors import RequestError, ResponseError
from proxy.core.fields import MEMO_MAX
from proxy.core.request_head import RequestHead, parse_request_head
from proxy.core.response_head import ResponseHead, parse_response_head
from proxy.core.usual_heads import Fields, read_usual_request, read_usual_response
from proxy.settings import ProxySettings

if TYPE_CHECKING:
    from collections.abc import Callable

SETTINGS = ProxySettings(node="n", region="ams", url_bytes_max=64, header_count_max=8)

FIELDS = (
    *(b"Host: a.test", b"host: b.test:8080", b"Host: a b", b"Host: ", b"Accept: */*", b"accept:*/*"),
    *(b"Accept:  */*", b"Accept: */* ", b"Accept: \t", b"Accept:", b": x", b"Accept", b" Accept: x", b""),
    *(b"Accept : x", b"Ac cept: x", b"A\xe9: x", b"X: \xe9", b"X: \x00", b"X: a\rb", b"X: a\nb", b"X: a\tb"),
    *(b"Connection: keep-alive", b"Connection: Keep-Alive", b"Connection: close", b"connection: x, host"),
    *(b"Connection: upgrade", b"Upgrade: websocket", b"Content-Length: 5", b"content-length: 0"),
    *(b"Content-Length: +5", b"Content-Length: 5, 5", b"Content-Length: 9999999999999999999"),
    *(b"Content-Length: 05", b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip, chunked"),
    *(b"Expect: 100-continue", b"Te: trailers", b"X-Forwarded-For: 1.2.3.4", b"x_forwarded_for: 1.2.3.4"),
    *(b"Fly-Region: lax", b"fly-prefer-region: gru", b"fly_client_ip: 1.2.3.4", b"Cookie: a=b; c=d"),
    *(
        b"fly-replay: region=gru",
        b"Content-Type: application/vnd.fly.replay+json",
        b"Content-Type: text/html",
    ),
    *(b"Keep-Alive: timeout=5", b"Set-Cookie: a=b", b'ETag: "1"', b"Date: Mon, 23 Nov 2026 12:00:00 GMT"),
)
STARTS = (
    *(b"GET / HTTP/1.1", b"POST /a?b=%20c HTTP/1.1", b"HEAD /a/../b HTTP/1.1", b"GET / HTTP/1.0"),
    *(b"GET  / HTTP/1.1", b"GET /a b HTTP/1.1", b"GET /#x HTTP/1.1", b"GET http://a.test/ HTTP/1.1"),
    *(b"OPTIONS * HTTP/1.1", b"get / HTTP/1.1", b"CONNECT a:1 HTTP/1.1", b"GET /\xe9 HTTP/1.1"),
    *(
        b'GET /<x>|"^`{} HTTP/1.1',
        b"PUT /" + b"x" * 70 + b" HTTP/1.1",
        b"GET / HTTP/1.1 ",
        b"GET /\t HTTP/1.1",
    ),
)
STATUS_LINES = (
    *(b"HTTP/1.1 200 OK", b"HTTP/1.1 404 ", b"HTTP/1.1 500", b"HTTP/1.0 200 OK", b"HTTP/1.1 204 No Content"),
    *(b"HTTP/1.1 304 Not Modified", b"HTTP/1.1 101 Switching Protocols", b"HTTP/1.1 99 x", b"HTTP/2 200 OK"),
    *(b"HTTP/1.1 201 Created", b"HTTP/1.1 100 Continue", b"HTTP/1.1 200 \x01", b"http/1.1 200 OK"),
)
lines = st.lists(st.one_of(st.sampled_from(FIELDS), st.binary(max_size=12)), max_size=10)


UNCOMPARED = frozenset(("framing", "connection", "hosts"))


def describe(head: RequestHead | ResponseHead) -> dict[str, object]:
    names = (name for name in dir(head) if not name.startswith("_") and name not in UNCOMPARED)
    return {name: value for name in names if not callable(value := getattr(head, name))}


def judge(read: Callable[[], RequestHead | ResponseHead]) -> dict[str, object] | None:
    try:
        return describe(read())
    except (RequestError, ResponseError):
        return None


def compare_request(start: bytes, *requests: list[bytes]) -> None:
    said: Fields | None = None
    for fields in requests:
        raw = b"\r\n".join((start, *fields, b"", b""))
        usual = read_usual_request(raw, SETTINGS, said)
        if usual is not None:
            head, said = usual
            assert describe(head) == judge(partial(parse_request_head, raw, SETTINGS))
            head.lines, head.host, head.target = [b"Transformed: 1"], b"other.test", b"/other"


def compare_answer(start: bytes, fields: list[bytes]) -> None:
    raw = b"\r\n".join((start, *fields))
    head = read_usual_response(raw)
    if head is not None:
        assert describe(head) == judge(partial(parse_response_head, raw + b"\r\n\r\n"))


@pytest.mark.parametrize("field", FIELDS)
def test_a_head_with_each_field_is_what_the_parser_says(field: bytes) -> None:
    fine = FIELDS[0]
    for start in STARTS:
        compare_request(start, [fine, field], [fine, field, field], [field, fine], [fine, fine], [field])
    for start in STATUS_LINES:
        for fields in ([field], [field, field], [field, b"Content-Length: 7"], [b"X: y", field]):
            compare_answer(start, fields)


@given(st.sampled_from(STARTS), lines, lines)
def test_a_request_of_usual_lines_is_what_the_parser_says(
    start: bytes, first: list[bytes], second: list[bytes]
) -> None:
    compare_request(start, first, second, first)


@given(st.sampled_from(STATUS_LINES), lines)
def test_an_answer_of_usual_lines_is_what_the_parser_says(start: bytes, fields: list[bytes]) -> None:
    compare_answer(start, fields)
    compare_answer(start, fields)


def test_what_browsers_and_servers_send_is_usual() -> None:
    request = (
        b"GET /a?b=c HTTP/1.1\r\nHost: a.test\r\nAccept: */*\r\nCookie: a=b\r\nConnection: keep-alive\r\n\r\n"
    )
    usual = read_usual_request(request, SETTINGS, None)
    assert usual is not None
    head, said = usual
    assert head.lines == [b"Accept: */*", b"Cookie: a=b"]
    again = read_usual_request(request.replace(b"/a?b=c", b"/d"), SETTINGS, said)
    assert again is not None
    assert again[1] is said
    assert (again[0].target, again[0].lines) == (b"/d", head.lines)
    response = read_usual_response(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nServer: x")
    assert response is not None
    assert (response.status, response.content_length, response.lines) == (200, 5, [b"Server: x"])


def test_the_fields_of_another_request_are_not_taken_for_the_same() -> None:
    first = read_usual_request(b"GET / HTTP/1.1\r\nHost: a.test\r\nX: 1\r\n\r\n", SETTINGS, None)
    assert first is not None
    second = read_usual_request(b"GET / HTTP/1.1\r\nHost: a.test\r\nX: 2\r\n\r\n", SETTINGS, first[1])
    assert second is not None
    assert second[0].lines == [b"X: 2"]


@pytest.mark.parametrize("behind", [b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n", b"\r\n", b"body\r\n\r\n"])
def test_more_than_one_head_is_left_to_who_finds_its_end(behind: bytes) -> None:
    assert read_usual_request(b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n" + behind, SETTINGS, None) is None


def test_invented_and_secret_lines_do_not_fill_memory() -> None:
    raw = b"GET / HTTP/1.1\r\nHost: a.test\r\nX-%d: 1\r\nCookie: secret\r\n\r\n"
    for number in range(MEMO_MAX + 100):
        assert read_usual_request(raw % number, SETTINGS, None) is not None
    assert len(usual_heads._request_lines.seen) <= MEMO_MAX
    assert b"Cookie: secret" not in usual_heads._request_lines.seen


def test_too_many_fields_are_left_to_who_refuses_them() -> None:
    some = [FIELDS[0], *[b"X: y"] * (SETTINGS.header_count_max - 1)]
    raw = b"\r\n".join((STARTS[0], *some, b"", b""))
    assert read_usual_request(raw, SETTINGS, None) is not None
    compare_request(STARTS[0], some, [*some, b"X: y"])
