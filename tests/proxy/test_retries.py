"""When a request is sent again, when it must not be, and how often an app's requests may be."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from proxy.core.errors import BAD_RESPONSE, CONNECT_FAILED, CONNECT_REFUSED, UPSTREAM_RESET, UPSTREAM_TIMEOUT
from proxy.core.response_head import parse_response_head
from tests.proxy.replay_world import World as Fleet
from tests.proxy.test_exchange import OK, FakeConnection, World

if TYPE_CHECKING:
    from proxy.core.exchange import Exchange
    from tests.proxy.edge import Edge

case = pytest.param
EARLY_HINTS = parse_response_head(b"HTTP/1.1 103 Early Hints\r\n\r\n")


def raw(method: str, body: bytes = b"") -> bytes:
    return b"%b /x HTTP/1.1\r\nHost: app.test\r\nContent-Length: %d\r\n\r\n" % (method.encode(), len(body))


def lose_reused(world: World, exchange: Exchange) -> None:
    """The idle connection that it was sent on turns out to be closed."""
    exchange.handle_machine_lost(UPSTREAM_RESET, "")


def lose_fresh(world: World, exchange: Exchange) -> None:
    """A new connection breaks after the request was sent on it."""
    exchange.handle_connected(FakeConnection(world))
    exchange.handle_machine_lost(UPSTREAM_RESET, "")


def refuse(world: World, exchange: Exchange) -> None:
    exchange.handle_connect_failed(CONNECT_REFUSED, "no")


def time_out_connecting(world: World, exchange: Exchange) -> None:
    exchange.handle_connect_failed(CONNECT_FAILED, "slow")


def time_out_answering(world: World, exchange: Exchange) -> None:
    exchange.handle_connected(FakeConnection(world))
    exchange.handle_machine_lost(UPSTREAM_TIMEOUT, "")


def answer_badly(world: World, exchange: Exchange) -> None:
    exchange.handle_connected(FakeConnection(world))
    exchange.handle_machine_lost(BAD_RESPONSE, "junk")


def hint_and_lose(world: World, exchange: Exchange) -> None:
    exchange.handle_connected(FakeConnection(world))
    exchange.handle_informational(EARLY_HINTS)
    exchange.handle_machine_lost(UPSTREAM_RESET, "")


def answer_half_and_lose(world: World, exchange: Exchange) -> None:
    exchange.handle_connected(FakeConnection(world))
    exchange.handle_response(OK, b"o", ended=False)
    exchange.handle_machine_lost(UPSTREAM_RESET, "")


SAFE = ("GET", "HEAD", "OPTIONS", "PUT", "DELETE", "PROPFIND", "REPORT", "QUERY")
UNSAFE = ("POST", "PATCH", "PURGE")
TWICE = [
    *(case(m, refuse, True, id=f"nothing-was-sent-{m}") for m in (*SAFE, *UNSAFE)),
    *(case(m, time_out_connecting, True, id=f"no-connection-in-time-{m}") for m in ("GET", "POST")),
    *(case(m, lose_reused, True, id=f"a-stale-connection-{m}") for m in SAFE),
    *(case(m, lose_reused, False, id=f"a-stale-connection-{m}") for m in UNSAFE),
    *(case(m, lose_fresh, True, id=f"a-reset-before-the-answer-{m}") for m in SAFE),
    *(case(m, lose_fresh, False, id=f"a-reset-before-the-answer-{m}") for m in UNSAFE),
    *(case(m, time_out_answering, False, id=f"no-answer-in-time-{m}") for m in ("GET", "POST")),
    *(case(m, answer_badly, False, id=f"no-answer-but-junk-{m}") for m in ("GET", "POST")),
    *(case(m, hint_and_lose, False, id=f"a-part-of-the-answer-{m}") for m in ("GET", "POST")),
    *(case(m, answer_half_and_lose, False, id=f"half-of-the-answer-{m}") for m in ("GET", "POST")),
]


@pytest.mark.parametrize(("method", "happen", "again"), TWICE)
def test_sent_again(method: str, happen, again: bool) -> None:
    world = World("m1", "m2", idle=happen is lose_reused)
    exchange = world.exchange(raw(method))
    first = world.target
    happen(world, exchange)
    connects = sum(entry.startswith("connect") for entry in world.take())
    assert connects == 1 + again
    assert world.metrics.app("app").retries == again
    assert world.in_flight() == again
    if again and happen is not lose_reused:
        assert world.target != first


def test_what_was_sent_and_is_no_longer_kept_is_not_sent_again() -> None:
    world = World("m1", "m2", idle=True, replay_body_bytes_max=4)
    exchange = world.exchange(raw("PUT", b"hello"), b"hello")
    assert exchange.body_lost
    exchange.handle_machine_lost(UPSTREAM_RESET, "")
    assert b"fly-proxy-error: PC03" in world.answer


def test_the_whole_body_goes_again() -> None:
    world = World("m1", "m2", idle=True)
    exchange = world.exchange(raw("PUT", b"hello!"), b"hel", ended=False)
    exchange.handle_request_body(b"lo!", ended=True)
    exchange.handle_machine_lost(UPSTREAM_RESET, "")
    exchange.handle_connected(FakeConnection(world))
    assert world.sent[-1].endswith(b"\r\n\r\nhello!")


def spend(world: World) -> None:
    """Use up what the app may have now."""
    for _ in range(1_000):
        world.plane.retries.take("app", world.now)
    assert not world.plane.retries.take("app", world.now)
    world.metrics.app("app").retries = world.metrics.app("app").retries_refused = 0


@pytest.mark.parametrize("happen", [refuse, lose_reused, lose_fresh])
def test_when_too_many_are_retries_the_client_gets_the_error_at_once(happen) -> None:
    world = World("m1", "m2", idle=happen is lose_reused)
    exchange = world.exchange(raw("GET"))
    spend(world)
    happen(world, exchange)
    assert b"fly-proxy-error: PR03" in world.answer
    assert b"too many requests of the app are retries already; [PC0" in world.answer
    counted = world.metrics.app("app")
    assert (counted.retries, counted.retries_refused, world.in_flight()) == (0, 1, 0)


def test_a_retry_that_nobody_is_left_for_costs_nothing() -> None:
    world = World("m1")
    exchange = world.exchange(raw("GET"))
    refuse(world, exchange)
    counted = world.metrics.app("app")
    assert (counted.retries, counted.retries_refused) == (0, 0)


def test_a_replay_and_its_fallback_are_no_retries() -> None:
    world = World("m1", "m2", idle=True)
    exchange = world.exchange(raw("GET"))
    spend(world)
    world.idle = False
    head = parse_response_head(
        b"HTTP/1.1 200 OK\r\nfly-replay: elsewhere=true;fallback=force_self\r\nContent-Length: 0\r\n\r\n"
    )
    issuer = world.target
    exchange.handle_response(head, b"", ended=True)
    assert world.target != issuer
    refuse(world, exchange)
    assert world.target == issuer
    exchange.handle_connected(FakeConnection(world))
    assert b"fly-replay-failed: replay_source=" in world.sent[-1]
    assert world.metrics.app("app").retries_refused == 0


def test_an_error_of_a_replay_does_not_speak_of_failures_before_it() -> None:
    world = World("m1", "m2")
    exchange = world.exchange(raw("GET"))
    refuse(world, exchange)
    exchange.handle_connected(FakeConnection(world))
    head = parse_response_head(b"HTTP/1.1 200 OK\r\nfly-replay: region=nrt\r\nContent-Length: 0\r\n\r\n")
    exchange.handle_response(head, b"", ended=True)
    assert b"fly-proxy-error: PR01" in world.answer
    assert b"PC01" not in world.answer


@pytest.mark.parametrize(
    ("fails", "after_s", "reason"),
    [
        case(1, 0.0, b"retries_exhausted", id="nobody-is-left"),
        case(1, 0.5, b"timeout", id="its-time-is-over"),
        case(0, 0.0, b"no_candidate", id="nobody-was-there"),
    ],
)
def test_a_fallback_says_why(fails: int, after_s: float, reason: bytes) -> None:
    world = World(*(["m1", "m2"] if fails else ["m1"]), idle=True)
    exchange = world.exchange(raw("GET"))
    world.idle = False
    head = parse_response_head(
        b"HTTP/1.1 200 OK\r\nfly-replay: elsewhere=true;timeout=500ms;fallback=force_self\r\n"
        b"Content-Length: 0\r\n\r\n"
    )
    exchange.handle_response(head, b"", ended=True)
    if fails:
        world.now += after_s
        refuse(world, exchange)
    exchange.handle_connected(FakeConnection(world))
    assert b";reason=%b;elapsed_ms=%d\r\n" % (reason, after_s * 1_000) in world.sent[-1]


async def test_an_outage_costs_its_machines_little_more_than_the_requests(edge: Edge) -> None:
    fleet = await Fleet(edge).start(retries_per_s_min=0, retry_percent=20)
    for name in ("m1", "m2", "m3"):
        await fleet.stop(name)
    client = await edge.client()
    for _ in range(100):
        assert (await client.get()).error == "PR03"
    counted = edge.metrics.app("app")
    assert counted.retries <= 20
    assert counted.retries_refused >= 70
    assert sum(edge.metrics.connect_failures.values()) == 100 + counted.retries
