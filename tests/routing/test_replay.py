from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from routing.balancer import Want
from routing.replay import (
    HEADER_BYTES_MAX,
    JSON_BYTES_MAX,
    REGIONS_MAX,
    STATE_CHARS_MAX,
    Replay,
    ReplayError,
    format_replay_src,
    parse_regions,
    parse_replay_header,
    parse_replay_json,
    plan_replay,
)
from tests.routing.rows import put, row, table_with

if TYPE_CHECKING:
    from routing.table import RoutingTable
    from routing.target import Target


@pytest.mark.parametrize(
    ("value", "replay"),
    [
        (b"region=ams", Replay(regions=("ams",))),
        (b'region="iad,ord,us,any"', Replay(regions=("iad", "ord", "us", "any"))),
        (b'region=" iad , ord "', Replay(regions=("iad", "ord"))),
        (b"instance=00bb33ff", Replay(instance="00bb33ff")),
        (b"prefer_instance=m1;region=us", Replay(regions=("us",), prefer_instance="m1")),
        (b"app=other", Replay(app="other")),
        (b"app=other;instance=m9", Replay(app="other", instance="m9")),
        (b"elsewhere=true", Replay(elsewhere=True)),
        (b"elsewhere=false;app=web", Replay(app="web")),
        (b"app=web;state=captured_write", Replay(app="web", state="captured_write")),
        (b"app=web;state=YWJj/+==", Replay(app="web", state="YWJj/+==")),
        (b'app=web;state="a; b=\\"c\\" \\\\"', Replay(app="web", state='a; b="c" \\')),
        (b'app=web;state=""', Replay(app="web", state="")),
        (b"region=ams;timeout=800ms", Replay(regions=("ams",), timeout_ms=800)),
        (
            b"region=ams;timeout=10s;fallback=force_self",
            Replay(regions=("ams",), timeout_ms=10_000, fallback="force_self"),
        ),
        (
            b"region=ams;timeout=2m;fallback=prefer_self",
            Replay(regions=("ams",), timeout_ms=120_000, fallback="prefer_self"),
        ),
        (b" \tapp = web ;\tstate\t= x ", Replay(app="web", state="x")),
    ],
)
def test_reads_the_header_form(value: bytes, replay: Replay) -> None:
    assert parse_replay_header(value) == replay


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"", "expected a field name"),
        (b";", "expected a field name"),
        (b"app=web;", "expected a field name"),
        (b"app=web;;state=x", "expected a field name"),
        (b"app", "expected '='"),
        (b"=web", "expected a field name"),
        (b"App=web", "expected a field name"),
        (b"app=", "no acceptable value"),
        (b'app="web', "no acceptable value"),
        (b'app="web"x', "expected ';'"),
        (b"region=iad,ord", "expected ';'"),
        (b"app=web state=x", "expected ';'"),
        (b"app=web;app=web", "twice"),
        (b"instanse=m1", "unknown field 'instanse'"),
        (b"transform=x;app=web", "transform must be an object, in the JSON form"),
        (b"app=we\rb", "expected ';'"),
        (b"app=web\r\nx-evil: 1", "expected ';'"),
        (b'app=web;state="a\nb"', "no acceptable value"),
        (b'app=web;state="a\x00b"', "no acceptable value"),
        (b'app=web;state="a\\\nb"', "no acceptable value"),
        ("app=web;state=é".encode(), "not ASCII"),
        (b"app=Web", "app 'Web' is malformed"),
        (b'app="a;b"', "malformed"),
        (b"app=../x", "malformed"),
        (b"instance=a:b", "malformed"),
        (b'prefer_instance=""', "malformed"),
        (b'region=""', "not a region"),
        (b'region="ams,"', "not a region"),
        (b"region=AMS", "not a region"),
        (b"elsewhere=yes", "true or false"),
        (b"elsewhere=false", "nowhere to go"),
        (b"state=x", "nowhere to go"),
        (b"timeout=1s;fallback=force_self", "nowhere to go"),
        (b"instance=a;prefer_instance=b", "exclude each other"),
        (b"app=web;fallback=self", "force_self or prefer_self"),
        (b"app=web;timeout=1500", "whole number"),
        (b"app=web;timeout=1.5s", "whole number"),
        (b"app=web;timeout=-1s", "whole number"),
        (b"app=web;timeout=0s", "not within"),
        (b"app=web;timeout=61m", "not within"),
        (b"app=web;timeout=9999999999s", "whole number"),
        (b"app=web;state=" + b"x" * (STATE_CHARS_MAX + 1), "state"),
        (b"app=web;state=" + b"x" * HEADER_BYTES_MAX, "longer"),
    ],
)
def test_refuses_what_the_header_grammar_does_not_allow(value: bytes, message: str) -> None:
    with pytest.raises(ReplayError) as caught:
        parse_replay_header(value)
    assert caught.value.code == "PA03"
    assert message in caught.value.message


def test_a_message_quotes_little_of_the_instruction_and_escapes_it() -> None:
    with pytest.raises(ReplayError) as caught:
        parse_replay_json(json.dumps({"app": "é\r\n" + "x" * 10_000}).encode())
    assert len(caught.value.message) < 150
    assert caught.value.message.isascii()
    assert caught.value.message.isprintable()


def test_reads_the_json_form() -> None:
    body = {
        "app": "target-app",
        "region": "iad,us",
        "prefer_instance": "m1",
        "state": "né; w",
        "elsewhere": True,
        "timeout": "10s",
        "fallback": "force_self",
        "transform": None,
    }
    assert parse_replay_json(json.dumps(body).encode()) == Replay(
        "target-app", ("iad", "us"), None, "m1", "né; w", True, 10_000, "force_self"
    )


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        (b'{"app": "web"} x', "not valid JSON"),
        (b'{"app": "a", "app": "b"}', "twice"),
        (b"[" * 60_000, "not valid JSON"),
        (b"1" * 10_000, "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b"{}", "nowhere to go"),
        (b'{"app": 1}', "must be a string"),
        (b'{"region": ["ams"]}', "must be a string"),
        (b'{"app": "web", "timeout": 10}', "must be a string"),
        (b'{"app": "web", "elsewhere": 1}', "true or false"),
        (b'{"app": "web", "elsewhere": []}', "true or false"),
        (b'{"app": ""}', "malformed"),
        (b'{"app": "web\\n"}', "malformed"),
        (b'{"app": "web", "state": "a\\r\\nb"}', "printable"),
        (b'{"app": "web", "state": "\\ud800"}', "printable"),
        (b'{"app": "web", "\\ud800": 1}', "unknown field"),
        (b'{"app": "web", "transform": []}', "transform must be an object"),
        (b'{"app": "web", "cache": {"ttl": "60"}}', "a whole number of seconds"),
        (b'{"app": "web", "allow_bypass": 1}', "true or false"),
        (b" " * JSON_BYTES_MAX + b"{}", "longer"),
    ],
)
def test_refuses_what_the_json_form_does_not_allow(body: bytes, message: str) -> None:
    with pytest.raises(ReplayError) as caught:
        parse_replay_json(body)
    assert caught.value.code == "PA03"
    assert message in caught.value.message


def test_a_list_of_regions_loses_repetitions_and_what_follows_any() -> None:
    assert parse_regions("ams, fra,ams") == ("ams", "fra")
    assert parse_regions("ams,any,fra") == ("ams", "any")
    assert len(parse_regions(",".join(f"r{i}" for i in range(REGIONS_MAX)))) == REGIONS_MAX
    with pytest.raises(ReplayError, match="more than"):
        parse_regions("a," * 100_000)


def world() -> tuple[RoutingTable, Target]:
    table = table_with(
        row("machines"),
        row("machines", id="m2"),
        row("apps", name="api"),
        row("services", app="api", port=443),
        row("machines", id="api1", app="api"),
        row("apps", name="mail"),
        row("services", app="mail", options='{"handlers": ["tls"]}'),
        row("apps", name="secret", network="other"),
        row("services", app="secret"),
    )
    source = table.machine("m1")
    assert source is not None
    return table, source


def plan(replay: Replay, port: int = 443) -> tuple[str, Want]:
    table, source = world()
    service, want = plan_replay(replay, source, table, port)
    return service.app, want


def test_plans_the_choice_that_the_instruction_asks_for() -> None:
    assert plan(Replay(regions=("iad", "eu", "any"))) == ("web", Want(("iad", "eu", "any")))
    assert plan(Replay(instance="m2")) == ("web", Want(instance="m2"))
    assert plan(Replay(prefer_instance="m2", regions=("ams",))) == (
        "web",
        Want(("ams",), prefer_instance="m2"),
    )
    assert plan(Replay(app="api")) == ("api", Want())
    assert plan(Replay(app="api", instance="api1")) == ("api", Want(instance="api1"))
    assert plan(Replay(elsewhere=True)) == ("web", Want(exclude=frozenset(("m1",))))


def test_leaves_a_machine_that_does_not_exist_to_the_balancer() -> None:
    assert plan(Replay(instance="gone")) == ("web", Want(instance="gone"))
    assert plan(Replay(prefer_instance="api1")) == ("web", Want(prefer_instance="api1"))


@pytest.mark.parametrize(
    ("replay", "port", "code", "message"),
    [
        (Replay(app="nobody"), 443, "PA04", "does not exist"),
        (Replay(app="api"), 80, "PA04", "serves no HTTP on port 80"),
        (Replay(app="mail"), 443, "PA04", "serves no HTTP on port 443"),
        (Replay(app="secret"), 443, "PA05", "another network"),
        (Replay(instance="api1"), 443, "PA03", "not of app 'web'"),
        (Replay(app="api", instance="m2"), 443, "PA03", "not of app 'api'"),
        (Replay(regions=("iad", "amss")), 443, "PA03", "unknown region 'amss', did you mean 'ams'?"),
        (Replay(regions=("zzzzzz",)), 443, "PA03", "unknown region 'zzzzzz'"),
        (Replay(instance="m1", elsewhere=True), 443, "PA03", "excludes the very machine"),
    ],
)
def test_refuses_what_contradicts_the_table(replay: Replay, port: int, code: str, message: str) -> None:
    with pytest.raises(ReplayError) as caught:
        plan(replay, port)
    assert caught.value.code == code
    assert message in caught.value.message


def test_an_app_that_lost_its_row_may_not_replay_to_others() -> None:
    table, source = world()
    table.apply("apps", ("web",), None)
    with pytest.raises(ReplayError, match="PA05"):
        plan_replay(Replay(app="api"), source, table, 443)
    with pytest.raises(ReplayError, match="PA04"):
        plan_replay(Replay(elsewhere=True), source, table, 443)


def test_a_region_that_only_a_machine_names_is_known() -> None:
    table, source = world()
    put(table, "machines", id="m3", region="attic")
    _, want = plan_replay(Replay(regions=("attic",)), source, table, 443)
    assert want.regions == ("attic",)


def test_formats_the_source_of_a_replay() -> None:
    assert format_replay_src("m1", "ams", 17, None) == b"instance=m1;region=ams;t=17"
    assert format_replay_src("m1", "ams", 17, "abc=/%7B") == b"instance=m1;region=ams;t=17;state=abc=/%7B"


def test_state_cannot_break_out_of_the_source_header() -> None:
    hostile = 'x;instance=evil"\r\nfly-region: é '
    assert format_replay_src("m1", "ams", 17, hostile) == (
        b"instance=m1;region=ams;t=17;state=x%3Binstance=evil%22%0D%0Afly-region:%20%C3%A9%20"
    )


@pytest.mark.parametrize(
    ("instance", "region"), [("m;1", "ams"), ("m1", "a b"), ("", "ams"), ("m1\n", "ams")]
)
def test_refuses_to_format_an_impossible_source(instance: str, region: str) -> None:
    with pytest.raises(ValueError, match="not a machine and a region"):
        format_replay_src(instance, region, 17, None)
