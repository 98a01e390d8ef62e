"""Drivers that ask others: a webhook, and the shape of the Machines API."""

from __future__ import annotations

import hashlib
import hmac
import time
from typing import TYPE_CHECKING, Any

import orjson
import pytest
from aiohttp import web

from isthmus.config_machines import DriverConfig
from isthmus.machines.driver import DriverError, Machine
from isthmus.machines.fly import FlyDriver
from isthmus.machines.webhook import WebhookDriver

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

MACHINE = Machine("m1", "web", "ams", "10.0.0.1", 80)


class Fake:
    """Answers as it is told to; `asked` has (method, path, headers, body) of each request."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, Any, bytes]] = []
        self.status = 200
        self.text = "{}"
        self.states: dict[str, str] = {}  # of machines, at the Machines API
        self.slow: dict[str, int] = {}  # looks until a machine is in its state
        self.url = ""
        self.config: dict[str, Any] = {"image": "web:1", "env": {"A": "b"}}  # of the machine, at the API

    async def handle(self, request: web.Request) -> web.Response:
        self.asked.append((request.method, request.path, request.headers, await request.read()))
        return web.Response(status=self.status, text=self.text)

    async def handle_machines(self, request: web.Request) -> web.Response:
        """Do what the API does as far as it matters here."""
        self.asked.append((request.method, request.path, request.headers, await request.read()))
        if request.headers["Authorization"] != "Bearer t0ken":
            return web.json_response({"error": "unauthorized"}, status=401)
        _, _, _, app, _, machine, *action = request.path.split("/")
        if (app, machine) != ("web", "m1"):
            return web.json_response({"error": "machine not found"}, status=404)
        if not action:
            if self.slow.get(machine, 0) > 0:
                self.slow[machine] -= 1
                return web.json_response({"id": machine, "state": "stopping"})
            if request.method == "POST":
                self.config = orjson.loads(self.asked[-1][3])["config"]
                self.states[machine] = "started"
            return web.json_response({"id": machine, "state": self.states[machine], "config": self.config})
        if self.status != 200:
            return web.json_response({"error": self.text}, status=self.status)
        self.states[machine] = {"start": "started", "stop": "stopped", "suspend": "suspended"}[action[0]]
        return web.json_response({"ok": True})

    @property
    def lines(self) -> list[str]:
        return [f"{method} {path}" for method, path, _, _ in self.asked]


@pytest.fixture
async def fake() -> AsyncIterator[Fake]:
    fake = Fake()
    app = web.Application()
    app.router.add_route("*", "/hook", fake.handle)
    app.router.add_route("*", "/v1/{rest:.*}", fake.handle_machines)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield fake
    await runner.cleanup()


def webhook(fake: Fake, **settings: Any) -> WebhookDriver:
    config = DriverConfig(type="webhook", url=f"{fake.url}/hook?x=1", secret="s3cret", **settings)
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
    assert fake.states["m1"] == "stopped"


async def test_stop_waits_until_the_machine_is_stopped(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.machines.fly.LOOK_S", 0.001)
    fake.states["m1"], fake.slow["m1"] = "started", 3
    await fly(fake).stop(MACHINE)
    assert fake.slow["m1"] == 0
    fake.slow["m1"] = 1_000_000
    with pytest.raises(DriverError, match="not stopped within 50 ms"):
        await fly(fake, timeout_ms=50).stop(MACHINE)


async def test_machine_that_cannot_be_suspended_is_stopped(fake: Fake) -> None:
    fake.states["m1"] = "started"
    driver = fly(fake)
    calls: list[str] = []
    call = driver._call

    async def refuse_suspend(method: str, machine: Machine, action: str) -> dict[str, Any]:
        calls.append(action)
        if action == "suspend":
            raise DriverError("422: machine has too much memory")
        return await call(method, machine, action)

    driver._call = refuse_suspend  # type: ignore[method-assign] — the API refuses this one call
    assert not await driver.suspend(MACHINE)
    assert calls[:2] == ["suspend", "stop"]


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
