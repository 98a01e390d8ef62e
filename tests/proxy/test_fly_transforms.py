"""`transform` of Fly's JSON form, which changes the replayed request: one case for each thing said of it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.proxy.replay_world import World, answer_with

if TYPE_CHECKING:
    from tests.proxy.edge import Edge

case = pytest.param

TRANSFORMS = [
    case({"path": "/new?x=1"}, b"GET /new?x=1 HTTP/1.1", {}, id="path-and-query-are-replaced"),
    case({"path": "/new"}, b"GET /new HTTP/1.1", {}, id="the-query-goes-with-the-path"),
    case({}, b"GET /old?a=b HTTP/1.1", {b"x-own": [b"1"]}, id="nothing"),
    case({"delete_headers": ["X-OWN"]}, None, {b"x-own": [], b"cookie": [b"c=1"]}, id="delete-in-any-case"),
    case({"delete_headers": ["x-other"]}, None, {b"x-own": [b"1"]}, id="delete-what-is-not-there"),
    case({"set_headers": [{"name": "X-Own", "value": "2"}]}, None, {b"x-own": [b"2"]}, id="set-overwrites"),
    case(
        {"set_headers": [{"name": "x_own", "value": "2"}]},
        None,
        {b"x-own": [], b"x_own": [b"2"]},
        id="set-overwrites-what-apps-take-for-it",
    ),
    case(
        {"set_headers": [{"name": "X-New", "value": "a"}, {"name": "x-new", "value": "b"}]},
        None,
        {b"x-new": [b"a", b"b"]},
        id="set-twice-is-two",
    ),
    case(
        {
            "set_headers": [{"name": "authorization", "value": "Bearer t"}],
            "delete_headers": ["authorization"],
        },
        None,
        {b"authorization": [b"Bearer t"]},
        id="delete-comes-before-set",
    ),
    case(
        {"set_headers": [{"name": "host", "value": "inner.test"}]},
        None,
        {b"host": [b"inner.test"]},
        id="host",
    ),
    case({"delete_headers": ["fly-force-instance-id"]}, None, {}, id="delete-a-routing-header"),
    case(
        {"delete_headers": ["fly-client-ip"]},
        None,
        {b"fly-client-ip": [b"127.0.0.1"]},
        id="what-the-proxy-says-stays",
    ),
]


@pytest.mark.parametrize(("transform", "line", "expected"), TRANSFORMS)
async def test_1_5_transform(
    edge: Edge, transform: dict[str, object], line: bytes | None, expected: dict[bytes, list[bytes]]
) -> None:
    world = await World(edge).start()
    world.asks("m1", {"instance": "m2", "transform": transform})
    assert await world.outcome(b"X-Own: 1", b"Cookie: c=1", b"Authorization: a", path=b"/old?a=b") == "m2"
    request = world.last("m2")
    assert request.line == (line or b"GET /old?a=b HTTP/1.1")
    assert {name: request.values(name) for name in expected} == expected


@pytest.mark.parametrize(
    "transform",
    [
        {"path": "new"},
        {"path": "/a b"},
        {"path": "/a\r\nX: y"},
        {"path": "/#a"},
        {"path": "/é"},
        {"path": 1},
        {"delete_headers": "cookie"},
        {"delete_headers": ["a b"]},
        {"delete_headers": ["host"]},
        {"delete_headers": ["content-length"]},
        {"delete_headers": ["Transfer-Encoding"]},
        {"delete_headers": ["upgrade"]},
        {"set_headers": {"name": "a", "value": "b"}},
        {"set_headers": [{"name": "a"}]},
        {"set_headers": [{"name": "a", "value": "b\r\nc: d"}]},
        {"set_headers": [{"name": "a", "value": "é"}]},
        {"set_headers": [{"name": "connection", "value": "close"}]},
        {"set_headers": [{"name": "content-length", "value": "0"}]},
        {"set_headers": [{"name": "transfer-encoding", "value": "chunked"}]},
        {"set_headers": [{"name": "fly-client-ip", "value": "1.2.3.4"}]},
        {"set_headers": [{"name": "fly-replay-src", "value": "x"}]},
        {"set_headers": [{"name": "x-forwarded-for", "value": "1.2.3.4"}]},
        {"set_headers": [{"name": "host", "value": "a b"}]},
        {"unknown": 1},
        [],
    ],
    ids=lambda transform: json.dumps(transform)[:60],
)
async def test_1_5_a_transform_that_would_break_the_request_is_refused(edge: Edge, transform: object) -> None:
    world = await World(edge).start()
    world.asks("m1", {"instance": "m2", "transform": transform})
    response = await edge.get(b"/", b"Content-Length: 0")
    assert (response.status, response.error) == (502, "PA03")
    assert world.seen("m2") == 0


async def test_1_5_a_transform_is_for_one_replay_only(edge: Edge) -> None:
    world = await World(edge).start()
    transform = {"path": "/new", "set_headers": [{"name": "x-own", "value": "2"}]}
    world.answers("m1", lambda r: answer_with({"instance": "m2", "transform": transform}))
    world.answers("m2", lambda r: answer_with(b"app=other"))
    assert await world.outcome(b"X-Own: 1", path=b"/old") == "o1"
    assert (world.last("m2").line, world.last("m2").values(b"x-own")) == (b"GET /new HTTP/1.1", [b"2"])
    assert (world.last("o1").line, world.last("o1").values(b"x-own")) == (b"GET /old HTTP/1.1", [b"1"])


async def test_1_6_a_fallback_is_the_original_request(edge: Edge) -> None:
    world = await World(edge).start()
    world.asks("m1", {"app": "empty", "fallback": "force_self", "transform": {"path": "/new"}})
    assert await world.outcome(path=b"/old") == "m1"
    assert world.last("m1").line == b"GET /old HTTP/1.1"
