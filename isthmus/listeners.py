"""Claim the addresses of a node before anything starts, so that a taken port is one clear sentence.

Decides nothing but which address is free. Invariant: when `claim` returns, the ports of workers stay ours
until the claim is closed, because workers may come and go.
"""

from __future__ import annotations

import contextlib
import errno
import socket

import msgspec

from isthmus.config import Config, ConfigError, format_address, parse_listen
from isthmus.config_sources import flag_name


class Claim:
    """What `claim` holds: sockets that never listen, so that the kernel gives them no connections."""

    def __init__(self, config: Config, held: contextlib.ExitStack) -> None:
        self.config = config  # with the ports that the system chose for workers
        self._held = held

    def close(self) -> None:
        """Let go of the ports."""
        self._held.close()


def claim(config: Config) -> Claim:
    """Check every listener of the node and keep the ports of its workers.

    Raises ConfigError that names the setting and the way out.
    """
    # All are held until the last is had: two that differ in their text may still be one address.
    with contextlib.ExitStack() as held:
        for setting, address, kind in (
            ("admin.listen", config.admin.listen, socket.SOCK_STREAM),
            ("gossip.listen", config.gossip.listen, socket.SOCK_STREAM),
            ("gossip.listen", config.gossip.listen, socket.SOCK_DGRAM),
        ):
            held.enter_context(_bind(setting, address, kind))
        # Without SO_REUSEPORT first: with it, a second isthmus would silently share the port of the first.
        probe = held.enter_context(_bind("proxy.listen", config.proxy.listen, socket.SOCK_STREAM))
        listen = bound_address(probe)
        tls_listen = ""
        if config.tls.listen:
            probe = held.enter_context(_bind("tls.listen", config.tls.listen, socket.SOCK_STREAM))
            tls_listen = bound_address(probe)
    proxy = msgspec.structs.replace(config.proxy, listen=listen)
    tls = msgspec.structs.replace(config.tls, listen=tls_listen)
    with contextlib.ExitStack() as held:
        held.enter_context(bind_shared("proxy.listen", listen))
        if tls_listen:
            held.enter_context(bind_shared("tls.listen", tls_listen))
        return Claim(msgspec.structs.replace(config, proxy=proxy, tls=tls), held.pop_all())


def bind_shared(setting: str, address: str) -> socket.socket:
    """Return a socket on an address that processes of this node share. Raises ConfigError."""
    return _bind(setting, address, socket.SOCK_STREAM, share=True)


def bound_address(sock: socket.socket) -> str:
    """Return `host:port` of a bound socket."""
    host, port = sock.getsockname()[:2]
    return format_address(host, port)


def _bind(setting: str, address: str, kind: socket.SocketKind, *, share: bool = False) -> socket.socket:
    host, port = parse_listen(address)
    try:
        family, _, _, _, target = socket.getaddrinfo(host, port, type=kind, flags=socket.AI_PASSIVE)[0]
    except (socket.gaierror, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no host name"
        raise ConfigError(f"{setting}: cannot resolve `{host}`: {reason}") from None
    sock = socket.socket(family, kind)
    try:
        if kind is socket.SOCK_STREAM:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if share:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(target)
        if kind is socket.SOCK_STREAM and not share:
            sock.listen(1)
    except OSError as error:
        sock.close()
        raise ConfigError(_explain(setting, address, error)) from None
    return sock


def _explain(setting: str, address: str, error: OSError) -> str:
    _, port = parse_listen(address)
    flag = flag_name(setting)
    if error.errno == errno.EADDRINUSE:
        return (
            f"{setting}: {address} is taken by another program. See which with "
            f"`ss -lntup 'sport = :{port}'`, or choose another with {flag} HOST:PORT"
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{setting}: no permission to listen on {address}; below 1024 it takes CAP_NET_BIND_SERVICE"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{setting}: {address} is not an address of this machine; choose another with {flag} HOST:PORT"
    return f"{setting}: cannot listen on {address}: {error.strerror}"
