"""What would become of a request, and why: by the table alone, and told to a person."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.commands.explain import format_explanation
from isthmus.explanation import Question, QuestionError, Sources, explain
from proxy.settings import ProxySettings
from routing.explain import find_hostname
from tests.routing.rows import put, row, table_with

if TYPE_CHECKING:
    from collections.abc import Sequence

    from routing.table import RoutingTable

SOURCES = Sources(ProxySettings("n1", "ams"), {"n1": 0, "n2": 1_500}, {}, now=10.0, now_ms=60_000)


def ask(
    table: RoutingTable, *headers: str, url: str = "http://web.test/", region: str = "", **changes: Any
) -> dict[str, Any]:
    question = Question(url, headers=headers, region=region)
    return explain(question, table, SOURCES._replace(**changes))


def outcome(table: RoutingTable, *headers: str, **said: Any) -> tuple[str, str]:
    """The result and the machine of it, or its code."""
    told = ask(table, *headers, **said)["outcome"]
    return told["result"], told.get("machine") or told["code"]


def why(table: RoutingTable, *headers: str, **said: Any) -> str:
    told: str = ask(table, *headers, **said)["outcome"]["why"]
    return told


def world(*rows: Any) -> RoutingTable:
    return table_with(
        *(row("machines", id=f"m-{region}", region=region, node="n2") for region in ("ams", "fra", "gru")),
        *rows,
    )


# The way to the service


def test_the_route_the_app_and_the_service_are_named_with_who_declared_them() -> None:
    table = world(row("services", hard_limit=9, internal_port=8080, options='{"force_https": true}'))
    put(table, "hostnames", path_prefix="/api", managed_by="config:n1")
    told = ask(table, url="https://web.test/api/x?y=1")
    assert told["route"] == {"hostname": "web.test", "path": "/api", "app": "web", "by": "config:n1"}
    assert told["app"] == {"app": "web", "network": "default", "by": ""}
    assert told["service"]["internal_port"] == 8080
    assert (told["service"]["soft_limit"], told["service"]["hard_limit"]) == (20, 9)
    assert told["options"] == {"force_https": True}


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://other.test/", "no hostname and path prefix match"),
        ("http://gone.test/", "app 'gone' has no row in apps"),
        (
            "http://narrow.test/",
            "app 'narrow' has no service on port 80: its 0 machines are not routable there",
        ),
    ],
)
def test_where_the_way_ends_is_said(url: str, expected: str) -> None:
    table = world(
        row("hostnames", hostname="gone.test", app="gone"),
        row("hostnames", hostname="narrow.test", app="narrow"),
        row("apps", name="narrow"),
        row("services", app="narrow", port=443),
    )
    told = ask(table, url=url)["outcome"]
    assert (told["result"], told["why"]) == ("unrouted", expected)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ('{"force_https": true}', ("redirect", "")),
        ('{"handlers": []}', ("unrouted", "")),
        ('{"maintenance": "back soon"}', ("maintenance", "")),
    ],
)
def test_what_options_answer_reaches_no_machine(options: str, expected: tuple[str, str]) -> None:
    assert outcome(world(row("services", options=options))) == expected


def test_options_are_told_in_full_but_for_long_texts() -> None:
    options = (
        '{"sticky": {"cookie": "sid"}, "compression": true, "response_headers": {"X-A": "b"},'
        ' "maintenance": "%s", "replay_cache": [{"type": "cookie", "name": "t", "ttl_seconds": 60}]}'
        % ("x" * 500)
    )
    told = ask(world(row("services", options=options)))["options"]
    assert told["sticky"]["cookie"] == "sid"
    assert told["headers_added"] == ["X-A: b"]
    assert len(told["maintenance"]) < 200
    assert {"compression", "replay"} <= told.keys()


# The choice


def test_the_nearest_region_wins_and_is_another_one_elsewhere() -> None:
    assert outcome(world()) == ("machine", "m-ams")
    assert outcome(world(), region="gig") == ("machine", "m-gru")
    assert "ams comes first" in why(world())


def test_tiers_come_in_order_with_how_far_they_are() -> None:
    table = world()
    table.set_round_trips("ams", [("fra", 7.0)])
    told = ask(table)["tiers"]
    assert [(t["region"], t["order"], t["rtt_from"], t["with_room"]) for t in told] == [
        ("ams", 1, "here", 1),
        ("fra", 2, "measured", 1),
        ("gru", 3, "distance", 1),
    ]
    assert told[1]["rtt_ms"] == 7.0


def test_why_a_nearer_tier_was_passed_is_said() -> None:
    table = world(row("checks", machine="m-ams", status="critical"))
    assert outcome(table) == ("machine", "m-fra")
    assert why(table).startswith("in ams: 1 unhealthy; fra is next")
    verdicts = {machine["machine"]: machine["verdict"] for machine in ask(table)["machines"]}
    assert verdicts["m-ams"] == "unhealthy: alive critical"


def test_wishes_of_the_client_lead_the_choice_as_they_would_in_the_proxy() -> None:
    table = world()
    assert outcome(table, "fly-prefer-region: gru") == ("machine", "m-gru")
    assert outcome(table, "fly-force-instance-id: m-fra") == ("machine", "m-fra")
    assert ask(table, "fly-prefer-region: gru")["wish"] == {"regions": ["gru", "any"]}
    told = ask(table, "fly-force-region: fra")
    assert [tier["order"] for tier in told["tiers"]] == [1, None, None]
    table = world(row("services", options='{"client_routing": false}'))
    assert outcome(table, "fly-prefer-region: gru") == ("machine", "m-ams")


def test_a_request_that_the_proxy_refuses_is_refused_with_its_code() -> None:
    assert outcome(world(), "fly-force-region: ams", "fly-force-region: fra")[0] == "refused"
    assert outcome(world(), "Content-Length: 1", "Content-Length: 2")[0] == "refused"


def test_sticky_keys_lead_to_one_machine() -> None:
    options = '{"sticky": {"cookie": "sid"}}'
    table = table_with(*(row("machines", id=f"m{i}") for i in range(8)), row("services", options=options))
    told = ask(table, "Cookie: sid=abc")
    assert [machine["share"] for machine in told["machines"] if machine["share"]] == [1.0]
    assert told["outcome"]["why"] == "the sticky key leads to it"
    assert told["wish"] == {"sticky_key": "abc"}


def test_shares_follow_weights() -> None:
    table = table_with(row("machines", id="small"), row("machines", id="large", weight=400))
    shares = {machine["machine"]: machine["share"] for machine in ask(table)["machines"]}
    assert shares["large"] > 2 * shares["small"] > 0
    assert "drawn by weight" in why(table)


def test_panic_is_called_by_its_name() -> None:
    table = table_with(row("machines"), row("checks", status="critical"))
    assert outcome(table) == ("machine", "m1")
    assert why(table).startswith("panic: nobody healthy is left")


def test_panic_before_nobody_is_left_is_called_by_its_name_too() -> None:
    table = table_with(
        row("services", options='{"panic_percent": 60}'), row("machines"), row("machines", id="m2")
    )
    table.apply(*row("checks", status="critical"))
    assert why(table).startswith("panic: 1 of 2 machines are healthy, less than 60 %")
    assert all(machine["share"] for machine in ask(table)["machines"])


def test_a_full_app_queues_and_a_sleeping_one_is_started() -> None:
    full = table_with(row("services", hard_limit=1), row("machines"), row("loads", in_flight=1))
    assert outcome(full)[0] == "queue"
    asleep = table_with(row("machines", state="stopped", driver="process"))
    assert outcome(asleep) == ("start", "m1")
    assert outcome(table_with(row("machines", state="stopped")))[0] == "refused"


def test_over_the_soft_limit_everywhere_the_nearest_still_wins_and_that_is_said() -> None:
    table = world(
        row("services", soft_limit=1),
        *(row("loads", machine=f"m-{r}", in_flight=3) for r in ("ams", "fra", "gru")),
    )
    for _ in range(300):
        table.follow_loads()
    assert outcome(table) == ("machine", "m-ams")
    assert "over its soft limit of 1" in why(table)


def test_how_old_things_are_and_what_workers_leave_out_is_told() -> None:
    table = world(row("checks", machine="m-ams", updated_ms=59_000))
    failing = {"worker-0/1": (("m-ams", 3, 2.0),), "worker-1/2": (("m-ams", 1, 0.0),)}
    told = ask(table, failing=failing)
    (machine,) = [machine for machine in told["machines"] if machine["machine"] == "m-ams"]
    assert machine["staleness_ms"] == 1_500
    assert machine["left_out"] == {"failures": 3, "workers": 1}
    assert machine["checks"][0]["changed_ms_ago"] == 1_000
    assert told["staleness_ms"] == {"n1": 0, "n2": 1_500}


# Questions


@pytest.mark.parametrize("url", ["", "ftp://web.test/", "http://", "http://[::1", "http://web.test:99999/"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(QuestionError):
        ask(world(), url=url)


@pytest.mark.parametrize("line", ["no colon", "a: b\r\nHost: evil", "a: b\nc: d"])
def test_what_is_no_field_is_refused(line: str) -> None:
    with pytest.raises(QuestionError):
        ask(world(), line)


def test_a_region_that_nobody_knows_is_refused() -> None:
    with pytest.raises(QuestionError, match="nobody knows a region `atlantis`"):
        ask(world(), region="atlantis")


# Which row is meant


def hostnames(rows: Sequence[tuple[str, str]]) -> RoutingTable:
    return table_with(
        *(
            row("hostnames", hostname=host, path_prefix=prefix, app=f"{host} {prefix}")
            for host, prefix in rows
        )
    )


_HOSTS = st.sampled_from(["a.b.c", "b.c", "*.b.c", "*.c", "*", "x.b.c"])
_PATHS = st.sampled_from(["/", "/a", "/a/b", "/ab"])


@given(
    st.lists(st.tuples(_HOSTS, _PATHS), unique=True, max_size=6),
    st.sampled_from([b"a.b.c", b"A.B.C:80", b"b.c.", b"q.b.c", b"c", b"web.test", b""]),
    st.sampled_from([b"/", b"/a", b"/a/b/c", b"/abc", b"/a%2fb", b"/a/../ab", b"*"]),
)
def test_the_row_that_is_named_is_the_one_that_routes(
    rows: list[tuple[str, str]], host: bytes, path: bytes
) -> None:
    table = hostnames(rows)
    found = find_hostname(table, host, path)
    assert (None if found is None else found.app) == table.find_app(host, path)


# For a person


def test_an_explanation_is_told_in_lines_that_drive_no_terminal() -> None:
    table = world(row("checks", machine="m-ams", name="alive", status="critical", output="\x1b[2Jboom"))
    put(table, "apps", managed_by="config:\x1b[1m")
    text = "\n".join(format_explanation(ask(table, "fly-prefer-region: ams")))
    assert "\x1b" not in text
    for said in (
        "web.test / -> web",
        "regions ams,any",
        "m-ams",
        "unhealthy: alive critical",
        "-> m-fra",
        "1.5 s ago",
    ):
        assert said in text, text


def test_a_request_that_leads_nowhere_is_told_too() -> None:
    text = "\n".join(format_explanation(ask(world(), url="http://nobody.test/")))
    assert "no app is served under this host and path" in text
    assert "-> unrouted" in text


def test_a_request_that_is_refused_has_no_route_that_was_looked_for() -> None:
    text = "\n".join(format_explanation(ask(world(), "Content-Length: 1", "Content-Length: 2")))
    assert "route     not looked for" in text


def test_a_host_among_the_headers_takes_the_place_of_that_of_the_url() -> None:
    assert ask(world(), "hOST: other.test")["outcome"]["result"] == "unrouted"
    assert ask(world(), "Host: a.test", "Host: b.test")["outcome"]["result"] == "refused"
