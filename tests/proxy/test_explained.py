"""Requests that are explained to those who may know, and to nobody else."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core.explain_proof import TTL_S_MAX, accepts, derive_key, make_proof
from proxy.core.explained_exchange import STEPS_MAX
from tests.fakes.machine import OK, Connection

if TYPE_CHECKING:
    from pathlib import Path

    from tests.fakes.client import Response
    from tests.fakes.machine import Request
    from tests.proxy.edge import Edge

KEY = derive_key(b"k" * 32)
OLD_KEY = derive_key(b"o" * 32)
NOW_S = 1_000_000
REPLAY = b"HTTP/1.1 200 OK\r\nfly-replay: instance=m2\r\nContent-Length: 0\r\n\r\n"


def field(key: bytes = KEY, host: bytes = b"app.test", in_s: int = 60) -> bytes:
    return b"Isthmus-Explain: " + make_proof(key, host, int(time.time()) + in_s).encode()


def steps(response: Response) -> list[dict[str, Any]]:
    return [json.loads(value) for value in response.values(b"isthmus-trace")]


async def start(edge: Edge, **changes: object) -> None:
    await edge.start(**changes)
    edge.server.explain_to((KEY, OLD_KEY))


# The proof


@pytest.mark.parametrize("host", [b"app.test", b"APP.test:8080", b"app.test."])
def test_a_proof_is_good_for_its_host_until_it_expires(host: bytes) -> None:
    value = make_proof(KEY, host, NOW_S + 60).encode()
    assert accepts([OLD_KEY, KEY], value, b"app.test", NOW_S)
    assert not accepts([KEY], value, b"app.test", NOW_S + 60)
    assert not accepts([KEY], value, b"other.test", NOW_S)
    assert not accepts([OLD_KEY], value, b"app.test", NOW_S)
    assert not accepts([], value, b"app.test", NOW_S)


def test_a_proof_that_is_good_for_long_is_not_believed() -> None:
    assert accepts([KEY], make_proof(KEY, b"a", NOW_S + TTL_S_MAX).encode(), b"a", NOW_S)
    assert not accepts([KEY], make_proof(KEY, b"a", NOW_S + TTL_S_MAX * 2).encode(), b"a", NOW_S)


def test_the_time_in_a_proof_cannot_be_changed() -> None:
    version, expiry, mac = make_proof(KEY, b"a", NOW_S + 60).encode().split(b".")
    assert not accepts([KEY], b".".join((version, b"%d" % (int(expiry) + 1), mac)), b"a", NOW_S)


@given(st.binary(max_size=120))
def test_no_bytes_are_a_proof(value: bytes) -> None:
    assert not accepts([KEY], value, b"a", NOW_S)


# Through the proxy


async def test_an_answer_says_which_machine_it_is_from_and_what_dropped_the_others(edge: Edge) -> None:
    machine = await edge.machine("m1", region="gru")
    edge.put_machine("m2", 1)
    edge.table.apply("checks", ("m2", "alive"), ("m2", "alive", "node1", "critical", "", 0))
    await start(edge)
    response = await edge.get(b"/", field(), b"fly-prefer-region: gru")
    first, step = steps(response)
    assert (response.status, response.body) == (200, b"ok")
    assert (first["node"], first["region"], first["app"]) == ("node1", "ams", "app")
    assert first["regions"] == ["gru", "any"]
    assert first["request"] == response.values(b"fly-request-id")[0].decode()
    assert (step["machine"], step["region"], step["status"]) == ("m1", "gru", 200)
    assert step["dropped"] == {"m2": "unhealthy"}
    assert 0 <= step["at_ms"] <= step["sent_ms"] <= step["head_ms"] <= first["ms"]
    assert machine.requests[0].values(b"isthmus-explain") == []


@pytest.mark.parametrize(
    "lines",
    [
        (),
        (b"Isthmus-Explain: 1",),
        (field(host=b"other.test"),),
        (field(in_s=-1),),
        (field(derive_key(b"")),),
        (field(), field()),
    ],
    ids=("none", "nonsense", "other-host", "expired", "other-key", "twice"),
)
async def test_who_proves_nothing_is_told_nothing_and_served(edge: Edge, lines: tuple[bytes, ...]) -> None:
    machine = await edge.machine(answer=lambda _: OK.replace(b"\r\n\r\n", b"\r\nIsthmus-Trace: x\r\n\r\n"))
    await start(edge)
    response = await edge.get(b"/", *lines)
    assert (response.status, response.body, steps(response)) == (200, b"ok", [])
    assert b"explain" not in machine.requests[0].head.lower()


async def test_the_field_in_disguise_reaches_no_machine(edge: Edge) -> None:
    machine = await edge.machine()
    await start(edge)
    await edge.get(b"/", field().replace(b"-Explain", b"_Explain"))
    assert b"explain" not in machine.requests[0].head.lower()


async def test_failures_and_retries_are_told_and_so_is_the_error_in_the_end(edge: Edge) -> None:
    async def hang_up(connection: Connection) -> None:
        await connection.read_request()

    await edge.machine("m1", behave=hang_up)
    await start(edge)
    response = await edge.get(b"/", field())
    first, step = steps(response)
    assert (response.status, response.error, first["error"]) == (502, "PR03", "PR03")
    assert (step["machine"], step["error"]) == ("m1", "PC03")
    assert json.loads(response.body)["error"] == "PR03"


async def test_both_ends_of_a_replay_are_told(edge: Edge) -> None:
    await edge.machine("m1", answer=lambda _: REPLAY)
    await edge.machine("m2")
    await start(edge)
    response = await edge.get(b"/", field(), b"fly-force-instance-id: m1")
    _, asked, replay, answered = steps(response)
    assert (asked["machine"], asked["replays"], asked["status"]) == ("m1", True, 200)
    assert (replay["step"], replay["app"], replay["instance"]) == ("replay", "app", "m2")
    assert (answered["machine"], answered["status"]) == ("m2", 200)


async def test_a_request_that_goes_round_is_told_in_a_bounded_number_of_lines(edge: Edge) -> None:
    def send_on(request: Request) -> bytes:
        return REPLAY.replace(b"instance=m2", b"app=app")

    await edge.machine("m1", answer=send_on)
    await start(edge)
    response = await edge.get(b"/", field())
    told = steps(response)
    assert response.error == told[0]["error"]
    assert len(told) == 1 + STEPS_MAX
    assert told[0]["steps_left_out"] > 0


async def test_what_a_machine_is_called_breaks_no_line(edge: Edge) -> None:
    await edge.machine("m1")
    edge.put_machine("m2", 1)
    await start(edge)
    target = edge.table.machine("m2")
    assert target is not None
    target.id = "m\r\nSet-Cookie: é"
    target.cordoned = True
    response = await edge.get(b"/", field())
    assert steps(response)[1]["dropped"] == {"m\r\nSet-Cookie: é": "cordoned"}
    assert response.values(b"set-cookie") == []


async def test_an_explained_request_is_logged_like_others(edge: Edge, tmp_path: Path) -> None:
    from proxy.access_log import AccessLog  # noqa: PLC0415 - this test alone needs it

    edge.access_log = AccessLog(str(tmp_path / "log"), "json", 1, edge.metrics)
    await edge.machine()
    await start(edge)
    await edge.get(b"/logged", field())
    edge.access_log.close()
    assert b"/logged" in (tmp_path / "log").read_bytes()
