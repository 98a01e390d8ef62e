"""Which links are kept, and when they are dialled again."""

from collections.abc import Callable
from random import Random

import pytest

from replication.core.clock import SiteId
from replication.core.links import Link, Links
from replication.core.member import Address, MemberInfo
from tests.fakes.links import FakeLink

A, B = SiteId(b"a" * 16), SiteId(b"b" * 16)
HOME: Address = ("10.0.0.1", 1)


def info(site: SiteId) -> MemberInfo:
    return MemberInfo(site, site[:1].decode(), *HOME, 1)


class World:
    """Dials that the test answers, and a clock that it moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.changes: list[tuple[str, SiteId]] = []
        self.dials: list[tuple[Address, bool, Callable[[Link | None], None]]] = []
        self.timers: list[tuple[float, Callable[[], None]]] = []
        self.links = Links(
            self,
            Random(1),
            on_peer_up=lambda site: self.changes.append(("up", site)),
            on_peer_down=lambda site: self.changes.append(("down", site)),
            redial_ms=100,
            redial_max_ms=1_000,
        )

    def now_ms(self) -> float:
        return self.now

    def call_later(self, delay_ms: float, act: Callable[[], None]) -> None:
        self.timers.append((delay_ms, act))

    def dial(self, address: Address, *, lasting: bool, done: Callable[[Link | None], None]) -> None:
        self.dials.append((address, lasting, done))

    def answer(self, site: SiteId | None) -> FakeLink | None:
        """Answer the oldest dial as this site, or not at all."""
        _, lasting, done = self.dials.pop(0)
        if site is None:
            done(None)
            return None
        link = FakeLink(info(site), lasting=lasting, on_close=self.links.handle_link_down)
        self.links.handle_link_up(link)
        done(link)
        return link

    def fire(self) -> float:
        """Let the oldest timer come up; return how long it was set for."""
        delay, act = self.timers.pop(0)
        self.now += delay
        act()
        return delay


@pytest.fixture
def world() -> World:
    return World()


def test_a_wanted_link_is_dialled_again_until_it_is_not_wanted(world):
    world.links.want({A: HOME})
    link = world.answer(A)
    assert link is not None
    assert world.links.is_up(A)
    link.close()
    assert world.changes == [("up", A), ("down", A)]
    world.fire()
    world.answer(A)
    assert world.links.is_up(A)
    world.links.want({})
    assert world.changes[-1] == ("down", A)
    assert not world.timers, "nobody is dialled who is not wanted"
    assert not world.links.send(A, b"x")
    assert world.links.counters["frames_dropped"] == 1


def test_who_does_not_answer_is_tried_again_less_and_less_often(world):
    world.links.want({A: HOME})
    waits = []
    for _ in range(8):
        world.answer(None)
        waits.append(world.fire())
    assert waits[0] < 200
    assert max(waits) <= 1_500
    assert min(waits[5:]) > 500
    assert len(world.dials) == 1, "one dial at a time"


def test_somebody_else_at_the_address_is_not_taken_for_the_peer(world):
    world.links.want({A: HOME})
    link = world.answer(B)
    assert link is not None
    assert link.is_closed
    assert world.links.counters["dials_failed"] == 1
    assert not world.links.is_up(A)
    world.fire()
    assert world.dials, "the peer is tried again"


def test_a_peer_that_moved_is_dialled_at_its_new_address_at_once(world):
    world.links.want({A: HOME})
    world.answer(None)
    world.links.want({A: ("10.0.0.2", 1)})
    assert [address for address, *_ in world.dials] == [("10.0.0.2", 1)]


def test_a_link_that_breaks_at_once_each_time_counts_as_failing(world):
    world.links.want({A: HOME})
    waits = []
    for _ in range(5):
        link = world.answer(A)
        assert link is not None
        link.close()
        waits.append(world.fire())
    assert waits[-1] > 4 * waits[0]
    link = world.answer(A)
    world.now += 2_000
    assert link is not None
    link.close()
    assert world.fire() < 200, "one that lasted starts from anew"


def test_a_borrowed_link_does_not_make_a_peer_a_neighbour(world):
    lent: list[tuple[Link | None, bool]] = []
    world.links.borrow(A, HOME, lambda link, ours: lent.append((link, ours)))
    link = world.answer(A)
    assert lent == [(link, True)]
    assert not world.links.is_up(A)
    assert world.links.get(A) is link
    world.links.borrow(A, HOME, lambda link, ours: lent.append((link, ours)))
    assert lent[1] == (link, False), "the link that is there is lent"
    assert link is not None
    link.close()
    assert world.links.get(A) is None
    assert world.changes == []


def test_a_stranger_is_not_lent(world):
    lent: list[tuple[Link | None, bool]] = []
    world.links.borrow(A, HOME, lambda link, ours: lent.append((link, ours)))
    link = world.answer(B)
    assert lent == [(None, False)]
    assert link is not None
    assert link.is_closed


def test_a_lasting_link_is_preferred_and_a_peer_stays_up_until_its_last_is_gone(world):
    ends = [
        FakeLink(info(A), lasting=lasting, on_close=world.links.handle_link_down)
        for lasting in (True, False, True)
    ]
    for link in ends:
        world.links.handle_link_up(link)
    assert world.links.get(A) is ends[2], "the newest of the lasting ones"
    ends[2].close()
    assert world.changes == [("up", A)]
    world.links.close(A)
    assert world.changes == [("up", A), ("down", A)]
