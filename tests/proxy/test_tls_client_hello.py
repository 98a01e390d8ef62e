from __future__ import annotations

import ssl
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core.client_hello import HELLO_BYTES_MAX, ClientHello, ClientHelloError, parse_client_hello


def hello_of(name: str | None, *alpn: str) -> bytes:
    context = ssl.create_default_context()
    context.check_hostname = False
    if alpn:
        context.set_alpn_protocols(list(alpn))
    outgoing = ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name).do_handshake()
    return outgoing.read()


HELLO = hello_of("Sub.Example.test", "h2", "http/1.1")
BOTH = frozenset(("TLSv1.2", "TLSv1.3"))
PARSED = ClientHello("sub.example.test", (b"h2", b"http/1.1"), BOTH)


def in_records(hello: bytes, size: int) -> bytes:
    message = hello[5:]
    pieces = [message[at : at + size] for at in range(0, len(message), size)]
    return b"".join(b"\x16\x03\x01" + len(piece).to_bytes(2, "big") + piece for piece in pieces)


def message_with(name: bytes, extra: bytes = b"", version: bytes = b"\x03\x03") -> bytes:
    entry = b"\0" + len(name).to_bytes(2, "big") + name
    names = len(entry).to_bytes(2, "big") + entry
    extensions = b"\0\0" + len(names).to_bytes(2, "big") + names + extra
    body = version + b"r" * 32 + b"\0" + b"\0\x02\x13\x01" + b"\x01\0"
    body += len(extensions).to_bytes(2, "big") + extensions
    message = b"\x01" + len(body).to_bytes(3, "big") + body
    return b"\x16\x03\x01" + len(message).to_bytes(2, "big") + message


def test_name_and_protocols_of_openssl_are_read() -> None:
    assert parse_client_hello(HELLO) == PARSED
    assert parse_client_hello(HELLO + b"what follows") == PARSED
    assert parse_client_hello(hello_of(None)) == ClientHello(None, (), BOTH)


@pytest.mark.parametrize("size", [1, 3, 4, 100])
def test_message_in_several_records_is_read(size: int) -> None:
    hello = in_records(HELLO, size)
    if len(hello) <= HELLO_BYTES_MAX:
        assert parse_client_hello(hello) == PARSED


@pytest.mark.parametrize("hello", [HELLO, in_records(HELLO, 60)])
def test_asks_for_what_is_missing_and_never_for_too_much(hello: bytes) -> None:
    have = 0
    while not isinstance(needed := parse_client_hello(hello[:have]), ClientHello):
        assert have < needed <= len(hello)
        have = needed
    assert have == len(hello)
    for cut in range(len(hello)):
        assert isinstance(parse_client_hello(hello[:cut]), int)


@pytest.mark.parametrize(
    "name", [b"", b"a b", b"a\0.test", b"\xff.test", b"-a", b"a/../b", b"x" * 254, b"a\r\n"]
)
def test_server_name_that_is_none_is_refused(name: bytes) -> None:
    with pytest.raises(ClientHelloError):
        parse_client_hello(message_with(name))


def test_final_dot_is_dropped() -> None:
    assert parse_client_hello(message_with(b"a.test.")) == ClientHello("a.test", (), frozenset({"TLSv1.2"}))


def versions(*offered: str) -> bytes:
    said = bytes.fromhex("".join(offered))
    return b"\0\x2b" + (len(said) + 1).to_bytes(2, "big") + bytes([len(said)]) + said


@pytest.mark.parametrize(
    ("version", "extra", "found"),
    [
        (b"\x03\x02", b"", set()),
        (b"\x03\x03", b"", {"TLSv1.2"}),
        (b"\x03\x04", b"", {"TLSv1.2"}),  # TLS 1.3 is offered by the extension alone
        (b"\x03\x03", versions("0304"), {"TLSv1.3"}),
        (b"\x03\x01", versions("4a4a", "0304", "0303", "0302"), {"TLSv1.2", "TLSv1.3"}),
        (b"\x03\x03", versions("0302"), set()),
    ],
)
def test_versions_are_those_of_the_extension_where_there_is_one(
    version: bytes, extra: bytes, found: set[str]
) -> None:
    hello = parse_client_hello(message_with(b"a.test", extra, version))
    assert isinstance(hello, ClientHello)
    assert hello.versions == found


def test_versions_that_are_cut_are_refused() -> None:
    with pytest.raises(ClientHelloError):
        parse_client_hello(message_with(b"a.test", versions("0304", "03")))


def test_extension_that_occurs_twice_is_refused() -> None:
    with pytest.raises(ClientHelloError):
        parse_client_hello(message_with(b"a.test", b"\0\0\0\0"))


@pytest.mark.parametrize(
    "data",
    [
        b"\x17",
        b"GET / HTTP/1.1\r\n",
        b"\x16\x02\x00\x00\x05",
        b"\x16\x03\x01\x00\x00",
        b"\x16\x03\x01\x40\x01",
        b"\x16\x03\x01\x00\x04\x02\x00\x00\x00",
        b"\x16\x03\x01\x00\x04\x01\x01\x00\x00",
        b"\x16\x03\x01\x00\x01\x01" * 8_000,
    ],
)
def test_what_is_no_client_hello_is_refused(data: bytes) -> None:
    with pytest.raises(ClientHelloError):
        parse_client_hello(data)


def judge(data: bytes) -> None:
    try:
        result = parse_client_hello(data)
    except ClientHelloError:
        return
    if isinstance(result, int):
        assert len(data) < result <= HELLO_BYTES_MAX
    elif result.server_name is not None:
        assert result.server_name.isascii()
        assert result.server_name.isprintable()


@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    judge(data)
    judge(b"\x16\x03\x01" + data)


@given(
    st.lists(st.tuples(st.integers(0, len(HELLO) - 1), st.integers(0, 255)), max_size=8), st.integers(0, 600)
)
def test_mutations_of_a_real_message_are_read_or_refused(flips: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(HELLO)
    for at, value in flips:
        data[at] = value
    judge(bytes(data))
    judge(bytes(data[:cut]))
