from __future__ import annotations

import socket
from contextlib import closing
from typing import TYPE_CHECKING

import msgspec
import pytest

from isthmus.config import AdminConfig, Config, ConfigError, GossipConfig, ProxyConfig, TcpConfig, TlsConfig
from isthmus.listeners import bind_shared, bound_address, claim

if TYPE_CHECKING:
    from collections.abc import Iterator

ANY = "127.0.0.1:0"


def config(proxy: str = ANY, admin: str = ANY, gossip: str = ANY, tls: str = "") -> Config:
    return Config(
        node="n1",
        data="/nowhere",
        proxy=ProxyConfig(listen=proxy),
        tls=TlsConfig(listen=tls, certificates=("/nowhere",)),
        admin=AdminConfig(listen=admin),
        gossip=GossipConfig(listen=gossip),
    )


def refusal(given: Config) -> str:
    with pytest.raises(ConfigError) as caught:
        claim(given).close()
    return str(caught.value)


def taken(kind: socket.SocketKind, *, shared: bool = False) -> socket.socket:
    sock = socket.socket(socket.AF_INET, kind)
    if shared:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(("127.0.0.1", 0))
    if kind is socket.SOCK_STREAM:
        sock.listen()
    return sock


@pytest.fixture(params=["tcp", "tcp shared by another isthmus"])
def other_program(request: pytest.FixtureRequest) -> Iterator[socket.socket]:
    with taken(socket.SOCK_STREAM, shared=request.param != "tcp") as sock:
        yield sock


@pytest.mark.parametrize(
    ("section", "flag"),
    [
        ("proxy", "--listen"),
        ("tls", "--tls-listen"),
        ("admin", "--admin-listen"),
        ("gossip", "--gossip-listen"),
    ],
)
def test_taken_port_is_refused_with_the_setting_and_the_way_out(
    other_program: socket.socket, section: str, flag: str
) -> None:
    address = bound_address(other_program)
    port = address.rsplit(":", 1)[1]
    assert refusal(config(**{section: address})) == (
        f"{section}.listen: {address} is taken by another program. See which with "
        f"`ss -lntup 'sport = :{port}'`, or choose another with {flag} HOST:PORT"
    )


def test_taken_datagram_port_is_refused_too() -> None:
    with taken(socket.SOCK_DGRAM) as sock:
        address = bound_address(sock)
        assert f"gossip.listen: {address} is taken by another program" in refusal(config(gossip=address))


def test_address_of_another_machine_is_refused() -> None:
    assert "admin.listen: 192.0.2.1:1234 is not an address of this machine" in refusal(
        Config(node="n1", data="/nowhere", admin=AdminConfig(listen="192.0.2.1:1234", token="t"))
    )


@pytest.mark.parametrize("host", ["[:::]", "a..b", "a" * 64])
def test_host_that_means_nothing_is_refused(host: str) -> None:
    assert f"proxy.listen: cannot resolve `{host.strip('[]')}`" in refusal(config(proxy=f"{host}:0"))


def test_port_chosen_by_the_system_is_held_for_workers_that_come_and_go() -> None:
    with closing(claim(config())) as reservation:
        address = reservation.config.proxy.listen
        host, port = address.split(":")
        assert int(port) > 0
        # Nobody listens yet: the reservation itself takes no connections.
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((host, int(port))).close()
        for _ in range(2):
            with socket.socket() as worker:
                worker.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                worker.bind((host, int(port)))
                worker.listen()
                with socket.create_connection((host, int(port))) as client:
                    accepted, _ = worker.accept()
                    accepted.close()
                    assert client.recv(1) == b""
        assert "is taken by another program" in refusal(config(proxy=address))


def test_admin_and_gossip_ports_are_free_again_for_the_agent() -> None:
    with taken(socket.SOCK_STREAM) as one, taken(socket.SOCK_STREAM) as two:
        admin, gossip = bound_address(one), bound_address(two)
    with closing(claim(config(admin=admin, gossip=gossip))):
        for address in (admin, gossip):
            host, port = address.split(":")
            with socket.socket() as agent:
                agent.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                agent.bind((host, int(port)))


def test_ipv6_addresses_get_their_brackets() -> None:
    try:
        reservation = claim(config(proxy="[::1]:0"))
    except ConfigError:
        pytest.skip("this machine has no IPv6")
    with closing(reservation):
        assert reservation.config.proxy.listen.startswith("[::1]:")


def test_one_address_for_two_listeners_is_refused_however_it_is_written() -> None:
    with taken(socket.SOCK_STREAM) as sock:
        port = sock.getsockname()[1]
    problem = refusal(config(f"127.0.0.1:{port}", admin=f"localhost:{port}"))
    assert problem.startswith(f"proxy.listen: 127.0.0.1:{port} is taken")


def test_port_for_tls_is_held_too() -> None:
    with closing(claim(config(tls=ANY))) as reservation:
        address = reservation.config.tls.listen
        assert not address.endswith(":0")
        with bind_shared("tls.listen", address) as worker:
            worker.listen()
            assert f"tls.listen: {address} is taken by another program" in refusal(config(tls=address))
    with closing(claim(config(tls=address))) as again:
        assert again.config.tls.listen == address


def test_ports_for_raw_tcp_are_held_too_and_found_again_in_another_order() -> None:
    told = msgspec.structs.replace(
        config(), tcp=(TcpConfig(listen=ANY, app="a"), TcpConfig(listen=ANY, app="b"))
    )
    with closing(claim(told)) as first:
        used = first.config
        assert [tcp.app for tcp in used.tcp] == ["a", "b"]
        assert len({tcp.listen for tcp in used.tcp} - {ANY}) == 2
        first.sockets["tcp[0].listen"][0].listen()
        taken = msgspec.structs.replace(used, proxy=ProxyConfig(listen=ANY))
        assert f"tcp[0].listen: {used.tcp[0].listen} is taken by another program" in refusal(taken)
        swapped = msgspec.structs.replace(used, tcp=used.tcp[::-1])
        second = claim(swapped, first)
        assert second.config == swapped
        assert second.sockets["tcp[0].listen"] == first.sockets["tcp[1].listen"]
        second.close(first)


def test_successor_keeps_the_sockets_whose_address_stays() -> None:
    with closing(claim(two_workers())) as former:
        held = former.sockets["proxy.listen"]
        assert len(held) == 2
        wanted = msgspec.structs.replace(
            former.config, workers=3, tls=TlsConfig(listen=ANY, certificates=("/c",))
        )
        with closing(claim(wanted, former)) as heir:
            assert heir.sockets["proxy.listen"][:2] == held
            assert len(heir.sockets["proxy.listen"]) == 3
            assert len(heir.sockets["tls.listen"]) == 3
            former.close(heir)
            assert all(sock.fileno() != -1 for sock in held)
        assert all(sock.fileno() == -1 for sock in held)


def test_successor_that_is_given_up_leaves_what_was_there() -> None:
    with closing(claim(two_workers())) as former:
        heir = claim(msgspec.structs.replace(former.config, workers=4), former)
        heir.close(former)
        assert [sock.fileno() == -1 for sock in heir.sockets["proxy.listen"]] == [False, False, True, True]


def test_worker_that_goes_on_dying_gets_a_socket_to_which_nobody_connects_yet() -> None:
    with closing(claim(config())) as claimed:
        (sock,) = claimed.sockets["proxy.listen"]
        sock.listen()
        host, port = claimed.config.proxy.listen.split(":")
        socket.create_connection((host, int(port))).close()
        claimed.renew(0)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((host, int(port))).close()


def two_workers() -> Config:
    return msgspec.structs.replace(config(), workers=2)
