"""The admin API of a real agent, over a real socket."""

from __future__ import annotations

import asyncio
import io
import socket
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from isthmus.admin.metrics import find_family, known_metrics
from isthmus.admin.server import BODY_BYTES_MAX
from isthmus.agent_role import AgentRole
from isthmus.config import AdminConfig, Config, GossipConfig, ProxyConfig
from isthmus.credentials import compute_explain_keys
from isthmus.role import RefusedError
from proxy.core.explain_proof import accepts
from replication.errors import BusyError, ReadOnlyError, StoreError
from tests.isthmus.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


def config(data: Path, admin: AdminConfig | None = None) -> Config:
    return Config(
        node="n1",
        data=str(data),
        region="ams",
        proxy=ProxyConfig(listen="127.0.0.1:1"),
        admin=admin or AdminConfig(listen="127.0.0.1:0"),
        gossip=GossipConfig(listen="127.0.0.1:0"),
    )


class Admin:
    """A client of one node's admin API."""

    def __init__(self, session: aiohttp.ClientSession, address: str) -> None:
        self.session = session
        self.address = address

    async def ask(self, method: str, path: str, body: Any = None, **options: Any) -> tuple[int, Any]:
        """Return status and decoded body of an answer, which must be JSON whatever happened."""
        async with self.session.request(
            method, f"http://{self.address}{path}", json=body, **options
        ) as response:
            assert response.content_type == "application/json"
            return response.status, await response.json()

    async def get(self, path: str) -> Any:
        status, answer = await self.ask("GET", path)
        assert status == 200
        return answer

    async def routed(self) -> set[str]:
        """The machines that requests may go to."""
        return {machine["machine"] for route in await self.get("/v1/routes") for machine in route["machines"]}


@pytest.fixture
async def role(tmp_path: Path) -> AsyncIterator[AgentRole]:
    role = AgentRole(config(tmp_path))
    yield role
    await role.stop()


@pytest.fixture
async def admin(role: AgentRole) -> AsyncIterator[Admin]:
    addresses = await role.start()
    async with aiohttp.ClientSession() as session:
        yield Admin(session, addresses["admin"])


WEB = {
    "name": "web",
    "hosts": ["web.test", "*.web.test"],
    "soft_limit": 5,
    "machines": [
        {"address": "127.0.0.1:2", "id": "m1"},
        {"address": "127.0.0.1:3", "id": "m2", "region": "gru"},
    ],
}


async def with_web(admin: Admin) -> None:
    assert await admin.ask("POST", "/v1/apps", WEB) == (
        201,
        {"app": "web", "machines": ["m1", "m2"], "warnings": []},
    )
    await eventually("the table has it", lambda: has_web(admin))


async def has_web(admin: Admin) -> bool:
    return await admin.routed() == {"m1", "m2"}


async def test_new_node_shows_itself_and_nothing_else(admin: Admin) -> None:
    assert await admin.get("/healthz") == {"ok": True}
    (node,) = await eventually("own row is in the table", lambda: admin.get("/v1/nodes"))
    assert (node["node"], node["region"], node["address"], node["self"]) == ("n1", "ams", "127.0.0.1:1", True)
    for path in ("/v1/apps", "/v1/machines", "/v1/routes"):
        assert await admin.get(path) == []
    status = await admin.get("/v1/status")
    assert (status["node"], status["sealed"], status["workers_following"]) == ("n1", False, [])


async def test_added_app_is_shown_and_routed_nearest_machine_first(admin: Admin) -> None:
    await with_web(admin)
    (app,) = await admin.get("/v1/apps")
    assert app == {
        "app": "web",
        "network": "default",
        "hosts": ["*.web.test", "web.test"],
        "machines": 2,
        "routable": 2,
    }
    for route in await admin.get("/v1/routes"):
        assert (route["path"], route["app"]) == ("/", "web")
        assert [machine["machine"] for machine in route["machines"]] == ["m1", "m2"]
    machines = {machine["machine"]: machine for machine in await admin.get("/v1/machines")}
    assert machines["m2"]["region"] == "gru"
    assert machines["m1"]["node"] == "n1"
    assert machines["m1"]["checks"] == []
    assert machines["m1"]["verdict"] == "candidate: 0 of 5"


@pytest.mark.parametrize(
    ("action", "undo", "verdict"),
    [("stop", "start", "not started: stopped"), ("cordon", "uncordon", "cordoned")],
)
async def test_machine_taken_out_is_shown_and_not_routed_until_it_is_back(
    admin: Admin, action: str, undo: str, verdict: str
) -> None:
    await with_web(admin)
    assert await admin.ask("POST", f"/v1/machines/m1/{action}") == (
        200,
        {"machine": "m1", "done": action, "asked": ""},
    )

    async def is_out() -> bool:
        return await admin.routed() == {"m2"}

    await eventually("it is out", is_out)
    (m1,) = (machine for machine in await admin.get("/v1/machines") if machine["machine"] == "m1")
    assert (m1["routable"], m1["verdict"]) == (False, verdict)
    assert (await admin.ask("POST", f"/v1/machines/m1/{undo}"))[0] == 200
    await eventually("it is back", lambda: has_web(admin))


async def test_machines_and_apps_come_and_go(admin: Admin) -> None:
    await with_web(admin)
    assert await admin.ask("POST", "/v1/machines", {"app": "web", "address": "127.0.0.1:4", "id": "m3"}) == (
        201,
        {"machine": "m3"},
    )
    assert await admin.ask("DELETE", "/v1/machines/m1") == (200, {"removed": "m1"})

    async def are(*machines: str) -> bool:
        return await admin.routed() == set(machines)

    await eventually("m3 came and m1 went", lambda: are("m2", "m3"))
    assert await admin.ask("DELETE", "/v1/apps/web") == (200, {"removed": "web"})
    await eventually("nothing is routed", are)

    async def is_empty() -> bool:
        return not (
            await admin.get("/v1/apps") or await admin.get("/v1/machines") or await admin.get("/v1/routes")
        )

    await eventually("nothing is left", is_empty)


async def test_overview_is_all_views_at_once(admin: Admin) -> None:
    await with_web(admin)
    overview = await admin.get("/v1/overview")
    for view in ("apps", "machines", "routes"):
        assert overview[view] == await admin.get(f"/v1/{view}")
    assert overview["status"]["node"] == "n1"
    assert overview["nodes"][0]["node"] == "n1"
    assert overview["traffic"] == {"in_flight": 0, "unrouted": 0, "apps": {}}


async def test_row_that_cannot_be_used_is_shown_with_its_reason(admin: Admin, role: AgentRole) -> None:
    await with_web(admin)
    bad = "INSERT INTO machines (id, app, node, region, address) VALUES ('bad', 'web', 'n1', 'ams', '??')"
    await role._agent.execute([(bad, ())])

    async def rejected() -> Any:
        return (await admin.get("/v1/status"))["rejected_rows"]

    (row,) = await eventually("it is shown", rejected)
    assert (row["table"], row["key"]) == ("machines", ["bad"])
    assert "'??'" in row["reason"]
    assert await admin.routed() == {"m1", "m2"}


REFUSED: dict[str, tuple[str, str, Any, int, str]] = {
    "no such path": ("GET", "/v1/nothing", None, 404, "Not Found: GET /v1/nothing"),
    "no such method": ("PUT", "/v1/apps", {}, 405, "Method Not Allowed: PUT /v1/apps"),
    "change by GET": (
        "GET",
        "/v1/machines/m1/stop",
        None,
        405,
        "Method Not Allowed: GET /v1/machines/m1/stop",
    ),
    "unknown key": ("POST", "/v1/apps", {"name": "a", "host": "x"}, 400, "unknown field `host`"),
    "missing key": ("POST", "/v1/machines", {"app": "web"}, 400, "missing required field `address`"),
    "wrong type": ("POST", "/v1/apps", {"name": 5}, 400, "Expected `str`, got `int` - at `$.name`"),
    "wrong value": ("POST", "/v1/apps", {"name": "a", "soft_limit": 0}, 400, ">= 1"),
    "no weight": (
        "POST",
        "/v1/machines",
        {"app": "web", "address": "127.0.0.1:4", "weight": 0},
        400,
        "Expected `int` >= 1 - at `$.weight`",
    ),
    "no object": ("POST", "/v1/apps", [1], 400, "Expected `object`, got `array`"),
    "bad address": (
        "POST",
        "/v1/apps",
        {"name": "a", "hosts": ["a.test"], "machines": [{"address": "x"}]},
        400,
        "`x` names no port",
    ),
    "taken host": (
        "POST",
        "/v1/apps",
        {"name": "a", "hosts": ["web.test"]},
        409,
        "already leads to app `web`",
    ),
    "own listener": (
        "POST",
        "/v1/machines",
        {"app": "web", "address": "localhost:1"},
        409,
        "listener of this node",
    ),
    "unknown region": (
        "POST",
        "/v1/machines",
        {"app": "web", "address": "127.0.0.1:9", "region": "amz"},
        409,
        "did you mean `ams`?",
    ),
    "unknown app": ("DELETE", "/v1/apps/none", None, 404, "there is no app `none`"),
    "unknown machine": ("DELETE", "/v1/machines/m9", None, 404, "there is no machine `m9`"),
    "quoted machine": ("POST", "/v1/machines/a%2Fb%20c/stop", None, 404, "there is no machine `a/b c`"),
    "unknown action": (
        "POST",
        "/v1/machines/m1/explode",
        None,
        404,
        "`explode` is no action; there are start, stop",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_what_cannot_be_done_is_refused_with_a_reason_and_changes_nothing(
    admin: Admin, case: str
) -> None:
    method, path, body, status, reason = REFUSED[case]
    await with_web(admin)
    before = [await admin.get(path) for path in ("/v1/apps", "/v1/machines", "/v1/routes")]
    answer = await admin.ask(method, path, body)
    assert answer[0] == status
    assert reason in answer[1]["error"]
    assert [await admin.get(path) for path in ("/v1/apps", "/v1/machines", "/v1/routes")] == before


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b'{"name": "a"}{}'])
async def test_body_that_is_no_json_is_refused(admin: Admin, body: bytes) -> None:
    async with admin.session.post(f"http://{admin.address}/v1/apps", data=body) as response:
        assert response.status == 400
        assert (await response.json())["error"]


async def test_body_that_is_too_large_is_refused(admin: Admin) -> None:
    body = io.BytesIO(b" " * (BODY_BYTES_MAX + 1))
    async with admin.session.post(f"http://{admin.address}/v1/apps", data=body) as response:
        assert response.status == 413
        assert "Too Large" in (await response.json())["error"]


async def test_failure_of_our_own_is_logged_and_not_shown(
    admin: Admin, role: AgentRole, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise RuntimeError("the secret of the node")

    monkeypatch.setattr(role._agent, "status", fail)
    assert await admin.ask("GET", "/v1/status") == (
        500,
        {"error": "internal error; the log of this node says more"},
    )
    (record,) = (record for record in caplog.records if record.msg == "an admin request failed")
    assert record.path == "/v1/status"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ReadOnlyError("disk is full"), "this node is read-only: disk is full"),
        (StoreError("damaged"), "the database refuses: damaged"),
    ],
)
async def test_database_that_takes_no_change_is_told_as_such(
    admin: Admin, role: AgentRole, monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
) -> None:
    async def refuse(statements: Any) -> None:
        raise error

    monkeypatch.setattr(role._agent, "execute", refuse)
    assert await admin.ask("POST", "/v1/apps", WEB) == (503, {"error": told})


async def test_busy_database_is_told_as_such(
    admin: Admin, role: AgentRole, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def busy(statements: Any) -> None:
        raise BusyError("database is locked")

    monkeypatch.setattr(role._agent, "execute", busy)
    status, answer = await admin.ask("POST", "/v1/apps", WEB)
    assert status == 503
    assert "try again" in answer["error"]


async def test_metrics_are_described_and_understood(admin: Admin) -> None:
    async with admin.session.get(f"http://{admin.address}/metrics") as response:
        assert response.status == 200
        text = await response.text()
    names = {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}
    assert {"isthmus_commit_seq", "isthmus_checks_running", "isthmus_feed_followers"} <= names
    for name in names:
        assert find_family(name, known_metrics()), name


async def test_token_is_asked_for_everywhere_but_for_health_and_page(tmp_path: Path) -> None:
    role = AgentRole(config(tmp_path, AdminConfig(listen="127.0.0.1:0", token="sesame")))
    addresses = await role.start()
    try:
        async with aiohttp.ClientSession() as session:
            admin = Admin(session, addresses["admin"])
            for method, path in (
                ("GET", "/v1/status"),
                ("GET", "/nothing"),
                ("POST", "/v1/apps"),
                ("GET", "/metrics"),
            ):
                status, answer = await admin.ask(method, path)
                assert status == 401
                assert "admin token" in answer["error"]
            assert (await admin.ask("GET", "/healthz"))[0] == 200
            headers = {"Authorization": "Bearer sesame"}
            assert (await admin.ask("GET", "/v1/status", headers=headers))[0] == 200
    finally:
        await role.stop()


async def test_page_of_another_origin_changes_nothing(admin: Admin) -> None:
    status, answer = await admin.ask("POST", "/v1/apps", WEB, headers={"Origin": "http://evil.test"})
    assert (status, answer["error"]) == (403, "requests from other web pages are refused")
    status, _ = await admin.ask("GET", "/v1/status", headers={"Host": "evil.test"})
    assert status == 403
    assert await admin.get("/v1/apps") == []


async def test_taken_port_refuses_the_start_and_leaves_nothing_open(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        role = AgentRole(config(tmp_path, AdminConfig(listen=f"127.0.0.1:{other.getsockname()[1]}")))
        with pytest.raises(RefusedError, match="address already in use"):
            await role.start()
    # The database is free again.
    second = AgentRole(config(tmp_path))
    await second.start()
    await second.stop()


async def test_idle_connections_do_not_hold_up_the_stop(admin: Admin, role: AgentRole) -> None:
    host, port = admin.address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    async with asyncio.timeout(5):
        await role.stop()
        assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()


async def test_a_request_is_explained_by_what_the_node_has(admin: Admin) -> None:
    await with_web(admin)
    question = {"url": "https://a.web.test/x", "headers": ["fly-prefer-region: gru"], "from": "syd"}
    status, told = await admin.ask("POST", "/v1/explain", question)
    assert (status, told["outcome"]["machine"], told["route"]["hostname"]) == (200, "m2", "*.web.test")
    assert told["staleness_ms"] == {"n1": 0}
    query = "url=https://a.web.test/x&header=fly-prefer-region:%20gru&from=syd"
    asked = await admin.get(f"/v1/explain?{query}")
    assert (asked["question"], asked["outcome"]) == (told["question"], told["outcome"])
    status, told = await admin.ask("GET", "/v1/explain?url=nonsense://")
    assert (status, told["error"]) == (400, "`nonsense://` is no URL with http or https and a host")


async def test_without_a_key_nothing_proves_who_may_have_requests_explained(admin: Admin) -> None:
    status, told = await admin.ask("POST", "/v1/explain/proof", {"host": "web.test"})
    assert (status, "gossip.keys" in told["error"]) == (409, True)


async def test_a_proof_is_one_that_workers_of_the_cluster_take(tmp_path: Path) -> None:
    told = config(tmp_path, AdminConfig(listen="127.0.0.1:0", token="secret"))
    role = AgentRole(told)
    addresses = await role.start()
    headers = {"Authorization": "Bearer secret"}
    try:
        async with aiohttp.ClientSession(headers=headers) as session:
            admin = Admin(session, addresses["admin"])
            _, proof = await admin.ask("POST", "/v1/explain/proof", {"host": "web.test", "ttl_s": 60})
            refused, _ = await admin.ask("POST", "/v1/explain/proof", {"host": "web test"})
    finally:
        await role.stop()
    assert (proof["header"], refused) == ("Isthmus-Explain", 400)
    now_s = proof["expires_ms"] // 1000 - 60
    keys = compute_explain_keys((), "secret")
    assert accepts(keys, proof["value"].encode(), b"web.test", now_s)
    assert not accepts(
        compute_explain_keys((b"k" * 32,), "secret"), proof["value"].encode(), b"web.test", now_s
    )
