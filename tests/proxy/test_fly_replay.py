"""Fly's "Dynamic request routing", one case for each thing that it says of replays.

Each id names what is said. Where Fly says nothing, the case is what docs/replay.md decides.
"""

from __future__ import annotations

import gzip
import json
import re
from typing import TYPE_CHECKING

import pytest

from tests.proxy.edge import wait_for
from tests.proxy.replay_world import World, answer_with, is_replayed, name_of, outcome_of
from tests.proxy.test_tunnels import SWITCHED, UPGRADE

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.fakes.machine import Connection, Request
    from tests.proxy.edge import Edge
    from tests.proxy.replay_world import Instruction

case = pytest.param


def nothing(world: World) -> None:
    """As it is."""


async def test_the_original_request_goes_again_and_the_client_sees_the_last_answer_only(edge: Edge) -> None:
    world = await World(edge).start()
    world.asks("m1", b"instance=m2", b"X-First: 1")
    client = await edge.client()
    client.send(b"PATCH /a/b?c=d&e HTTP/1.1\r\nHost: app.test\r\nX-Own: 1\r\nContent-Length: 2\r\n\r\nhi")
    response = await client.read_response()
    assert (response.status, response.body) == (200, b"m2")
    assert response.values(b"x-first") == []
    request = world.last("m2")
    assert (request.line, request.body) == (b"PATCH /a/b?c=d&e HTTP/1.1", b"hi")
    assert (request.values(b"host"), request.values(b"x-own")) == ([b"app.test"], [b"1"])
    # The host stays the client's, also when the target is another app.
    assert (await client.get()).status == 200


@pytest.mark.parametrize(
    "status", [200, 201, 202, 206, 301, 302, 307, 400, 404, 409, 421, 429, 500, 503, 599]
)
@pytest.mark.parametrize("form", ["header", "json"])
async def test_any_final_status_carries_an_instruction(edge: Edge, status: int, form: str) -> None:
    world = await World(edge).start()
    instruction: Instruction = b"instance=m2" if form == "header" else {"instance": "m2"}
    world.asks("m1", instruction, status=b"%d x" % status)
    assert await world.outcome() == "m2"


async def test_statuses_without_a_body_carry_one_too(edge: Edge) -> None:
    world = await World(edge).start()
    for status in (b"204 No Content", b"304 Not Modified"):
        head = b"HTTP/1.1 %b\r\nfly-replay: instance=m2\r\n\r\n" % status
        world.answers("m1", lambda r, head=head: head)
        assert await world.outcome() == "m2"


async def test_a_provisional_status_does_not(edge: Edge) -> None:
    world = await World(edge).start()
    world.answers(
        "m1", lambda r: b"HTTP/1.1 103 Early Hints\r\nfly-replay: instance=m2\r\n\r\n" + name_of(b"m1")
    )
    client = await edge.client()
    early = await client.get()
    assert (early.status, early.values(b"fly-replay")) == (103, [])
    assert (await client.read_response()).body == b"m1"


async def test_nor_does_101_for_the_machine_has_upgraded(edge: Edge) -> None:
    world = await World(edge).start()
    world.answers("m1", lambda r: SWITCHED.replace(b"\r\n\r\n", b"\r\nfly-replay: instance=m2\r\n\r\n"))
    assert outcome_of(await edge.exchange(UPGRADE)) == "PA03"
    assert world.seen("m2") == 0


@pytest.mark.parametrize("size", [0, 1, 100_000, 400_000])
@pytest.mark.parametrize("framing", ["length", "chunks", "close"])
async def test_the_body_of_the_answer_is_dropped_whatever_its_size(
    edge: Edge, size: int, framing: str
) -> None:
    world = await World(edge).start()
    told = {
        "length": b"Content-Length: %d\r\n\r\n" % size + b"x" * size,
        "chunks": b"Transfer-Encoding: chunked\r\n\r\n"
        + (b"%x\r\n" % size + b"x" * size + b"\r\n") * bool(size)
        + b"0\r\n\r\n",
        "close": b"Connection: close\r\n\r\n" + b"x" * size,
    }[framing]

    async def behave(connection: Connection) -> None:
        await connection.read_request()
        connection.writer.write(b"HTTP/1.1 200 OK\r\nfly-replay: instance=m2\r\n" + told)
        if framing == "close":
            connection.writer.write_eof()
        await connection.read()

    world.machines["m1"].behave = behave
    assert await world.outcome() == "m2"


@pytest.mark.parametrize(
    "field",
    [
        b"fly-replay-cache: /x",
        b"fly-replay-cache-ttl-secs: 60",
        b"fly-replay-cache-allow-bypass: yes",
        b"fly-replay-delete-header: cookie",
        b"fly-replay-src: x",
        b"Fly-Replay-Anything: x",
    ],
)
async def test_fields_of_replays_never_reach_the_client(edge: Edge, field: bytes) -> None:
    world = await World(edge).start()
    world.answers("m1", lambda r: name_of(b"m1", field))
    response = await edge.get()
    assert response.body == b"m1"
    assert b"replay" not in response.head.lower()


INSTRUCTIONS = [
    # The header.
    case(b"region=gru", "m2", id="1.3-a-region-may-be-bare"),
    case(b'region="gru"', "m2", id="1.3-a-region-may-be-quoted"),
    case(b'region="nrt,gru,any"', "m2", id="1.3-a-list-is-quoted"),
    case(b"region=nrt,gru", "PA03", id="1.3-a-list-that-is-not-is-refused"),
    case({"region": "nrt,gru"}, "m2", id="1.3-in-json-a-list-is-a-string"),
    case(b" region = gru ; state = x ", "m2", id="1.3-space-around-separators"),
    case(b"region=gru;region=iad", "PA03", id="1.3-a-field-twice"),
    case(b"instanse=m2", "PA03", id="1.3-an-unknown-field"),
    case(b"instance=m2,state=x", "PA03", id="1.3-a-comma-separates-nothing"),
    case(b"Instance=m2", "PA03", id="1.3-names-are-in-lower-case"),
    case(b"", "PA03", id="1.3-an-empty-header"),
    # Where to go.
    case(b"region=sam", "PA03", id="1.4-an-unknown-region"),
    case(b"region=nrt", "PR01", id="1.4-a-region-without-any-is-a-hard-wish"),
    case(b'region="nrt,any"', "m1", id="1.4-any-is-or-anywhere"),
    case(b'region="iad,gru"', "m3", id="1.4-a-list-is-tried-in-order"),
    case(b'region="nrt,gru,iad"', "m2", id="1.4-a-list-goes-on-where-nobody-is"),
    case(b"region=eu", "m1", id="1.4-alias-eu"),
    case(b"region=na", "m3", id="1.4-alias-na"),
    case(b"region=us", "m3", id="1.4-alias-us"),
    case(b"region=usa", "m3", id="1.4-alias-usa"),
    case(b"region=sa", "m2", id="1.4-alias-sa"),
    case(b"region=apac", "PR01", id="1.4-alias-apac"),
    case(b"region=any", "m1", id="1.4-alias-any"),
    case(b'region="apac,sa"', "m2", id="1.4-aliases-in-a-list"),
    case(b"instance=m2", "m2", id="1.4-instance"),
    case(b"instance=nobody", "PR02", id="1.4-instance-has-no-stand-in"),
    case(b"prefer_instance=m2", "m2", id="1.4-prefer-instance"),
    case(b"prefer_instance=nobody", "m1", id="1.4-prefer-instance-has-a-stand-in"),
    case(b"prefer_instance=nobody;region=gru", "m2", id="1.4-the-stand-in-meets-the-other-fields"),
    case(b"app=other", "o1", id="1.4-app-goes-to-its-nearest-machine"),
    case(b"app=other;region=gru", "o2", id="1.4-app-and-region"),
    case(b"app=other;instance=o2", "o2", id="1.4-app-and-instance"),
    case(b"app=other;prefer_instance=o2", "o2", id="1.4-app-and-prefer-instance"),
    case(b"app=other;instance=m2", "PA03", id="1.4-instance-of-another-app-than-named"),
    case(b"instance=o1", "PA03", id="1.4-instance-of-another-app-and-none-named"),
    case(b"instance=m2;region=gru", "m2", id="1.4-instance-in-its-region"),
    case(b'instance=m2;region="nrt,sa"', "m2", id="1.4-instance-in-an-area-of-the-list"),
    case(b"instance=m2;region=iad", "PA03", id="1.4-instance-in-another-region"),
    case(b"instance=m2;prefer_instance=m3", "PA03", id="1.4-instance-and-prefer-instance"),
    case(b"elsewhere=true", "m3", id="1.4-elsewhere"),
    case(b"elsewhere=true;instance=m1", "PA03", id="1.4-elsewhere-and-itself"),
    case(b"elsewhere=true;region=ams", "PR01", id="1.4-elsewhere-with-nobody-else"),
    case(b"instance=m1", "m1", id="1.4-a-replay-to-the-same-machine"),
    case(b"state=x", "PA03", id="1.4-nowhere-to-go"),
    case(b"timeout=10s", "PA03", id="1.4-a-timeout-is-nowhere-to-go"),
    case(b"instance=m2;timeout=800ms", "m2", id="1.4-timeout-in-ms"),
    case(b"instance=m2;timeout=10s", "m2", id="1.4-timeout-in-s"),
    case(b"instance=m2;timeout=1m", "m2", id="1.4-timeout-in-m"),
    case(b"instance=m2;timeout=1500", "PA03", id="1.4-timeout-without-a-unit"),
    case(b"instance=m2;fallback=force_self", "m2", id="1.4-fallback-force-self"),
    case(b"instance=m2;fallback=prefer_self", "m2", id="1.4-fallback-prefer-self"),
    case(b"instance=m2;fallback=self", "PA03", id="1.4-fallback-anything-else"),
    # JSON.
    case({"app": "other", "region": "gru"}, "o2", id="1.5-fields-are-those-of-the-header"),
    case({"instance": "m2", "elsewhere": True}, "m2", id="1.5-elsewhere-is-true-or-false"),
    case({"instance": "m2", "nothing": 1}, "PA03", id="1.5-an-unknown-key"),
    case({"instance": "m2", "state": None}, "m2", id="1.5-null-is-not-given"),
    case({"instance": 2}, "PA03", id="1.5-a-value-of-another-type"),
    case({"instance": "m2", "transform": {"paths": "/"}}, "PA03", id="1.5-an-unknown-transform"),
    case({"instance": "m2", "cache": {"path": "/"}}, "PA03", id="1.5-an-unknown-key-of-cache"),
    case({"transform": {"path": "/x"}}, "PA03", id="1.5-a-transform-is-nowhere-to-go"),
    case({"instance": "m2", "state": "x" * 70_000}, "PA03", id="1.5-larger-than-64-KiB"),
    # Between apps.
    case(b"app=foreign", "PA05", id="1.10-an-app-of-another-network"),
    case(b"app=foreign;instance=f1", "PA05", id="1.10-a-machine-of-another-network"),
    case(b"app=nowhere", "PA04", id="1.10-an-unknown-app"),
    case(b"app=hidden", "h1", id="1.10-an-app-without-a-hostname"),
    case(b"app=empty", "PR01", id="1.11-an-app-without-machines"),
]


@pytest.mark.parametrize(("instruction", "outcome"), INSTRUCTIONS)
async def test_instruction(edge: Edge, instruction: Instruction, outcome: str) -> None:
    world = await World(edge).start()
    edge.table.apply("apps", ("hidden",), ("hidden", "default", ""))
    edge.table.apply("services", ("hidden", 0), ("hidden", 0, None, "requests", 9, None, "[]", ""))
    await edge.machine("h1", "hidden", answer=lambda r: name_of(b"h1"))
    world.asks("m1", instruction)
    response = await edge.get()
    assert outcome_of(response) == outcome
    if response.error.startswith("PA"):
        assert response.status == 502
        # The reason is told, and of what it is about.
        assert response.json["message"].count(": ") >= 1
    assert all(target.in_flight == 0 for target in edge.table.targets())


async def test_an_unknown_field_is_named(edge: Edge) -> None:
    world = await World(edge).start()
    world.asks("m1", b"instanse=m2")
    assert "'instanse'" in (await edge.get()).json["message"]


ANSWERS = [
    case(answer_with(b"instance=m2", b"fly-replay: instance=m3"), "PA03", id="1.3-two-headers"),
    case(answer_with({"instance": "m3"}, b"fly-replay: instance=m2"), "m3", id="1.5-json-beats-the-header"),
    case(
        answer_with(b"instance=m2").replace(b"\r\n\r\n", b"\r\nContent-Type: text/html\r\n\r\n"),
        "m2",
        id="1.5-the-header-with-another-type",
    ),
    case(
        answer_with({"instance": "m2"}).replace(b"replay+json", b"replay+json; charset=utf-8"),
        "m2",
        id="1.5-the-type-may-have-parameters",
    ),
    case(answer_with({"instance": "m2"}).replace(b'{"instance"', b"{'instance'"), "PA03", id="1.5-malformed"),
    case(
        b"HTTP/1.1 200 OK\r\nContent-Type: application/vnd.fly.replay+json\r\nContent-Encoding: gzip\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(z := gzip.compress(b'{"instance":"m2"}', mtime=0)), z),
        "PA03",
        id="1.5-compressed",
    ),
    case(
        b"HTTP/1.1 200 OK\r\nContent-Type: application/vnd.fly.replay+json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n"
        + b"".join(b"1\r\n%c\r\n" % byte for byte in b'{"instance":"m2"}')
        + b"0\r\n\r\n",
        "m2",
        id="1.5-in-many-pieces",
    ),
    case(
        b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 17\r\n\r\n{"instance":"m2"}',
        '{"instance":"m2"}',
        id="1.5-another-type-is-for-the-client",
    ),
    case(
        answer_with(b"instance=m2", b"fly-replay-delete-header: x-own"), "m2", id="1.5-the-old-delete-header"
    ),
]


@pytest.mark.parametrize(("answer", "outcome"), ANSWERS)
async def test_answer(edge: Edge, answer: bytes, outcome: str) -> None:
    world = await World(edge).start()
    world.answers("m1", lambda r: answer)
    assert await world.outcome(b"X-Own: 1") == outcome
    if outcome == "m2":
        assert world.last("m2").values(b"x-own") == [b"1"]


TARGETS: list[object] = [
    case(b"instance=m2", lambda w: w.put("m2", "stopped"), "PR01", id="1.11-instance-is-stopped"),
    case(b"instance=m2", lambda w: w.put("m2", cordoned=1), "PR01", id="1.11-instance-is-cordoned"),
    case(b"instance=m2", lambda w: w.fail_check("m2"), "m2", id="1.4-instance-is-tried-when-unhealthy"),
    case(b"prefer_instance=m2", lambda w: w.put("m2", "stopped"), "m1", id="1.4-preferred-is-stopped"),
    case(b"prefer_instance=m2", lambda w: w.fail_check("m2"), "m1", id="1.4-preferred-is-unhealthy"),
    case(b"region=gru", lambda w: w.put("m2", "stopped"), "PR01", id="1.11-nobody-in-the-region"),
    case(b"region=gru;fallback=force_self", lambda w: w.put("m2", "stopped"), "m1", id="1.6-no-candidate"),
    case(
        b"instance=m2;fallback=force_self", lambda w: w.put("m2", "stopped"), "m1", id="1.6-instance-stopped"
    ),
    case(b"instance=nobody;fallback=prefer_self", nothing, "m1", id="1.6-instance-unknown"),
    case(b"app=nowhere;fallback=force_self", nothing, "PA04", id="1.6-an-unknown-app-is-no-failure-to-reach"),
    case(b"app=foreign;fallback=force_self", nothing, "PA05", id="1.6-nor-is-one-that-is-not-allowed"),
    case(b"app=empty;fallback=force_self", nothing, "m1", id="1.6-an-app-without-machines-is"),
    case(b"region=nrt;timeout=10s", nothing, "PR01", id="1.6-a-timeout-without-fallback"),
]


@pytest.mark.parametrize(("instruction", "prepare", "outcome"), TARGETS)
async def test_target(edge: Edge, instruction: bytes, prepare: Callable[[World], None], outcome: str) -> None:
    world = await World(edge).start()
    prepare(world)
    world.asks("m1", instruction)
    assert await world.outcome() == outcome
    if outcome == "m1" and b"fallback" in instruction:
        assert world.last("m1").values(b"fly-replay-failed")
        assert world.last("m1").values(b"fly-replay-src") == []
    if b"prefer" in instruction and b"fallback" not in instruction:
        assert world.last("m1").values(b"fly-preferred-instance-unavailable") == [b"m2"]


async def test_1_4_a_preferred_machine_at_its_hard_limit_has_a_stand_in(edge: Edge) -> None:
    world = await World(edge).start()
    edge.put_app("app", "app.test", hard=1)
    target = edge.table.machine("m2")
    assert target is not None
    target.in_flight = 1
    world.asks("m1", b"prefer_instance=m2")
    assert await world.outcome() == "m1"
    assert world.last("m1").values(b"fly-preferred-instance-unavailable") == [b"m2"]
    target.in_flight = 0


async def test_1_4_elsewhere_is_for_one_round_only(edge: Edge) -> None:
    world = await World(edge).start()
    world.answers("m1", lambda r: name_of(b"m1") if is_replayed(r) else answer_with(b"elsewhere=true"))
    world.answers("m3", lambda r: answer_with(b"region=any"))
    assert await world.outcome() == "m1"
    assert (world.seen("m1"), world.seen("m3")) == (2, 1)


async def test_1_6_an_error_of_the_target_is_its_answer(edge: Edge) -> None:
    world = await World(edge).start()
    world.asks("m1", b"instance=m2;fallback=force_self")
    for status in (b"500 x", b"502 x", b"503 x", b"504 x"):
        world.answers("m2", lambda r, status=status: name_of(b"m2", status=status))
        response = await edge.get()
        assert (response.status, response.body, response.error) == (int(status[:3]), b"m2", "")


async def test_1_6_a_target_that_is_reached_and_breaks_off_is_no_fallback(edge: Edge) -> None:
    async def hang_up(connection: Connection) -> None:
        await connection.read_request()

    world = await World(edge).start()
    world.machines["m2"].behave = hang_up
    world.asks("m1", b"instance=m2;fallback=force_self")
    client = await edge.client()
    client.send(b"POST / HTTP/1.1\r\nHost: app.test\r\nContent-Length: 0\r\n\r\n")
    assert outcome_of(await client.read_response()) == "PC03"
    assert world.seen("m1") == 1


async def test_1_6_force_self_is_the_very_machine_and_prefer_self_any_of_its_app(edge: Edge) -> None:
    world = await World(edge).start()
    for fallback, outcome in ((b"force_self", "PR02"), (b"prefer_self", "m3")):
        world.put("m1")

        def answer(request: Request, fallback: bytes = fallback) -> bytes:
            edge.table.apply("machines", ("m1",), None)  # gone before the request can come back
            return answer_with(b"app=empty;fallback=" + fallback)

        world.answers("m1", answer)
        assert await world.outcome() == outcome
    assert world.last("m3").values(b"fly-preferred-instance-unavailable") == [b"m1"]


async def test_1_6_a_fallback_cannot_be_replayed(edge: Edge) -> None:
    world = await World(edge).start()
    world.answers("m1", lambda r: answer_with(b"app=empty;fallback=force_self"))
    response = await edge.get()
    assert (response.status, response.error) == (502, "PA03")
    assert "fallback" in response.json["message"]
    assert world.seen("m1") == 2


async def test_1_7_the_source_is_the_last_hop_and_cannot_be_spoofed(edge: Edge) -> None:
    world = await World(edge).start()
    world.answers("m1", lambda r: answer_with(b'instance=m2;state="a;b c\\""'))
    world.answers("m2", lambda r: answer_with(b"app=other"))
    assert await world.outcome(b"fly-replay-src: instance=evil;state=secret") == "o1"
    first, last = world.last("m2").values(b"fly-replay-src"), world.last("o1").values(b"fly-replay-src")
    assert len(first) == len(last) == 1
    assert re.fullmatch(rb"instance=m1;region=ams;t=\d{16};state=a%3Bb%20c%22", first[0])
    assert re.fullmatch(rb"instance=m2;region=gru;t=\d{16}", last[0])


@pytest.mark.parametrize(
    "field",
    [
        b"fly-replay-src",
        b"fly-replay-failed",
        b"fly-replay-cache-status",
        b"fly-preferred-instance-unavailable",
        b"Fly_Replay_Src",
    ],
)
async def test_1_7_what_a_client_says_of_replays_is_removed(edge: Edge, field: bytes) -> None:
    world = await World(edge).start()
    assert await world.outcome(field + b": x", b"fly-replay-cache-control: skip") == "m1"
    assert b"\r\n" + field.lower() not in world.last("m1").head.lower()
    assert world.last("m1").values(b"fly-replay-cache-control") == [b"skip"]


async def test_1_7_a_failed_replay_is_told_with_six_fields(edge: Edge) -> None:
    world = await World(edge).start()
    await world.stop("o2")
    world.asks("m1", b"app=other;instance=o2;region=gru;timeout=10s;fallback=force_self")
    assert await world.outcome() == "m1"
    (told,) = world.last("m1").values(b"fly-replay-failed")
    fields = dict(pair.split(b"=") for pair in told.split(b";"))
    assert int(fields.pop(b"elapsed_ms")) < 10_000
    assert fields == {
        b"instance": b"o2",
        b"app": b"other",
        b"region": b"gru",
        b"replay_source": b"m1",
        b"reason": b"retries_exhausted",
    }


@pytest.mark.parametrize("chunked", [False, True], ids=["fixed", "chunked"])
@pytest.mark.parametrize(
    ("size", "outcome"), [(0, "m2"), (1_000, "m2"), (1_001, "PA01")], ids=["empty", "at-the-limit", "beyond"]
)
async def test_1_9_bodies_up_to_the_limit(edge: Edge, size: int, outcome: str, chunked: bool) -> None:
    world = await World(edge).start(replay_body_bytes_max=1_000)
    world.asks("m1", b"instance=m2")
    body = b"x" * size
    framed = b"Content-Length: %d\r\n\r\n%b" % (size, body)
    if chunked:
        piece = b"%x\r\n%b\r\n" % (size, body) if size else b""
        framed = b"Transfer-Encoding: chunked\r\n\r\n" + piece + b"0\r\n\r\n"
    response = await edge.exchange(b"POST / HTTP/1.1\r\nHost: app.test\r\n" + framed)
    assert outcome_of(response) == outcome
    if outcome == "m2":
        assert world.last("m2").body == body
    else:
        # The first machine got all of it; it is the replay that cannot be.
        assert (response.status, world.last("m1").body) == (413, body)


@pytest.mark.parametrize(("replays", "outcome"), [(10, "m1"), (11, "PA02")])
async def test_1_9_ten_replays_are_done_and_the_eleventh_is_not(
    edge: Edge, replays: int, outcome: str
) -> None:
    world = await World(edge).start()
    world.answers(
        "m1", lambda r: name_of(b"m1") if world.seen("m1") > replays else answer_with(b"instance=m1")
    )
    response = await edge.get()
    assert outcome_of(response) == outcome
    assert response.status == (200 if outcome == "m1" else 508)
    assert world.seen("m1") == 11


GRANTS = [
    case([], "PA05", id="nobody"),
    case(["app"], "f1", id="the-app"),
    case(["other"], "PA05", id="another-app"),
    case(["network:default"], "f1", id="its-network"),
    case(["network:elsewhere"], "PA05", id="another-network"),
    case(["network:app"], "PA05", id="a-network-of-the-name-of-the-app"),
    case(["*"], "f1", id="everybody"),
]


@pytest.mark.parametrize(("sources", "outcome"), GRANTS)
async def test_1_10_the_target_says_who_may_replay_to_it(
    edge: Edge, sources: list[str], outcome: str
) -> None:
    world = await World(edge).start()
    edge.put_app("foreign", "foreign.test", "elsewhere", json.dumps({"replay_from": sources}))
    world.asks("m1", b"app=foreign")
    assert await world.outcome() == outcome
    # One way only.
    world.asks("f1", b"app=app")
    assert outcome_of(await edge.exchange(b"GET / HTTP/1.1\r\nHost: foreign.test\r\n\r\n")) == "PA05"


async def test_1_10_the_service_is_that_of_the_port_that_the_client_connected_to(edge: Edge) -> None:
    world = await World(edge).start()
    edge.table.apply("services", ("other", 0), None)
    world.asks("m1", b"app=other")
    for port, outcome in ((edge.server.port % 65_535 + 1, "PA04"), (edge.server.port, "o1")):
        row = ("other", port, None, "requests", 9, None, "[]", "")
        edge.table.apply("services", ("other", port), row)
        response = await edge.get()
        assert outcome_of(response) == outcome
        if outcome == "PA04":
            assert f"port {edge.server.port}" in response.json["message"]
    assert world.last("o1").values(b"host") == [b"app.test"]


async def test_1_12_an_upgrade_is_replayed_and_tunnelled(edge: Edge) -> None:
    async def echo(connection: Connection) -> None:
        await connection.read_until(b"\r\n\r\n")
        connection.writer.write(SWITCHED)
        connection.writer.write(await connection.read())

    world = await World(edge).start()
    # As apps in the wild write it, straight to the socket.
    world.answers(
        "m1",
        lambda r: (
            b"HTTP/1.1 307 Temporary Redirect\r\nFly-Replay: instance=m2\r\n"
            b"Connection: close\r\nContent-Length: 0\r\n\r\n"
        ),
    )
    world.machines["m2"].behave = echo
    client = await edge.client()
    client.send(UPGRADE)
    response = await client.read_response()
    assert (response.status, response.values(b"upgrade")) == (101, [b"websocket"])
    client.send(b"ping")
    assert await client.read(4) == b"ping"
    assert b"\r\nUpgrade: websocket\r\n" in world.machines["m2"].received
    assert b"\r\nfly-replay-src: instance=m1;" in world.machines["m2"].received


async def test_1_13_a_client_that_waits_for_100_is_told_once(edge: Edge) -> None:
    async def behave(connection: Connection) -> None:
        await connection.read_until(b"\r\n\r\n")
        connection.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        await connection.read_exactly(4)
        connection.writer.write(answer_with(b"instance=m2"))
        await connection.read()

    world = await World(edge).start()
    world.machines["m1"].behave = behave
    client = await edge.client()
    client.send(b"PUT / HTTP/1.1\r\nHost: app.test\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n")
    assert (await client.read_response()).status == 100
    client.send(b"body")
    assert (await client.read_response()).body == b"m2"
    assert (world.last("m2").body, world.last("m2").values(b"expect")) == (b"body", [])


async def test_1_13_a_client_that_leaves_ends_its_replay(edge: Edge) -> None:
    async def hold(connection: Connection) -> None:
        await connection.read_request()
        await connection.read()

    world = await World(edge).start()
    world.asks("m1", b"instance=m2")
    world.machines["m2"].behave = hold
    client = await edge.client()
    client.send(b"GET / HTTP/1.1\r\nHost: app.test\r\n\r\n")
    await wait_for(lambda: bool(world.machines["m2"].received))
    client.close()
    await wait_for(lambda: world.machines["m2"].connections[0].closed)
    assert all(target.in_flight == 0 for target in edge.table.targets())


async def test_1_13_replays_and_retries_are_counted_apart(edge: Edge) -> None:
    world = await World(edge).start()
    await world.stop("o1")
    world.asks("m1", b"app=other")
    assert await world.outcome() == "o2"
    counted = {name: (m.replays, m.retries) for name, m in edge.metrics.apps.items()}
    assert counted == {"app": (1, 0), "other": (0, 1)}
