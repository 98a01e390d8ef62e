"""What the parts of a node have in common: they start, or refuse to, and stop.

Decides nothing. Knows neither the agent nor workers, nor the processes that they run in.
"""

from __future__ import annotations

from typing import Protocol


class Role(Protocol):
    """What one process of a node does between its start and its stop."""

    async def start(self) -> dict[str, str]:
        """Begin, and return the addresses that it listens on by name. Raises RefusedError."""

    def reload(self) -> None:
        """Read again what may change while it runs; what is wrong with it is logged, and nothing changes."""

    async def stop(self) -> None:
        """End gracefully."""


class RefusedError(Exception):
    """The role cannot start, and trying again would not help. The message is for the operator."""
