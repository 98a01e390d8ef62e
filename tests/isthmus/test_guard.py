from __future__ import annotations

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from isthmus.admin.guard import make_guard, refuse


def asked(host: str = "127.0.0.1:8471", **headers: str) -> web.Request:
    """A request as the guard sees it; aiohttp's name for the maker is unfortunate, it is a real Request."""
    return make_mocked_request("POST", "/v1/apps", {"Host": host, **headers})


@pytest.mark.parametrize(
    "host", ["127.0.0.1:8471", "127.0.0.1", "localhost:8471", "localhost", "[::1]:8471", "[::1]"]
)
def test_programs_of_this_machine_get_in_without_a_token(host: str) -> None:
    assert refuse(asked(host), "") is None


@pytest.mark.parametrize(
    "host",
    [
        "evil.test:8471",
        "localhost.evil.test",
        "127.0.0.1.evil.test:8471",
        "10.0.0.1:8471",
        "[fdaa::1]:8471",
        "",
        "[",
        ":",
    ],
)
def test_name_that_a_foreign_page_pointed_at_us_does_not_get_in(host: str) -> None:
    assert "is no loopback name" in str(refuse(asked(host), ""))


@pytest.mark.parametrize(
    "origin", ["http://evil.test", "null", "http://localhost:3000", "https://127.0.0.1:8471", ""]
)
def test_page_from_elsewhere_does_not_act_through_a_browser(origin: str) -> None:
    assert refuse(asked(Origin=origin), "") == "requests from other web pages are refused"


def test_own_dashboard_may_act() -> None:
    assert refuse(asked(Origin="http://127.0.0.1:8471"), "") is None


@pytest.mark.parametrize("host", ["127.0.0.1:8471", "node.example.com", "10.0.0.1:8471"])
def test_token_opens_from_anywhere_and_is_needed_everywhere(host: str) -> None:
    assert refuse(asked(host, Authorization="Bearer sésame"), "sésame") is None
    assert refuse(asked(host), "sésame") is not None


@pytest.mark.parametrize(
    "given",
    ["", "Bearer", "Bearer ", "Bearer sesam", "Bearer sesamee", "bearer sesame", "Basic sesame", "Bearer ÿ"],
)
def test_wrong_token_says_how_to_send_the_right_one(given: str) -> None:
    assert refuse(asked(Authorization=given), "sesame") == (
        "the admin token is missing or wrong: send `Authorization: Bearer <token>`"
    )


async def ask_through_guard(token: str, path: str, **headers: str) -> tuple[web.StreamResponse, list[str]]:
    reached: list[str] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        reached.append(request.path)
        return web.Response(text="ok")

    request = make_mocked_request("GET", path, {"Host": "127.0.0.1:8471", **headers})
    return await make_guard(token)(request, handler), reached


async def test_refusal_does_not_reach_the_handler() -> None:
    response, reached = await ask_through_guard("sesame", "/v1/status")
    assert response.status == 401
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert reached == []
    response, reached = await ask_through_guard("", "/v1/status", Origin="http://evil.test")
    assert response.status == 403
    assert reached == []


async def test_health_is_open_to_all_who_reach_the_listener() -> None:
    response, reached = await ask_through_guard("sesame", "/healthz")
    assert response.status == 200
    assert reached == ["/healthz"]


async def test_answers_are_neither_sniffed_nor_kept() -> None:
    response, _ = await ask_through_guard("", "/v1/status")
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Cache-Control"] == "no-store"
