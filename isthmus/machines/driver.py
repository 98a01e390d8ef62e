"""What the keeper of machines needs of whatever starts and stops them.

Decides nothing. Refuses to know what is behind a machine. Invariant: a driver that fails raises DriverError,
with a sentence for the operator.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol


class DriverError(Exception):
    """The driver could not do it."""


class Machine(NamedTuple):
    """The machine that is meant."""

    id: str
    app: str
    region: str
    host: str
    port: int | None
    release: str = ""  # what its next start is to run; empty: whatever it has


class Made(NamedTuple):
    """A machine that a driver has made."""

    id: str
    address: str


class Driver(Protocol):
    """Starts and stops machines. Each method may be called again for what is done already."""

    poll_s: float  # how often it is asked whether a machine runs

    async def start(self, machine: Machine) -> None:
        """Start it, or have it go on; it need not answer requests yet. Raises DriverError."""

    async def stop(self, machine: Machine) -> None:
        """Stop it; has ended when this returns, as far as the driver can know. Raises DriverError."""

    async def suspend(self, machine: Machine) -> bool:
        """Have it sleep with all that it has in memory; False when it was stopped in place of that."""

    async def is_running(self, machine: Machine) -> bool | None:
        """Tell whether it runs; None when the driver cannot know. Raises DriverError."""

    async def create(self, like: Machine, region: str) -> Made:
        """Make one more machine of an app, like one that it has; it need not run yet. Raises DriverError."""

    def explain_end(self, machine: Machine) -> tuple[str, bool]:
        """Tell, of a machine that does not run any more by itself, why, and whether to start it again."""
