"""Who may talk: what is opened, what is not, and why."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replication.seal import (
    DATAGRAM_OVERHEAD_BYTES,
    HANDSHAKE_BYTES,
    KeyRing,
    PlainSeal,
    ReplayWindow,
    SealError,
    make_seal,
)

OLD, NEW = b"o" * 32, b"n" * 32


def rings(*keys: bytes) -> tuple[KeyRing, KeyRing]:
    keys = keys or (OLD,)
    return KeyRing(keys, "c"), KeyRing(keys, "c")


def reason(act, *args) -> str:
    with pytest.raises(SealError) as caught:
        act(*args)
    return caught.value.reason


def shake(dialer, accepter):
    dial, accept = dialer.dial(), accepter.accept()
    theirs = accept.finish(dial.first_bytes())
    return dial.finish(accept.first_bytes()), theirs


@given(st.lists(st.binary(max_size=200), max_size=5))
def test_datagrams_come_out_as_they_went_in(messages):
    a, b = rings()
    for message in messages:
        sealed = a.seal_datagram(message)
        assert len(sealed) == len(message) + DATAGRAM_OVERHEAD_BYTES
        assert b.open_datagram(sealed) == message


def test_a_datagram_is_opened_once():
    a, b = rings()
    sealed = a.seal_datagram(b"x")
    b.open_datagram(sealed)
    assert reason(b.open_datagram, sealed) == "replayed"


def test_a_datagram_sent_back_to_its_sender_is_refused():
    a, _ = rings()
    assert reason(a.open_datagram, a.seal_datagram(b"x")) == "reflected"


@pytest.mark.parametrize(
    "stranger",
    [KeyRing((NEW,), "c"), KeyRing((OLD,), "another"), PlainSeal("c")],
    ids=["key", "cluster", "plain"],
)
def test_a_datagram_of_another_key_or_cluster_is_refused(stranger):
    _, b = rings()
    assert reason(b.open_datagram, stranger.seal_datagram(b"x" * 50)) in {"tag", "magic"}


@given(st.binary(max_size=100), st.data())
def test_a_datagram_with_any_bit_flipped_is_refused(message, data):
    a, b = rings()
    sealed = bytearray(a.seal_datagram(message))
    bit = data.draw(st.integers(0, len(sealed) * 8 - 1))
    sealed[bit // 8] ^= 1 << bit % 8
    assert reason(b.open_datagram, bytes(sealed)) in {"tag", "magic"}


@given(st.binary(max_size=200))
def test_garbage_is_refused(data):
    _, b = rings()
    assert reason(b.open_datagram, data) in {"truncated", "magic", "tag"}


def test_a_forged_datagram_does_not_spend_the_counter_of_a_true_one():
    a, b = rings()
    b.open_datagram(a.seal_datagram(b"first"))
    sealed = a.seal_datagram(b"x")
    forged = sealed[:-1] + bytes([sealed[-1] ^ 1])
    assert reason(b.open_datagram, forged) == "tag"
    assert b.open_datagram(sealed) == b"x"


def test_datagrams_may_overtake_each_other():
    a, b = rings()
    sealed = [a.seal_datagram(bytes([n])) for n in range(20)]
    assert [b.open_datagram(item) for item in reversed(sealed)] == [bytes([n]) for n in reversed(range(20))]


@given(st.lists(st.integers(0, 3000), max_size=200))
def test_the_window_admits_no_counter_twice_and_every_new_one_in_reach(counters):
    window = ReplayWindow()
    admitted: set[int] = set()
    for counter in counters:
        in_reach = counter > max(admitted, default=-1) - 1024
        assert window.admit(counter) is (in_reach and counter not in admitted)
        if in_reach:
            admitted.add(counter)
    assert window.seen < 1 << 1024


def test_a_counter_far_ahead_costs_no_memory():
    window = ReplayWindow()
    window.admit(1)
    assert window.admit(2**63)
    assert window.seen == 1


def test_keys_rotate_one_node_at_a_time():
    a, b = rings(OLD)
    b.replace((OLD, NEW))
    assert b.open_datagram(a.seal_datagram(b"1")) == b"1"
    assert a.open_datagram(b.seal_datagram(b"2")) == b"2"
    a.replace((NEW, OLD))
    assert b.open_datagram(a.seal_datagram(b"3")) == b"3"
    b.replace((NEW,))
    assert a.open_datagram(b.seal_datagram(b"4")) == b"4"
    assert b.open_datagram(a.seal_datagram(b"5")) == b"5"


def test_a_rotation_does_not_let_old_datagrams_in_again():
    a, b = rings(OLD)
    sealed = a.seal_datagram(b"x")
    b.open_datagram(sealed)
    b.replace((NEW, OLD))
    assert reason(b.open_datagram, sealed) == "replayed"
    b.replace((NEW,))
    assert reason(b.open_datagram, sealed) == "tag"


@pytest.mark.parametrize("keys", [(), (b"short",), (OLD,) * 5])
def test_a_ring_that_is_empty_short_or_too_large_is_refused(keys):
    with pytest.raises(ValueError, match="key ring"):
        KeyRing(keys, "c")


@given(st.lists(st.tuples(st.booleans(), st.binary(max_size=100)), max_size=10))
def test_streams_carry_both_ways(records):
    ours, theirs = shake(*rings())
    for from_us, data in records:
        source, target = (ours, theirs) if from_us else (theirs, ours)
        assert target.open(source.seal(data)) == data


def test_a_stream_record_that_is_repeated_reordered_reflected_or_altered_is_refused():
    for spoil in (
        lambda box, one, two: (one, one),
        lambda box, one, two: (two, one),
        lambda box, one, two: (one[:-1] + b"\0",),
        lambda box, one, two: (one[:10],),
        lambda box, one, two: (box.seal(b"own"),),
    ):
        ours, theirs = shake(*rings())
        records = spoil(theirs, ours.seal(b"one"), ours.seal(b"two"))

        def open_all(records=records, theirs=theirs) -> None:
            for record in records:
                theirs.open(record)

        assert reason(open_all) in {"tag", "truncated"}


def test_a_stream_opens_with_any_key_of_the_ring():
    a, b = KeyRing((NEW,), "c"), KeyRing((OLD, NEW), "c")
    ours, theirs = shake(a, b)
    assert theirs.open(ours.seal(b"x")) == b"x"


def test_nothing_is_said_to_a_dialer_without_the_key():
    stranger, b = KeyRing((NEW,), "c"), KeyRing((OLD,), "c")
    accept = b.accept()
    for first in (
        stranger.dial().first_bytes(),
        PlainSeal("c").dial().first_bytes(),
        b"",
        b"x" * HANDSHAKE_BYTES,
    ):
        assert reason(accept.finish, first) in {"tag", "magic"}
    with pytest.raises(AssertionError):
        accept.first_bytes()


def test_the_opening_of_a_stream_is_answered_once():
    a, b = rings()
    first = a.dial().first_bytes()
    b.accept().finish(first)
    assert reason(b.accept().finish, first) == "replayed"
    b.replace((NEW, OLD))
    assert reason(b.accept().finish, first) == "replayed"
    b.accept().finish(a.dial().first_bytes())


def test_a_dialer_is_not_fooled_by_its_own_words_or_a_stranger():
    a, _ = rings()
    dial = a.dial()
    assert reason(dial.finish, dial.first_bytes()) == "tag"
    other = KeyRing((OLD,), "c").accept()
    other.finish(a.dial().first_bytes())
    assert reason(dial.finish, other.first_bytes()) == "tag"


def test_plain_framing_keeps_clusters_apart():
    a, b, other = make_seal((), "c"), make_seal((), "c"), make_seal((), "other")
    assert b.open_datagram(a.seal_datagram(b"x")) == b"x"
    assert reason(b.open_datagram, other.seal_datagram(b"x")) == "cluster"
    assert reason(b.open_datagram, b"garbage") == "magic"
    ours, theirs = shake(a, b)
    assert theirs.open(ours.seal(b"x")) == b"x"
    assert reason(b.accept().finish, other.dial().first_bytes()) == "cluster"
