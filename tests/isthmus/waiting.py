"""Wait for a condition, with a deadline."""

from __future__ import annotations

import asyncio
from inspect import isawaitable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

# Generous: the machines that run this are shared. A wait ends as soon as its condition holds.
DEADLINE_S = 20.0


async def eventually(what: str, condition: Callable[[], Any]) -> Any:
    """Return the first true value of the condition, which may be a coroutine function."""
    deadline = asyncio.get_running_loop().time() + DEADLINE_S
    while True:
        value = condition()
        if isawaitable(value):
            value = await value
        if value:
            return value
        assert asyncio.get_running_loop().time() < deadline, f"waited {DEADLINE_S} s in vain: {what}"
        await asyncio.sleep(0.005)
