"""Laws of the replay parser: no bytes surprise it, and it reads back what an app would write."""

from __future__ import annotations

import json

from hypothesis import example, given
from hypothesis import strategies as st

from proxy.core.request_head import parse_request_head
from proxy.core.transforms import apply_transform
from proxy.settings import ProxySettings
from routing.catalog import APP_NAME, IDENTIFIER, REGION_CODE
from routing.hosts import normalise_path
from routing.replay import (
    Replay,
    ReplayError,
    format_replay_src,
    parse_regions,
    parse_replay_header,
    parse_replay_json,
)
from routing.replay_options import is_below, parse_prefix

_PIECES = st.sampled_from(
    [
        *(
            b"app",
            b"region",
            b"instance",
            b"prefer_instance",
            b"state",
            b"elsewhere",
            b"timeout",
            b"fallback",
        ),
        *(
            b"=",
            b";",
            b'"',
            b"\\",
            b",",
            b" ",
            b"\t",
            b"\r\n",
            b"\x00",
            b"\xc3\xa9",
            b"%",
            b"true",
            b"10s",
            b"web",
        ),
        *(b"{", b"}", b"[", b":", b"null", b"1e999", b"ams", b"any", b"force_self", b"\\ud800"),
    ]
)
_BYTES = st.binary(max_size=200) | st.lists(_PIECES, max_size=30).map(b"".join)

_TEXT = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40)
_REGIONS = st.lists(st.sampled_from(["ams", "iad", "eu", "us", "lab-1"]), unique=True, max_size=4).flatmap(
    lambda codes: st.sampled_from([(*codes,), (*codes, "any")])
)


def _is_acceptable(replay: Replay) -> bool:
    somewhere = replay.app or replay.regions or replay.instance or replay.prefer_instance or replay.elsewhere
    return bool(somewhere) and not (replay.instance and replay.prefer_instance)


_REPLAYS = st.builds(
    Replay,
    app=st.none() | st.sampled_from(["web", "a-b_c", "9"]),
    regions=_REGIONS,
    instance=st.none() | st.sampled_from(["m1", "0A.b-c_d"]),
    prefer_instance=st.none() | st.sampled_from(["m1", "x"]),
    state=st.none() | _TEXT,
    elsewhere=st.booleans(),
    timeout_ms=st.none() | st.integers(1, 3_600_000),
    fallback=st.sampled_from([None, "force_self", "prefer_self"]),
).filter(_is_acceptable)


def _fields(replay: Replay) -> dict[str, str | bool]:
    """Return what an app that wants this replay would say."""
    fields: dict[str, str | bool | None] = {
        "app": replay.app,
        "region": ",".join(replay.regions) or None,
        "instance": replay.instance,
        "prefer_instance": replay.prefer_instance,
        "state": replay.state,
        "elsewhere": replay.elsewhere or None,
        "timeout": None if replay.timeout_ms is None else f"{replay.timeout_ms}ms",
        "fallback": replay.fallback,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _write_header(replay: Replay, gap: str) -> bytes:
    def quote(value: str | bool) -> str:
        text = "true" if value is True else str(value)
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'

    pairs = (f"{name}{gap}={gap}{quote(value)}" for name, value in _fields(replay).items())
    return f"{gap};{gap}".join(pairs).encode()


def _check(replay: Replay) -> None:
    """Whatever was accepted is safe to put into headers and lookups."""
    assert _is_acceptable(replay)
    assert replay.app is None or APP_NAME.fullmatch(replay.app)
    assert replay.instance is None or IDENTIFIER.fullmatch(replay.instance)
    assert replay.prefer_instance is None or IDENTIFIER.fullmatch(replay.prefer_instance)
    assert all(REGION_CODE.fullmatch(code) for code in replay.regions)
    assert replay.timeout_ms is None or replay.timeout_ms > 0
    format_replay_src("m1", "ams", 0, replay.state)


@given(_BYTES)
@example(b"[" * 65_536)
@example(b'{"a":' * 13_000)
@example(b"9" * 65_536)
@example(b"app=" + b'"' * 8_000)
@example(b" " * 8_192)
def test_any_bytes_are_a_replay_or_a_replay_error(value: bytes) -> None:
    for parse in (parse_replay_header, parse_replay_json):
        try:
            replay = parse(value)
        except ReplayError as error:
            message = error.message
            assert message.isprintable()
            assert len(message) < 200
        else:
            _check(replay)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
_NAMES = st.sampled_from(
    [
        *_fields(Replay("a", ("ams",), "i", "p", "s", True, 1, "force_self")),
        *("allow_bypass", "cache", "transform", "x"),
    ]
)


@given(
    st.dictionaries(_NAMES, _JSON | st.sampled_from(["ams", "web", "10s", "true", "force_self"]), max_size=4)
)
def test_any_json_object_is_a_replay_or_a_replay_error(fields: dict[str, object]) -> None:
    try:
        replay = parse_replay_json(json.dumps(fields).encode())
    except ReplayError as error:
        message = error.message
        assert message.isprintable()
    else:
        _check(replay)


_TOKENS = st.sampled_from(["x-a", "Host", "host", "content-length", "fly-region", "connection", "cookie"])
_SOME_TEXT = st.text(max_size=12) | st.sampled_from(["/a?b", "b.test", "v"])
_TRANSFORMS = st.fixed_dictionaries(
    {},
    optional={
        "path": _SOME_TEXT | _JSON,
        "delete_headers": st.lists(_TOKENS | _SOME_TEXT, max_size=3) | _JSON,
        "set_headers": st.lists(
            st.fixed_dictionaries({"name": _TOKENS | _SOME_TEXT, "value": _SOME_TEXT}) | _JSON, max_size=3
        ),
    },
)


@given(_TRANSFORMS)
def test_whatever_a_transform_says_the_request_stays_one_request(transform: dict[str, object]) -> None:
    head = parse_request_head(
        b"POST /old HTTP/1.1\r\nHost: a.test\r\nX-A: 1\r\nCookie: c\r\nContent-Length: 2\r\n\r\n",
        ProxySettings("n1", "ams"),
    )
    before = (head.target, head.host, head.lines)
    try:
        replay = parse_replay_json(json.dumps({"app": "web", "transform": transform}).encode())
        assert replay.transform is not None
        original = apply_transform(head, replay.transform)
    except ReplayError as error:
        message = error.message
        assert message.isprintable()
        assert (head.target, head.host, head.lines) == before
        return
    raw = b"POST %b HTTP/1.1\r\nHost: %b\r\n" % (head.target, head.host)
    raw += b"".join(line + b"\r\n" for line in head.lines) + b"Content-Length: 2\r\n\r\n"
    again = parse_request_head(raw, ProxySettings("n1", "ams"))
    assert (again.target, again.host, again.content_length) == (head.target, head.host, 2)
    assert [line.rstrip() for line in head.lines] == again.lines
    original.put_back(head)
    assert (head.target, head.host, head.lines) == before


_PREFIXES = st.text("ab./*%\\ ?#:", max_size=10)


@given(_PREFIXES, st.lists(st.sampled_from(["a", "b", "ab", "..", "%61", ""]), max_size=4))
def test_a_prefix_covers_what_is_below_it_and_nothing_else(text: str, segments: list[str]) -> None:
    try:
        host, prefix = parse_prefix(text)
    except ValueError:
        return
    assert host == host.lower()
    path = normalise_path(("/" + "/".join(segments)).encode())
    wanted = [] if prefix == b"/" else prefix.split(b"/")[1:]
    assert is_below(path, prefix) == (path.split(b"/")[1 : 1 + len(wanted)] == wanted)


@given(st.text(max_size=60))
def test_any_list_of_regions_is_read_or_refused(text: str) -> None:
    try:
        regions = parse_regions(text)
    except ReplayError:
        return
    assert regions
    assert parse_regions(",".join(regions)) == regions


@given(_REPLAYS, st.sampled_from(["", " ", "\t "]))
def test_both_forms_say_what_the_app_wrote(replay: Replay, gap: str) -> None:
    assert parse_replay_header(_write_header(replay, gap)) == replay
    assert parse_replay_json(json.dumps(_fields(replay)).encode()) == replay


@given(st.text())
def test_the_source_header_is_four_fields_whatever_the_state(state: str) -> None:
    state = state.encode("utf-8", "replace").decode()
    value = format_replay_src("m1", "ams", 42, state)
    instance, region, t, shown = value.split(b";")
    assert (instance, region, t) == (b"instance=m1", b"region=ams", b"t=42")
    assert shown.startswith(b"state=")
    assert all(0x21 <= byte < 0x7F for byte in shown)
    assert b'"' not in shown
