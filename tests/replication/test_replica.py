"""What a replica makes of what its parts report."""

import logging
from random import Random

import pytest

from replication.core.clock import NEVER, SiteId
from replication.core.member import MemberInfo
from replication.core.versions import VersionRanges
from replication.errors import SnapshotError
from replication.replica import Replica, ReplicaSettings
from replication.schema import Schema
from replication.store import Store
from tests.fakes.host import FakeHost

SCHEMA = Schema.parse("CREATE TABLE items (id INTEGER PRIMARY KEY, v TEXT NOT NULL DEFAULT '');")
US, PEER = SiteId(b"u" * 16), SiteId(b"p" * 16)


class Running:
    """A replica on its own, over a real store."""

    def __init__(self) -> None:
        self.host = FakeHost(Store.open(":memory:", SCHEMA, site=US))
        self.seen: dict[SiteId, VersionRanges] = {US: VersionRanges([(1, 1)])}
        self.settings = ReplicaSettings()
        me = MemberInfo(US, "u", "10.0.0.1", 1, 1)
        self.replica = Replica(self.host, self.settings, me, Random(1), seen=self.seen)
        self.replica.start(())
        self.host.settle()

    def pass_ms(self, delay_ms: float) -> None:
        """Let timers come up until so much time has gone by."""
        until = self.host.now + delay_ms
        while self.host.now < until:
            # The fake host fires in order of setting; what counts here is that time goes on.
            self.host.fire()
            self.host.settle()


def test_why_a_snapshot_cannot_be_taken_in_is_told_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    running = Running()
    with caplog.at_level(logging.WARNING):
        for wait_ms in (0, 30_000, 31_000):
            running.host.now += wait_ms
            running.replica._on_sync_over(PEER, 0, SnapshotError("unknown table notes"))
    expected = f"a snapshot from {PEER.hex()} cannot be taken in: unknown table notes"
    assert [record.message for record in caplog.records] == [expected] * 2


def test_who_has_heard_of_nobody_calls_nothing_stable_unless_it_has_always_been_alone() -> None:
    running = Running()
    running.pass_ms(20_000)
    assert running.replica._compute_stable() > NEVER, "nobody else has ever written here"
    running.seen[PEER] = VersionRanges([(1, 3)])
    assert running.replica._compute_stable() == NEVER
    running.host.now += running.settings.swim.forget_ms
    running.pass_ms(20_000)
    assert running.replica._compute_stable() > NEVER, "whoever wrote has not been heard of for a day"
