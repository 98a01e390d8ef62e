"""What the flags of `isthmus app add` and `set` ask a node for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from isthmus.cli import make_parser
from isthmus.client import ClientError
from isthmus.commands import app

if TYPE_CHECKING:
    from pathlib import Path


class FakeClient:
    def __init__(self) -> None:
        self.posts: list[tuple[str, Any]] = []
        self.apps: list[dict[str, Any]] = []

    def get(self, _path: str) -> Any:
        return self.apps

    def post(self, path: str, body: Any) -> Any:
        self.posts.append((path, body))
        return {"app": "web", "machines": []}


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    client = FakeClient()
    monkeypatch.setattr(app, "make_client", lambda args: client)
    return client


def run(*words: str) -> int:
    args = make_parser().parse_args(["app", *words])
    return args.run(args)


def test_what_the_proxy_does_for_an_app_is_asked_for_with_flags(client: FakeClient, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<h1>Back soon</h1>", "utf-8")
    flags = [
        "--response-header",
        "Link: </a>",
        "--response-header",
        "Link: </b>",
        "--remove-header",
        "Server",
    ]
    options = {
        "response_headers": {"Server": False, "Link": ["</a>", "</b>"]},
        "proxy_protocol": "v2",
        "maintenance": "<h1>Back soon</h1>",
    }
    flags += ["--remove-header", "Server", "--proxy-protocol", "v2", "--maintenance", str(page)]
    assert run("add", "web", *flags) == run("set", "web", *flags) == 0
    assert client.posts == [("/v1/apps", {"name": "web", **options}), ("/v1/apps/web/options", options)]


def test_what_was_set_is_taken_back(client: FakeClient) -> None:
    assert run("set", "web", "--no-maintenance", "--keep-header", "Server") == 0
    assert client.posts == [
        ("/v1/apps/web/options", {"response_headers": {"Server": None}, "maintenance": None})
    ]


@pytest.mark.parametrize("flags", [["--response-header", "no colon"], ["--maintenance", "/nowhere/page"]])
def test_flags_that_say_nothing_are_refused(client: FakeClient, flags: list[str]) -> None:
    with pytest.raises(ClientError, match=flags[0]):
        run("set", "web", *flags)
    assert client.posts == []


@pytest.mark.parametrize(
    ("said", "handlers"), [("tls,http", ["tls", "http"]), ("tls", ["tls"]), ("none", [])]
)
def test_handlers_are_set(client: FakeClient, said: str, handlers: list[str]) -> None:
    assert run("set", "web", "--handlers", said) == 0
    assert client.posts == [("/v1/apps/web/options", {"handlers": handlers})]


@pytest.mark.parametrize(("flag", "value"), [("--force-https", True), ("--no-force-https", False)])
def test_redirect_to_tls_is_turned_on_and_off(client: FakeClient, flag: str, value: bool) -> None:
    run("set", "web", flag)
    assert client.posts == [("/v1/apps/web/options", {"force_https": value})]


@pytest.mark.parametrize(("flag", "value"), [("--compression", True), ("--no-compression", False)])
def test_compression_is_turned_on_and_off(client: FakeClient, flag: str, value: bool) -> None:
    run("set", "web", flag)
    assert client.posts == [("/v1/apps/web/options", {"compression": value})]


@pytest.mark.parametrize(
    ("said", "sticky"),
    [
        ("cookie:sid", {"cookie": "sid"}),
        ("header:X-User", {"header": "X-User"}),
        ("set:at", {"cookie": "at", "set": True}),
        ("none", {}),
    ],
)
def test_how_an_app_is_balanced_is_set(client: FakeClient, said: str, sticky: dict[str, Any]) -> None:
    flags = ["--sticky", said, "--slow-start-ms", "5000", "--panic-percent", "50"]
    others = {"slow_start_ms": 5_000, "panic_percent": 50}
    assert run("add", "web", *flags) == run("set", "web", *flags) == 0
    assert client.posts[0] == ("/v1/apps", {"name": "web", "sticky": sticky, **others})
    whole = {"cookie": None, "header": None, "set": None} | sticky
    assert client.posts[1] == ("/v1/apps/web/options", {"sticky": whole, **others}), "none of the old remains"


@pytest.mark.parametrize("said", ["cookie", "cookie:", "session:a", ""])
def test_a_way_to_keep_clients_that_is_none_is_refused(client: FakeClient, said: str) -> None:
    with pytest.raises(ClientError, match="--sticky"):
        run("set", "web", "--sticky", said)
    assert client.posts == []


def test_limits_and_a_check_are_set_of_an_app_that_is_there(client: FakeClient) -> None:
    assert run("set", "web", "--check", "/up", "--soft-limit", "5", "--hard-limit", "9") == 0
    changes = {"checks": [{"path": "/up"}], "soft_limit": 5, "hard_limit": 9}
    assert client.posts == [("/v1/apps/web/options", changes)]


def test_app_that_has_a_host_does_not_become_that_of_all_others(client: FakeClient) -> None:
    client.apps = [{"app": "web", "hosts": ["web.test"]}, {"app": "bare", "hosts": []}]
    for words in (("web",), ("web", "--path-prefix", "/a"), ("web", "--host", "b.test"), ("bare",), ("new",)):
        run("add", *words)
    assert [body.get("hosts") for _, body in client.posts] == [[], None, ["b.test"], None, None]
