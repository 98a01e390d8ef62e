from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.hosts import HostIndex, normalise_host, normalise_path


def index(*routes: tuple[str, str, str]) -> HostIndex[str]:
    hosts = HostIndex[str]()
    for hostname, prefix, app in routes:
        hosts.put(hostname, prefix, app)
    return hosts


@pytest.mark.parametrize(
    ("host", "name"),
    [
        (b"example.com", b"example.com"),
        (b"EXAMPLE.Com.:8443", b"example.com"),
        (b"[::1]:80", b"[::1]"),
        (b"[FDAA::1]", b"[fdaa::1]"),
        (b"[::1", b""),
        (b"", b""),
        (b"a" * 300, b""),
    ],
)
def test_a_host_is_compared_in_one_spelling(host: bytes, name: bytes) -> None:
    assert normalise_host(host) == name


@pytest.mark.parametrize(
    ("path", "normal"),
    [
        (b"/", b"/"),
        (b"", b"/"),
        (b"*", b"/*"),
        (b"/a/b", b"/a/b"),
        (b"/a/", b"/a"),
        (b"/a?b=/../c", b"/a"),
        (b"/a#/../b", b"/a"),
        (b"/a#x?y", b"/a"),
        (b"//a///b", b"/a/b"),
        (b"/a/./b/.", b"/a/b"),
        (b"/a/../b", b"/b"),
        (b"/../../a", b"/a"),
        (b"/a/%2e%2E/b", b"/b"),
        (b"/a/.%2e/b", b"/b"),
        (b"/a%2f..%2Fb", b"/b"),
        (b"/a\\..\\b", b"/b"),
        (b"/a%5c..%5Cb", b"/b"),
        (b"/%61", b"/a"),
        (b"/a/%252e%252e/b", b"/a/%2e%2e/b"),
        (b"/a/...", b"/a/..."),
        (b"/.well-known/x", b"/.well-known/x"),
        (b"/%zz", b"/%zz"),
        (b"/%00a", b"/\x00a"),
        (b"/%3fa", b"/?a"),
    ],
)
def test_a_path_is_compared_as_the_most_lenient_machine_would_read_it(path: bytes, normal: bytes) -> None:
    assert normalise_path(path) == normal


@given(
    st.lists(st.sampled_from([b"/", b".", b"..", b"a", b"%2e", b"%2f", b"\\", b"%5C", b"%", b"?", b"b"])).map(
        b"".join
    )
)
def test_a_normalised_path_has_no_trick_left(path: bytes) -> None:
    normal = normalise_path(path)
    assert normal.startswith(b"/")
    assert b"\\" not in normal
    assert not {b"", b".", b".."} & set(normal[1:].split(b"/")) or normal == b"/"


def test_exact_name_wins_over_longer_and_shorter_wildcards_and_star() -> None:
    hosts = index(
        ("a.b.test", "/", "exact"), ("*.b.test", "/", "near"), ("*.test", "/", "far"), ("*", "/", "rest")
    )
    assert hosts.find(b"a.b.test", b"/") == "exact"
    assert hosts.find(b"A.B.TEST.:80", b"/") == "exact"
    assert hosts.find(b"x.b.test", b"/") == "near"
    assert hosts.find(b"x.y.b.test", b"/") == "near"
    assert hosts.find(b"b.test", b"/") == "far"
    assert hosts.find(b"test", b"/") == "rest"
    assert hosts.find(b"10.0.0.1", b"/") == "rest"


def test_a_wildcard_does_not_match_its_own_suffix_or_an_empty_label() -> None:
    hosts = index(("*.test", "/", "app"))
    assert hosts.find(b"test", b"/") is None
    assert hosts.find(b".test", b"/") is None
    assert hosts.find(b"xtest", b"/") is None


@pytest.mark.parametrize("host", [b"", b":80", b"a" * 1_000])
def test_what_is_no_name_leads_to_the_star_alone(host: bytes) -> None:
    assert index(("*", "/", "rest")).find(host, b"/") == "rest"
    assert index(("*.a", "/", "rest"), ("a", "/", "one")).find(host, b"/") is None


def test_longest_prefix_wins_on_a_segment_boundary() -> None:
    hosts = index(("h", "/", "root"), ("h", "/api", "api"), ("h", "/api/v2", "v2"), ("h", "/ü", "umlaut"))
    assert hosts.find(b"h", b"/api") == "api"
    assert hosts.find(b"h", b"/api/") == "api"
    assert hosts.find(b"h", b"/api?x") == "api"
    assert hosts.find(b"h", b"/apix") == "root"
    assert hosts.find(b"h", b"/api/v22/x") == "api"
    assert hosts.find(b"h", b"/api/v2/x/y/z") == "v2"
    assert hosts.find(b"h", b"/API") == "root"
    assert hosts.find(b"h", b"/%c3%bc/x") == "umlaut"
    assert hosts.find(b"h", b"/" + b"a/" * 50_000) == "root"


@pytest.mark.parametrize(
    "path",
    [
        b"/x/../admin",
        b"//admin",
        b"/./admin/",
        b"/%61dmin",
        b"/x%2f..%2fadmin",
        b"\\admin",
        b"/x\\..\\admin",
        b"/x/%2e%2e/admin",
    ],
)
def test_tricks_in_the_path_do_not_lead_around_a_prefix(path: bytes) -> None:
    hosts = index(("h", "/", "public"), ("h", "/admin", "admin"))
    assert hosts.find(b"h", path) == "admin"


def test_a_path_that_climbs_out_of_a_prefix_is_not_under_it() -> None:
    hosts = index(("h", "/", "public"), ("h", "/admin", "admin"))
    assert hosts.find(b"h", b"/admin/../x") == "public"
    assert hosts.find(b"h", b"/admin/%2e%2e%2fx") == "public"


def test_a_name_without_a_matching_prefix_is_not_caught_by_a_wildcard() -> None:
    hosts = index(("a.test", "/api", "api"), ("*.test", "/", "rest"))
    assert hosts.find(b"a.test", b"/") is None
    assert hosts.find(b"a.test", b"/api/x") == "api"


def test_routes_come_and_go() -> None:
    routes = [("a.test", "/", "a"), ("a.test", "/b", "b"), ("*.test", "/", "c"), ("*", "/", "d")]
    hosts = index(*routes)
    assert sorted(hosts.routes()) == sorted((*route, "") for route in routes)
    hosts.put("a.test", "/b", "other")
    assert hosts.find(b"a.test", b"/b") == "other"
    hosts.drop("a.test", "/b")
    assert hosts.find(b"a.test", b"/b") == "a"
    hosts.drop("a.test", "/")
    assert hosts.find(b"a.test", b"/b") == "c"
    hosts.drop("*.test", "/")
    assert hosts.find(b"a.test", b"/b") == "d"
    hosts.drop("*", "/")
    assert hosts.find(b"a.test", b"/b") is None
    assert not list(hosts.routes())
