from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core.detours import KNOWN_MAX, Detours
from proxy.core.peer_frames import (
    CONTROL_BYTES_MAX,
    DATA,
    HEADER_BYTES,
    OPEN,
    REFUSED,
    FrameError,
    FrameReader,
    Order,
    encode_frame,
    encode_header,
    encode_hello,
    encode_open,
    encode_refusal,
    encode_release,
    parse_hello,
    parse_open,
    parse_refusal,
    parse_release,
)

ORDER = Order("m-1.a_b", "app", 443, 8080, 1, 3000, fresh=True)
names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", fullmatch=True)
numbers = st.integers(0, 2**31)


def joined(frames: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    """Put the pieces of DATA together."""
    found: list[tuple[int, bytes]] = []
    for kind, payload in frames:
        if kind == DATA and found and found[-1][0] == DATA:
            found[-1] = DATA, found[-1][1] + payload
        else:
            found.append((kind, payload))
    return [frame for frame in found if frame != (DATA, b"")]


@given(st.builds(Order, names, names, numbers, numbers, numbers, numbers, st.booleans()))
def test_what_is_ordered_is_read(order: Order) -> None:
    ((kind, payload),) = FrameReader().feed(encode_open(order))
    assert (kind, parse_open(payload)) == (OPEN, order)


def test_words_of_a_newer_node_are_passed_over() -> None:
    payload = encode_open(ORDER)[HEADER_BYTES:]
    assert parse_open(payload + b" urgent") == ORDER


@given(
    st.lists(st.tuples(st.sampled_from([DATA, OPEN, REFUSED, 99]), st.binary(max_size=40))),
    st.lists(st.integers(0, 200)),
)
def test_any_chunking_gives_the_same_frames(frames: list[tuple[int, bytes]], cuts: list[int]) -> None:
    stream = b"".join(encode_frame(kind, payload) for kind, payload in frames)
    reader = FrameReader()
    read = []
    at = 0
    for cut in [*sorted(cuts), len(stream)]:
        read += reader.feed(stream[at:cut])
        at = max(at, cut)
    assert joined(read) == joined(frames)


def test_data_is_handed_on_before_its_frame_is_complete() -> None:
    reader = FrameReader()
    assert reader.feed(encode_header(DATA, 10) + b"abc") == [(DATA, b"abc")]
    assert reader.feed(b"defghij" + encode_frame(OPEN, b"x")) == [(DATA, b"defghij"), (OPEN, b"x")]


def test_no_more_than_a_control_frame_is_kept() -> None:
    reader = FrameReader()
    with pytest.raises(FrameError, match="too long"):
        reader.feed(encode_header(OPEN, CONTROL_BYTES_MAX + 1))


@given(st.binary(max_size=300))
def test_any_bytes_raise_nothing_but_frame_errors(data: bytes) -> None:
    for parse in (parse_hello, parse_open, parse_refusal, parse_release, FrameReader().feed):
        with contextlib.suppress(FrameError):
            parse(data)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"m1 app 0 80 1 1000",
        b"m1 app 0 80 1 1000 perhaps",
        b"m1 app -1 80 1 1000 kept",
        b"m1 app 0 8_0 1 1000 kept",
        "mé app 0 80 1 1000 kept".encode(),
        b"m1 app 0 12345678901 1 1000 kept",
    ],
)
def test_malformed_orders_are_refused(payload: bytes) -> None:
    with pytest.raises(FrameError):
        parse_open(payload)


def test_greeting_of_another_version_is_refused() -> None:
    assert parse_hello(encode_hello("n1")[HEADER_BYTES:]) == "n1"
    with pytest.raises(FrameError, match="version"):
        parse_hello(b"2 n1")


def test_refusal_is_short_and_printable() -> None:
    payload = encode_refusal("PC01", "é" * 1000)[HEADER_BYTES:]
    assert parse_refusal(payload) == ("PC01", "?" * 256)
    assert parse_refusal(b"PC06 a\r\nb") == ("PC06", "a??b")
    with pytest.raises(FrameError):
        parse_refusal(b"<script> x")


def test_release_counts_beyond_any_answer() -> None:
    assert parse_release(encode_release(2**63)[HEADER_BYTES:]) == 2**63


def test_detour_is_believed_for_longer_each_time_and_forgotten_at_once() -> None:
    detours = Detours(1.0, 4.0)
    assert detours.is_due("n2", 0.0)
    now = 10.0
    for wait_s in (1.0, 2.0, 4.0, 4.0):
        detours.fail("n2", now)
        assert detours.knows("n2")
        assert not detours.is_due("n2", now + wait_s - 0.1)
        now += wait_s
        assert detours.is_due("n2", now)
    detours.succeed("n2")
    assert not detours.knows("n2")
    detours.fail("n2", now)
    assert detours.is_due("n2", now + 1.0)


def test_detour_that_is_being_tried_is_left_alone_and_keeps_its_wait() -> None:
    detours = Detours(1.0, 4.0)
    detours.fail("n2", 0.0)
    detours.hold("n2", 1.0, 3.0)
    detours.hold("other", 1.0, 3.0)
    assert not detours.is_due("n2", 3.9)
    assert detours.is_due("other", 1.0)
    detours.fail("n2", 4.0)
    assert not detours.is_due("n2", 5.9)
    assert detours.is_due("n2", 6.0)


def test_detours_have_an_end() -> None:
    detours = Detours(1.0, 4.0)
    for number in range(KNOWN_MAX + 1):
        detours.fail(f"n{number}", 0.0)
    assert [detours.knows(f"n{number}") for number in (0, KNOWN_MAX - 1, KNOWN_MAX)] == [False, False, True]
