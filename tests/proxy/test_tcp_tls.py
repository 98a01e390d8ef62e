"""TLS on ports for raw TCP, TLS passed on by the name that is asked for, and PROXY headers before TLS."""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from proxy.core.proxy_protocol import render_announcement
from tests.fakes.client import RawClient
from tests.proxy.edge import wait_for
from tests.proxy.tcp_edge import TcpEdge, echo
from tests.proxy.test_tcp import LARGE
from tests.proxy.test_tls import ALERT_UNRECOGNIZED_NAME, client_hello

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.fakes.machine import FakeMachine

V1 = b"PROXY TCP4 192.0.2.7 198.51.100.1 4711 443\r\n"


@pytest_asyncio.fixture
async def edge(tmp_path: Path) -> AsyncIterator[TcpEdge]:
    edge = TcpEdge(tmp_path / "ours")
    edge.directory.mkdir()
    edge.write("app.test", "raw.test")
    yield edge
    await edge.stop()


async def tls_machine(edge: TcpEdge, directory: Path, app: str, name: str) -> FakeMachine:
    """A machine that ends TLS itself, with a certificate of its own, and echoes."""
    path = edge.authority.write(directory, name)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path, path.with_suffix(".key"))
    return await edge.machine(f"{app}-1", app, behave=echo, context=context)


async def serial(client: RawClient) -> str:
    return client.writer.get_extra_info("peercert")["serialNumber"]


async def test_hosts_of_all_three_kinds_share_a_port(edge: TcpEdge, tmp_path: Path) -> None:
    edge.put_raw("through", "through.test")
    edge.put_raw("raw", "raw.test", handlers=("tls",))
    through = await tls_machine(edge, tmp_path, "through", "through.test")
    raw = await edge.machine("raw-1", "raw", behave=echo)
    http = await edge.machine("app-1", "app")
    await edge.start()
    for _ in range(2):
        client = await edge.tls_client("through.test")
        client.send(LARGE)
        assert await client.read(len(LARGE)) == LARGE
        assert through.connections[-1].writer.get_extra_info("ssl_object") is not None
        client = await edge.tls_client("raw.test")
        client.send(LARGE)
        assert await client.read(len(LARGE)) == LARGE
        assert raw.connections[-1].received == LARGE
        assert (await (await edge.tls_client("app.test")).get()).status == 200
    assert len(http.requests) == 2
    # What is passed on is shown to nobody here: two handshakes for each of the others.
    assert sum(edge.tls_metrics.handshakes.values()) == 4


async def test_certificate_of_a_name_that_is_passed_on_is_the_machines(edge: TcpEdge, tmp_path: Path) -> None:
    edge.write("through.test")  # one that we have, and do not use
    edge.put_raw("through", "*.through.test")
    edge.table.apply("hostnames", ("through.test", "/"), ("through.test", "/", "through", ""))
    await tls_machine(edge, tmp_path, "through", "a.through.test")
    await edge.start()
    assert await edge.served_names("through.test") == {"a.through.test"}
    assert await edge.served_names("b.through.test") == {"a.through.test"}


async def test_first_message_reaches_the_machine_byte_for_byte(edge: TcpEdge) -> None:
    edge.put_raw("app", "app.test")
    machine = await edge.echo_machine()
    await edge.start()
    hello = client_hello("app.test")
    client = await edge.raw_client()
    for at in range(0, len(hello), 100):
        client.send(hello[at : at + 100])
        await asyncio.sleep(0)
    client.send(b"and more")
    assert await client.read(len(hello) + 8) == hello + b"and more"
    assert machine.received == hello + b"and more"


@pytest.mark.parametrize("name", ["unknown.test", None])
async def test_name_of_no_app_falls_to_the_usual_path(edge: TcpEdge, name: str | None) -> None:
    edge.put_raw("app", "app.test")
    machine = await edge.echo_machine()
    await edge.start()
    client = await edge.raw_client()
    client.send(client_hello(name))
    assert await client.read_to_end() == ALERT_UNRECOGNIZED_NAME
    assert not machine.connections


async def test_app_of_a_certificate_is_not_served_as_http_when_it_is_raw(edge: TcpEdge) -> None:
    edge.put_raw("raw", "raw.test")
    machine = await edge.machine("raw-1", "raw", behave=echo)
    await edge.start()
    client = await edge.tls_client("app.test")
    client.send(b"GET / HTTP/1.1\r\nHost: raw.test\r\n\r\n")
    assert (await client.read_response()).error == "PH13"
    assert not machine.connections


async def test_tls_ends_on_a_port_of_an_app_that_says_so(edge: TcpEdge) -> None:
    edge.put_raw("app", handlers=("tls",))
    machine = await edge.echo_machine()
    await edge.start()
    edge.tls_port = edge.listen()
    client = await edge.tls_client("app.test")
    client.send(b"in the clear")
    assert await client.read(12) == b"in the clear"
    assert machine.received == b"in the clear"
    client.writer.close()
    await wait_for(lambda: machine.connections[0].closed)
    await wait_for(lambda: not edge.relays)


@pytest.mark.parametrize("where", ["its port", "its name"])
async def test_raw_app_has_its_own_versions_too(edge: TcpEdge, where: str) -> None:
    edge.put_raw("app", handlers=("tls",), tls_versions=["TLSv1.3"])
    machine = await edge.echo_machine()
    await edge.start()
    if where == "its port":
        edge.tls_port = edge.listen()
    context = edge.client_context()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError, match="TLSV1_ALERT_PROTOCOL_VERSION"):
        await edge.tls_client(context=context)
    assert not machine.connections
    client = await edge.tls_client()
    client.send(b"in the clear")
    assert await client.read(12) == b"in the clear"


async def test_versions_do_not_matter_where_tls_is_passed_on(edge: TcpEdge, tmp_path: Path) -> None:
    edge.put_raw("app", tls_versions=["TLSv1.3"])
    machine = await tls_machine(edge, tmp_path, "app", "app.test")
    await edge.start()
    context = edge.client_context()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    client = await edge.tls_client(context=context)
    client.send(b"hello")
    assert await client.read(5) == b"hello"
    assert machine.received == b"hello"


async def test_machines_end_is_that_of_a_client_with_tls(edge: TcpEdge) -> None:
    async def behave(connection: object) -> None:
        connection.writer.write(LARGE)

    edge.put_raw("app", handlers=("tls",))
    await edge.echo_machine(behave=behave)
    await edge.start()
    edge.tls_port = edge.listen()
    client = await edge.tls_client("app.test")
    assert await client.read_to_end() == LARGE
    client.close()
    await wait_for(lambda: not edge.relays)


async def test_without_certificates_no_tls_ends_here(edge: TcpEdge) -> None:
    edge.put_raw("app", handlers=("tls",))
    machine = await edge.echo_machine()
    await edge.start()
    client = await edge.tcp_client(edge.listen(certificates=False))
    client.send(client_hello("app.test"))
    assert await client.read_to_end() == ALERT_UNRECOGNIZED_NAME
    assert not machine.connections


async def test_machines_may_have_tls_of_their_own(edge: TcpEdge, tmp_path: Path) -> None:
    edge.put_raw("app", machine_tls={"ca": edge.authority.pem, "server_name": "m.test"})
    machine = await tls_machine(edge, tmp_path, "app", "m.test")
    await edge.start()
    client = await edge.tcp_client(edge.listen())
    client.send(b"sealed on its way")
    assert await client.read(17) == b"sealed on its way"
    assert machine.received == b"sealed on its way"
    client.writer.write_eof()
    assert await client.read_to_end() == b""
    await wait_for(lambda: not edge.relays)


@pytest.mark.parametrize("cut", [0, 1, 20, len(V1)])
async def test_announced_client_comes_before_the_handshake(edge: TcpEdge, cut: int) -> None:
    machine = await edge.machine()
    await edge.start(proxy_protocol_from=("127.0.0.0/8",))
    reader, writer = await asyncio.open_connection("127.0.0.1", edge.tls_port)
    writer.write(V1[:cut])
    await writer.drain()
    await wait_for(lambda: edge.tls_metrics.pending == 1)
    writer.write(V1[cut:])
    await writer.start_tls(edge.client_context(), server_hostname="app.test")
    client = RawClient(reader, writer)
    edge.clients.append(client)
    assert (await client.get(b"/", b"X-Forwarded-For: 203.0.113.9")).status == 200
    (request,) = machine.requests
    assert request.values(b"fly-client-ip") == request.values(b"x-forwarded-for") == [b"192.0.2.7"]
    assert request.values(b"x-forwarded-proto") == [b"https"]


async def test_announced_client_is_told_to_a_machine_that_ends_tls(edge: TcpEdge) -> None:
    edge.put_raw("app", "app.test", proxy_protocol="v2")
    machine = await edge.echo_machine()
    await edge.start(proxy_protocol_from=("127.0.0.0/8",))
    client = await edge.raw_client()
    hello = client_hello("app.test")
    client.send(V1 + hello)
    told = render_announcement("v2", ("192.0.2.7", 4711), ("198.51.100.1", 443)) + hello
    assert await client.read(len(told)) == told
    assert machine.received == told


@pytest.mark.parametrize("first", [client_hello("app.test"), V1[:-2] + b"x\r\n", b"PROXY TCP4 x\r\n"])
async def test_announcer_that_announces_nothing_gets_no_handshake(edge: TcpEdge, first: bytes) -> None:
    await edge.start(proxy_protocol_from=("127.0.0.0/8",))
    client = await edge.raw_client()
    client.send(first)
    assert await client.read_to_end() == b""
    assert edge.metrics.bad_announcements == 1
    assert edge.tls_metrics.failures == {"announcement": 1}


async def test_header_that_does_not_come_is_not_waited_for(edge: TcpEdge) -> None:
    edge.tls = edge.tls.__class__(handshake_timeout_s=0.05)
    await edge.start(proxy_protocol_from=("127.0.0.0/8",))
    client = await edge.raw_client()
    client.send(V1[:10])
    assert await client.read_to_end() == b""
    assert edge.metrics.bad_announcements == 1
    assert edge.tls_metrics.failures == {"timeout": 1}


async def test_who_may_not_announce_is_told_that_this_is_no_tls(edge: TcpEdge) -> None:
    await edge.start(proxy_protocol_from=("10.0.0.0/8",))
    client = await edge.raw_client()
    client.send(V1 + client_hello("app.test"))
    assert (await client.read_response()).error == "PT10"


async def test_each_announced_client_has_its_own_limits(edge: TcpEdge) -> None:
    await edge.machine()
    await edge.start(proxy_protocol_from=("127.0.0.0/8",), handshakes_per_client_per_s=1)
    for last, served in ((7, 4), (8, 4), (7, 0)):
        header = V1.replace(b"2.7", b"2.%d" % last)
        for _ in range(served or 1):
            client = await edge.raw_client()
            client.send(header + client_hello("app.test"))
            first = await client.reader.read(1)
            assert first == (b"\x16" if served else b"")
    assert edge.tls_metrics.failures["client_rate"] == 1
    assert edge.metrics.shed == {"client_rate": 1}
