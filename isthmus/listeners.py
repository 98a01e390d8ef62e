"""Claim the addresses of a node before anything starts, so that a taken port is one clear sentence.

Decides nothing but which address is free. Invariant: the sockets on which workers listen are made here and
stay open until the claim is closed, so that workers may come and go, and no connection that the kernel has
accepted for one is lost with it.
"""

from __future__ import annotations

import contextlib
import errno
import socket

from isthmus.config import Config, ConfigError, format_address, parse_listen
from isthmus.config_sources import flag_name


class Claim:
    """The bound sockets of a node's workers. They listen when a worker does so for the first time.

    Every worker has one of its own for each address: the kernel spreads connections over them.
    """

    def __init__(self, config: Config, sockets: dict[str, list[socket.socket]]) -> None:
        self.config = config  # with the ports that the system chose for workers
        self.sockets = sockets  # one for each worker, by setting

    def for_worker(self, index: int) -> dict[str, int]:
        """Return the descriptors of a worker's sockets by setting."""
        return {setting: sockets[index].fileno() for setting, sockets in self.sockets.items()}

    def has(self, setting: str, address: str) -> bool:
        """True when the sockets of a setting are bound to this address."""
        return setting in self.sockets and _address(self.config, setting) == address

    def at(self, address: str) -> list[socket.socket]:
        """Return the sockets that are bound to an address, under whatever setting; none if none are."""
        found = [s for setting, s in self.sockets.items() if _address(self.config, setting) == address]
        return found[0] if found else []

    def renew(self, index: int) -> None:
        """Give a worker new sockets: nobody connects to them until it listens. The old queues are lost."""
        for setting, sockets in self.sockets.items():
            old, sockets[index] = sockets[index], bind_shared(setting, _address(self.config, setting))
            old.close()

    def close(self, heir: Claim | None = None) -> None:
        """Let go of the ports, but for those that the heir has as well."""
        kept = {id(sock) for sockets in heir.sockets.values() for sock in sockets} if heir is not None else ()
        for sockets in self.sockets.values():
            for sock in sockets:
                if id(sock) not in kept:
                    sock.close()


def claim(config: Config, former: Claim | None = None) -> Claim:
    """Check every listener of the node and bind those of its workers, but for what a former claim has.

    Raises ConfigError that names the setting and the way out.
    """
    had = (
        set()
        if former is None
        else {(s, _address(former.config, s)) for s in ("admin.listen", "gossip.listen")}
    )
    workers = max(1, config.workers)
    # All are held until the last is had: two that differ in their text may still be one address.
    with contextlib.ExitStack() as held:
        for setting, kind in (
            ("admin.listen", socket.SOCK_STREAM),
            ("gossip.listen", socket.SOCK_STREAM),
            ("gossip.listen", socket.SOCK_DGRAM),
        ):
            if (setting, _address(config, setting)) not in had:
                held.enter_context(_bind(setting, _address(config, setting), kind))
        addresses = {}
        for setting, address in config.listeners.items():
            if former is not None and former.at(address):
                addresses[setting] = address
            else:
                # Without SO_REUSEPORT first: with it, a second isthmus would silently share the first's port.
                probe = held.enter_context(_bind(setting, address, socket.SOCK_STREAM))
                addresses[setting] = bound_address(probe)
    with contextlib.ExitStack() as undo:
        sockets: dict[str, list[socket.socket]] = {}
        for setting, address in addresses.items():
            sockets[setting] = [] if former is None else former.at(address)[:workers]
            while len(sockets[setting]) < workers:
                sockets[setting].append(undo.enter_context(bind_shared(setting, address)))
        undo.pop_all()
    return Claim(config.relocate(addresses), sockets)


def _address(config: Config, setting: str) -> str:
    address: str = config.listeners.get(setting) or getattr(config, setting.partition(".")[0]).listen
    return address


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
