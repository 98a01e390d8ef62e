"""Clients that keep to their machine, by a key of theirs or by a cookie of the proxy's."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from tests.fakes.machine import OK

if TYPE_CHECKING:
    from tests.proxy.edge import Edge


async def start(edge: Edge, count: int = 4, **sticky: object) -> None:
    edge.put_app("app", "app.test", options=json.dumps({"sticky": sticky}))
    for number in range(count):
        body = b"m%d" % number
        answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-Own: 1\r\n\r\n" + body
        await edge.machine(f"m{number}", answer=lambda _, answer=answer: answer)
    await edge.start()


async def test_a_cookie_of_the_app_keeps_its_clients_to_their_machines(edge: Edge) -> None:
    await start(edge, cookie="session")
    client = await edge.client()
    seen = set()
    for user in range(20):
        cookie = b"Cookie: theme=dark; session=u%d; x" % user
        machines = {(await client.get(b"/", cookie)).body for _ in range(3)}
        assert len(machines) == 1
        seen |= machines
    assert len(seen) == 4
    assert not (await client.get()).values(b"set-cookie"), "the app sets it"


async def test_a_header_keeps_its_clients_to_their_machines(edge: Edge) -> None:
    await start(edge, header="X-User")
    client = await edge.client()
    assert len({(await client.get(b"/", b"x-USER:  alice ")).body for _ in range(8)}) == 1
    assert len({(await client.get(b"/", b"X-User: u%d" % user)).body for user in range(20)}) == 4
    assert len({(await client.get(b"/", b"X-User2: alice")).body for _ in range(40)}) == 4


async def test_the_proxy_sets_a_cookie_that_leads_back_to_the_machine(edge: Edge) -> None:
    await start(edge, cookie="at", set=True)
    client = await edge.client()
    first = await client.get()
    (cookie,) = first.values(b"set-cookie")
    machine = first.body
    assert cookie == b"at=" + machine + b"; Path=/; HttpOnly; SameSite=Lax"
    for _ in range(8):
        again = await client.get(b"/", b"Cookie: at=" + machine)
        assert (again.body, again.values(b"set-cookie")) == (machine, [])
        assert again.values(b"x-own") == [b"1"]


async def test_a_client_whose_machine_is_gone_gets_another_one_and_its_cookie(edge: Edge) -> None:
    await start(edge, cookie="at", set=True)
    client = await edge.client()
    edge.table.apply("machines", ("m2",), None)
    moved = await client.get(b"/", b"Cookie: at=m2")
    assert moved.body in {b"m0", b"m1", b"m3"}
    assert moved.values(b"set-cookie") == [b"at=" + moved.body + b"; Path=/; HttpOnly; SameSite=Lax"]


async def test_a_cookie_that_names_no_machine_of_the_app_is_no_way_into_another_one(edge: Edge) -> None:
    await start(edge, 1, cookie="at", set=True)
    edge.put_app("other", "other.test")
    await edge.machine("secret", app="other", answer=lambda _: OK)
    client = await edge.client()
    for value in (b"secret", b'"m0', b"../m0", b"", b"a" * 300):
        response = await client.get(b"/", b"Cookie: at=" + value)
        assert response.body == b"m0"


async def test_what_the_client_asks_for_by_header_comes_before_its_cookie(edge: Edge) -> None:
    await start(edge, cookie="at", set=True)
    client = await edge.client()
    response = await client.get(b"/", b"Cookie: at=m1", b"fly-prefer-instance-id: m3")
    assert response.body == b"m3"
