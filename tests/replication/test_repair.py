"""What a replica answers to a peer that asks what it has."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

from replication.core.clock import SiteId
from replication.core.versions import VersionRanges
from replication.core.wire import Frame, Members, SyncOpen, SyncState, decode_frame
from replication.repair import Repair
from replication.store import Store

if TYPE_CHECKING:
    from replication.database import Database
    from replication.transport import Link


def site(number: int) -> SiteId:
    return SiteId(number.to_bytes(16, "big"))


class BusyNode:
    """A database that sees a new site while it is asked for a log's floor, as a thread may at any moment."""

    def __init__(self) -> None:
        self.seen: dict[SiteId, VersionRanges] = {}
        self.see(site(1))

    def see(self, who: SiteId) -> None:
        ranges = VersionRanges()
        ranges.add(1, 5)
        self.seen[who] = ranges

    def log_floor(self, _site: SiteId) -> int:
        self.see(site(len(self.seen) + 1))
        return 3

    async def run(self, act: Callable[[Store], object]) -> object:
        return act(cast("Store", self))


async def never(_: object) -> int:
    raise AssertionError("nothing is applied when a peer asks")


class Peer:
    """A link that records what is sent to the peer."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []

    def send(self, data: bytes) -> bool:
        self.frames.append(decode_frame(data))
        return True

    async def drain(self) -> None:
        pass


async def test_state_is_told_as_it_was_when_asked_for_while_more_comes_in() -> None:
    node, peer = BusyNode(), Peer()
    repair = Repair(
        cast("Database", node),
        site(1),
        Path("/nowhere"),
        seen=lambda: node.seen,
        apply=never,
        apply_snapshot=never,
        members=lambda: Members(()),
        on_peer_ahead=lambda _peer: None,
        timeout_ms=1_000,
        served_max=1,
    )
    repair.handle_request(cast("Link", peer), SyncOpen(7, {}))
    (answering,) = repair._serving  # to wait for it without a clock
    await answering
    assert peer.frames == [Members(()), SyncState(7, {site(1): ((1, 5),)}, {site(1): 3})]
