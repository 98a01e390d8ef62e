from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from isthmus import compiled
from proxy.settings import ProxySettings
from proxy.upstream import Upstream

if TYPE_CHECKING:
    from proxy.core.response_head import ResponseHead


class FakeTransport(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.unsent = 0
        self.aborted = False

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def abort(self) -> None:
        self.aborted = True


class FakePool:
    def __init__(self) -> None:
        self.settings = ProxySettings("n1", "ams")
        self.loop = SimpleNamespace(time=lambda: 0.0)
        self.kept: list[Upstream] = []

    def add(self, upstream: Upstream) -> None:
        pass

    def put(self, upstream: Upstream) -> None:
        self.kept.append(upstream)


class FakeExchange:
    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        self.head = SimpleNamespace(method=b"PUT")

    def handle_response(self, head: ResponseHead, body: bytes, *, ended: bool) -> None:
        assert ended
        self.upstream.release()


@pytest.mark.skipif(compiled.is_compiled(), reason="a compiled Upstream takes only what is a Pool")
@pytest.mark.parametrize("unsent", [0, 1])
def test_an_answer_to_what_is_not_yet_sent_ends_the_connection(unsent: int) -> None:
    pool, transport = FakePool(), FakeTransport()
    upstream = Upstream(pool, ("10.0.0.1", 80))
    upstream.connection_made(transport)
    upstream.begin(FakeExchange(upstream))
    transport.unsent = unsent
    upstream.data_received(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    assert transport.aborted is bool(unsent)
    assert len(pool.kept) == 1 - unsent
