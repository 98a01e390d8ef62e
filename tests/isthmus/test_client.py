"""The command line's client, against the admin API of a real agent and against what is none."""

from __future__ import annotations

import argparse
import asyncio
import socket
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from isthmus.agent_role import AgentRole
from isthmus.client import AdminClient, ClientError, make_client, quote
from isthmus.config import AdminConfig, Config, GossipConfig
from isthmus.supervisor import NodeInfo

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

TOKEN = "sésame 世界"


@pytest.fixture
async def address(tmp_path: Path) -> AsyncIterator[str]:
    """Where the admin API of a node listens that has a token."""
    role = AgentRole(
        Config(
            node="n1",
            data=str(tmp_path),
            admin=AdminConfig(listen="127.0.0.1:0", token=TOKEN),
            gossip=GossipConfig(listen="127.0.0.1:0"),
        )
    )
    addresses = await role.start()
    yield addresses["admin"]
    await role.stop()


@contextmanager
def answering(data: bytes) -> Iterator[str]:
    """Some other server: it answers one connection with these bytes."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65_536)
                connection.sendall(data)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        thread.join()


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("scheme", ["", "http://", "//"])
async def test_asks_adds_and_removes(address: str, scheme: str) -> None:
    client = AdminClient(scheme + address, TOKEN)

    def work() -> tuple[Any, Any, Any]:
        added = client.post("/v1/apps", {"name": "web", "hosts": ["web.test"]})
        return client.get("/v1/status"), added, client.delete(f"/v1/apps/{quote('web')}")

    status, added, removed = await asyncio.to_thread(work)
    assert status["node"] == "n1"
    assert added == {"app": "web", "machines": [], "warnings": []}
    assert removed == {"removed": "web"}


async def test_refusal_of_the_node_is_told_in_its_words(address: str) -> None:
    client = AdminClient(address, TOKEN)
    with pytest.raises(ClientError, match=r"^there is no machine `a/b`$"):
        await asyncio.to_thread(client.delete, f"/v1/machines/{quote('a/b')}")


@pytest.mark.parametrize("token", ["", "wrong"])
async def test_missing_token_is_told(address: str, token: str) -> None:
    client = AdminClient(address, token)
    with pytest.raises(ClientError, match="missing or wrong: give it with --token or ISTHMUS_TOKEN"):
        await asyncio.to_thread(client.get, "/v1/status")


def test_nobody_there_says_how_to_start_or_find_one() -> None:
    address = free_address()
    with pytest.raises(
        ClientError, match=rf"no isthmus answers at {address} .*`isthmus run`.*--admin HOST:PORT"
    ):
        AdminClient(address, "").get("/v1/status")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n\xff",
    ],
)
def test_other_server_is_not_taken_for_a_node(data: bytes) -> None:
    with answering(data) as address, pytest.raises(ClientError, match=f"no isthmus answers at {address}"):
        AdminClient(address, "").get("/v1/status")


def test_program_that_speaks_http_is_told_as_such() -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>"
    with answering(answer) as address, pytest.raises(ClientError, match=r"\(another program does\)"):
        AdminClient(address, "").get("/v1/status")


@pytest.mark.parametrize("field", [b"fly-proxy-error: PH13", b"Via: 1.1 isthmus"])
def test_listener_for_clients_is_told_from_that_for_admins(field: bytes) -> None:
    answer = b'HTTP/1.1 404 Not Found\r\n%b\r\nContent-Length: 16\r\n\r\n{"error":"PH13"}' % field
    with (
        answering(answer) as address,
        pytest.raises(ClientError, match=f"{address} is where clients connect"),
    ):
        AdminClient(address, "").get("/v1/status")


@pytest.mark.parametrize("body", [b"[]", b"{}", b"null"])
def test_refusal_without_a_reason_is_told_by_its_status(body: bytes) -> None:
    answer = b"HTTP/1.1 404 Not Found\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    with answering(answer) as address, pytest.raises(ClientError, match=f"{address} answers with status 404"):
        AdminClient(address, "").get("/v1/status")


@pytest.mark.parametrize(
    "base", ["https://127.0.0.1:1", "ftp://x", "http://", "127.0.0.1:http", "http://[::1", ""]
)
def test_what_is_no_address_is_refused(base: str) -> None:
    with pytest.raises(ClientError, match="--admin takes http://HOST:PORT"):
        AdminClient(base, "")


class TestWhichNodeIsAsked:
    @pytest.fixture(autouse=True)
    def clean_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("ISTHMUS_ADMIN", "ISTHMUS_DATA", "ISTHMUS_TOKEN"):
            monkeypatch.delenv(name, raising=False)

    @staticmethod
    def asked(
        admin: str | None = None, data: Path | None = None, token: str | None = None
    ) -> tuple[str, str]:
        client = make_client(argparse.Namespace(admin=admin, data=data, token=token))
        return client._address, client._token

    @staticmethod
    def leave_note(data: Path, admin: str) -> Path:
        data.mkdir(exist_ok=True)
        note = NodeInfo("n1", "ams", 1, "127.0.0.1:8080", admin, "127.0.0.1:8472")
        (data / "node.json").write_bytes(msgspec.json.encode(note))
        return data

    def test_the_one_that_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ISTHMUS_ADMIN", "10.0.0.9:1")
        monkeypatch.setenv("ISTHMUS_TOKEN", "t")
        data = self.leave_note(tmp_path, "127.0.0.1:5")
        assert self.asked(admin="10.0.0.1:1") == ("10.0.0.1:1", "t")
        assert self.asked(admin="10.0.0.1:1", data=data, token="flag") == ("10.0.0.1:1", "flag")
        assert self.asked(data=data) == ("127.0.0.1:5", "t")
        assert self.asked() == ("10.0.0.9:1", "t")

    def test_the_one_whose_data_directory_the_environment_names(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("ISTHMUS_DATA", str(self.leave_note(tmp_path, "127.0.0.1:6")))
        assert self.asked() == ("127.0.0.1:6", "")

    def test_the_one_that_runs_with_defaults(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("os.geteuid", lambda: 1000)
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
        self.leave_note(tmp_path / "isthmus", "127.0.0.1:7")
        assert self.asked() == ("127.0.0.1:7", "")

    def test_none_that_runs_is_told_with_what_to_do(self, tmp_path: Path) -> None:
        with pytest.raises(
            ClientError, match=rf"no isthmus runs with the data directory {tmp_path}; start one"
        ):
            self.asked(data=tmp_path)
