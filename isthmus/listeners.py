"""Claim the addresses of a node before anything starts, so that a taken port is one clear sentence.

Decides nothing but which address is free. Invariant: when `claim` returns, the proxy's port stays ours for
as long as the returned socket lives, because workers may come and go.
"""

from __future__ import annotations

import contextlib
import errno
import socket

from isthmus.config import Config, ConfigError, flag_name, format_address, parse_listen


def claim(config: Config) -> socket.socket:
    """Check every listener of the node and return the socket that holds the proxy's port.

    The returned socket is bound with SO_REUSEPORT and never listens, so that the kernel gives it no
    connections. Raises ConfigError that names the setting and the way out.
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
        host, port = probe.getsockname()[:2]
    return _bind("proxy.listen", format_address(host, port), socket.SOCK_STREAM, share=True)


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
