from __future__ import annotations

import asyncio
import json
import shutil
import socket
import ssl
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from proxy.tls import TlsSettings
from proxy.transports import go_on_reading, hold_reading
from tests.proxy.edge import wait_for
from tests.proxy.tls_edge import TlsEdge

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.fakes.machine import Connection

ALERT_UNRECOGNIZED_NAME = b"\x15\x03\x03\x00\x02\x02\x70"
ALERT_PROTOCOL_VERSION = b"\x15\x03\x03\x00\x02\x02\x46"


@pytest_asyncio.fixture
async def edge(tmp_path: Path) -> AsyncIterator[TlsEdge]:
    edge = TlsEdge(tmp_path)
    edge.write("app.test")
    yield edge
    await edge.stop()


def client_hello(name: str | None) -> bytes:
    context = ssl.create_default_context()
    context.check_hostname = False
    outgoing = ssl.MemoryBIO()
    tls = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


async def test_request_over_tls_reaches_the_machine_and_is_told_as_such(edge: TlsEdge) -> None:
    machine = await edge.machine()
    await edge.start()
    client = await edge.tls_client()
    response = await client.get(b"/a", b"X-Forwarded-Proto: http", b"Fly-Forwarded-SSL: off")
    assert (response.status, response.body) == (200, b"ok")
    (request,) = machine.requests
    port = b"%d" % edge.tls_port
    told = {
        name: request.values(name)
        for name in (b"X-Forwarded-Proto", b"Fly-Forwarded-Proto", b"X-Forwarded-SSL", b"Fly-Forwarded-SSL")
    }
    assert told == dict(zip(told, ([b"https"], [b"https"], [b"on"], [b"on"]), strict=True))
    assert request.values(b"X-Forwarded-Port") == request.values(b"Fly-Forwarded-Port") == [port]
    assert (await client.get()).status == 200  # the connection is kept


async def test_request_without_tls_is_told_as_such(edge: TlsEdge) -> None:
    machine = await edge.machine()
    await edge.start()
    await edge.get(b"/", b"X-Forwarded-Proto: https")
    assert machine.requests[0].values(b"X-Forwarded-Proto") == [b"http"]


async def test_trusted_proxy_that_says_nothing_of_the_scheme_is_told_by_its_own(edge: TlsEdge) -> None:
    machine = await edge.machine()
    await edge.start(trusted_proxies=("127.0.0.0/8",))
    client = await edge.tls_client()
    await client.get(b"/", b"X-Forwarded-For: 192.0.2.1")
    await client.get(b"/", b"X-Forwarded-For: 192.0.2.1", b"X-Forwarded-Proto: http")
    assert [r.values(b"X-Forwarded-Proto") for r in machine.requests] == [[b"https"], [b"http"]]


async def test_large_bodies_pass_both_ways(edge: TlsEdge) -> None:
    async def echo(connection: Connection) -> None:
        request = await connection.read_request()
        head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(request.body)
        connection.writer.write(head + request.body)
        await connection.writer.drain()
        await connection.read()

    await edge.machine(behave=echo)
    await edge.start()
    client = await edge.tls_client()
    body = bytes(range(256)) * 16_384  # 4 MiB: more than all buffers together
    client.send(b"POST / HTTP/1.1\r\nHost: app.test\r\nContent-Length: %d\r\n\r\n" % len(body))
    client.send(body)
    assert (await client.read_response()).body == body


async def test_refused_request_gets_its_answer_although_the_rest_of_it_is_still_coming(edge: TlsEdge) -> None:
    failures: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
    await edge.machine()
    await edge.start()
    client = await edge.tls_client()
    client.send(b"POST / HTTP/1.1\r\nHost: app.test\r\nContent-Length: 1,2\r\n\r\n" + b"x" * 300_000)
    response = await client.read_response()
    assert response.error == "PH02"
    assert await client.read_to_end() == b""
    assert not failures


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_ticket_resumes_a_session_also_when_the_certificate_was_replaced(
    edge: TlsEdge, version: ssl.TLSVersion
) -> None:
    await edge.machine()
    await edge.start()
    context = edge.client_context()
    context.minimum_version = context.maximum_version = version
    session = await asyncio.to_thread(request_with_session, edge.tls_port, context, None)
    edge.write("app.test", days=60)
    edge.certificates.load()
    await asyncio.to_thread(request_with_session, edge.tls_port, context, session)
    shown = version.name.replace("_", ".")
    assert edge.tls_metrics.handshakes == {(shown, False): 1, (shown, True): 1}


def request_with_session(
    port: int, context: ssl.SSLContext, session: ssl.SSLSession | None
) -> ssl.SSLSession | None:
    with (
        socket.create_connection(("127.0.0.1", port), 5) as sock,
        context.wrap_socket(sock, server_hostname="app.test", session=session) as tls,
    ):
        tls.sendall(b"GET / HTTP/1.1\r\nHost: app.test\r\n\r\n")
        assert tls.recv(4_096).startswith(b"HTTP/1.1 200")
        return tls.session


async def test_http_1_1_is_agreed_on(edge: TlsEdge) -> None:
    await edge.start()
    context = edge.client_context()
    context.set_alpn_protocols(["h2", "http/1.1"])
    client = await edge.tls_client(context=context)
    assert client.writer.get_extra_info("ssl_object").selected_alpn_protocol() == "http/1.1"


async def test_versions_below_1_2_are_refused(edge: TlsEdge) -> None:
    await edge.start()
    context = edge.client_context()
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="deprecated"):
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.warns(DeprecationWarning, match="deprecated"):
        context.minimum_version = ssl.TLSVersion.TLSv1
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await edge.tls_client(context=context)
    await wait_for(lambda: edge.tls_metrics.failures == {"version": 1})


@pytest.mark.skipif(shutil.which("openssl") is None, reason="not installed: apt-get install openssl")
async def test_a_handshake_is_not_begun_again(edge: TlsEdge) -> None:
    await edge.machine()
    await edge.start()
    client = await asyncio.create_subprocess_exec(
        *(
            "openssl",
            "s_client",
            "-connect",
            f"127.0.0.1:{edge.tls_port}",
            "-servername",
            "app.test",
            "-tls1_2",
        ),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    assert client.stdin is not None
    assert client.stdout is not None
    async with asyncio.timeout(20):
        await client.stdout.readuntil(b"Verify return code")
        client.stdin.write(b"R\n")  # its command for a renegotiation
        said = await client.stdout.read()
        await client.wait()
    assert b"RENEGOTIATING" in said
    assert b"no renegotiation" in said.lower()


async def test_suites_without_forward_secrecy_are_refused(edge: TlsEdge) -> None:
    await edge.start()
    context = edge.client_context()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("AES128-GCM-SHA256:ECDHE-ECDSA-AES128-SHA")
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await edge.tls_client(context=context)
    await wait_for(lambda: edge.tls_metrics.failures == {"cipher": 1})


@pytest.mark.parametrize(("name", "reason"), [("other.test", "unknown_name"), (None, "no_name")])
async def test_name_without_a_certificate_gets_the_alert_for_it(
    edge: TlsEdge, name: str | None, reason: str
) -> None:
    await edge.start()
    client = await edge.raw_client()
    client.send(client_hello(name))
    assert await client.read_to_end() == ALERT_UNRECOGNIZED_NAME
    assert edge.tls_metrics.failures == {reason: 1}


async def test_exact_name_comes_before_a_wildcard_and_that_before_the_default(edge: TlsEdge) -> None:
    default = edge.write("default.test", file="listed")
    edge.sources = (str(default), str(edge.directory))
    edge.write("*.app.test")
    edge.write("b.app.test", "also.test")
    await edge.start()
    for asked, served in {
        "app.test": {"app.test"},
        "a.app.test": {"*.app.test"},
        "B.app.TEST": {"b.app.test", "also.test"},
        "also.test": {"b.app.test", "also.test"},
        "x.y.app.test": {"default.test"},
        "": {"default.test"},
    }.items():
        assert await edge.served_names(asked) == served, asked


@pytest.mark.parametrize(
    ("name", "host", "trusted", "status"),
    [
        ("app.test", b"app.test:443", (), 200),
        ("app.test", b"APP.test.", (), 200),
        ("app.test", b"also.test", (), 200),
        ("app.test", b"other.test", (), 421),
        ("other.test", b"app.test", (), 421),
        ("app.test", b"other.test", ("127.0.0.0/8",), 200),
        ("unrouted.test", b"app.test", (), 200),
    ],
)
async def test_a_connection_for_one_app_leads_to_no_other(
    edge: TlsEdge, name: str, host: bytes, trusted: tuple[str, ...], status: int
) -> None:
    edge.write("other.test", "unrouted.test")
    app, other = await edge.machine(), await edge.machine("m2", app="other")
    edge.table.apply("hostnames", ("also.test", "/"), ("also.test", "/", "app", ""))
    await edge.start(trusted_proxies=trusted)
    client = await edge.tls_client(name)
    client.send(b"GET / HTTP/1.1\r\nHost: " + host + b"\r\n\r\n")
    response = await client.read_response()
    assert response.status == status
    if status == 421:
        assert (response.error, response.values(b"connection")) == ("PH15", [b"close"])
        assert app.received == other.received == b""


async def test_plain_http_on_the_port_for_tls_is_told_so(edge: TlsEdge) -> None:
    await edge.start()
    client = await edge.raw_client()
    client.send(b"GET / HTTP/1.1\r\nHost: app.test\r\n\r\n")
    response = await client.read_response()
    assert (response.status, response.error) == (400, "PT10")
    assert b"https://" in response.body
    assert await client.read_to_end() == b""
    assert edge.tls_metrics.failures == {"plain_http": 1}


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"\0" * 64, "no_tls"),
        (b"\x16\x03\x01\x00\x05\x02\x00\x00\x01\x00", "malformed"),
        (b"\x16\x03\x01\x40\x01", "malformed"),
        (b"\x16\x03\x01\x40\x00\x01\x00\xff\xff" + b"\0" * 20_000, "malformed"),
    ],
)
async def test_what_is_no_client_hello_is_closed_at_once(edge: TlsEdge, sent: bytes, reason: str) -> None:
    await edge.start()
    client = await edge.raw_client()
    client.send(sent)
    assert (await client.read_to_end())[:1] in {b"", b"\x15"}
    await wait_for(lambda: edge.tls_metrics.failures == {reason: 1})


async def test_first_message_may_come_byte_by_byte(edge: TlsEdge) -> None:
    await edge.start()
    client = await edge.raw_client()
    client.writer.transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    hello = client_hello("app.test")
    for at in range(len(hello)):
        client.send(hello[at : at + 1])
        await asyncio.sleep(0)
    assert (await client.read(3)) == b"\x16\x03\x03"  # ServerHello


@pytest.mark.parametrize("sent", [0, 1, 40, None])
async def test_handshake_that_does_not_go_on_is_cut_in_time(edge: TlsEdge, sent: int | None) -> None:
    edge.tls = TlsSettings(handshake_timeout_s=0.05)
    await edge.start()
    client = await edge.raw_client()
    client.send(client_hello("app.test")[:sent])
    await client.read_to_end()
    await wait_for(lambda: edge.tls_metrics.pending == 0)
    assert edge.tls_metrics.failures == {"timeout": 1}


@pytest.mark.parametrize("sent", [0, 40, None])
async def test_client_that_leaves_within_the_handshake_is_forgotten(edge: TlsEdge, sent: int | None) -> None:
    await edge.start()
    client = await edge.raw_client()
    client.send(client_hello("app.test")[:sent])
    client.writer.write_eof()
    await client.read_to_end()
    await wait_for(lambda: edge.tls_metrics.pending == 0)
    assert edge.tls_metrics.failures == {"closed": 1}


async def test_one_client_has_a_share_of_the_pending_handshakes(edge: TlsEdge) -> None:
    edge.tls = TlsSettings(handshakes_max=16)
    await edge.start()
    clients = [await edge.raw_client() for _ in range(3)]
    assert await clients[2].read_to_end() == b""
    assert edge.tls_metrics.failures == {"client_limit": 1}
    clients[0].send(client_hello("app.test"))
    assert await clients[0].read(1) == b"\x16"


@pytest.mark.parametrize("trusted", [(), ("127.0.0.0/8",)])
async def test_handshakes_beyond_a_clients_rate_are_not_begun(
    edge: TlsEdge, trusted: tuple[str, ...]
) -> None:
    await edge.machine()
    await edge.start(handshakes_per_client_per_s=1, trusted_proxies=trusted)
    for _ in range(4):
        assert (await (await edge.tls_client()).get()).status == 200
    client = await edge.raw_client()
    client.send(client_hello("app.test"))
    first = await client.reader.read(1) if trusted else await client.read_to_end()
    assert first == (b"\x16" if trusted else b"")
    assert edge.tls_metrics.failures == ({} if trusted else {"client_rate": 1})
    assert edge.metrics.shed == ({} if trusted else {"client_rate": 1})


async def test_newcomer_takes_the_place_of_the_oldest_pending_handshake(edge: TlsEdge) -> None:
    edge.tls = TlsSettings(handshakes_max=1)
    await edge.start()
    oldest = await edge.raw_client()
    await wait_for(lambda: edge.tls_metrics.pending == 1)
    # From another address, lest it is the client's own limit.
    reader, writer = await asyncio.open_connection("127.0.0.1", edge.tls_port, local_addr=("127.0.0.2", 0))
    assert await oldest.read_to_end() == b""
    writer.write(client_hello("app.test"))
    assert await reader.read(1) == b"\x16"
    writer.transport.abort()
    assert edge.tls_metrics.failures == {"limit": 1}


async def test_idle_connection_is_closed_with_a_notice(edge: TlsEdge) -> None:
    await edge.start(keepalive_timeout_s=0.05, head_timeout_s=0.05)
    client = await edge.tls_client()
    assert await client.read_to_end() == b""


async def test_client_that_leaves_within_an_answer_ends_the_exchange_at_once(
    edge: TlsEdge, caplog: pytest.LogCaptureFixture
) -> None:
    async def endless(connection: Connection) -> None:
        await connection.read_request()
        connection.writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 999999999\r\n\r\n")
        while True:
            connection.writer.write(b"x" * 65_536)
            await connection.writer.drain()

    await edge.machine(behave=endless)
    await edge.start(linger_s=60.0)
    client = await edge.tls_client()
    client.send(b"GET / HTTP/1.1\r\nHost: app.test\r\n\r\n")
    await client.read(100_000)
    client.writer.close()
    await wait_for(lambda: edge.metrics.aborted["client"] == 1)
    assert not caplog.records  # uvloop warns of what is written to nobody


async def test_client_that_has_not_read_its_last_answer_has_the_time_of_slow_ones(edge: TlsEdge) -> None:
    await edge.machine()
    await edge.start(linger_s=0.05)
    client = await edge.tls_client()
    hold_reading(client.writer.transport)
    client.send(b"GET / HTTP/1.1\r\nHost: app.test\r\nConnection: close\r\n\r\n")
    await wait_for(lambda: edge.metrics.app("app").bytes_out == 2)
    await asyncio.sleep(0.2)
    assert edge.metrics.connections_open == 1
    go_on_reading(client.writer.transport)
    assert (await client.read_to_end()).endswith(b"ok")


async def test_drain_lets_the_request_in_flight_finish(edge: TlsEdge) -> None:
    release = asyncio.Event()

    async def slow(connection: Connection) -> None:
        await connection.read_request()
        await release.wait()
        connection.writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    machine = await edge.machine(behave=slow)
    await edge.start()
    client = await edge.tls_client()
    client.send(b"GET / HTTP/1.1\r\nHost: app.test\r\n\r\n")
    await wait_for(lambda: bool(machine.connections))
    draining = asyncio.create_task(edge.server.drain(5))
    await wait_for(lambda: edge.server._plane.draining)
    with pytest.raises(ConnectionRefusedError):
        await edge.raw_client()
    release.set()
    response = await client.read_response()
    assert (response.body, response.values(b"connection")) == (b"ok", [b"close"])
    assert await draining


async def test_websocket_over_tls(edge: TlsEdge) -> None:
    async def upgrade(connection: Connection) -> None:
        await connection.read_request()
        connection.writer.write(
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nhello"
        )
        assert await connection.read() == b"frame"
        connection.writer.write(b"answer")
        await connection.read()

    await edge.machine(behave=upgrade)
    await edge.start()
    client = await edge.tls_client()
    assert (await client.get(b"/", b"Connection: Upgrade", b"Upgrade: websocket")).status == 101
    client.send(b"frame")
    assert await client.read(11) == b"helloanswer"


async def raw_answer(edge: TlsEdge, version: ssl.TLSVersion, name: str = "app.test") -> bytes:
    """What a client that speaks this version alone gets for its first message."""
    context = edge.client_context()
    context.minimum_version = context.maximum_version = version
    outgoing = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name).do_handshake()
    client = await edge.raw_client()
    client.send(outgoing.read())
    return await client.read_to_end()


@pytest.mark.parametrize(
    ("allowed", "refused"),
    [("TLSv1.3", ssl.TLSVersion.TLSv1_2), ("TLSv1.2", ssl.TLSVersion.TLSv1_3)],
)
async def test_client_of_a_version_that_the_app_does_not_allow_is_refused_before_a_certificate(
    edge: TlsEdge, allowed: str, refused: ssl.TLSVersion
) -> None:
    edge.put_app("app", "app.test", options=json.dumps({"tls_versions": [allowed]}))
    edge.write("other.test")
    edge.put_app("other", "other.test")
    machine = await edge.machine()
    await edge.machine("other-1", "other")
    await edge.start()
    context = edge.client_context()
    context.minimum_version = context.maximum_version = refused
    with pytest.raises(ssl.SSLError, match="TLSV1_ALERT_PROTOCOL_VERSION"):
        await edge.tls_client(context=context)
    assert await raw_answer(edge, refused) == ALERT_PROTOCOL_VERSION, "nothing but the alert"
    assert edge.tls_metrics.failures == {"version": 2}
    assert not machine.connections
    served = await edge.tls_client("other.test", context)
    served.send(b"GET / HTTP/1.1\r\nHost: other.test\r\n\r\n")
    assert (await served.read_response()).status == 200
    # Who speaks both is served in the one that is allowed.
    client = await edge.tls_client()
    assert client.writer.get_extra_info("ssl_object").version() == allowed
    assert (await client.get()).status == 200


async def test_versions_of_an_app_change_with_its_row(edge: TlsEdge) -> None:
    await edge.machine()
    await edge.start()
    context = edge.client_context()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    assert (await (await edge.tls_client(context=context)).get()).status == 200
    edge.put_app("app", "app.test", options='{"tls_versions": ["TLSv1.3"]}')
    with pytest.raises(ssl.SSLError, match="TLSV1_ALERT_PROTOCOL_VERSION"):
        await edge.tls_client(context=context)
    edge.put_app("app", "app.test", options="{}")
    assert (await (await edge.tls_client(context=context)).get()).status == 200


async def test_name_of_another_app_is_no_way_around_the_versions(edge: TlsEdge) -> None:
    edge.put_app("strict", "strict.test", options='{"tls_versions": ["TLSv1.3"]}')
    machine = await edge.machine("strict-1", "strict")
    await edge.machine()
    await edge.start()
    context = edge.client_context()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    client = await edge.tls_client(context=context)
    client.send(b"GET / HTTP/1.1\r\nHost: strict.test\r\n\r\n")
    assert (await client.read_response()).error == "PH15"
    assert not machine.connections


@pytest.mark.parametrize(
    ("name", "asked", "spoken", "status"),
    [
        ("", b"strict.test/", ssl.TLSVersion.TLSv1_2, 421),
        ("", b"strict.test/", ssl.TLSVersion.TLSv1_3, 200),
        ("unrouted.test", b"strict.test/", ssl.TLSVersion.TLSv1_2, 421),
        ("app.test", b"app.test/strict/", ssl.TLSVersion.TLSv1_2, 421),
        ("app.test", b"app.test/strict/", ssl.TLSVersion.TLSv1_3, 200),
    ],
)
async def test_app_that_the_handshake_does_not_name_is_asked_in_its_versions_only(
    edge: TlsEdge, name: str, asked: bytes, spoken: ssl.TLSVersion, status: int
) -> None:
    edge.sources = (str(edge.write("unrouted.test", file="default")), str(edge.directory))
    edge.put_app("strict", "strict.test", options='{"tls_versions": ["TLSv1.3"]}')
    edge.table.apply("hostnames", ("app.test", "/strict"), ("app.test", "/strict", "strict", ""))
    machine = await edge.machine("strict-1", "strict")
    await edge.machine()
    await edge.start()
    context = edge.client_context()
    context.minimum_version = context.maximum_version = spoken
    client = await edge.tls_client(name, context)
    client.send(b"GET http://%s HTTP/1.1\r\nHost: strict.test\r\n\r\n" % asked)
    assert (await client.read_response()).status == status
    assert bool(machine.connections) == (status == 200)
