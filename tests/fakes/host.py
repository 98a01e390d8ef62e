"""A host whose store answers when the test says so."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

from replication.core.change import Commit
from replication.core.links import Link
from replication.core.member import Address
from replication.store import Store


class ListSpool:
    """A spool in memory."""

    def __init__(self) -> None:
        self.chunks: list[bytes] = []
        self.is_closed = False

    def write(self, chunk: bytes) -> None:
        self.chunks.append(chunk)

    def read(self) -> Iterator[bytes]:
        yield from self.chunks

    def close(self) -> None:
        self.is_closed = True


class FakeHost:
    """Keeps what it is asked for; `step` runs the oldest call of the store, `fire` the oldest timer."""

    def __init__(self, store: object) -> None:
        self.store = cast("Store", store)
        self.calls: deque[Callable[[], None]] = deque()
        self.timers: deque[tuple[float, Callable[[], None]]] = deque()
        self.datagrams: list[tuple[Address, bytes]] = []
        self.dials: list[tuple[Address, bool, Callable[[Link | None], None]]] = []
        self.spools: list[ListSpool] = []
        self.commits: list[Commit] = []
        self.now = 0.0
        self.wall = 1_700_000_000_000

    def now_ms(self) -> float:
        return self.now

    def wall_ms(self) -> int:
        return self.wall

    def call_later(self, delay_ms: float, act: Callable[[], None]) -> None:
        self.timers.append((delay_ms, act))

    def send_datagram(self, to: Address, data: bytes) -> None:
        self.datagrams.append((to, data))

    def dial(self, address: Address, *, lasting: bool, done: Callable[[Link | None], None]) -> None:
        self.dials.append((address, lasting, done))

    def make_spool(self) -> ListSpool:
        self.spools.append(ListSpool())
        return self.spools[-1]

    def run(
        self, act: Callable[[Store], Any], done: Callable[[Any], None], failed: Callable[[Exception], None]
    ) -> None:
        self.commit(act, lambda _: (), done, failed)

    def commit(
        self,
        act: Callable[[Store], Any],
        commits_of: Callable[[Any], Sequence[Commit]],
        done: Callable[[Any], None],
        failed: Callable[[Exception], None],
    ) -> None:
        def call() -> None:
            try:
                result = act(self.store)
            except Exception as error:  # noqa: BLE001 - as a host does
                failed(error)
                return
            self.commits += commits_of(result)
            done(result)

        self.calls.append(call)

    def step(self) -> None:
        """Run the oldest call of the store."""
        self.calls.popleft()()

    def settle(self) -> None:
        """Run all calls of the store, and those that they lead to."""
        while self.calls:
            self.step()

    def fire(self) -> None:
        """Let the oldest timer come up."""
        delay, act = self.timers.popleft()
        self.now += delay
        act()
