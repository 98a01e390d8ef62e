from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from tests.proxy.tls_edge import TlsEdge

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@pytest_asyncio.fixture
async def edge(tmp_path: Path) -> AsyncIterator[TlsEdge]:
    edge = TlsEdge(tmp_path)
    edge.write("app.test")
    edge.put_app("app", "app.test", options='{"force_https": true}')
    await edge.machine()
    yield edge
    await edge.stop()


@pytest.mark.parametrize(
    ("line", "host", "status", "place"),
    [
        (b"GET /a?b=c", b"app.test", 301, b"/a?b=c"),
        (b"HEAD /", b"app.test:8080", 301, b"/"),
        (b"POST /form", b"App.Test", 308, b"/form"),
        (b"GET //evil.test/", b"app.test", 301, b"//evil.test/"),
        (b"OPTIONS *", b"app.test", 308, b"/"),
        (b"GET http://app.test/x", b"ignored.test", 301, b"/x"),
    ],
)
async def test_request_without_tls_is_sent_to_the_same_place_over_it(
    edge: TlsEdge, line: bytes, host: bytes, status: int, place: bytes
) -> None:
    await edge.start()
    client = await edge.client()
    client.send(b"%b HTTP/1.1\r\nHost: %b\r\n\r\n" % (line, host))
    response = await client.read_response()
    name = host.partition(b":")[0] if b"http:" not in line else b"app.test"
    assert response.status == status
    assert response.values(b"location") == [b"https://%b:%d%b" % (name, edge.tls_port, place)]
    assert not edge.machines[0].requests


async def test_port_443_is_not_named(edge: TlsEdge) -> None:
    await edge.start()
    await edge.server.close()
    await edge.server.start()
    assert (await edge.get(b"/x")).values(b"location") == [b"https://app.test/x"]


async def test_redirect_keeps_the_connection_unless_a_body_follows(edge: TlsEdge) -> None:
    await edge.start()
    client = await edge.client()
    assert not (await client.get()).values(b"connection")
    client.send(b"POST / HTTP/1.1\r\nHost: app.test\r\nContent-Length: 3\r\n\r\nabc")
    assert (await client.read_response()).values(b"connection") == [b"close"]
    assert await client.read_to_end() == b""


async def test_request_over_tls_is_served(edge: TlsEdge) -> None:
    await edge.start()
    assert (await (await edge.tls_client()).get()).status == 200


async def test_trusted_proxy_that_had_tls_is_served_and_another_is_not_believed(edge: TlsEdge) -> None:
    said = b"X-Forwarded-Proto: https"
    await edge.start()
    assert (await edge.get(b"/", said)).status == 301
    await edge.server.close()
    await edge.start(trusted_proxies=("127.0.0.0/8",))
    assert (await edge.get(b"/", said)).status == 200
    assert (await edge.get(b"/", b"X-Forwarded-Proto: http")).status == 301
