"""What is fuzzed, and what must hold for any bytes.

A target takes bytes and returns; what it raises is a finding. Of those that read streams, the bytes come
once in one read and once cut into many, and both must be the same to everybody. Oracles are h11, which
this project has no part in, and plain strict expressions.
"""

from __future__ import annotations

import json
import random
import re
from typing import TYPE_CHECKING

import h11

from proxy.core.access_line import Entry, render_combined, render_json
from proxy.core.client_hello import ClientHello, ClientHelloError, parse_client_hello
from proxy.core.errors import ProxyError, RequestError, ResponseError
from proxy.core.framing import BodyError, ChunkedBody
from proxy.core.proxy_protocol import Announced, ProxyHeaderError, parse_announcement
from proxy.core.request_head import RequestHead, parse_request_head
from proxy.core.response_head import ResponseHead, parse_response_head
from proxy.core.usual_heads import read_usual_request, read_usual_response
from proxy.core.wishes import plan_want
from routing.hosts import normalise_host, normalise_path
from routing.replay import Replay, ReplayError, format_replay_src, parse_replay_header, parse_replay_json
from tests.fuzz.world import SETTINGS, World

if TYPE_CHECKING:
    from collections.abc import Callable

_FIELD = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[ \t]*[^\0-\x08\n-\x1f\x7f]*")
_TARGET = re.compile(rb"/[!\"$-~]*|\*")
_HOST = re.compile(rb"[A-Za-z0-9._-]+(:[0-9]{1,5})?|\[[0-9A-Fa-f:.]+\](:[0-9]{1,5})?")
_STATUS = re.compile(rb"HTTP/1\.1 ([1-5][0-9][0-9]) [^\r\n]*\r\n")
_LENGTH = re.compile(rb"\r\nContent-Length: ([0-9]+)\r\n")
# Only the proxy says these to a machine, once each.
_OWN = (b"fly-client-ip", b"x-forwarded-for", b"x-forwarded-proto", b"fly-request-id", b"host", b"via")
_NEVER = (
    b"te",
    b"trailer",
    b"keep-alive",
    b"http2-settings",
    b"proxy-authorization",
    b"x-real-ip",
    b"forwarded",
)


def cut(data: bytes, seed: int) -> list[bytes]:
    """Cut a stream into reads; every byte alone for a seed of 0."""
    if not seed:
        return [data[i : i + 1] for i in range(len(data))]
    rng = random.Random(seed)
    pieces, at = [], 0
    while at < len(data):
        size = rng.choice((1, 2, 3, 7, 20, 100, 1_000))
        pieces.append(data[at : at + size])
        at += size
    return pieces


# The data plane, whole


def fuzz_requests(data: bytes) -> None:
    """A client's bytes through the connection: machines get what both parsers agree on, however it is cut."""
    seed, stream = data[:1], data[1:]
    whole, pieces = World(table="whole"), World(table="pieces")
    whole.send(stream)
    pieces.send(*cut(stream, seed[0] if seed else 1))
    for world in (whole, pieces):
        world.settle()
        for machine in world.machines:
            check_forwarded(bytes(machine.transport.written))
    assert whole.received == pieces.received, (whole.received, pieces.received)
    if statuses(whole) != statuses(pieces) or whole.wire.closing != pieces.wire.closing:
        # What will not do may be refused before it is complete, or when it was waited for in vain.
        whole.age()
        pieces.age()
        assert statuses(whole) == statuses(pieces)
    for world in (whole, pieces):
        world.end()


def statuses(world: World) -> list[bytes]:
    """The verdict on each request; the code may depend on how much was there when it was judged."""
    found, written, at = [], bytes(world.wire.written), 0
    if world.tunnelled:
        return [b"tunnel"]
    while at < len(written):
        match = _STATUS.match(written, at)
        assert match is not None, written[at : at + 100]
        end = written.index(b"\r\n\r\n", at) + 4
        length = _LENGTH.search(written, at, end)
        at = end
        if length is not None and not written.startswith(b"HTTP/1.1 ", end):  # or it answers a HEAD
            at = end + int(length[1]) if len(written) >= end + int(length[1]) else end
        status = match[1]
        refused = b"fly-proxy-error: P" in written[:end] and status[:1] in b"45" and status != b"404"
        found.append(b"refused" if refused else status)
    return found


def check_forwarded(stream: bytes) -> None:
    """What a machine got is nothing but requests that are beyond all doubt."""
    head = stream[: stream.find(b"\r\n\r\n")]
    if not head:
        return
    assert stream.find(b"\r\n\r\n") > 0
    line, *lines = head.split(b"\r\n")
    method, target, version = line.split(b" ")
    assert method.isupper() or b"-" in method
    assert version == b"HTTP/1.1"
    assert _TARGET.fullmatch(target), target
    names: list[bytes] = []
    for field in lines:
        assert _FIELD.fullmatch(field), field
        names.append(field[: field.index(b":")].lower())
    for name in _OWN:
        assert names.count(name) == 1, (name, head)
    assert not set(_NEVER) & set(names)
    assert names.count(b"content-length") + names.count(b"transfer-encoding") <= 1
    assert _HOST.fullmatch(lines[0].removeprefix(b"Host: ")), lines[0]


# Requests whose answers are fuzzed, by the first byte of the input.
ASKED = (
    b"GET / HTTP/1.1\r\nHost: app.test\r\n\r\n",
    b"HEAD / HTTP/1.1\r\nHost: app.test\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: app.test\r\nContent-Length: 5\r\n\r\nhello",
    b"PUT / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n0\r\n\r\n",
    b"GET / HTTP/1.0\r\nHost: app.test\r\nConnection: keep-alive\r\n\r\n",
    b"GET /ws HTTP/1.1\r\nHost: app.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
)
AGAIN = b"GET /again HTTP/1.1\r\nHost: app.test\r\nConnection: close\r\n\r\n"


def fuzz_answers(data: bytes) -> None:
    """A machine's bytes through both connections: one whole answer, or the client sees the cut."""
    (kind, seed), stream = data[:2].ljust(2, b"\0"), data[2:]
    asked = ASKED[kind % len(ASKED)]
    results = []
    for pieces in ([stream], cut(stream, seed >> 1)):
        world = World(lambda pieces=pieces: pieces, hangs_up=bool(seed & 1))  # type: ignore[misc]
        world.send(asked)
        if not read_answer(world, asked):
            world.age()
        results.append(read_answer(world, asked) or ("cut",))
        if not world.wire.closing and not world.tunnelled:
            ask_again(world, asked, stream)
        world.end()
    assert results[0] == results[1], results


def ask_again(world: World, asked: bytes, stream: bytes) -> None:
    """The next request gets an answer of its own, and never behind one that went on or was the last."""
    before, machines = len(world.wire.written), len(world.machines)
    world.answer = lambda: [b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nagain"]
    world.send(AGAIN)
    second = bytes(world.wire.written[before:])
    assert second.startswith(b"HTTP/1.1 200 OK\r\n"), second[:200]
    assert second.endswith(b"again"), second[-200:]
    parser = make_client(asked)
    try:
        parser.receive_data(stream or b"-")
        while parser.their_state in {h11.SEND_RESPONSE, h11.SEND_BODY}:
            if parser.next_event() is h11.NEED_DATA:
                break
        # h11 knows of no HTTP/1.0 that is kept alive.
        kept = parser.their_http_version == b"1.0" and b"keep-alive" in stream.lower()
        ends = {h11.DONE, h11.MUST_CLOSE} if kept else {h11.DONE}
        clean = parser.their_state in ends and not parser.trailing_data[0]
    except h11.RemoteProtocolError:
        clean = False
    assert clean or len(world.machines) > machines, "used again behind more, or less, than one answer"


def make_client(asked: bytes) -> h11.Connection:
    parser = h11.Connection(h11.CLIENT, max_incomplete_event_size=200_000)
    method = asked.split(b" ", 1)[0]
    upgrade = [("connection", "upgrade"), ("upgrade", "x")] if b"/ws" in asked else []
    parser.send(h11.Request(method=method, target="/", headers=[("host", "app.test"), *upgrade]))
    parser.send(h11.EndOfMessage())
    return parser


def read_answer(world: World, asked: bytes) -> tuple[object, ...]:
    """What a client with another parser makes of the answer: status and body, cut, or nothing yet."""
    written = bytes(world.wire.written)
    parser = make_client(asked)
    if written:  # nothing would be the end
        parser.receive_data(written)
    if world.wire.closing and not world.wire.aborted:
        parser.receive_data(b"")
    status, body = 0, b""
    while True:
        try:
            event = parser.next_event()
        except h11.RemoteProtocolError as error:
            # Only one that ends too early; anything else is a stream that we made.
            assert "closed" in str(error) or "incomplete" in str(error).lower() or not written, error
            return ("cut",)
        if isinstance(event, h11.InformationalResponse) and event.status_code == 101:
            return (101,)
        if isinstance(event, h11.Response):
            status = event.status_code
        elif isinstance(event, h11.Data):
            body += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage):
            break
        elif not isinstance(event, h11.InformationalResponse):
            return ("cut",) if world.wire.closing else ()
    # An answer that turns out to be wrong after its head was passed on is cut instead.
    return ("cut",) if b"fly-proxy-error" in written else (status, body)


# The parts, one by one


def fuzz_request_head(data: bytes) -> None:
    """A head is refused, or h11 reads the same out of it; and so does who knows its lines."""
    end = data.find(b"\r\n\r\n") + 4
    if end < 4:
        return
    raw = data[:end]
    usual = read_usual_request(raw, SETTINGS, None)
    if usual is not None:
        again = read_usual_request(raw, SETTINGS, usual[1])
        assert again is not None
        assert describe(usual[0]) == describe(again[0]) == describe(parse_request_head(raw, SETTINGS))
    try:
        head = parse_request_head(raw, SETTINGS)
        if head.routing is not None:
            plan_want(head.routing)
    except RequestError:
        return
    parser = h11.Connection(h11.SERVER, max_incomplete_event_size=100_000)
    parser.receive_data(data[:end])
    event = parser.next_event()
    assert isinstance(event, h11.Request), event
    assert event.method == head.method
    assert event.target == head.target or event.target.lower().startswith(b"http")
    fields = dict(event.headers)
    assert (b"transfer-encoding" in fields) == head.chunked
    if b"content-length" in fields:
        assert int(fields[b"content-length"]) == head.content_length
    said = {(name, value) for name, value in event.headers}
    for line in head.lines:
        name, _, value = line.partition(b":")
        assert (name.lower(), value.strip()) in said, line
    render(head.method, head.host, head.target, head.lines)


# How a parser came to know the rest.
_ON_THE_WAY = frozenset(("framing", "connection", "hosts"))


def describe(head: RequestHead | ResponseHead) -> dict[str, object]:
    """Everything that a head says."""
    names = (name for name in dir(head) if not name.startswith("_") and name not in _ON_THE_WAY)
    return {name: value for name in names if not callable(value := getattr(head, name))}


def render(method: bytes, host: bytes, target: bytes, lines: list[bytes]) -> None:
    """Nothing of a head breaks out of a line of the log."""
    entry = Entry(
        0, b"id", b"::1", method, host, target, 1, lines, 200, 0, 0, 0.0, 0.0, "a", "m", "r", 0, 0, ""
    )
    line = render_json(entry)
    assert line.count(b"\n") == 1
    assert line.isascii()
    assert json.loads(line)["status"] == 200
    line = render_combined(entry)
    assert line.count(b"\n") == 1
    assert line[:-1].decode("ascii").isprintable()


def fuzz_response_head(data: bytes) -> None:
    """A head is refused, or h11 reads the same out of it; and so does who knows its lines."""
    end = data.find(b"\r\n\r\n") + 4
    if end < 4:
        return
    usual = read_usual_response(data[: end - 4])
    if usual is not None:
        assert describe(usual) == describe(parse_response_head(data[:end]))
    try:
        head = parse_response_head(data[:end])
    except ResponseError:
        return
    if head.status == 101:  # nobody asked h11 for it
        return
    parser = h11.Connection(h11.CLIENT, max_incomplete_event_size=100_000)
    parser.send(h11.Request(method="GET", target="/", headers=[("host", "a")]))
    parser.send(h11.EndOfMessage())
    parser.receive_data(data[:end])
    event = parser.next_event()
    assert isinstance(event, h11.Response | h11.InformationalResponse), event
    assert event.status_code == head.status
    fields = dict(event.headers)
    assert (b"transfer-encoding" in fields) == head.chunked
    if head.content_length >= 0:
        assert int(fields[b"content-length"]) == head.content_length


def fuzz_chunks(data: bytes) -> None:
    """A body is refused, or h11 decodes the same; and no cut changes it."""
    seed, stream = data[:1], data[1:]
    whole = decode([stream])
    pieces = decode(cut(stream, seed[0] if seed else 1))
    if whole is None or not whole[1]:
        # An incomplete or wrong stream may be found wrong sooner or later, but is never complete.
        assert pieces is None or not pieces[1], (whole, pieces)
        return
    assert pieces == whole
    parser = h11.Connection(h11.SERVER, max_incomplete_event_size=100_000)
    parser.receive_data(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + stream)
    assert isinstance(parser.next_event(), h11.Request)
    body = b""
    try:
        while isinstance(event := parser.next_event(), h11.Data):
            body += bytes(event.data)
    except h11.RemoteProtocolError as error:
        # What trailers say is nothing to us, for they are dropped.
        assert "Content-Length" in str(error) or "Transfer-Encoding" in str(error), error
        return
    assert isinstance(event, h11.EndOfMessage), event
    assert body == whole[0]
    assert parser.trailing_data[0] == whole[2]


def decode(pieces: list[bytes]) -> tuple[bytes, bool, bytes] | None:
    body = ChunkedBody(bound_overhead=True)
    decoded, rest = b"", b""
    try:
        for piece in pieces:
            if body.ended:
                rest += piece
            else:
                decoded += body.feed(piece)
    except BodyError:
        return None
    return decoded, body.ended, body.rest + rest


def fuzz_replay(data: bytes) -> None:
    """An instruction is refused in short printable words, or is safe to act on."""
    parse: Callable[[bytes], Replay] = parse_replay_json if data[:1] == b"{" else parse_replay_header
    try:
        replay = parse(data)
    except ReplayError as error:
        assert error.message.isprintable()
        assert len(error.message) < 400  # 60 characters that are escaped to four each, and words
        return
    assert replay.app or replay.regions or replay.instance or replay.prefer_instance or replay.elsewhere
    source = format_replay_src("m1", "ams", 0, replay.state)
    assert source.count(b";") == (3 if replay.state is not None else 2), source
    assert all(0x21 <= byte < 0x7F for byte in source)


def fuzz_wishes(data: bytes) -> None:
    """Wishes of a client are refused, or make a choice."""
    names = (b"fly-prefer-region", b"fly-force-region", b"fly-prefer-instance-id", b"fly-force-instance-id")
    values = data.split(b"\n")[:4]
    try:
        plan_want([(names[i], value) for i, value in enumerate(values)])
    except ProxyError as error:
        assert error.detail.isprintable()


def fuzz_client_hello(data: bytes) -> None:
    """The same is read from every prefix that is long enough, and more is asked for only where it helps."""
    whole = read_hello(data)
    for end in range(0, len(data), max(1, len(data) // 8)):
        part = read_hello(data[:end])
        if isinstance(part, int):
            assert part > end
        elif part is None:
            assert whole is None
        else:
            assert whole == part
    if isinstance(whole, ClientHello) and whole.server_name is not None:
        assert re.fullmatch(r"[a-z0-9_][a-z0-9._-]*", whole.server_name), whole


def read_hello(data: bytes) -> ClientHello | int | None:
    try:
        return parse_client_hello(data)
    except ClientHelloError:
        return None


def fuzz_announcement(data: bytes) -> None:
    """A PROXY header means the same however it is cut, and what is none is none from some byte on."""
    whole = read_announcement(data)
    for end in range(len(data)):
        part = read_announcement(data[:end])
        if part is False:
            assert whole is False
        elif part is not None:
            assert part == whole


def read_announcement(data: bytes) -> Announced | bool | None:
    try:
        return parse_announcement(data)
    except ProxyHeaderError:
        return False


def fuzz_names(data: bytes) -> None:
    """A normalised path stays one, without a segment that climbs."""
    path = normalise_path(data)
    assert path.startswith(b"/")
    assert not {b"..", b"."} & set(path.split(b"/"))
    assert b"//" not in path
    assert b"\\" not in path
    host = normalise_host(data)
    assert host == host.lower()


TARGETS: dict[str, Callable[[bytes], None]] = {
    "requests": fuzz_requests,
    "answers": fuzz_answers,
    "request_head": fuzz_request_head,
    "response_head": fuzz_response_head,
    "chunks": fuzz_chunks,
    "replay": fuzz_replay,
    "wishes": fuzz_wishes,
    "client_hello": fuzz_client_hello,
    "announcement": fuzz_announcement,
    "names": fuzz_names,
}
