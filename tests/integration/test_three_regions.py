"""Three regions as real processes: routing, replay, streams, death and cuts."""

from __future__ import annotations

import http.client
import os
import random
import re
import signal
import socket
import sqlite3
import threading
import time
from typing import TYPE_CHECKING, Self

import aiohttp
import pytest

from tests.integration.processes import Guestbook, Node, wait_for

if TYPE_CHECKING:
    from tests.integration.conftest import World

HOST = {"Host": "guestbook.test"}


def served_by(node: Node, path: str = "/") -> str:
    answer = node.get(path, headers=HOST)
    assert answer.status == 200, answer.text
    found = re.match(r"hello from machine (\S+)", answer.text)
    assert found, answer.text
    return found[1]


@pytest.mark.parametrize("region", ["ams", "iad", "syd"])
def test_the_nearest_machine_answers(world: World, region: str) -> None:
    assert {served_by(world.nodes[region]) for _ in range(30)} == {f"{region}-1", f"{region}-2"}


@pytest.mark.parametrize("region", ["iad", "syd"])
def test_an_app_replays_to_a_region(world: World, region: str) -> None:
    answer = world.nodes["ams"].get(f"/in/{region}", headers=HOST)
    assert re.fullmatch(
        rf"hello from machine {region}-[12] in {region}\n"
        r"replayed: instance=ams-[12];region=ams;t=\d+\n",
        answer.text,
    )
    assert "fly-replay" not in answer.headers


def test_an_app_replays_to_an_instance(world: World) -> None:
    assert {served_by(world.nodes["ams"], "/on/syd-2") for _ in range(10)} == {"syd-2"}


def test_a_post_is_replayed_with_its_whole_body(world: World) -> None:
    seed = 20261123
    words = random.Random(seed)
    entry = "".join(words.choices("abcdefghijklmnopqrstuvwxyz ", k=200_000)).strip()
    answer = world.nodes["syd"].get("/guestbook", method="POST", body=entry.encode(), headers=HOST)
    assert answer.status == 201, answer.text
    assert re.fullmatch(r"written on iad-[12] in iad\n", answer.text)
    read = world.nodes["ams"].get("/guestbook", headers=HOST)
    assert read.text.splitlines()[0] == entry, f"seed {seed}"


async def test_a_websocket_echoes_through_the_proxy(world: World) -> None:
    url = f"http://{world.nodes['iad'].proxy}/echo"
    async with aiohttp.ClientSession() as session, session.ws_connect(url, headers=HOST) as web_socket:
        for text in ("one", "zwei", "x" * 100_000):
            await web_socket.send_str(text)
            answer = await web_socket.receive_str(timeout=20)
            assert re.fullmatch(rf"iad-[12]: {text}", answer)


def test_a_stream_arrives_while_it_is_written(world: World) -> None:
    connection = http.client.HTTPConnection(world.nodes["ams"].proxy, timeout=20)
    connection.request("GET", "/count", headers=HOST)
    response = connection.getresponse()
    arrivals = []
    while chunk := response.read1(100):
        arrivals.append((chunk, time.monotonic()))
    connection.close()
    assert b"".join(chunk for chunk, _ in arrivals) == b"1\n2\n3\n4\n5\n"
    # The app writes a number each 200 ms; held back, they would come at once.
    assert arrivals[-1][1] - arrivals[0][1] > 0.4


def test_a_stopped_machine_leaves_the_tables_of_all_nodes(world: World) -> None:
    everyone = set(world.machines)
    world.nodes["ams"].change("machines/syd-1/stop")
    world.wait_until_all_see(everyone - {"syd-1"})
    assert {served_by(world.nodes["syd"]) for _ in range(20)} == {"syd-2"}
    world.nodes["iad"].change("machines/syd-1/start")
    world.wait_until_all_see(everyone)


def test_a_write_by_another_sqlite_client_reaches_all_nodes(world: World) -> None:
    everyone = set(world.machines)
    with sqlite3.connect(world.nodes["iad"].data / "isthmus.db") as database:
        database.execute("UPDATE machines SET cordoned = 1 WHERE id = 'ams-2'")
    database.close()
    world.wait_until_all_see(everyone - {"ams-2"})
    world.nodes["ams"].change("machines/ams-2/uncordon")
    world.wait_until_all_see(everyone)


def test_the_next_request_is_served_when_a_machine_dies(world: World) -> None:
    dead = world.machines["iad-1"]
    port = int(dead.address.rsplit(":", 1)[1])
    for _ in range(10):
        served_by(world.nodes["iad"])
    dead.kill()
    assert {served_by(world.nodes["iad"]) for _ in range(40)} == {"iad-2"}
    # Its check takes it out of every table, and brings it back.
    world.wait_until_all_see(set(world.machines) - {"iad-1"})
    world.machines["iad-1"] = Guestbook("iad", "iad-1", world.directory, port)
    try:
        world.wait_until_all_see(set(world.machines))
    finally:
        dead.process = world.machines["iad-1"].process  # the fixture closes what it started


class Load:
    """Clients that go on asking until they are told to stop. `errors` says what went wrong."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._stop = threading.Event()
        self.served = 0
        self.errors: list[str] = []
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        wait_for("the load to run", lambda: self.served > 10)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                answer = self._node.get("/", headers=HOST)
            except (OSError, http.client.HTTPException) as error:
                self.errors.append(repr(error))
            else:
                self.served += 1
                if answer.status != 200:
                    self.errors.append(f"{answer.status} {answer.text}")


def test_requests_go_on_without_an_error_when_the_agent_is_killed(world: World) -> None:
    node = world.nodes["ams"]
    agent = node.agent_pid()
    with Load(node) as load:
        os.kill(agent, signal.SIGKILL)
        before = load.served
        wait_for("requests while there is no agent", lambda: load.served > before + 20)

        def restarted() -> bool:
            try:
                return node.agent_pid() != agent
            except (OSError, http.client.HTTPException):
                return False

        wait_for("the agent to be restarted", restarted)
        after = load.served
        wait_for("requests with the new agent", lambda: load.served > after + 20)
    assert load.errors == []
    # The workers follow the new agent: a change on another node takes effect here.
    world.nodes["syd"].change("machines/ams-1/stop")
    wait_for("the change to take effect", lambda: {served_by(node) for _ in range(10)} == {"ams-2"})
    world.nodes["syd"].change("machines/ams-1/start")
    world.wait_until_all_see(set(world.machines))


def test_a_killed_worker_is_restarted(world: World) -> None:
    node = world.nodes["syd"]
    (worker,) = wait_for("a worker to follow", node.worker_pids)
    os.kill(worker, signal.SIGKILL)
    wait_for("another worker", lambda: node.worker_pids() not in ([], [worker]))
    assert served_by(node).startswith("syd-")


def table_rows(node: Node) -> dict[str, list[tuple[object, ...]]]:
    """Return all replicated rows of a node, straight from its file."""
    database = sqlite3.connect(f"file:{node.data}/isthmus.db?mode=ro", uri=True)
    try:
        tables = ("nodes", "regions", "apps", "hostnames", "services", "machines", "checks", "loads")
        return {table: sorted(database.execute(f"SELECT * FROM {table}")) for table in tables}
    finally:
        database.close()


def test_both_sides_of_a_cut_go_on_and_agree_when_it_heals(world: World) -> None:
    syd, ams, iad = world.nodes["syd"], world.nodes["ams"], world.nodes["iad"]
    world.cut_off("syd")
    dropped_before = world.dropped()
    syd.change("machines/syd-1/stop")
    ams.change("machines/ams-1/stop")
    iad.change("apps", {"name": "north", "hosts": ["north.test"], "machines": [{"address": "127.0.0.1:9"}]})
    syd.change("apps", {"name": "south", "hosts": ["south.test"], "machines": [{"address": "127.0.0.1:9"}]})
    # Both write the same row: they must agree on one of the two in the end.
    iad.change("machines/iad-2/cordon")
    syd.change("machines/iad-2/stop")
    wait_for(
        "the cut to have dropped gossip",
        lambda: sum(r.dropped for r in world.relays.values()) > dropped_before,
    )
    # Each side goes on with what it knows, and with what it was told itself.
    wait_for("syd to act on its own write", lambda: {served_by(syd) for _ in range(10)} == {"syd-2"})
    wait_for("ams to act on its own write", lambda: {served_by(ams) for _ in range(10)} == {"ams-2"})
    assert served_by(syd, "/in/ams") in {"ams-1", "ams-2"}
    assert "ams-1" in syd.routable()
    assert "syd-1" in iad.routable()
    world.heal()
    wait_for("equal tables everywhere", lambda: table_rows(syd) == table_rows(ams) == table_rows(iad), 60)
    rows = table_rows(syd)
    assert {"guestbook", "north", "south"} == {row[0] for row in rows["apps"]}
    states = {row[0]: (row[5], row[6]) for row in rows["machines"]}
    assert states["syd-1"] == states["ams-1"] == ("stopped", 0)
    assert states["iad-2"] in {("started", 1), ("stopped", 0)}
    for action in ("ams-1/start", "syd-1/start", "iad-2/start", "iad-2/uncordon"):
        ams.change(f"machines/{action}")
    for app in ("north", "south"):
        ams.change(f"apps/{app}", method="DELETE")
    world.wait_until_all_see(set(world.machines))


def receive_all(connection: socket.socket) -> bytes:
    """Return what comes until the other end closes, in whichever way."""
    received = b""
    try:
        while data := connection.recv(65536):
            received += data
    except ConnectionResetError:
        pass
    return received


def test_garbage_on_the_gossip_port_is_counted_and_harmless(world: World) -> None:
    node = world.nodes["ams"]
    host, _, port = node.gossip.rpartition(":")
    before = node.metric("isthmus_gossip_dropped_total")
    noise = random.Random(7)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        for size in (0, 1, 17, 400, 1400):
            datagrams.sendto(noise.randbytes(size), (host, int(port)))
    with socket.create_connection((host, int(port))) as stream:
        stream.sendall(b"\xff" * 64)
        stream.settimeout(20)
        assert receive_all(stream) == b""  # closed without a word
    wait_for("the garbage to be counted", lambda: node.metric("isthmus_gossip_dropped_total") > before)
    assert {member["state"] for member in node.show("nodes")} == {"alive"}
    assert served_by(node).startswith("ams-")


def test_what_is_not_http_gets_a_clear_answer(world: World) -> None:
    host, _, port = world.nodes["ams"].proxy.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=20) as client:
        client.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 hello\r\n\r\n")
        answer = receive_all(client)
    assert answer.startswith(b"HTTP/1.1 400 ")


def test_an_unknown_host_gets_a_clear_answer(world: World) -> None:
    answer = world.nodes["ams"].get("/", headers={"Host": "nobody.test"})
    assert (answer.status, answer.headers["fly-proxy-error"]) == (404, "PH13")


def test_a_replay_to_an_unknown_region_gets_a_clear_answer(world: World) -> None:
    before = world.nodes["ams"].metric("isthmus_errors_total")
    answer = world.nodes["ams"].get("/in/nowhere", headers=HOST)
    assert (answer.status, answer.headers["fly-proxy-error"]) == (502, "PA03")
    assert "nowhere" in answer.text
    wait_for("the metric", lambda: world.nodes["ams"].metric("isthmus_errors_total") > before)
