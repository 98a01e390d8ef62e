"""Clients that others wrote, through a node to an application: right answers, and connections kept.

Each test waits until all that it asked for is counted, lest the next one counts it.
"""

from __future__ import annotations

import asyncio
import hashlib
import html
import http.client
import json
import re
import shutil
import subprocess
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from tests.integration.processes import Node, Program, closing_all, free_port, request, wait_for
from tests.integration.webapp import LARGE, LARGE_DIGEST

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

PIECES = b"".join(b"piece %d;" % number for number in range(50))
UPLOAD = b"0123456789abcdef" * 200_000  # 3.2 MB
UPLOAD_DIGEST = hashlib.sha256(UPLOAD).hexdigest()
EVENTS = ["event 0", "event 1", "event 2"]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    directory = tmp_path_factory.mktemp("clients")
    address = f"127.0.0.1:{free_port()}"
    with closing_all() as started:
        started.append(Program("webapp", directory, "tests.integration.webapp", address))

        def serves() -> bool:
            with suppress(OSError):
                return request(address, "/small").status == 200
            return False

        wait_for("the application", serves)
        node = Node(
            "n1",
            directory,
            f"""
proxy.listen = "127.0.0.1:0"
admin.listen = "127.0.0.1:0"
gossip.listen = "127.0.0.1:0"
[[apps]]
name = "app"
soft_limit = 1000
machines = [{{address = "{address}"}}]
""",
        )
        started.append(node)
        wait_for("the route", lambda: node.get("/small").status == 200)
        wait_for("that to be counted", lambda: node.metric("isthmus_requests_total") == 1)
        yield node


@pytest.fixture
def url(node: Node) -> str:
    return f"http://{node.proxy}"


class Counted:
    """How many connections and requests a node has counted since it was made."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._before = self._look()

    def _look(self) -> tuple[float, float]:
        # What workers count is told each second: a request of our own shows that it was.
        requests = self._node.metric("isthmus_requests_total")
        # Asked for last: a worker may tell more in between, and a connection comes before its requests.
        return self._node.metric("isthmus_connections_total"), requests

    def wait(self, requests: int) -> tuple[int, int]:
        """Return connections and requests once there are so many of the latter."""

        def look() -> tuple[int, int] | None:
            connections, count = self._look()
            found = int(connections - self._before[0]), int(count - self._before[1])
            return found if found[1] >= requests else None

        found: tuple[int, int] = wait_for(f"{requests} requests", look)
        return found


@pytest.fixture
def counted(node: Node) -> Counted:
    return Counted(node)


def program(name: str, package: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"there is no {name} here; Debian has it in {package}")
    return found


def run(*args: str, stdin: bytes = b"") -> bytes:
    done = subprocess.run(args, input=stdin, capture_output=True, check=False, timeout=90)
    assert done.returncode == 0, done.stderr.decode("utf-8", "replace")[-2000:]
    return done.stdout


class TestCurl:
    @pytest.fixture
    def curl(self) -> list[str]:
        return [program("curl", "curl"), "-sS", "--fail", "--max-time", "60"]

    def test_connection_is_kept(self, curl: list[str], url: str, counted: Counted) -> None:
        said = run(*curl, "-w", " %{num_connects}\n", *[f"{url}/small"] * 20)
        assert said.split() == [b"ok", b"1", *[b"ok", b"0"] * 19]
        assert counted.wait(20) == (1, 20)

    def test_large_answer_is_whole(self, curl: list[str], url: str, counted: Counted) -> None:
        assert hashlib.sha256(run(*curl, f"{url}/large")).hexdigest() == LARGE_DIGEST
        assert counted.wait(1) == (1, 1)

    def test_streams_both_ways(self, curl: list[str], url: str, counted: Counted) -> None:
        assert run(*curl, "-N", f"{url}/chunks") == PIECES
        assert run(*curl, "-T", "-", f"{url}/echo", stdin=UPLOAD) == UPLOAD  # chunked
        assert counted.wait(2) == (2, 2)

    def test_uploads_wait_for_100_continue(
        self, curl: list[str], url: str, counted: Counted, tmp_path: Path
    ) -> None:
        file = tmp_path / "upload"
        file.write_bytes(UPLOAD)
        said = run(*curl, "-v", "--stderr", "-", "--data-binary", f"@{file}", f"{url}/digest")
        assert UPLOAD_DIGEST.encode() in said
        assert b"< HTTP/1.1 100 Continue" in said
        assert counted.wait(1) == (1, 1)

    def test_http_1_0(self, curl: list[str], url: str, counted: Counted) -> None:
        assert run(*curl, "-0", f"{url}/chunks") == PIECES
        assert counted.wait(1) == (1, 1)


def test_hey_gets_no_error(url: str, counted: Counted) -> None:
    said = run(
        program("hey", "hey"), "-n", "400", "-c", "8", "-m", "POST", "-d", "x" * 5000, f"{url}/digest"
    ).decode()
    assert re.findall(r"\[(\d+)\]\s+(\d+) responses", said) == [("200", "400")]
    assert "Error distribution" not in said
    connections, _ = counted.wait(400)
    assert connections <= 16  # Go dials, and takes another's connection when that is free first


def test_ab_keeps_connections_of_http_1_0(url: str, counted: Counted) -> None:
    said = run(program("ab", "apache2-utils"), "-q", "-k", "-n", "400", "-c", "8", f"{url}/small").decode()
    found = dict(re.findall(r"^([A-Z][\w -]+):\s+(\d+)", said, re.MULTILINE))
    assert (found["Complete requests"], found["Failed requests"], found["Keep-Alive requests"]) == (
        "400",
        "0",
        "400",
    )
    connections, _ = counted.wait(400)
    assert connections <= 16


def check_told(told: Any, digest: str) -> None:
    """What a program in JavaScript tells of its fetches."""
    assert "error" not in told, told
    assert told["many"] == "ok" * 20
    assert told["large"] == LARGE_DIGEST
    assert told["posted"] == digest
    assert told["stream"].encode() == PIECES


NODE_SCRIPT = """
const crypto = require("node:crypto"), base = process.argv[1], told = {};
const digest = data => crypto.createHash("sha256").update(data).digest("hex");
async function main() {
  told.many = "";
  for (let i = 0; i < 20; i++) told.many += await (await fetch(base + "/small")).text();
  told.large = digest(Buffer.from(await (await fetch(base + "/large")).arrayBuffer()));
  const piece = new Uint8Array(100000).fill(120);
  const pieces = new ReadableStream({
    start(controller) { this.left = 30; },
    pull(controller) { if (this.left-- > 0) controller.enqueue(piece); else controller.close(); },
  });
  told.posted = await (await fetch(base + "/digest", {method: "POST", body: pieces, duplex: "half"})).text();
  told.stream = await (await fetch(base + "/chunks")).text();
  console.log(JSON.stringify(told));
}
main();
"""


def test_fetch_of_node_js(url: str, counted: Counted) -> None:
    told = json.loads(run(program("node", "nodejs"), "-e", NODE_SCRIPT, url))
    check_told(told, hashlib.sha256(b"x" * 3_000_000).hexdigest())
    connections, _ = counted.wait(23)
    assert connections <= 4


async def test_aiohttp(url: str, counted: Counted) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(UPLOAD), 100_000):
            yield UPLOAD[start : start + 100_000]

    connector = aiohttp.TCPConnector(limit=4)
    async with aiohttp.ClientSession(url, connector=connector) as session:

        async def read(method: str, path: str, **kwargs: Any) -> bytes:
            async with session.request(method, path, **kwargs) as response:
                assert response.status == 200
                return await response.read()

        assert set(await asyncio.gather(*(read("GET", "/small") for _ in range(40)))) == {b"ok"}
        assert await read("GET", "/large") == LARGE
        assert await read("GET", "/chunks") == PIECES
        assert await read("POST", "/digest", data=pieces()) == UPLOAD_DIGEST.encode()
        assert await read("POST", "/echo", data=pieces()) == UPLOAD
        assert b"data: event 2" in await read("GET", "/events")
        async with session.ws_connect("/ws") as socket:
            for word in ("one", "two", "x" * 100_000):
                await socket.send_str(word)
                assert await socket.receive_str() == word.upper()
    connections, _ = await asyncio.to_thread(counted.wait, 46)
    assert connections <= 6


def test_http_client_of_python(node: Node, counted: Counted) -> None:
    connection = http.client.HTTPConnection(node.proxy, timeout=30)
    for _ in range(20):
        connection.request("GET", "/small")
        assert connection.getresponse().read() == b"ok"
    connection.request("POST", "/digest", iter([UPLOAD[:1_000_000], UPLOAD[1_000_000:]]), encode_chunked=True)
    assert connection.getresponse().read() == UPLOAD_DIGEST.encode()
    connection.request("GET", "/large")
    assert connection.getresponse().read() == LARGE
    connection.close()
    assert counted.wait(22) == (1, 22)


def test_requests(url: str, counted: Counted) -> None:
    requests = pytest.importorskip("requests", reason="Debian has it in python3-requests")
    with requests.Session() as session:
        assert [session.get(f"{url}/small", timeout=30).text for _ in range(20)] == ["ok"] * 20
        assert session.get(f"{url}/large", timeout=30).content == LARGE
        answer = session.post(f"{url}/digest", data=iter([UPLOAD[:1000], UPLOAD[1000:]]), timeout=30)
        assert answer.text == UPLOAD_DIGEST
    assert counted.wait(22) == (1, 22)


def test_httpx(url: str, counted: Counted) -> None:
    httpx = pytest.importorskip("httpx", reason="Debian has it in python3-httpx")
    with httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
        assert [client.get("/small").text for _ in range(20)] == ["ok"] * 20
        assert client.get("/large").content == LARGE
        assert client.post("/digest", content=iter([UPLOAD[:1000], UPLOAD[1000:]])).text == UPLOAD_DIGEST
        with client.stream("GET", "/events") as response:
            lines = [line for line in response.iter_lines() if line]
        assert lines == [f"data: {event}" for event in EVENTS]
    assert counted.wait(23) == (1, 23)


# How much these two ask for is not known to the last request, so nothing may follow them.


def test_browser_runs_a_page(url: str, counted: Counted, tmp_path: Path) -> None:
    chromium = program("chromium", "chromium")
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
    said = run(chromium, *options, f"--user-data-dir={tmp_path}", "--dump-dom", f"{url}/page").decode()
    shown = re.findall(r'<pre id="told">(.*?)</pre>', said)
    told = json.loads(html.unescape(shown[0]))
    check_told(told, told["expected"])
    assert told["events"] == EVENTS
    assert told["socket"] == "HELLO"
    connections, requests = counted.wait(27)
    assert connections < requests / 2, "a browser opens six at most, and one for the socket"


def test_wrk_gets_no_error(url: str, counted: Counted) -> None:
    said = run(program("wrk", "wrk"), "-t1", "-c16", "-d1s", f"{url}/small").decode()
    assert "Socket errors" not in said
    assert "Non-2xx" not in said
    requests = int(re.findall(r"(\d+) requests in", said)[0])
    connections, seen = counted.wait(requests)
    assert seen >= requests > 16
    assert connections <= 17  # the first one is a trial
