"""Drivers that ask others: a webhook, and the shape of the Machines API."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
from typing import TYPE_CHECKING, Any

import orjson
import pytest
from aiohttp import web

from isthmus.config_machines import DriverConfig, MachineConfig
from isthmus.machines.driver import DriverError, Machine, Made
from isthmus.machines.fly import FlyDriver
from isthmus.machines.webhook import ANSWER_BYTES_MAX, WebhookDriver

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

MACHINE = Machine("m1", "web", "ams", "10.0.0.1", 80)


class Fake:
    """Answers as it is told to; `asked` has (method, path, headers, body) of each request."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, Any, bytes]] = []
        self.status = 200
        self.refused = {"start", "stop", "suspend", "create"}  # which actions get that status, at the API
        self.text = "{}"
        self.body: bytes | None = None  # in place of the text
        self.states: dict[str, str] = {}  # of machines, at the Machines API
        self.slow: dict[str, int] = {}  # looks until a machine is in its state
        self.url = ""
        self.config: dict[str, Any] = {"image": "web:1", "env": {"A": "b"}}  # of the machine, at the API
        self.made: dict[str, Any] = {"id": "e7", "private_ip": "fdaa:0:1::7", "state": "created"}
        self.half = asyncio.Event()  # half of an answer was sent
        self.go_on = asyncio.Event()  # the other half is sent

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked.append((request.method, request.path, request.headers, await request.read()))
        if request.path.endswith("/in-halves"):
            return await self.answer_in_halves(request)
        return web.Response(status=self.status, body=self.body or self.text.encode())

    async def answer_in_halves(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        data = self.text.encode()
        await response.write(data[: len(data) // 2])
        self.half.set()
        await self.go_on.wait()
        await response.write(data[len(data) // 2 :])
        return response

    async def handle_machines(self, request: web.Request) -> web.Response:
        """Do what the API does as far as it matters here."""
        self.asked.append((request.method, request.path, request.headers, await request.read()))
        if request.headers["Authorization"] != "Bearer t0ken":
            return web.json_response({"error": "unauthorized"}, status=401)
        _, _, _, app, _, *rest = request.path.split("/")
        if app != "web" or rest[:1] not in ([], ["m1"]):
            return web.json_response({"error": "machine not found"}, status=404)
        action = "create" if not rest else rest[1] if len(rest) > 1 else ""
        if self.status != 200 and action in self.refused:
            return web.json_response({"error": self.text}, status=self.status)
        if action == "create":
            return web.json_response(self.made)
        if action:
            return self.change(rest[0], action)
        return self.describe(request, rest[0])

    def describe(self, request: web.Request, machine: str) -> web.Response:
        if self.slow.get(machine, 0) > 0:
            self.slow[machine] -= 1
            return web.json_response({"id": machine, "state": "stopping"})
        if request.method == "POST":
            self.config = orjson.loads(self.asked[-1][3])["config"]
            self.states[machine] = "started"
        return web.json_response({"id": machine, "state": self.states[machine], "config": self.config})

    def change(self, machine: str, action: str) -> web.Response:
        """As the API does, refuse what the state of the machine does not allow."""
        state = self.states[machine]
        if state not in {"start": {"stopped", "suspended"}}.get(action, {"started"}):
            told = f"failed_precondition: unable to {action} machine from current state: '{state}'"
            return web.json_response({"error": told}, status=412)
        self.states[machine] = {"start": "started", "stop": "stopped", "suspend": "suspended"}[action]
        return web.json_response({"ok": True})

    @property
    def lines(self) -> list[str]:
        return [f"{method} {path}" for method, path, _, _ in self.asked]


@pytest.fixture
async def fake() -> AsyncIterator[Fake]:
    fake = Fake()
    app = web.Application()
    app.router.add_route("*", "/hook{rest:.*}", fake.handle)
    app.router.add_route("*", "/v1/{rest:.*}", fake.handle_machines)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield fake
    fake.go_on.set()
    await runner.cleanup()


def webhook(fake: Fake, path: str = "/hook?x=1", **settings: Any) -> WebhookDriver:
    config = DriverConfig(type="webhook", url=f"{fake.url}{path}", secret="s3cret", **settings)
    return WebhookDriver(config, "n1")


def fly(fake: Fake, **settings: Any) -> FlyDriver:
    return FlyDriver(DriverConfig(type="fly", url=fake.url, token="t0ken", **settings))


async def test_webhook_gets_a_signed_post_that_says_what_to_do(fake: Fake) -> None:
    driver = webhook(fake)
    await driver.start(MACHINE)
    await driver.stop(MACHINE)
    assert await driver.suspend(MACHINE)
    assert fake.lines == ["POST /hook"] * 3
    _, _, headers, body = fake.asked[0]
    assert body == (
        b'{"action":"start","machine":"m1","app":"web","region":"ams","address":"10.0.0.1:80","node":"n1",'
        b'"release":""}'
    )
    at_s = headers["isthmus-timestamp"]
    assert abs(time.time() - int(at_s)) < 60
    signature = hmac.new(b"s3cret", at_s.encode() + b"." + body, hashlib.sha256).hexdigest()
    assert headers["isthmus-signature"] == signature
    assert [b'"action":"stop"' in fake.asked[1][3], b'"action":"suspend"' in fake.asked[2][3]] == [True, True]


async def test_webhook_that_cannot_suspend_is_asked_to_stop(fake: Fake) -> None:
    answers = [501, 200]

    async def refuse_suspend(request: web.Request) -> web.Response:
        fake.asked.append((request.method, request.path, request.headers, await request.read()))
        return web.Response(status=answers.pop(0))

    fake.handle = refuse_suspend  # type: ignore[method-assign] — another behaviour for this test
    app = web.Application()
    app.router.add_post("/hook", fake.handle)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    assert not await webhook(fake).suspend(MACHINE)
    assert [b'"action":"suspend"' in fake.asked[0][3], b'"action":"stop"' in fake.asked[1][3]] == [True, True]
    await runner.cleanup()


@pytest.mark.parametrize("status", [302, 401, 500, 501])
async def test_webhook_that_refuses_is_a_failure_with_what_it_said(fake: Fake, status: int) -> None:
    fake.status, fake.text = status, "no\n  such thing" + "x" * 500
    with pytest.raises(DriverError, match=f"refuses to start it with {status}: no such thingx") as caught:
        await webhook(fake).start(MACHINE)
    assert len(str(caught.value)) < 300


async def test_nobody_there_and_no_answer_are_failures(fake: Fake) -> None:
    config = DriverConfig(type="webhook", url="http://127.0.0.1:1/hook?secret=x", secret="s")
    with pytest.raises(DriverError) as caught:
        await WebhookDriver(config, "n1").start(MACHINE)
    assert "secret=x" not in str(caught.value)


async def test_machines_api_is_asked_with_the_token_and_in_its_shape(fake: Fake) -> None:
    driver = fly(fake)
    fake.states["m1"] = "stopped"
    assert await driver.is_running(MACHINE) is False
    await driver.start(MACHINE)
    assert await driver.is_running(MACHINE) is True
    assert await driver.suspend(MACHINE)
    await driver.stop(MACHINE)
    path = "/v1/apps/web/machines/m1"
    changes = [line for line in fake.lines if line.startswith("POST")]
    assert changes == [f"POST {path}/start", f"POST {path}/suspend", f"POST {path}/stop"]
    assert {headers["Authorization"] for _, _, headers, _ in fake.asked} == {"Bearer t0ken"}


async def test_stop_waits_until_the_machine_is_stopped(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.machines.fly.LOOK_S", 0.001)
    fake.states["m1"], fake.slow["m1"] = "started", 3
    await fly(fake).stop(MACHINE)
    assert fake.slow["m1"] == 0
    fake.slow["m1"] = 1_000_000
    fake.states["m1"] = "started"
    with pytest.raises(DriverError, match="did not stop within 50 ms"):
        await fly(fake, timeout_ms=50).stop(MACHINE)


@pytest.mark.parametrize("status", [400, 409, 412, 422, 501])
async def test_machine_that_cannot_be_suspended_is_stopped(fake: Fake, status: int) -> None:
    fake.states["m1"] = "started"
    fake.status, fake.text, fake.refused = status, "machine has too much memory", {"suspend"}
    assert not await fly(fake).suspend(MACHINE)
    assert fake.states["m1"] == "stopped"


@pytest.mark.parametrize("status", [401, 408, 429, 500, 503])
async def test_machine_does_not_lose_its_memory_to_a_fault_of_the_api(fake: Fake, status: int) -> None:
    fake.states["m1"] = "started"
    fake.status, fake.text, fake.refused = status, "try again", {"suspend"}
    with pytest.raises(DriverError, match=f"answers suspend with {status}"):
        await fly(fake).suspend(MACHINE)
    assert fake.states["m1"] == "started"


async def test_suspend_that_ends_in_a_stop_is_told_as_such(fake: Fake) -> None:
    fake.states["m1"] = "stopped"
    assert not await fly(fake).suspend(MACHINE)
    fake.states["m1"] = "suspended"
    assert await fly(fake).suspend(MACHINE)


@pytest.mark.parametrize("state", ["stopped", "suspended", "destroyed"])
async def test_what_is_done_already_is_no_failure(fake: Fake, state: str) -> None:
    fake.states["m1"] = state
    await fly(fake).stop(MACHINE)
    fake.states["m1"] = "started"
    await fly(fake).start(MACHINE)


async def test_start_of_a_machine_that_is_gone_is_a_failure(fake: Fake) -> None:
    fake.states["m1"] = "destroyed"
    with pytest.raises(DriverError, match=r"412: .*from current state: 'destroyed'"):
        await fly(fake).start(MACHINE)


@pytest.mark.parametrize(
    ("settings", "machine", "told"),
    [
        ({"token": "wrong"}, MACHINE, "answers start with 401"),
        ({"app": "other"}, MACHINE, "404"),
        ({}, MACHINE._replace(id="../../x"), "404"),
    ],
)
async def test_what_the_api_refuses_is_told(
    fake: Fake, settings: dict[str, str], machine: Machine, told: str
) -> None:
    driver = FlyDriver(DriverConfig(type="fly", url=fake.url, **{"token": "t0ken", **settings}))
    with pytest.raises(DriverError, match=told):
        await driver.start(machine)


async def test_api_that_answers_with_no_json_is_a_failure(fake: Fake) -> None:
    fake.text = "<html>"
    driver = FlyDriver(DriverConfig(type="fly", url=f"{fake.url}/hook?", token="t"))
    with pytest.raises(DriverError, match="not JSON"):
        await driver.is_running(MACHINE)


async def test_machines_api_is_told_of_another_image_only_where_it_is_another(fake: Fake) -> None:
    driver = fly(fake)
    fake.states["m1"] = "stopped"
    await driver.start(MACHINE._replace(release="web:1"))
    assert fake.lines[-1] == "POST /v1/apps/web/machines/m1/start"
    await driver.start(MACHINE._replace(release="web:2"))
    assert fake.lines[-1] == "POST /v1/apps/web/machines/m1"
    assert fake.config == {"image": "web:2", "env": {"A": "b"}}


async def test_machine_whose_image_is_not_known_is_not_started_with_an_old_one(fake: Fake) -> None:
    fake.states["m1"], fake.config = "stopped", None  # type: ignore[assignment] — what the API says of it
    with pytest.raises(DriverError, match="does not say how m1 is configured"):
        await fly(fake).start(MACHINE._replace(release="web:2"))
    assert fake.states["m1"] == "stopped"


@pytest.mark.parametrize(
    ("address", "port", "expected"),
    [
        ("fdaa:0:1::7", 80, "[fdaa:0:1::7]:80"),
        ("fdaa:0:1::7", None, "[fdaa:0:1::7]"),
        ("10.0.0.7", 80, "10.0.0.7:80"),
    ],
)
async def test_machines_api_makes_one_more_like_the_one_that_is_there(
    fake: Fake, address: str, port: int | None, expected: str
) -> None:
    fake.states["m1"] = "started"
    fake.made["private_ip"] = address
    made = await fly(fake).create(MACHINE._replace(port=port), "gru")
    assert made == Made("e7", expected)
    assert MachineConfig(address=made.address, id=made.id).id == "e7"
    assert fake.lines == ["GET /v1/apps/web/machines/m1", "POST /v1/apps/web/machines"]
    assert orjson.loads(fake.asked[-1][3]) == {"region": "gru", "config": fake.config}


@pytest.mark.parametrize(
    "made", [{}, {"id": "e7"}, {"id": "e7", "private_ip": ""}, {"id": 7, "private_ip": 1}, []]
)
async def test_machine_that_the_api_does_not_tell_of_is_a_failure(fake: Fake, made: Any) -> None:
    fake.states["m1"], fake.made = "started", made
    with pytest.raises(DriverError, match="does not say what it has made"):
        await fly(fake).create(MACHINE, "gru")


@pytest.mark.parametrize("status", [402, 422, 429, 500])
async def test_machine_that_the_api_does_not_make_is_a_failure(fake: Fake, status: int) -> None:
    fake.states["m1"] = "started"
    fake.status, fake.text = status, "no capacity in gru"
    with pytest.raises(DriverError, match=f"answers a new machine with {status}: .*no capacity in gru"):
        await fly(fake).create(MACHINE, "gru")


async def test_webhook_makes_one_more_and_says_where_it_is(fake: Fake) -> None:
    fake.text = '{"machine": "web-7", "address": "10.0.0.7:80", "more": 1}'
    assert await webhook(fake).create(MACHINE, "gru") == Made("web-7", "10.0.0.7:80")
    asked = orjson.loads(fake.asked[0][3])
    assert (asked["action"], asked["machine"], asked["region"], asked["app"]) == ("create", "", "gru", "web")


@pytest.mark.parametrize(
    "text",
    [
        *("", "ok", "[]", '"x"', "null", "{}", '{"machine": "m"}', '{"machine": null, "address": "a:1"}'),
        *('{"machine": "m", "address": 5}', '{"machine": "", "address": "a:1"}'),
    ],
)
async def test_webhook_that_does_not_say_what_it_has_made_is_a_failure(fake: Fake, text: str) -> None:
    fake.text = text
    with pytest.raises(DriverError, match="does not say what it has made"):
        await webhook(fake).create(MACHINE, "gru")


async def test_webhook_whose_answer_is_no_text_is_a_failure(fake: Fake) -> None:
    fake.body = b'{"machine": "\xff", "address": "a:1"}'
    with pytest.raises(DriverError, match="does not say what it has made"):
        await webhook(fake).create(MACHINE, "gru")


async def test_webhook_that_cannot_make_machines_is_a_failure(fake: Fake) -> None:
    fake.status, fake.text = 501, "make them yourself"
    with pytest.raises(DriverError, match="refuses to create it with 501: make them yourself"):
        await webhook(fake).create(MACHINE, "gru")


async def test_answer_that_comes_in_pieces_is_read_whole(fake: Fake) -> None:
    fake.text = '{"machine": "web-7", "address": "10.0.0.7:80"}'
    making = asyncio.create_task(webhook(fake, path="/hook/in-halves").create(MACHINE, "gru"))
    await fake.half.wait()
    for _ in range(100):
        await asyncio.sleep(0)
    fake.go_on.set()
    assert (await making).id == "web-7"


async def test_answer_that_does_not_end_is_not_waited_for(fake: Fake) -> None:
    fake.text = '{"machine": "web-7"'
    with pytest.raises(DriverError) as caught:
        await webhook(fake, path="/hook/in-halves", timeout_ms=50).start(MACHINE)
    assert str(caught.value) == f"{fake.url.removeprefix('http://')}: no answer within 50 ms"


async def test_answer_that_is_too_large_is_not_read_to_its_end(fake: Fake) -> None:
    fake.text = "x" * (ANSWER_BYTES_MAX + 1)
    with pytest.raises(DriverError, match="more than 1048576 bytes"):
        await webhook(fake).start(MACHINE)


@pytest.mark.parametrize("port", ["1", "0", "99999"])
async def test_secrets_of_an_address_are_not_told(port: str) -> None:
    url = f"http://user:s3cret@127.0.0.1:{port}/s3cret/hook?key=s3cret"
    driver = WebhookDriver(DriverConfig(type="webhook", url=url, secret="s3cret"), "n1")
    with pytest.raises(DriverError) as caught:
        await driver.start(MACHINE)
    assert "s3cret" not in str(caught.value)
    assert f"127.0.0.1:{port}" in str(caught.value)


async def test_token_that_is_none_is_a_failure_and_is_not_told(fake: Fake) -> None:
    driver = FlyDriver(DriverConfig(type="fly", url=fake.url, token="s3cret\n"))
    with pytest.raises(DriverError) as caught:
        await driver.start(MACHINE)
    assert "s3cret" not in str(caught.value)
