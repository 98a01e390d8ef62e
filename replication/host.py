"""What a replica runs on.

Decides nothing: it names what a replica needs of the world, so that the same replica runs on an event loop
with threads and sockets, and in the simulator's virtual time. Invariant: everything is called on one thread,
one thing after another, and nothing is called back after the host has stopped.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

from replication.core.change import Commit
from replication.core.links import Dialler
from replication.core.member import Address
from replication.errors import ReplicationError
from replication.store import Store

T = TypeVar("T")


class SpoolError(ReplicationError):
    """A spool that was given more than it may hold."""


class Spool(Protocol):
    """Chunks that wait outside memory; written and read on any thread, by one at a time."""

    def write(self, chunk: bytes, /) -> None:
        """Add a chunk; raises SpoolError when it is too much, OSError."""

    def read(self) -> Iterator[bytes]:
        """Return the chunks from the first on."""

    def close(self) -> None:
        """Let go of what is held."""


class Host(Dialler, Protocol):
    """The world of one replica."""

    def wall_ms(self) -> int:
        """Return what the wall clock shows."""

    def send_datagram(self, to: Address, data: bytes, /) -> None:
        """Send, and forget."""

    def make_spool(self) -> Spool:
        """Return an empty spool; raises OSError."""

    def run(
        self, act: Callable[[Store], T], done: Callable[[T], None], failed: Callable[[Exception], None]
    ) -> None:
        """Run something on the store that makes no commit; then call one of the two.

        Calls run in the order in which they were made.
        """

    def commit(
        self,
        act: Callable[[Store], T],
        commits_of: Callable[[T], Sequence[Commit]],
        done: Callable[[T], None],
        failed: Callable[[Exception], None],
    ) -> None:
        """Like run, for what may commit; commits are handed to the replica before `done` is called."""
