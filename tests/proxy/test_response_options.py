"""What an app has the proxy do with its answers: headers added and removed, a page for maintenance."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from routing.options import HEADERS_MAX, PAGE_CHARS_MAX, parse_options
from tests.fakes.machine import OK

if TYPE_CHECKING:
    from tests.proxy.edge import Edge

ANSWER = (
    b"HTTP/1.1 200 OK\r\nServer: secret/1.2\r\nX-Powered-By: a\r\nx-powered-by: b\r\nX-Kept: 1\r\n"
    b"Cache-Control: no-store\r\nContent-Length: 2\r\n\r\nok"
)


def put(edge: Edge, **options: object) -> None:
    edge.put_app("app", "app.test", options=json.dumps(options))


async def test_headers_are_removed_replaced_and_added(edge: Edge) -> None:
    headers = {
        "server": False,
        "X-Powered-By": False,
        "Cache-Control": "public, max-age=60",
        "Link": ["</a.css>; rel=preload", "</b.css>; rel=preload"],
        "X-Empty": "",
    }
    put(edge, response_headers=headers)
    await edge.machine(answer=lambda r: ANSWER)
    await edge.start()
    client = await edge.client()
    response = await client.get()
    assert response.body == b"ok"
    told = {name: response.values(name) for name, _ in response.fields}
    del told[b"fly-request-id"]
    assert told == {
        b"x-kept": [b"1"],
        b"content-length": [b"2"],
        b"cache-control": [b"public, max-age=60"],
        b"link": [b"</a.css>; rel=preload", b"</b.css>; rel=preload"],
        b"x-empty": [b""],
        b"via": [b"1.1 isthmus"],
    }
    assert (await client.get()).status == 200  # the connection goes on


@pytest.mark.parametrize("page", ["<h1>Back soon \u2764</h1>", "Back soon"])
async def test_an_app_under_maintenance_answers_with_its_page(edge: Edge, page: str) -> None:
    put(edge, maintenance=page)
    machine = await edge.machine()
    await edge.start()
    client = await edge.client()
    response = await client.get()
    assert (response.status, response.error, response.body) == (503, "PL03", page.encode())
    markup = b"text/html" if page.startswith("<") else b"text/plain"
    assert response.values(b"content-type") == [markup + b"; charset=utf-8"]
    assert response.values(b"retry-after") == [b"1"]
    client.send(b"HEAD / HTTP/1.1\r\nHost: app.test\r\n\r\n")
    assert (await client.read_response(to_head=True)).values(b"content-length") == [
        b"%d" % len(page.encode())
    ]
    assert machine.received == b""
    put(edge)
    assert (await client.get()).body == b"ok"


async def test_a_replay_to_an_app_under_maintenance_gets_its_page(edge: Edge) -> None:
    instruction = b"HTTP/1.1 200 OK\r\nfly-replay: app=other\r\nContent-Length: 0\r\n\r\n"
    edge.put_app("other", "other.test", options=json.dumps({"maintenance": "Back soon"}))
    await edge.machine("m1", answer=lambda r: instruction)
    other = await edge.machine("m2", app="other", answer=lambda r: OK)
    await edge.start()
    assert (await edge.get()).body == b"Back soon"
    assert other.received == b""


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"maintenance": 1}, "maintenance must be text"),
        ({"maintenance": "x" * (PAGE_CHARS_MAX + 1)}, "of at most"),
        ({"response_headers": []}, "must be an object"),
        (
            {"response_headers": {f"x-{n}": "" for n in range(HEADERS_MAX + 1)}},
            "at most 64",
        ),
        ({"response_headers": {"x y": ""}}, "not the name of a header"),
        ({"response_headers": {"x\r\ny": ""}}, "not the name of a header"),
        ({"response_headers": {"": ""}}, "not the name of a header"),
        ({"response_headers": {"Content-Length": "5"}}, "the proxy's own"),
        ({"response_headers": {"transfer-encoding": False}}, "the proxy's own"),
        ({"response_headers": {"fly-replay": "app=x"}}, "the proxy's own"),
        ({"response_headers": {"fly-request-id": "x"}}, "the proxy's own"),
        ({"response_headers": {"x": "a\r\nb: c"}}, "not printable ASCII"),
        ({"response_headers": {"x": "a\n"}}, "not printable ASCII"),
        ({"response_headers": {"x": ["a", 1]}}, "not printable ASCII"),
        ({"response_headers": {"x": True}}, "not printable ASCII"),
        ({"response_headers": {"x": "v" * 4_097}}, "not printable ASCII"),
        ({"response_headers": {"x": "\u00e9"}}, "not printable ASCII"),
    ],
)
def test_options_that_would_break_an_answer_are_refused(options: object, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse_options(json.dumps(options))
