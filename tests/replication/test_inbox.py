"""Whose changesets are applied next, and whose are dropped."""

from replication.core.change import EncodedChangeset
from replication.core.clock import SiteId
from replication.core.inbox import TURN_CHANGESETS, Inbox

LOUD, QUIET, NEW = (SiteId(bytes([number]) * 16) for number in (1, 2, 3))


def make(site: SiteId, version: int, size: int = 10) -> EncodedChangeset:
    return EncodedChangeset(site, version, b"x" * size)


def test_origins_take_turns_and_keep_their_order() -> None:
    inbox = Inbox(1_000_000)
    for version in range(1, 3 * TURN_CHANGESETS + 1):
        assert inbox.add(make(LOUD, version))
    assert inbox.add(make(QUIET, 1))
    batch = inbox.take(2 * TURN_CHANGESETS, 1_000_000)
    assert [item.version for item in batch if item.site == LOUD] == list(range(1, 2 * TURN_CHANGESETS))
    assert batch[TURN_CHANGESETS].site == QUIET, "it does not wait for all that was there before"
    assert len(inbox) == 3 * TURN_CHANGESETS + 1 - len(batch)


def test_a_flood_leaves_room_for_others() -> None:
    inbox = Inbox(1_000)
    version = 0
    while inbox.add(make(LOUD, version + 1)):
        version += 1
    assert inbox.bytes <= 1_010
    taken = inbox.take(20, 1_000_000)
    assert inbox.add(make(QUIET, 1)), "one that holds less than its share is let in"
    for _ in taken[: len(taken) // 2]:
        inbox.add(make(LOUD, version + 1))
    assert inbox.add(make(NEW, 1))


def test_what_is_taken_is_bounded_but_never_nothing() -> None:
    inbox = Inbox(1_000_000)
    inbox.add(make(LOUD, 1, 5_000))
    inbox.add(make(LOUD, 2, 10))
    assert [item.version for item in inbox.take(10, 100)] == [1]
    assert [item.version for item in inbox.take(10, 100)] == [2]
    assert inbox.take(10, 100) == []
    assert (inbox.bytes, len(inbox)) == (0, 0)
