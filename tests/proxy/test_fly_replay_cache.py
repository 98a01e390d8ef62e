"""Replay caching, one case for each thing that Fly's pages say of it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from proxy.core.replay_cache import ReplayCache
from proxy.core.request_head import RequestHead, parse_request_head
from proxy.metrics import ProxyMetrics
from proxy.settings import ProxySettings
from routing.options import parse_options
from routing.replay import Replay
from routing.replay_options import AS_USUAL, RULES_MAX, SOURCES_MAX, parse_prefix
from routing.transform import CacheWish
from tests.proxy.edge import wait_for
from tests.proxy.replay_world import World, answer_with, is_replayed, name_of, outcome_of
from tests.proxy.test_tunnels import SWITCHED, UPGRADE
from tests.routing.rows import put, row, table_with

if TYPE_CHECKING:
    from routing.table import RoutingTable, Service
    from tests.fakes.machine import Connection, Request
    from tests.proxy.edge import Edge

case = pytest.param
SKIP = b"fly-replay-cache-control: skip"
TTL = b"fly-replay-cache-ttl-secs: 60"


def rules(**rule: object) -> str:
    """The options of a service with one rule of the session kind."""
    return json.dumps(
        {"replay_cache": [{"type": "cookie", "name": "sid", "ttl_seconds": 60, "path_prefix": "/"} | rule]}
    )


async def routed(
    edge: Edge, *fields: bytes, options: str = "{}", instruction: object = b"instance=m2"
) -> World:
    """A world in which m1 sends everything on, and says so with these fields."""
    world = await World(edge).start()
    edge.put_app("app", "app.test", options=options)
    edge.put_app("app", "other-host.test", options=options)
    world.asks("m1", instruction, *fields)
    return world


async def ask(edge: Edge, path: bytes = b"/", *lines: bytes, host: bytes = b"app.test") -> str:
    client = await edge.client()
    client.send(b"\r\n".join((b"GET %b HTTP/1.1" % path, b"Host: " + host, *lines, b"", b"")))
    return outcome_of(await client.read_response())


def status(request: Request) -> list[bytes]:
    return request.values(b"fly-replay-cache-status")


# The prefix that is asked for, the paths of two requests, and how often the app gets one of them.
PATHS = [
    case(b"/a/*", b"/a/b", b"/a/c?d", 1, id="below-the-prefix"),
    case(b"/a/*", b"/a", b"/a/", 1, id="the-prefix-itself"),
    case(b"/a", b"/a/b", b"/a/c", 1, id="the-star-is-implied"),
    case(b"/a/", b"/a/b", b"/a/c", 1, id="a-slash-at-the-end-says-nothing"),
    case(b"/*", b"/a", b"/b/c", 1, id="everything"),
    case(b"/a/*", b"/a/b", b"/ab", 2, id="prefixes-end-at-a-slash"),
    case(b"/a/*", b"/a/b", b"/", 2, id="not-above"),
    case(b"/a/*", b"/a/b", b"/a/%2e%2e/c", 2, id="dot-segments-lead-out"),
    case(b"/a/*", b"/ab", b"/ab", 2, id="a-prefix-of-the-name-is-none-of-the-path"),
    case(b"/b/*", b"/a/b", b"/a/b", 2, id="it-must-match-the-request"),
    case(b"app.test/a/*", b"/a/b", b"/a/c", 1, id="with-the-host"),
    case(b"App.Test/a", b"/a/b", b"/a/c", 1, id="hosts-have-no-case"),
    case(b"else.test/a/*", b"/a/b", b"/a/c", 2, id="another-host-does-not-match"),
    case(b"app.test:80/a", b"/a/b", b"/a/c", 2, id="hosts-have-no-port"),
    case(b"https://app.test/a", b"/a/b", b"/a/c", 2, id="nor-a-scheme"),
    case(b"", b"/a/b", b"/a/b", 2, id="an-empty-prefix"),
    case(b"/a/*/b", b"/a/x/b", b"/a/y/b", 2, id="a-star-in-the-middle"),
]


@pytest.mark.parametrize(("prefix", "first", "second", "asked"), PATHS)
@pytest.mark.parametrize("form", ["header", "json"])
async def test_1_8_path(
    edge: Edge, prefix: bytes, first: bytes, second: bytes, asked: int, form: str
) -> None:
    if form == "header":
        world = await routed(edge, b"fly-replay-cache: " + prefix, TTL)
    else:
        cache = {"prefix": prefix.decode(), "ttl": 60}
        world = await routed(edge, instruction={"instance": "m2", "cache": cache})
    assert await ask(edge, first) == "m2"
    assert await ask(edge, second) == "m2"
    assert world.seen("m1") == asked
    # What cannot be remembered is replayed all the same.
    assert [status(request) for request in world.machines["m2"].requests] == [
        [b"miss"],
        [b"hit"] if asked == 1 else [b"miss"],
    ]


WISHES = [
    case((TTL,), b"instance=m2", "stored", id="granted"),
    case((b"fly-replay-cache-ttl-secs: 10",), b"instance=m2", "stored", id="ten-seconds"),
    case((b"fly-replay-cache-ttl-secs: 9",), b"instance=m2", "refused_ttl", id="less-than-ten-seconds"),
    case((), b"instance=m2", "refused_ttl", id="no-ttl"),
    case((b"fly-replay-cache-ttl-secs: 1m",), b"instance=m2", "refused_ttl", id="not-a-number"),
    case((TTL, TTL), b"instance=m2", "refused_ttl", id="ttl-twice"),
    case((TTL, b"fly-replay-cache: /"), b"instance=m2", "refused_prefix", id="prefix-twice"),
    case((TTL,), b"instance=m2;state=x", "refused_state", id="state"),
    case((TTL,), b"instance=m2;timeout=5s", "refused_timeout", id="timeout"),
    case((TTL,), b"instance=m2;fallback=force_self", "refused_fallback", id="fallback"),
    case((), {"transform": {}, "cache": {"prefix": "/", "ttl": 60}}, "refused_transform", id="transform"),
    case((), {"cache": {"prefix": "/", "ttl": 9}}, "refused_ttl", id="json-less-than-ten-seconds"),
    case((), {"cache": {"ttl": 60}}, "refused_prefix", id="json-without-a-prefix"),
    case((TTL,), {"state": "x"}, "", id="json-beats-the-fields"),
    case((TTL,), b"region=sa", "stored", id="region"),
    case((TTL,), b"prefer_instance=m2", "stored", id="prefer-instance"),
]


@pytest.mark.parametrize(("fields", "instruction", "outcome"), WISHES)
async def test_1_8_wish(
    edge: Edge, fields: tuple[bytes, ...], instruction: bytes | dict[str, object], outcome: str
) -> None:
    if isinstance(instruction, dict):
        instruction = {"instance": "m2", **instruction}
    world = await routed(edge, b"fly-replay-cache: /", *fields, instruction=instruction)
    assert [await ask(edge), await ask(edge)] == ["m2", "m2"]
    assert world.seen("m1") == (1 if outcome == "stored" else 2)
    counted = {"stored": 1, "hit": 1} if outcome == "stored" else {outcome: 2} if outcome else {}
    assert edge.metrics.app("app").cached == counted


SESSIONS = [
    case({}, [b"Cookie: sid=1"], [b"Cookie: sid=1"], 1, id="cookie"),
    case({}, [b"Cookie: a=b; sid=1 ; c=d"], [b"cookie: sid=1"], 1, id="cookie-among-others"),
    case({}, [b"Cookie: a=b", b"Cookie: sid=1"], [b"Cookie: sid=1"], 1, id="cookie-in-two-fields"),
    case({}, [b"Cookie: sid=1"], [b"Cookie: sid=2"], 2, id="another-value"),
    case({}, [b"Cookie: sid=1"], [], 2, id="without-it"),
    case({}, [], [], 2, id="never-there"),
    case({}, [b"Cookie: sid="], [b"Cookie: sid="], 2, id="empty"),
    case({}, [b"Cookie: SID=1"], [b"Cookie: SID=1"], 2, id="cookies-have-a-case"),
    case({}, [b"sid: 1"], [b"sid: 1"], 2, id="a-header-is-no-cookie"),
    case({"type": "header", "name": "X-Sid"}, [b"x-sid: 1"], [b"X-SID: 1"], 1, id="header"),
    case({"type": "header", "name": "X-Sid"}, [b"x-sid: 1"], [b"X-SID: 2"], 2, id="another-header"),
    case({"path_prefix": "/a"}, [b"Cookie: sid=1"], [b"Cookie: sid=1"], 2, id="not-below-the-prefix"),
    case({"path_prefix": "/x"}, [b"Cookie: sid=1"], [b"Cookie: sid=1"], 2, id="below-it-and-not"),
    case({"path_prefix": "/", "name": "s"}, [b"Cookie: s=1"], [b"Cookie: s=1"], 1, id="everywhere"),
    case({"path_prefix": "app.test"}, [b"Cookie: sid=1"], [b"Cookie: sid=1"], 1, id="for-the-host"),
    case({"path_prefix": "else.test/"}, [b"Cookie: sid=1"], [b"Cookie: sid=1"], 2, id="for-another-host"),
]


@pytest.mark.parametrize(("rule", "first", "second", "asked"), SESSIONS)
async def test_1_8_session(
    edge: Edge, rule: dict[str, object], first: list[bytes], second: list[bytes], asked: int
) -> None:
    world = await routed(edge, options=rules(**rule))
    assert [await ask(edge, b"/x", *first), await ask(edge, b"/y", *second)] == ["m2", "m2"]
    assert world.seen("m1") == asked
    assert (status(world.last("m2")) == [b"hit"]) is (asked == 1)


async def test_1_8_nothing_is_shared_between_hosts(edge: Edge) -> None:
    world = await routed(edge, options=rules())
    for host in (b"app.test", b"other-host.test"):
        await ask(edge, b"/", b"Cookie: sid=1", host=host)
    assert world.seen("m1") == 2
    world.asks("m1", b"instance=m3", b"fly-replay-cache: /", TTL)
    assert await ask(edge, b"/", host=b"app.test") == "m3"
    assert await ask(edge, b"/", host=b"other-host.test:80") == "m3"
    assert world.seen("m1") == 4
    # Neither case nor port makes another host.
    assert await ask(edge, b"/", host=b"APP.test:99") == "m3"
    assert world.seen("m1") == 4


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("kind", ["header", "json", "json-in-cache", "session"])
async def test_1_8_a_client_may_skip_what_allows_it(edge: Edge, kind: str, allowed: bool) -> None:
    cache = {"prefix": "/", "ttl": 60}
    match kind:
        case "header":
            bypass = b"fly-replay-cache-allow-bypass: " + (b"yes" if allowed else b"no")
            world = await routed(edge, b"fly-replay-cache: /", TTL, bypass)
        case "json":
            said = {"instance": "m2", "cache": cache, "allow_bypass": allowed}
            world = await routed(edge, instruction=said)
        case "json-in-cache":
            said = {"instance": "m2", "cache": cache | {"allow_bypass": allowed}}
            world = await routed(edge, instruction=said)
        case _:
            world = await routed(edge, options=rules(allow_bypass=allowed))
    for lines in ((), (SKIP,), ()):
        assert await ask(edge, b"/", b"Cookie: sid=1", *lines) == "m2"
    seen = [status(request) for request in world.machines["m2"].requests]
    assert seen == [[b"miss"], [b"bypass"] if allowed else [b"hit"], [b"hit"]]
    assert world.seen("m1") == (2 if allowed else 1)


async def test_1_7_4_a_request_that_was_not_replayed_has_no_status(edge: Edge) -> None:
    world = await World(edge).start()
    assert await ask(edge) == "m1"
    assert status(world.last("m1")) == []


async def test_1_8_a_remembered_replay_has_no_source_and_beats_what_the_client_asks_for(edge: Edge) -> None:
    world = await routed(edge, b"fly-replay-cache: /", TTL)
    await ask(edge)
    assert await ask(edge, b"/", b"fly-force-instance-id: m3", b"fly-replay-src: instance=m1") == "m2"
    assert world.last("m2").values(b"fly-replay-src") == []


@pytest.mark.parametrize("form", ["header", "json"])
@pytest.mark.parametrize("kind", ["path", "session"])
async def test_1_8_the_target_sends_back_and_has_it_forgotten(edge: Edge, form: str, kind: str) -> None:
    if kind == "path":
        world = await routed(edge, b"fly-replay-cache: /", TTL)
    else:
        world = await routed(edge, options=rules())
    assert await ask(edge, b"/", b"Cookie: sid=1") == "m2"
    back = (
        answer_with(b"app=app;instance=m1", b"fly-replay-cache: invalidate")
        if form == "header"
        else answer_with({"instance": "m1", "cache": {"invalidate": True}})
    )
    world.answers("m2", lambda r: back)
    assert await ask(edge, b"/", b"Cookie: sid=1") == "m1"
    world.asks("m1", b"instance=m3")
    assert await ask(edge, b"/", b"Cookie: sid=1") == "m3"
    assert edge.metrics.app("app").cached["invalidated"] == 1


GONE = [
    case(b"instance=m2", lambda w: w.put("m2", "stopped"), id="stopped"),
    case(b"instance=m2", lambda w: w.edge.table.apply("machines", ("m2",), None), id="deleted"),
    case(b"region=gru", lambda w: w.put("m2", cordoned=1), id="nobody-in-its-region"),
    case(
        b"app=other;instance=o1", lambda w: w.edge.table.apply("apps", ("other",), None), id="its-app-is-gone"
    ),
    case(
        b"app=other;instance=o1",
        lambda w: w.edge.table.apply("apps", ("other",), ("other", "elsewhere", "")),
        id="not-allowed-any-more",
    ),
]


@pytest.mark.parametrize(("instruction", "prepare"), GONE)
async def test_1_8_when_the_target_is_gone_the_app_is_asked(edge: Edge, instruction: bytes, prepare) -> None:
    world = await routed(edge, b"fly-replay-cache: /", TTL, instruction=instruction)
    await ask(edge)
    prepare(world)
    world.answers("m1", lambda r: name_of(b"m1"))
    assert await ask(edge) == "m1"
    assert status(world.last("m1")) == world.last("m1").values(b"fly-replay-failed") == []
    assert edge.table.service("app", 80).cached_replays is None
    assert edge.metrics.app("app").cached == {"stored": 1, "gone": 1} | (
        {} if b"app=other" in instruction else {"hit": 1}
    )


async def test_1_8_when_the_target_cannot_be_reached_the_app_is_asked_with_the_whole_body(edge: Edge) -> None:
    world = await routed(edge, b"fly-replay-cache: /", TTL)
    await ask(edge)
    await world.stop("m2")
    world.answers("m1", lambda r: name_of(r.body))
    response = await edge.exchange(b"POST / HTTP/1.1\r\nHost: app.test\r\nContent-Length: 5\r\n\r\nhello")
    assert response.body == b"hello"


async def test_1_8_the_app_is_asked_as_the_client_wanted(edge: Edge) -> None:
    world = await routed(edge, b"fly-replay-cache: /", TTL)
    await ask(edge)
    world.put("m2", "stopped")
    assert await ask(edge, b"/", b"fly-force-instance-id: m3") == "m3"


async def test_1_8_a_target_that_is_only_full_is_not_gone(edge: Edge) -> None:
    world = await routed(edge, b"fly-replay-cache: /", TTL)
    edge.put_app("app", "app.test", hard=1)
    await edge.server.close()
    await edge.start(queue_timeout_s=0.02)
    await ask(edge)
    target = edge.table.machine("m2")
    assert target is not None
    target.in_flight += 1
    assert await ask(edge) == "PR04"
    target.in_flight -= 1
    assert await ask(edge) == "m2"
    assert world.seen("m1") == 1


async def test_1_8_only_one_step_is_looked_up(edge: Edge) -> None:
    world = await routed(edge, b"fly-replay-cache: /", TTL, instruction=b"app=other;instance=o1")
    world.answers("o1", lambda r: answer_with(b"app=app;instance=m2", b"fly-replay-cache: /", TTL))
    assert [await ask(edge), await ask(edge)] == ["m2", "m2"]
    assert (world.seen("m1"), world.seen("o1"), world.seen("m2")) == (1, 2, 2)
    assert status(world.last("m2")) == [b"miss"]
    # What `other` asked for is not remembered for it either.
    assert await ask(edge, host=b"other.test") == "m2"
    assert edge.table.service("other", 80).cached_replays is not None


async def test_1_12_an_upgrade_goes_to_the_remembered_target(edge: Edge) -> None:
    async def switch(connection: Connection) -> None:
        await connection.read_until(b"\r\n\r\n")
        connection.writer.write(SWITCHED)
        await connection.read()

    world = await routed(edge, b"fly-replay-cache: /", TTL)
    await ask(edge)
    world.machines["m2"].behave = switch
    for connection in world.machines["m2"].connections:
        connection.writer.close()
    await wait_for(lambda: edge.metrics.upstreams_open <= 1)
    client = await edge.client()
    client.send(UPGRADE)
    assert (await client.read_response()).status == 101
    assert world.seen("m1") == 1


async def test_apps_without_remembered_replays_are_not_looked_up(edge: Edge) -> None:
    world = await routed(edge)
    assert await ask(edge) == "m2"
    assert edge.table.service("app", 80).cached_replays is None
    assert edge.metrics.app("app").cached == {}
    assert is_replayed(world.last("m2"))


# The cache alone: time, and bounds.


def head_of(path: str = "/", *lines: str, host: str = "app.test") -> RequestHead:
    raw = "\r\n".join((f"GET {path} HTTP/1.1", f"Host: {host}", *lines, "", ""))
    return parse_request_head(raw.encode(), ProxySettings("n1", "ams"))


class Memory:
    """A cache and the services that it is about."""

    def __init__(self, entries_max: int = 100, options: str = "{}", apps: tuple[str, ...] = ("web",)) -> None:
        self.table: RoutingTable = table_with(row("machines"))
        for app in apps:
            put(self.table, "apps", name=app)
            put(self.table, "services", app=app, options=options)
        assert not self.table.rejected
        self.metrics = ProxyMetrics()
        self.cache = ReplayCache(entries_max, self.metrics)

    def service(self, app: str = "web") -> Service:
        service = self.table.service(app, 80)
        assert service is not None
        return service

    def learn(self, head: RequestHead, prefix: str = "/", now: float = 0.0, app: str = "web") -> str:
        source = self.table.machine("m1")
        assert source is not None
        wish = CacheWish(prefix, 60) if prefix else None
        return self.cache.learn(self.service(app), source, Replay(instance="m2", cache=wish), head, now)

    def finds(self, head: RequestHead, now: float = 0.0, app: str = "web") -> bool:
        return self.cache.find(self.service(app), head, now) is not None


def test_an_entry_ends_with_its_time_and_leaves_nothing() -> None:
    memory = Memory()
    assert memory.learn(head_of(), now=5.0) == "stored"
    assert memory.finds(head_of(), now=64.9)
    assert not memory.finds(head_of(), now=65.0)
    assert memory.service().cached_replays is None
    assert memory.metrics.replay_cache_entries == 0


@pytest.mark.parametrize(
    ("path", "prefix"), [("/", b"/"), ("/a", b"/"), ("/a/b", b"/a/b"), ("/a/b/c/d", b"/a/b"), ("/a/bc", b"/")]
)
def test_the_longest_prefix_wins(path: str, prefix: bytes) -> None:
    memory = Memory()
    memory.learn(head_of("/x"), "/")
    memory.learn(head_of("/a/b"), "/a/b")
    entry = memory.cache.find(memory.service(), head_of(path), 0.0)
    assert entry is not None
    assert entry.key[1] == prefix


@pytest.mark.parametrize(("path", "session"), [("/", True), ("/a", False), ("/a/b", False)])
def test_the_longer_of_a_session_and_a_path_wins_and_the_session_between_equals(
    path: str, session: bool
) -> None:
    memory = Memory(options=rules())
    cookie = "Cookie: sid=1"
    memory.learn(head_of("/x", cookie), "/")
    memory.learn(head_of("/a", cookie), "/a")
    memory.learn(head_of("/x", cookie), "")
    entry = memory.cache.find(memory.service(), head_of(path, cookie), 0.0)
    assert entry is not None
    assert bool(entry.key[2]) is session


def test_a_newer_replay_takes_the_place_of_the_older_one() -> None:
    memory = Memory()
    memory.learn(head_of(), now=0.0)
    memory.learn(head_of(), now=50.0)
    assert memory.finds(head_of(), now=100.0)
    assert memory.metrics.replay_cache_entries == 1


def test_a_client_that_invents_sessions_displaces_only_the_oldest_of_the_app_with_most() -> None:
    options = rules()
    memory = Memory(entries_max=10, options=options, apps=("web", "quiet"))
    memory.learn(head_of("/", "Cookie: sid=mine"), "", app="quiet")
    for n in range(50):
        assert memory.learn(head_of("/", f"Cookie: sid={n}"), "") == "stored"
        assert memory.metrics.replay_cache_entries <= 10
    assert memory.finds(head_of("/", "Cookie: sid=mine"), app="quiet")
    kept = [n for n in range(50) if memory.finds(head_of("/", f"Cookie: sid={n}"))]
    assert kept == list(range(41, 50))


def test_what_is_used_stays_longer() -> None:
    memory = Memory(entries_max=3, options=rules())
    for n in range(3):
        memory.learn(head_of("/", f"Cookie: sid={n}"), "")
    assert memory.finds(head_of("/", "Cookie: sid=0"))
    memory.learn(head_of("/", "Cookie: sid=3"), "")
    assert [memory.finds(head_of("/", f"Cookie: sid={n}")) for n in range(4)] == [True, False, True, True]


def test_a_rule_ends_at_a_slash() -> None:
    memory = Memory(options=rules(path_prefix="/a"))
    assert memory.learn(head_of("/ab", "Cookie: sid=1"), "") == ""
    assert memory.learn(head_of("/a/b", "Cookie: sid=1"), "") == "stored"


def test_keys_are_small_whatever_clients_send() -> None:
    memory = Memory(options=rules())
    memory.learn(head_of("/", "Cookie: sid=" + "x" * 8_000), "")
    (key,) = memory.service().cached_replays.entries
    assert sum(map(len, key)) < 100


def test_without_room_nothing_is_remembered() -> None:
    memory = Memory(entries_max=0)
    assert memory.learn(head_of()) == ""
    assert not memory.finds(head_of())


@pytest.mark.parametrize("entries_max", [0, 3, 100])
def test_another_bound_holds_at_once(entries_max: int) -> None:
    memory = Memory(options=rules())
    for n in range(10):
        memory.learn(head_of("/", f"Cookie: sid={n}"), "")
    memory.cache.adopt(entries_max)
    kept = [n for n in range(10) if memory.finds(head_of("/", f"Cookie: sid={n}"))]
    assert kept == list(range(10))[10 - min(entries_max, 10) :]


def test_services_that_are_gone_are_forgotten() -> None:
    memory = Memory(apps=("web", "old"))
    memory.learn(head_of(), app="old")
    memory.table.apply("services", ("old", 0), None)
    memory.learn(head_of(), app="web")
    assert memory.metrics.replay_cache_entries == 1


def test_a_path_of_many_segments_costs_no_more_than_the_longest_prefix() -> None:
    memory = Memory()
    memory.learn(head_of("/a/b"), "/a/b")
    lookups = 0

    class Counting(dict):
        def get(self, key, default=None):
            nonlocal lookups
            lookups += 1
            return super().get(key, default)

    memory.service().cached_replays.entries = Counting(memory.service().cached_replays.entries)
    assert memory.finds(head_of("/a/b" + "/c" * 3_000))
    assert not memory.finds(head_of("/c" * 4_000))
    assert lookups < 10


def test_the_longest_rule_that_the_request_has_a_value_for_counts() -> None:
    options = json.dumps(
        {
            "replay_cache": [
                {"type": "header", "name": "x-b", "ttl_seconds": 30, "path_prefix": "/a"},
                {"type": "cookie", "name": "sid", "ttl_seconds": 10},
            ]
        }
    )
    memory = Memory(options=options)
    memory.learn(head_of("/a", "x-b: 1", "Cookie: sid=1"), "")
    assert memory.finds(head_of("/a/c", "x-b: 1"), now=29.0)
    assert not memory.finds(head_of("/a/c", "Cookie: sid=1"))
    memory.learn(head_of("/a", "Cookie: sid=1"), "")
    assert memory.finds(head_of("/z", "Cookie: sid=1"), now=9.0)
    assert not memory.finds(head_of("/z", "Cookie: sid=1"), now=10.0)


@pytest.mark.parametrize(
    "text", ["/", "/*", "/api", "/api/", "/api/*", "a.test/api", "a.test", "A.test/api/*"]
)
def test_forms_of_a_prefix(text: str) -> None:
    host, path = parse_prefix(text)
    assert host in {b"", b"a.test"}
    assert path in {b"/", b"/api"}


RULE = {"type": "cookie", "name": "sid", "ttl_seconds": 60}


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"replay_cache": {}}, "must be a list"),
        ({"replay_cache": [RULE] * (RULES_MAX + 1)}, "at most"),
        ({"replay_cache": ["x"]}, "must be an object"),
        ({"replay_cache": [RULE | {"ttl": 1}]}, "unknown key 'ttl'"),
        ({"replay_cache": [RULE | {"type": "ip"}]}, "cookie or header"),
        ({"replay_cache": [RULE | {"type": []}]}, "cookie or header"),
        ({"replay_cache": [RULE | {"name": "a b"}]}, "none of a cookie"),
        ({"replay_cache": [RULE | {"ttl_seconds": 9}]}, "within 10"),
        ({"replay_cache": [RULE | {"ttl_seconds": True}]}, "within 10"),
        ({"replay_cache": [RULE | {"path_prefix": "a b"}]}, "no prefix"),
        ({"replay_cache": [RULE | {"allow_bypass": 1}]}, "true or false"),
        ({"replay_from": "*"}, "must be a list"),
        ({"replay_from": ["*"] * (SOURCES_MAX + 1)}, "at most"),
        ({"replay_from": ["a b"]}, "no app"),
        ({"replay_from": [1]}, "no app"),
        ({"client_routing": 1}, "true or false"),
        ({"pristine": "yes"}, "true or false"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse_options(json.dumps(options))


def test_what_is_not_said_is_as_usual() -> None:
    options = parse_options('{"maintenance": "x"}')
    assert options is not None
    assert options.replay == AS_USUAL
    assert options.replay.client_routing
