from __future__ import annotations

import ipaddress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy.core import fields
from proxy.core.errors import ERRORS, ProxyError, RequestError, ResponseError, prefers_plain, render_error
from proxy.core.fields import MEMO_MAX, REQUEST_KINDS, request_kind, response_kind
from proxy.core.forwarding import Forwarding
from proxy.core.request_head import parse_request_head
from proxy.core.request_id import RequestIds
from proxy.core.response_head import parse_response_head
from proxy.core.wishes import plan_want
from proxy.settings import ProxySettings
from routing.balancer import Want

SETTINGS = ProxySettings("n1", "ams")
TOKENS = (
    b"GET POST / /a HTTP/1.1 HTTP/1.0 Host: Content-Length: Transfer-Encoding: chunked Connection: close 5 a"
)
PIECES = st.sampled_from(
    [*TOKENS.split(), b" ", b"\r\n", b"\n", b"\r", b":", b",", b"\0", b"\t", b"\xff", b"upgrade"]
)


@given(st.lists(PIECES, max_size=30).map(b"".join))
@example(b"")
def test_any_request_head_is_read_or_refused_and_reads_the_same_once_remade(noise: bytes) -> None:
    raw = b"GET / HTTP/1.1\r\nHost: a.test\r\n" + noise.replace(b"\r\n\r\n", b"") + b"\r\n\r\n"
    raw = raw[: raw.find(b"\r\n\r\n") + 4]
    try:
        head = parse_request_head(raw, SETTINGS)
    except RequestError:
        return
    assert b"\r" not in b"".join(head.lines) + head.target + head.host
    assert b"\n" not in b"".join(head.lines) + head.target + head.host
    assert not (head.chunked and head.content_length >= 0)
    framing = [b"Transfer-Encoding: chunked"] if head.chunked else []
    if head.content_length >= 0:
        framing = [b"Content-Length: %d" % head.content_length]
    start = b"%b %b HTTP/1.1\r\nHost: %b" % (head.method, head.target, head.host)
    again = parse_request_head(b"\r\n".join((start, *head.lines, *framing, b"", b"")), SETTINGS)
    assert (again.method, again.target, again.host) == (head.method, head.target, head.host)
    assert (again.content_length, again.chunked) == (head.content_length, head.chunked)
    # Of a field without a value, the space behind the colon may go.
    assert [line.rstrip() for line in again.lines] == [line.rstrip() for line in head.lines]


@given(st.lists(PIECES, max_size=30).map(b"".join))
def test_any_answer_is_read_or_refused(noise: bytes) -> None:
    raw = b"HTTP/1.1 200 OK\r\n" + noise + b"\r\n\r\n"
    raw = raw[: raw.find(b"\r\n\r\n") + 4]
    try:
        head = parse_response_head(raw)
    except ResponseError:
        return
    assert b"\r" not in b"".join(head.lines)
    assert b"\n" not in b"".join(head.lines)
    assert not (head.chunked and head.content_length >= 0)


@pytest.mark.parametrize(
    ("lines", "keeps"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", True),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", False),
        (b"HTTP/1.1 200 OK\r\nConnection: keep-alive\r\nConnection: Close\r\n\r\n", False),
        (b"HTTP/1.0 200 OK\r\n\r\n", False),
        (b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\n\r\n", True),
    ],
)
def test_an_answer_says_whether_its_connection_goes_on(lines: bytes, keeps: bool) -> None:
    assert parse_response_head(lines).keep_alive is keeps


def test_a_reason_is_kept_and_a_missing_one_gets_its_space() -> None:
    assert (
        parse_response_head(b"HTTP/1.0 200 Sure thing\r\n\r\n").status_line == b"HTTP/1.1 200 Sure thing\r\n"
    )
    assert parse_response_head(b"HTTP/1.1 200\r\n\r\n").status_line == b"HTTP/1.1 200 \r\n"


def test_a_post_without_a_body_says_so_to_the_machine() -> None:
    assert parse_request_head(b"POST / HTTP/1.1\r\nHost: a\r\n\r\n", SETTINGS).content_length == 0
    assert parse_request_head(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", SETTINGS).content_length == -1


def test_the_port_of_a_host_is_one() -> None:
    for port in (b"0", b"0080", b"9999", b"59999", b"65499", b"65535"):
        raw = b"GET / HTTP/1.1\r\nHost: a:%b\r\n\r\n" % port
        assert parse_request_head(raw, SETTINGS).host == b"a:" + port
    for port in (b"65536", b"70000", b"99999", b"165535"):
        for raw in (
            b"GET / HTTP/1.1\r\nHost: a:%b\r\n\r\n" % port,
            b"GET http://a:%b/ HTTP/1.1\r\nHost: a\r\n\r\n" % port,
        ):
            with pytest.raises(RequestError) as raised:
                parse_request_head(raw, SETTINGS)
            assert raised.value.code == "PH03"


def test_invented_names_do_not_fill_memory() -> None:
    for number in range(2 * MEMO_MAX):
        request_kind(b"x-%d" % number)
    assert len(REQUEST_KINDS) <= MEMO_MAX
    assert request_kind(b"HOST") == fields.HOST


def test_names_are_sorted_in_any_case_and_spelling() -> None:
    assert [request_kind(n) for n in (b"fly-x", b"FLY_X", b"X_Real_IP", b"x-real-ipx")] == [
        fields.DROP
    ] * 3 + [fields.PASS]
    assert [response_kind(n) for n in (b"Fly-Replay", b"fly-replay-x", b"Server")] == [
        fields.REPLAY,
        fields.DROP,
        fields.PASS,
    ]


@pytest.mark.parametrize("code", sorted(ERRORS))
def test_every_error_can_be_written_both_ways(code: str) -> None:
    for plain in (True, False):
        data = render_error(code, "why", b"ID-ams", plain=plain, close=True)
        head, _, body = data.partition(b"\r\n\r\n")
        assert int(head[9:12]) == ERRORS[code][0]
        assert b"Content-Length: %d" % len(body) in head
        assert code.encode() in body
        assert b"why" in body
    assert render_error(code, "", b"ID", plain=True, close=False, with_body=False).endswith(b"\r\n\r\n")


def test_people_get_text_and_programs_json() -> None:
    assert prefers_plain([b"Accept: text/html,application/xhtml+xml"])
    assert not prefers_plain([b"Accept: application/json, text/plain"])
    assert not prefers_plain([b"Accept: */*"])
    assert not prefers_plain([])


def test_ids_are_unique_sorted_and_carry_the_region() -> None:
    ids = RequestIds(lambda bits: (1 << bits) - 1, "ams")
    first = [ids.next(1_700_000_000_000) for _ in range(3000)]
    assert len(set(first)) == 3000
    assert first == sorted(first)
    assert all(len(i) == 30 and i.endswith(b"-ams") for i in first)
    assert ids.next(1_700_000_000_001)[:10] > first[0][:10]


def test_ids_draw_new_randomness_when_their_counter_is_used_up() -> None:
    draws = iter((7, 8))
    ids = RequestIds(lambda bits: next(draws), "ams")
    ids._counter = (1 << 20) - 2
    before, after = ids.next(5), ids.next(5)
    assert before[:22] != after[:22]
    assert next(draws, None) is None


@given(st.lists(st.one_of(st.ip_addresses(), st.text(max_size=8)), max_size=6))
def test_a_chain_never_yields_a_client_that_is_no_address(hops: list[object]) -> None:
    forwarding = Forwarding(("10.0.0.0/8",), "ams", 80)
    value = ", ".join(map(str, hops)).encode("latin-1", "replace")
    lines = forwarding.lines_for_trusted("10.0.0.1", [(b"X-Forwarded-For", value)])
    fields_seen = dict(line.split(b": ", 1) for line in lines.split(b"\r\n") if line)
    ipaddress.ip_address(fields_seen[b"Fly-Client-IP"].decode())
    for hop in fields_seen[b"X-Forwarded-For"].decode().split(", "):
        ipaddress.ip_address(hop)


def test_mapped_addresses_are_trusted_like_what_they_map() -> None:
    forwarding = Forwarding(("10.0.0.0/8", "fd00::/8"), "ams", 80)
    assert forwarding.trusts("::ffff:10.1.2.3")
    assert forwarding.trusts("fd00::1")
    assert not forwarding.trusts("11.0.0.1")
    assert not forwarding.trusts("")


@pytest.mark.parametrize(
    ("said", "want"),
    [
        ([(b"fly-prefer-region", b"gru")], Want(("gru", "any"))),
        ([(b"fly-force-region", b"gru,ams")], Want(("gru", "ams"))),
        ([(b"fly-force-region", b"gru"), (b"fly-prefer-region", b"ams")], Want(("gru",))),
        ([(b"fly-force-instance-id", b"m1"), (b"fly-prefer-instance-id", b"m2")], Want((), "m1")),
        ([(b"fly-force-instance-id", b"m1"), (b"fly-prefer-region", b"ams")], Want((), "m1")),
        ([(b"fly-prefer-instance-id", b"m2"), (b"fly-force-region", b"ams")], Want(("ams",), None, "m2")),
    ],
)
def test_wishes_of_a_client_have_an_order(said: list[tuple[bytes, bytes]], want: Want) -> None:
    assert plan_want(said) == want


@pytest.mark.parametrize(
    "said",
    [
        [(b"fly-force-region", b"a;b")],
        [(b"fly-prefer-instance-id", b"m 1")],
        [(b"fly-force-region", b"ams"), (b"fly-force-region", b"gru")],
    ],
)
def test_malformed_wishes_are_refused(said: list[tuple[bytes, bytes]]) -> None:
    with pytest.raises(ProxyError):
        plan_want(said)
