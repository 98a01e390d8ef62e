"""One round of a session, from the side that asks."""

import pytest

from replication.core.clock import SiteId
from replication.core.pull import Adopt, Ask, Keep, Over, PullRound, SyncError, Take
from replication.core.versions import VersionRanges
from replication.core.wire import (
    SnapshotAsk,
    SnapshotChunk,
    SyncAsk,
    SyncBusy,
    SyncChanges,
    SyncDone,
    SyncOpen,
    SyncState,
)

US, PEER = SiteId(b"u" * 16), SiteId(b"p" * 16)


def opened(seen=None):
    round_ = PullRound(7, US, lambda: seen or {})
    round_.open()
    return round_


def test_opens_with_what_was_seen():
    round_ = PullRound(7, US, lambda: {US: VersionRanges([(1, 3)])})
    assert round_.open() == SyncOpen(7, {US: ((1, 3),)})


def test_is_over_when_the_peer_has_nothing_new():
    step = opened({PEER: VersionRanges([(1, 5)])}).handle_answer(SyncState(7, {PEER: ((2, 4),)}, {}))
    assert step == Over(more=False)


def test_asks_for_gaps_and_takes_what_comes_until_it_is_done():
    round_ = opened({PEER: VersionRanges([(1, 2), (5, 5)])})
    step = round_.handle_answer(SyncState(7, {PEER: ((1, 6),)}, {}))
    assert step == Ask(SyncAsk(7, ((PEER, 3, 4), (PEER, 6, 6))))
    assert round_.handle_answer(SyncChanges(7, ())) == Take(())
    assert round_.handle_answer(SyncDone(7, complete=True)) == Over(more=True)


def test_keeps_a_snapshot_where_the_log_does_not_reach_and_adopts_it_whole():
    round_ = opened()
    assert round_.handle_answer(SyncState(7, {PEER: ((1, 9),)}, {PEER: 5})) == Ask(SnapshotAsk(7))
    assert round_.handle_answer(SnapshotChunk(7, b"part")) == Keep(b"part")
    assert round_.handle_answer(SyncDone(7, complete=True)) == Adopt()


def test_counts_own_versions_that_only_the_peer_has():
    round_ = opened({US: VersionRanges([(1, 2)])})
    round_.handle_answer(SyncState(7, {US: ((1, 5),)}, {}))
    assert round_.own_versions_lost == 3


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (SyncBusy(7), "busy"),
        (SyncDone(7, complete=True), "unexpected"),
        (SyncChanges(7, ()), "unexpected"),
        (SnapshotChunk(7, b""), "unexpected"),
    ],
)
def test_refuses_what_does_not_answer_the_opening(answer, reason):
    with pytest.raises(SyncError, match=reason):
        opened().handle_answer(answer)


def test_a_snapshot_that_the_peer_gave_up_is_not_adopted():
    round_ = opened()
    round_.handle_answer(SyncState(7, {PEER: ((1, 9),)}, {PEER: 5}))
    with pytest.raises(SyncError, match="incomplete"):
        round_.handle_answer(SyncDone(7, complete=False))
    with pytest.raises(SyncError, match="unexpected"):
        round_.handle_answer(SyncChanges(7, ()))
