from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
import uvloop

from tests.proxy.edge import Edge

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping


# Workers run on uvloop, whose transports differ from asyncio's in when they write and pause.
@pytest.hookimpl(optionalhook=True)
def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], uvloop.Loop]]:
    return {"uvloop": uvloop.new_event_loop}


@pytest_asyncio.fixture
async def edge() -> AsyncIterator[Edge]:
    edge = Edge()
    yield edge
    await edge.stop()
