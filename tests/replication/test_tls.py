"""Mutual TLS on streams: whose certificate opens a stream, and what happens when the files change."""

import asyncio
import contextlib
import os
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from replication.errors import ReplicationError
from replication.seal import HANDSHAKE_BYTES, make_seal
from replication.tls import StreamTls, TlsError, TlsFiles
from replication.transport import LinkError, Transport
from tests.fakes.certificates import Authority
from tests.replication.test_agent import eventually
from tests.replication.test_transport import KEY, Node

Start = Callable[..., "asyncio.Future[TlsNode]"]


class TlsNode(Node):
    def __init__(self, number: int, files: TlsFiles | None, *, keys: tuple[bytes, ...] = (KEY,)) -> None:
        super().__init__(number)
        self.tls = files and StreamTls(files)
        self.transport = Transport(
            ("127.0.0.1", 0),
            make_seal(keys, "c"),
            self.hello,
            self.handler,
            handshake_timeout_s=0.5,
            tls=self.tls,
        )


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    started: list[TlsNode] = []

    async def make(*args, **kwargs) -> TlsNode:
        started.append(TlsNode(len(started) + 1, *args, **kwargs))
        await started[-1].start()
        return started[-1]

    yield make
    for node in started:
        await node.transport.stop()


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.mark.parametrize("keys", [(KEY,), ()], ids=["sealed", "plain"])
async def test_frames_of_any_size_go_both_ways_inside_tls(start, authority, keys):
    a, b = await start(authority.issue("a"), keys=keys), await start(authority.issue("b"), keys=keys)
    link = await a.transport.connect(b.transport.address, lasting=True)
    frames = [b"x", os.urandom(3 * 1024 * 1024), b"y"]
    for frame in frames:
        assert link.send(frame)
    await eventually(lambda: b.handler.frames == frames)
    assert b.handler.links[0].send(b"back")
    await eventually(lambda: a.handler.frames == [b"back"])
    assert link._writer.get_extra_info("ssl_object").version() == "TLSv1.3"


@pytest.mark.parametrize("other", ["none", "foreign", "stranger", "expired", "without"])
async def test_who_has_no_valid_certificate_of_the_authority_is_refused_both_ways(
    start, authority, tmp_path, other
):
    files = {
        "none": None,
        "foreign": replace(Authority(tmp_path, "foreign").issue("f"), ca=authority.file),
        "stranger": Authority(tmp_path, "another").issue("s"),
        "expired": authority.issue("e", days=0),
        "without": authority.issue("w"),
    }[other]
    member, stranger = await start(authority.issue("a")), await start(files)
    if other == "without":  # one that wants TLS but shows nothing
        stranger.tls.client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        stranger.tls.client.check_hostname = False
        stranger.tls.client.load_verify_locations(authority.file)
    else:
        with pytest.raises((OSError, ReplicationError)):
            await member.transport.connect(stranger.transport.address, lasting=True)
    with pytest.raises((OSError, ReplicationError)):
        await stranger.transport.connect(member.transport.address, lasting=True)
    await eventually(lambda: sum(member.transport.dropped.values()) == 1)
    # A stranger that does not trust us hangs up before it is refused, with an alert or without.
    reasons = {"tls", "io"} if other == "stranger" else {"tls"}
    assert {reason for _, reason in member.transport.dropped} <= reasons
    assert member.handler.events == stranger.handler.events == []


async def test_a_certificate_does_not_replace_the_key(start, authority):
    a = await start(authority.issue("a"))
    b = await start(authority.issue("b"), keys=(b"?" * 32,))
    with pytest.raises(LinkError, match="refused"):
        await b.transport.connect(a.transport.address, lasting=True)
    assert a.transport.dropped == {("stream", "tag"): 1}


async def test_a_handshake_that_never_begins_or_ends_is_given_up(start, authority):
    a = await start(authority.issue("a"))
    client = StreamTls(authority.issue("c")).client
    silent_reader, silent = await asyncio.open_connection(*a.transport.address)
    half_reader, half = await asyncio.open_connection(*a.transport.address)
    half.write(b"\x16\x03\x01\x02\x00\x01")  # the beginning of a ClientHello
    tls_reader, tls = await asyncio.open_connection(*a.transport.address, ssl=client)
    for reader in (silent_reader, half_reader, tls_reader):
        with contextlib.suppress(OSError):
            assert await asyncio.wait_for(reader.read(), 5) == b""
    assert a.transport.dropped == {("stream", "timeout"): 3}
    assert len(a.transport._lobby) == 0
    for writer in (silent, half, tls):
        writer.transport.abort()


async def test_plain_bytes_to_a_port_with_tls_are_refused_without_an_answer_in_our_protocol(start, authority):
    a = await start(authority.issue("a"))
    reader, writer = await asyncio.open_connection(*a.transport.address)
    writer.write(make_seal((KEY,), "c").dial().first_bytes())
    with contextlib.suppress(OSError):
        assert len(await reader.read()) < HANDSHAKE_BYTES  # an alert of TLS at most
    writer.close()
    assert a.transport.dropped == {("stream", "tls"): 1}


async def test_a_renewed_certificate_is_shown_on_new_streams_and_open_ones_stay(start, authority):
    files = authority.issue("a")
    a, b = await start(files), await start(authority.issue("b"))
    link = await b.transport.connect(a.transport.address, lasting=True)
    old = link._writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    authority.issue("a")
    a.tls.reload()
    again = await b.transport.connect(a.transport.address, lasting=True)
    assert again._writer.get_extra_info("ssl_object").getpeercert(binary_form=True) != old
    assert link.send(b"still here")
    await eventually(lambda: a.handler.frames == [b"still here"])


async def test_streams_are_made_anew_when_the_authority_changes(start, authority, tmp_path):
    other = Authority(tmp_path, "other")
    a, b = await start(authority.issue("a")), await start(authority.issue("b"))
    both = authority.pem + other.pem
    link = await a.transport.connect(b.transport.address, lasting=True)
    authority.file.write_bytes(both)
    b.tls.reload()
    await asyncio.wait_for(link.closed.wait(), 5)
    assert b.transport.counters["links_revoked"] == 1
    link = await a.transport.connect(b.transport.address, lasting=True)
    authority.file.write_bytes(other.pem)
    b.tls.reload()  # its own certificate is of the old one still, as is a's
    await asyncio.wait_for(link.closed.wait(), 5)
    with pytest.raises((OSError, ReplicationError)):
        await a.transport.connect(b.transport.address, lasting=True)
    await eventually(lambda: b.transport.dropped == {("stream", "tls"): 1})


@pytest.mark.parametrize("bad", ["cert", "key", "ca", "mixed", "missing"])
def test_files_that_do_not_fit_are_refused_and_the_last_good_ones_stay(authority, tmp_path, bad):
    files = authority.issue("a")
    tls = StreamTls(files)
    server, client = tls.server, tls.client
    if bad == "missing":
        files.ca.unlink()
    elif bad == "mixed":
        files.key.write_bytes(authority.issue("b").key.read_bytes())
    else:
        getattr(files, bad).write_bytes(b"garbage \xff")
    with pytest.raises(TlsError, match=r"a\.crt"):
        tls.reload()
    assert (tls.server, tls.client) == (server, client)
    with pytest.raises(TlsError):
        StreamTls(files)
