from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core.framing import (
    LAST_CHUNK,
    OVERHEAD_BYTES_MAX,
    TRAILER_BYTES_MAX,
    BodyError,
    ChunkedBody,
    FixedBody,
    encode_chunk,
)


def feed_in_pieces(body: ChunkedBody | FixedBody, stream: bytes, cuts: list[int]) -> bytes:
    """Feed a stream cut at these places; what the body leaves over must be empty until it has ended."""
    decoded = b""
    bounds = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts)})
    for start, end in itertools.pairwise(bounds):
        assert not body.ended
        decoded += body.feed(stream[start:end])
    return decoded


CUTS = st.lists(st.integers(0, 10_000), max_size=40)


@given(st.lists(st.binary(min_size=1, max_size=200), max_size=8), CUTS)
def test_a_chunked_body_is_the_same_however_it_is_cut(chunks: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(map(encode_chunk, chunks)) + b"0;x=y\r\nA: b\r\nB:\r\n\r\n"
    body = ChunkedBody(bound_overhead=True)
    assert feed_in_pieces(body, stream, cuts) == b"".join(chunks)
    assert body.ended
    assert body.rest == b""


@given(st.lists(st.binary(min_size=1, max_size=50), max_size=4), st.binary(max_size=40))
def test_what_follows_a_chunked_body_is_left_over(chunks: list[bytes], following: bytes) -> None:
    body = ChunkedBody(bound_overhead=True)
    assert body.feed(b"".join(map(encode_chunk, chunks)) + LAST_CHUNK + following) == b"".join(chunks)
    assert body.ended
    assert body.rest == following


@given(st.binary(max_size=60), CUTS)
def test_any_bytes_are_a_body_or_an_error_independent_of_cuts(stream: bytes, cuts: list[int]) -> None:
    def run(places: list[int]) -> tuple[bytes, bool] | None:
        body = ChunkedBody(bound_overhead=True)
        try:
            bounds = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in places)})
            decoded = b""
            for start, end in itertools.pairwise(bounds):
                decoded += body.feed(stream[start:end])
                if body.ended:
                    break
        except BodyError:
            return None
        return decoded, body.ended

    whole, cut = run([]), run(cuts)
    # A stream that is not complete may be found wrong sooner in one read than in another.
    if whole is not None and whole[1]:
        assert cut == whole


@given(st.binary(min_size=1, max_size=100), st.binary(max_size=20), CUTS)
def test_a_fixed_body_takes_what_is_its_own(payload: bytes, following: bytes, cuts: list[int]) -> None:
    body = FixedBody(len(payload))
    assert feed_in_pieces(body, payload, cuts) == payload
    assert body.ended
    body = FixedBody(len(payload))
    assert (body.feed(payload + following), body.rest) == (payload, following)


def test_tiny_chunks_are_bounded_for_requests_and_free_for_answers() -> None:
    stream = encode_chunk(b"x") * OVERHEAD_BYTES_MAX
    with pytest.raises(BodyError, match="tiny"):
        ChunkedBody(bound_overhead=True).feed(stream)
    assert ChunkedBody(bound_overhead=False).feed(stream) == b"x" * OVERHEAD_BYTES_MAX


def test_trailers_are_bounded_also_when_they_trickle() -> None:
    body = ChunkedBody(bound_overhead=True)
    body.feed(b"0\r\n")
    for _ in range(TRAILER_BYTES_MAX // 6):
        body.feed(b"a: b\r\n")
    with pytest.raises(BodyError, match="trailers"):
        body.feed(b"a: b\r\n")


@pytest.mark.parametrize("held", [b"1" * 300, b"5;" + b"a" * 300, b"0\r\n" + b"a" * 9000])
def test_an_endless_line_is_refused_before_its_end(held: bytes) -> None:
    with pytest.raises(BodyError):
        ChunkedBody(bound_overhead=True).feed(held)
