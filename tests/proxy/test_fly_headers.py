"""What Fly's pages say of headers: what apps get, what clients get, and what clients choose with."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest

from tests.proxy.replay_world import MACHINES, World, name_of, outcome_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.proxy.edge import Edge

case = pytest.param
CLIENT = b"127.0.0.1"

# What the machine gets under a name, when the client sends these lines. Not from a trusted proxy.
TOLD = [
    case(b"Fly-Client-IP", (), [CLIENT], id="2.1-fly-client-ip"),
    case(b"Fly-Client-IP", (b"Fly-Client-IP: 1.2.3.4",), [CLIENT], id="2.1-fly-client-ip-spoofed"),
    case(b"Fly-Client-IP", (b"X-Forwarded-For: 1.2.3.4",), [CLIENT], id="2.1-fly-client-ip-is-the-peer"),
    case(b"Fly-Forwarded-Port", (), ["port"], id="2.1-fly-forwarded-port"),
    case(b"Fly-Forwarded-Port", (b"Fly-Forwarded-Port: 1",), ["port"], id="2.1-fly-forwarded-port-spoofed"),
    case(b"Fly-Forwarded-Proto", (b"Fly-Forwarded-Proto: https",), [b"http"], id="2.1-fly-forwarded-proto"),
    case(b"Fly-Forwarded-SSL", (b"Fly-Forwarded-SSL: on",), [b"off"], id="2.1-fly-forwarded-ssl"),
    case(b"Fly-Region", (b"Fly-Region: gru",), [b"ams"], id="2.1-fly-region-is-the-edge"),
    case(b"X-Forwarded-For", (), [CLIENT], id="2.1-x-forwarded-for"),
    case(b"X-Forwarded-For", (b"X-Forwarded-For: 1.2.3.4",), [CLIENT], id="2.1-x-forwarded-for-spoofed"),
    case(b"X-Forwarded-Proto", (b"X-Forwarded-Proto: https",), [b"http"], id="2.1-x-forwarded-proto"),
    case(b"X-Forwarded-Port", (b"X-Forwarded-Port: 1",), ["port"], id="2.1-x-forwarded-port"),
    case(b"X-Forwarded-SSL", (b"X-Forwarded-SSL: on",), [b"off"], id="2.1-x-forwarded-ssl"),
    case(b"X-Forwarded-Host", (b"X-Forwarded-Host: evil",), [], id="2.1-x-forwarded-host"),
    case(b"Forwarded", (b"Forwarded: for=1.2.3.4",), [], id="2.1-forwarded"),
    case(b"X-Real-IP", (b"X-Real-IP: 1.2.3.4",), [], id="2.1-x-real-ip"),
    case(b"Via", (), [b"1.1 isthmus"], id="2.1-via"),
    case(b"Via", (b"Via: 1.0 cdn",), [b"1.0 cdn", b"1.1 isthmus"], id="2.1-via-is-appended-to"),
    case(b"X-Request-Start", (b"X-Request-Start: t=1",), [rb"t=\d{16}"], id="2.1-x-request-start"),
    case(b"Fly-Request-Id", (b"Fly-Request-Id: x",), [rb"[0-9A-HJKMNP-TV-Z]{26}-ams"], id="2.1-request-id"),
    case(b"Fly-Dispatch-Start", (b"Fly-Dispatch-Start: t=1",), [], id="2.1-fly-dispatch-start"),
    case(b"Fly-Traceparent", (b"Fly-Traceparent: x",), [], id="2.1-fly-traceparent-spoofed"),
    case(b"Fly-Anything", (b"Fly-Anything: x",), [], id="2.1-anything-of-fly"),
    case(b"Isthmus-Anything", (b"Isthmus-Anything: x",), [], id="2.1-anything-of-ours"),
    case(b"fly_client_ip", (b"fly_client_ip: 1.2.3.4",), [], id="2.1-underscores"),
    case(b"x_forwarded_for", (b"x_forwarded_for: 1.2.3.4",), [], id="2.1-underscores-of-others"),
    case(b"flyio-debug", (b"flyio-debug: doit",), [], id="3-flyio-debug-is-consumed"),
    case(b"fly-prefer-region", (b"fly-prefer-region: ams",), [], id="3-fly-prefer-region-is-consumed"),
    case(b"fly-force-region", (b"fly-force-region: ams",), [], id="3-fly-force-region-is-consumed"),
    case(b"fly-prefer-instance-id", (b"fly-prefer-instance-id: m1",), [], id="3-prefer-instance-is-consumed"),
    case(b"fly-force-instance-id", (b"fly-force-instance-id: m1",), [], id="3-force-instance-is-consumed"),
    case(
        b"fly-replay-cache-control",
        (b"fly-replay-cache-control: skip",),
        [b"skip"],
        id="3-fly-replay-cache-control-is-passed-on",
    ),
]


@pytest.mark.parametrize(("name", "lines", "expected"), TOLD)
async def test_told(edge: Edge, name: bytes, lines: tuple[bytes, ...], expected: list[bytes | str]) -> None:
    machine = await edge.machine("m1")
    await edge.start()
    response = await edge.get(b"/", *lines)
    assert response.status == 200
    values = machine.requests[0].values(name)
    assert len(values) == len(expected)
    for value, wanted in zip(values, expected, strict=True):
        pattern = b"%d" % edge.server.port if isinstance(wanted, str) else wanted
        assert re.fullmatch(pattern, value), (value, pattern)
    if name == b"Fly-Request-Id":
        assert response.values(name) == values


# The same from a trusted proxy.
BELIEVED = [
    case(b"Fly-Client-IP", (b"X-Forwarded-For: 1.2.3.4",), [b"1.2.3.4"], id="the-client-is-whom-it-names"),
    case(
        b"Fly-Client-IP",
        (b"X-Forwarded-For: 6.6.6.6, 1.2.3.4",),
        [b"1.2.3.4"],
        id="the-client-is-the-last-one-that-is-no-proxy",
    ),
    case(
        b"Fly-Client-IP",
        (b"X-Forwarded-For: 1.2.3.4, 127.0.0.7",),
        [b"1.2.3.4"],
        id="proxies-in-the-chain-are-passed-over",
    ),
    case(
        b"Fly-Client-IP",
        (b"X-Forwarded-For: 1.2.3.4", b"X-Forwarded-For: 127.0.0.7"),
        [b"1.2.3.4"],
        id="two-fields-are-one-list",
    ),
    case(b"Fly-Client-IP", (b"X-Forwarded-For: junk",), [CLIENT], id="what-is-no-address-ends-the-chain"),
    case(b"Fly-Client-IP", (b"Fly-Client-IP: 1.2.3.4",), [CLIENT], id="fly-client-ip-never-is"),
    case(b"X-Forwarded-For", (b"X-Forwarded-For: 1.2.3.4",), [b"1.2.3.4, 127.0.0.1"], id="appended-to"),
    case(b"X-Forwarded-Proto", (b"X-Forwarded-Proto: https",), [b"https"], id="proto"),
    case(b"X-Forwarded-Proto", (b"X-Forwarded-Proto: gopher",), [b"http"], id="proto-that-is-none"),
    case(b"X-Forwarded-SSL", (b"X-Forwarded-Proto: https",), [b"on"], id="ssl-follows-proto"),
    case(b"X-Forwarded-Port", (b"X-Forwarded-Port: 443",), [b"443"], id="port"),
    case(b"X-Forwarded-Host", (b"X-Forwarded-Host: shop.test",), [b"shop.test"], id="host"),
    case(b"Forwarded", (b"Forwarded: for=1.2.3.4",), [], id="forwarded-never-is"),
]


@pytest.mark.parametrize(("name", "lines", "expected"), BELIEVED)
async def test_believed_of_a_trusted_proxy(
    edge: Edge, name: bytes, lines: tuple[bytes, ...], expected: list[bytes]
) -> None:
    machine = await edge.machine("m1")
    await edge.start(trusted_proxies=("127.0.0.0/8",))
    assert (await edge.get(b"/", *lines)).status == 200
    assert machine.requests[0].values(name) == expected


async def test_2_1_via_has_the_version_of_the_client(edge: Edge) -> None:
    machine = await edge.machine("m1")
    await edge.start()
    await edge.exchange(b"GET / HTTP/1.0\r\nHost: app.test\r\n\r\n")
    assert machine.requests[0].values(b"via") == [b"1.0 isthmus"]


# What the client gets under a name, when the app says these lines under these options.
ANSWERED = [
    case({}, (), b"Via", [b"1.1 isthmus"], id="2.2-via"),
    case({}, (b"Via: 1.0 cache",), b"Via", [b"1.0 cache", b"1.1 isthmus"], id="2.2-via-is-appended-to"),
    case({}, (), b"Fly-Request-Id", [rb"[0-9A-Z]{26}-ams"], id="2.2-request-id"),
    case(
        {}, (b"Fly-Request-Id: own",), b"Fly-Request-Id", [rb"[0-9A-Z]{26}-ams"], id="2.2-request-id-is-ours"
    ),
    case({}, (b"Server: own",), b"Server", [b"own"], id="2.2-server-is-the-apps"),
    case({}, (), b"Server", [], id="2.2-no-server-of-ours"),
    case({"pristine": True}, (), b"Via", [], id="2.2-pristine-via"),
    case({"pristine": True}, (b"Via: 1.0 cache",), b"Via", [b"1.0 cache"], id="2.2-pristine-leaves-the-apps"),
    case({"pristine": True}, (), b"Fly-Request-Id", [], id="2.2-pristine-request-id"),
    case({"pristine": True}, (), b"Content-Length", [b"2"], id="2.2-pristine-is-whole"),
    case(
        {"pristine": True, "response_headers": {"x-a": "1"}},
        (),
        b"X-A",
        [b"1"],
        id="2.2-pristine-and-headers",
    ),
    case(
        {"response_headers": {"fly-request-id": False}},
        (),
        b"Fly-Request-Id",
        [],
        id="2.2-request-id-removed",
    ),
    case(
        {"response_headers": {"fly-request-id": False}}, (), b"Via", [b"1.1 isthmus"], id="2.2-and-only-that"
    ),
    case({"response_headers": {"server": False}}, (b"Server: own",), b"Server", [], id="2.2-false-removes"),
    case({"response_headers": {"x-a": "1"}}, (b"X-A: 0",), b"X-A", [b"1"], id="2.2-a-string-sets"),
    case({"response_headers": {"x-a": ["1", "2"]}}, (), b"X-A", [b"1", b"2"], id="2.2-a-list-sets-several"),
    case({}, (b"flyio-debug: x",), b"flyio-debug", [b"x"], id="2.2-no-flyio-debug-unless-asked"),
]


@pytest.mark.parametrize(("options", "lines", "name", "expected"), ANSWERED)
async def test_answered(
    edge: Edge, options: dict[str, object], lines: tuple[bytes, ...], name: bytes, expected: list[bytes]
) -> None:
    edge.put_app("app", "app.test", options=json.dumps(options))
    await edge.machine("m1", answer=lambda r: name_of(b"ok", *lines))
    await edge.start()
    client = await edge.client()
    for _ in range(2):  # the connection goes on
        response = await client.get()
        values = response.values(name)
        assert response.body == b"ok"
        assert len(values) == len(expected)
        assert all(map(re.fullmatch, expected, values))


CHOICES = [
    case((), "m1", id="nothing"),
    case((b"fly-prefer-region: gru",), "m2", id="prefer-region"),
    case((b"fly-prefer-region: nrt,gru,ams",), "m2", id="prefer-region-in-order"),
    case((b"fly-prefer-region: nrt, sa",), "m2", id="prefer-region-with-an-area"),
    case((b"fly-prefer-region: nrt",), "m1", id="prefer-region-then-the-nearest"),
    case((b"fly-prefer-region: atlantis",), "m1", id="prefer-region-that-nobody-knows"),
    case((b"fly-force-region: nrt,gru",), "m2", id="force-region"),
    case((b"fly-force-region: nrt",), "PR01", id="force-region-has-no-stand-in"),
    case((b"fly-force-region: nrt,any",), "m1", id="force-region-with-any"),
    case((b"fly-prefer-instance-id: m2",), "m2", id="prefer-instance"),
    case((b"fly-prefer-instance-id: gone",), "m1", id="prefer-instance-has-a-stand-in"),
    case((b"fly-force-instance-id: m2",), "m2", id="force-instance"),
    case((b"fly-force-instance-id: gone",), "PR02", id="force-instance-has-none"),
    case((b"fly-force-instance-id: o1",), "PR02", id="force-instance-of-another-app"),
    case((b"fly-prefer-instance-id: o1",), "m1", id="prefer-instance-of-another-app"),
    case((b"fly-force-instance-id: m2", b"fly-prefer-instance-id: m3"), "m2", id="force-beats-prefer"),
    case((b"fly-force-instance-id: m2", b"fly-prefer-region: iad"), "m2", id="instance-beats-region"),
    case((b"fly-force-instance-id: m2", b"fly-force-region: iad"), "PR01", id="both-forced-hold-both"),
    case((b"fly-prefer-instance-id: m2", b"fly-force-region: iad"), "m3", id="a-stand-in-is-of-the-region"),
    case(
        (b"fly-prefer-instance-id: gone", b"fly-prefer-region: gru"), "m2", id="a-stand-in-is-near-the-region"
    ),
    case((b"fly-force-region: gru", b"fly-prefer-region: iad"), "m2", id="forced-region-beats-preferred"),
    case((b"fly-force-region: ",), "PH12", id="empty"),
    case((b"fly-force-region: GRU",), "PH12", id="regions-are-in-lower-case"),
    case((b"fly-force-region: gru", b"fly-force-region: ams"), "PH12", id="twice"),
    case((b"fly-force-instance-id: a b",), "PH12", id="malformed-instance"),
    case((b"fly-prefer-instance-id: a;b",), "PH12", id="malformed-preferred-instance"),
    case((b"Fly-Prefer-Region: gru",), "m2", id="in-any-case"),
    case((b"fly_prefer_region: gru",), "m1", id="not-with-underscores"),
    case((b"fly-replay: instance=m2",), "m1", id="clients-cannot-replay"),
]


@pytest.mark.parametrize(("lines", "outcome"), CHOICES)
async def test_3_choice(edge: Edge, lines: tuple[bytes, ...], outcome: str) -> None:
    world = await World(edge).start()
    response = await edge.get(b"/", *lines)
    assert outcome_of(response) == outcome
    preferred = [line.partition(b": ")[2] for line in lines if line.startswith(b"fly-prefer-instance-id")]
    if outcome in MACHINES:
        unmet = [
            name
            for name in preferred
            if name.decode() != outcome and b"fly-force-instance-id" not in lines[0]
        ]
        assert world.last(outcome).values(b"fly-preferred-instance-unavailable") == unmet
    else:
        assert response.status == {"PH12": 400, "PR01": 503, "PR02": 502}[outcome]


OFF: list[object] = [
    case({"client_routing": False}, "{}", id="on-the-node"),
    case({}, '{"client_routing": false}', id="for-the-app"),
]


@pytest.mark.parametrize(("settings", "options"), OFF)
async def test_3_clients_that_may_not_choose_are_routed_as_others(
    edge: Edge, settings: dict[str, object], options: str
) -> None:
    world = await World(edge).start(**settings)
    edge.put_app("app", "app.test", options=options)
    for line in (
        b"fly-force-instance-id: m2",
        b"fly-force-region: nrt",
        b"fly-force-region: ;",
        b"flyio-debug: doit",
    ):
        response = await edge.get(b"/", line)
        assert response.body == b"m1"
        assert response.values(b"flyio-debug") == []
        assert world.last("m1").values(line.partition(b":")[0]) == []


async def test_3_a_forced_machine_is_tried_when_its_checks_fail_but_not_when_stopped(
    edge: Edge,
) -> None:
    world = await World(edge).start()
    world.fail_check("m2")
    assert await world.outcome(b"fly-force-instance-id: m2") == "m2"
    world.put("m2", "stopped")
    assert await world.outcome(b"fly-force-instance-id: m2") == "PR01"


DEBUGGED: list[object] = [
    case(
        b"doit",
        lambda w: None,
        {"sid": "m1", "sr": "ams", "app": "app", "replays": 0, "attempts": 1},
        id="asked",
    ),
    case(b"please", lambda w: None, None, id="asked-otherwise"),
    case(
        b"doit",
        lambda w: w.asks("m1", b"app=other;region=gru"),
        {"sid": "o2", "sr": "gru", "app": "other", "replays": 1, "attempts": 1},
        id="after-a-replay",
    ),
]


@pytest.mark.parametrize(("asked", "prepare", "expected"), DEBUGGED)
async def test_2_2_flyio_debug_says_where_a_request_went(
    edge: Edge, asked: bytes, prepare: Callable[[World], None], expected: dict[str, object] | None
) -> None:
    world = await World(edge).start()
    prepare(world)
    told = (await edge.get(b"/", b"flyio-debug: " + asked)).values(b"flyio-debug")
    if expected is None:
        assert told == []
    else:
        assert json.loads(told[0]) == {"n": "node1", "nr": "ams", **expected}


async def test_2_2_flyio_debug_comes_with_pristine_answers_and_not_with_the_next_one(edge: Edge) -> None:
    edge.put_app("app", "app.test", options='{"pristine": true}')
    await edge.machine("m1")
    await edge.start()
    client = await edge.client()
    assert (await client.get(b"/", b"flyio-debug: doit")).values(b"flyio-debug") != []
    assert (await client.get()).values(b"flyio-debug") == []
