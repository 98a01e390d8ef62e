"""What the parts of a node have in common: they start, or refuse to, and stop.

Decides nothing. Knows neither the agent nor workers, nor the processes that they run in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from isthmus.config import Config
    from isthmus.reloading import Lifecycle


class Role(Protocol):
    """What one process of a node does between its start and its stop."""

    async def start(self) -> dict[str, str]:
        """Begin, and return the addresses that it listens on by name. Raises RefusedError."""

    async def adopt(self, config: Config) -> None:
        """Go on with another configuration. Raises RefusedError, and has changed nothing then."""

    def refresh(self) -> None:
        """Look again at the files in use that others write and move; what is wrong with them is logged."""

    async def stop(self) -> None:
        """End gracefully, and soon."""

    async def retire(self) -> None:
        """End as a successor takes over: with all the time that needs, and nobody must notice."""


class Control(Protocol):
    """What an agent may ask of whoever keeps the node's processes."""

    @property
    def lifecycle(self) -> Lifecycle:
        """What became of the last reload and upgrade."""

    async def reload(self) -> Lifecycle:
        """Read the configuration again, in all processes of the node."""

    async def upgrade(self) -> None:
        """Begin to replace all processes by new ones. Raises RefusedError when that cannot be."""


class RefusedError(Exception):
    """The role cannot start or change, and trying again would not help. The message is for the operator."""
