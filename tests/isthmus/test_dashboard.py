"""The dashboard's page: how it is served; it loads nothing from elsewhere and runs nothing of a row."""

from __future__ import annotations

import re
from importlib import resources
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from isthmus.admin.keys import KeyRoutes
from isthmus.admin.lifecycle import LifecycleRoutes
from isthmus.admin.metrics import WorkerTotals
from isthmus.admin.server import AdminServer
from isthmus.config import AdminConfig

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

TOKEN = "a token of the test"
PAGE = resources.files("isthmus.admin").joinpath("static/dashboard.html").read_text("utf-8")


class FakeViews:
    """Has every view that the server asks for; each says which it is."""

    def __getattr__(self, name: str) -> Any:
        return lambda: {"view": name}


@pytest.fixture
async def url() -> AsyncIterator[str]:
    config = AdminConfig(listen="127.0.0.1:0", token=TOKEN)
    parts = {"registry": None, "samples": list, "replica": None, "subscriptions": None}
    server = AdminServer(config, FakeViews(), keys=KeyRoutes(None), lifecycle=LifecycleRoutes(None), **parts)
    await server.start()
    yield f"http://{server.address}"
    await server.stop()


def script() -> str:
    return PAGE.partition("<script>")[2].partition("</script>")[0]


async def test_is_served_under_a_policy_that_allows_only_its_own_api(url: str) -> None:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/") as answer:
        policy = answer.headers["Content-Security-Policy"].split("; ")
        assert answer.status == 200
        assert answer.content_type == "text/html"
        assert await answer.text() == PAGE
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy


async def test_page_is_open_and_its_data_is_behind_the_token(url: str) -> None:
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{url}/") as answer:
            assert answer.status == 200
        async with session.get(f"{url}/v1/overview") as answer:
            assert answer.status == 401
        async with session.post(f"{url}/v1/machines/m/stop") as answer:
            assert answer.status == 401
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with session.get(f"{url}/v1/overview", headers=headers) as answer:
            assert await answer.json() == {"view": "overview"}


def test_names_no_address_elsewhere() -> None:
    assert re.findall(r"\b[a-z]+://|[\"'(=]\s*//|@import|url\(", PAGE, re.IGNORECASE) == []
    assert re.findall(r"<(?:link|img|iframe|script\s)|\ssrc=", PAGE, re.IGNORECASE) == []


def test_puts_values_in_as_text_only() -> None:
    sinks = (
        r"innerHTML|outerHTML|insertAdjacentHTML|setHTML|document\.write|DOMParser|createContextualFragment"
    )
    assert re.findall(sinks + r"|\beval\b|\bFunction\(|setTimeout\([\"'`]", script()) == []


def test_links_lead_nowhere_but_into_the_page() -> None:
    assert re.findall(r"href: (.{3})", script()) == ["`#$"]
    assert "location" not in script()


def test_each_fact_of_the_node_says_what_it_means() -> None:
    facts = script().partition("const facts = {")[2].partition("\n  };")[0]
    entries = re.split(r"^    (?=\")", facts, flags=re.MULTILINE)[1:]
    assert len(entries) > 15
    for entry in entries:
        assert re.search(r",\s+\"[^\"]{15,}\"( \+\s+\"[^\"]+\")?\],\s*$", entry), entry


def test_rates_are_made_of_what_the_api_counts() -> None:
    traffic = WorkerTotals().traffic()
    assert set(re.findall(r"traffic\.(\w+)", script())) == set(traffic)
