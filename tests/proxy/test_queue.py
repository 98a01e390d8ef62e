"""Waiting for room at the hard limit: who waits, who goes first, how it ends."""

from __future__ import annotations

import random

import pytest

from proxy.core.phase import Phase
from proxy.core.queue import OFFERED_MAX, Queue
from proxy.core.response_head import parse_response_head
from proxy.metrics import ProxyMetrics
from routing.balancer import Want
from tests.proxy.test_exchange import EVENTS, GET, OK, POST, World, possible


def full_world(**settings: object) -> World:
    """One machine with room for one request."""
    world = World("m1", idle=True, **settings)
    world.table.apply("services", ("app", 0), ("app", 0, None, "requests", 1, 1, "[]", ""))
    return world


def test_the_end_of_a_request_lets_the_first_in_line_go_on() -> None:
    world = full_world()
    running, first, second = (world.exchange(GET) for _ in range(3))
    assert [e.phase for e in (running, first, second)] == [Phase.WAITING, Phase.QUEUED, Phase.QUEUED]
    running.handle_response(OK, b"ok", ended=True)
    assert [e.phase for e in (running, first, second)] == [Phase.DONE, Phase.WAITING, Phase.QUEUED]
    first.handle_response(OK, b"ok", ended=True)
    second.handle_response(OK, b"ok", ended=True)
    assert world.in_flight() == world.metrics.queued == 0
    assert world.metrics.queue_waits == 2


def test_a_wait_ends_with_an_error_when_it_was_too_long() -> None:
    world = full_world(queue_timeout_s=5.0)
    running, late = world.exchange(GET), world.exchange(GET)
    assert late.deadline == world.now + 5.0
    world.now += 5.0
    late.handle_deadline()
    assert late.phase is Phase.DONE
    assert b"fly-proxy-error: PR04" in world.answer
    assert world.metrics.queue_seconds == pytest.approx(5.0)
    running.handle_client_lost()
    assert world.in_flight() == world.metrics.queued == 0


def test_a_replays_timeout_bounds_its_wait() -> None:
    world = full_world(queue_timeout_s=5.0)
    replayed, other = world.exchange(GET), world.exchange(GET)
    head = parse_response_head(b"HTTP/1.1 200 OK\r\nfly-replay: region=ams;timeout=2s\r\n\r\n")
    replayed.handle_response(head, b"", ended=True)
    # The other had waited for the room that the replay gave up.
    assert (replayed.phase, other.phase) == (Phase.QUEUED, Phase.WAITING)
    assert replayed.deadline == world.now + 2.0


def test_a_full_line_is_refused_at_once() -> None:
    world = full_world(queue_max=1)
    running, waiting, refused = (world.exchange(GET) for _ in range(3))
    assert refused.phase is Phase.DONE
    assert b"fly-proxy-error: PR04" in world.answer
    waiting.handle_client_lost()
    running.handle_client_lost()
    assert world.metrics.queued == 0


def test_who_left_is_not_served() -> None:
    world = full_world()
    running, gone, next_one = (world.exchange(GET) for _ in range(3))
    gone.handle_client_lost()
    running.handle_response(OK, b"ok", ended=True)
    assert (gone.phase, next_one.phase) == (Phase.DONE, Phase.WAITING)


def test_room_passes_over_who_cannot_use_it() -> None:
    world = full_world()
    running = world.exchange(GET)
    picky, easy = world.exchange(GET), world.exchange(GET)
    picky.want = Want(instance="m2")
    running.handle_response(OK, b"ok", ended=True)
    assert (picky.phase, easy.phase) == (Phase.QUEUED, Phase.WAITING)


class Picky:
    """Counts how often room is offered to it, and never takes it."""

    deadline = 0.0
    offered = 0

    def handle_room(self) -> bool:
        self.offered += 1
        return False

    def handle_deadline(self) -> None:
        raise AssertionError


def test_who_left_during_an_offer_is_passed_over() -> None:
    queue = Queue(10, ProxyMetrics())
    second = Picky()

    class First(Picky):
        def handle_room(self) -> bool:
            queue.leave("app", second, 0.0)
            return False

    queue.join("app", First())
    queue.join("app", second)
    queue.offer("app")
    assert second.offered == 0


def test_an_offer_costs_the_same_however_long_the_line_is() -> None:
    queue = Queue(1_000, ProxyMetrics())
    line = [Picky() for _ in range(1_000)]
    for one in line:
        assert queue.join("app", one)
    assert not queue.join("app", Picky())
    queue.offer("app")
    assert [one.offered for one in line] == [1] * OFFERED_MAX + [0] * (1_000 - OFFERED_MAX)


@pytest.mark.parametrize("seed", range(200))
def test_any_course_of_many_requests_ends_with_empty_lines(seed: int) -> None:
    rng = random.Random(seed)
    world = full_world(queue_max=3)
    exchanges = [world.exchange(rng.choice((GET, POST)), b"", ended=rng.random() < 0.7) for _ in range(6)]
    for _ in range(400):
        assert world.metrics.queued == sum(e.phase is Phase.QUEUED for e in exchanges)
        assert world.in_flight() == sum(e.target is not None for e in exchanges) <= 1
        alive = [e for e in exchanges if e.phase is not Phase.DONE]
        if not alive:
            break
        one = rng.choice(alive)
        if one.phase is Phase.QUEUED and rng.random() < 0.3:
            one.handle_deadline()
        elif events := possible(one):
            EVENTS[rng.choice(events)](world, one)
    for one in exchanges:
        one.handle_client_lost()
    assert (world.in_flight(), world.metrics.queued, len(world.plane.queue.waiting)) == (0, 0, 0)
