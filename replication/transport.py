"""Moves sealed bytes: one UDP socket, one TCP listener, and links dialled out.

Decides whom to let in (by certificate, seal, cluster and first message) and how much may be in flight. Knows
nothing of membership or changesets. Invariant: all traffic leaves from the bound address, so that a peer sees
the address that it knows; nothing is said to whoever does not hold a key; and without a key, nothing is
sent beyond this machine.

A frame on a stream is a length of 4 bytes and a sealed record. With mutual TLS all of a stream is inside it.
"""

import asyncio
import contextlib
import errno
import logging
import socket
import ssl
from collections import Counter
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Protocol, cast

from replication.core.member import Address, MemberInfo
from replication.core.wire import (
    DATAGRAM_BYTES_MAX,
    FRAME_BYTES_MAX,
    HELLO_BYTES_MAX,
    Hello,
    WireError,
    decode_frame,
    encode,
)
from replication.errors import ReplicationError
from replication.lobby import Lobby
from replication.seal import DATAGRAM_OVERHEAD_BYTES, HANDSHAKE_BYTES, Handshake, Seal, SealError, StreamBox
from replication.settings import is_loopback, is_wildcard
from replication.tls import StreamTls

log = logging.getLogger(__name__)

# Peers that have shown a key may hold this many connections to us; strangers wait elsewhere, in the lobby.
LINKS_ACCEPTED_MAX = 1_024
# After the system has refused to accept a connection, for want of descriptors as a rule.
_ACCEPT_PAUSE_S = 0.1
# What may wait for a slow peer; above it pushes are dropped (sync brings them) and sessions wait.
SEND_BYTES_MAX = 8 * 1024 * 1024
# Where `drain` begins to wait: about what fills a path of 300 ms at 10 Mbit/s.
DRAIN_BYTES = 256 * 1024
# Sent but unacknowledged for this long, a connection is dead: the peer is gone or the path is cut.
USER_TIMEOUT_MS = 10_000
_FAIR_FRAMES = 64
# Why a datagram of a node with another key, with none where we have one, or of another cluster is dropped.
_STRANGE = frozenset({"tag", "magic", "cluster"})


class LinkError(ReplicationError):
    """A link that cannot be made or kept; `reason` is fit for a metric's label."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Handler(Protocol):
    """What the transport reports to; all on the event loop."""

    def handle_datagram(self, data: bytes) -> None:
        """Take what an authentic datagram holds."""

    def handle_self(self, info: MemberInfo) -> None:
        """Take note of a stream whose other side says that it is our site; it is refused."""

    def handle_link_up(self, link: "Link") -> None:
        """Take note of a link whose other side has said who it is."""

    def handle_frame(self, link: "Link", data: bytes) -> None:
        """Take a frame; the next one is read unless the link is paused. A WireError closes the link."""

    def handle_link_down(self, link: "Link") -> None:
        """Take note that a link that was up is gone."""


class Link:
    """One established stream to a peer."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, box: StreamBox, *, dialled: bool
    ) -> None:
        self.dialled = dialled  # whether we opened it
        self.lasting = False  # whether the dialer keeps it; set by the hello
        self.peer = cast(
            "MemberInfo", None
        )  # who the other side says it is; set by the hello, before anyone sees it
        self.bytes_sent = 0
        self.bytes_received = 0
        self.closed = asyncio.Event()
        self._reader = reader
        self._writer = writer
        self.box = box
        self.authority = b""  # that of the TLS around it; set when it is opened
        self._reading = asyncio.Event()  # cleared while paused
        self._reading.set()
        self._waits: set[asyncio.Task[None]] = set()  # for the peer to keep up, or to take the rest
        writer.transport.set_write_buffer_limits(high=DRAIN_BYTES)

    def send(self, frame: bytes) -> bool:
        """Queue a frame; False when it was dropped, as the link is gone or the peer too slow."""
        waiting = self._writer.transport.get_write_buffer_size()
        if self._writer.is_closing() or (waiting and waiting + len(frame) > SEND_BYTES_MAX):
            return False
        record = self.box.seal(frame)
        self._writer.write(len(record).to_bytes(4, "big") + record)
        self.bytes_sent += len(record) + 4
        return True

    async def drain(self) -> None:
        """Wait until the peer has taken most of what was sent; raises OSError when the link is gone."""
        await self._writer.drain()

    @property
    def is_writable(self) -> bool:
        """Whether the peer keeps up, so that something large may be sent."""
        return self._writer.transport.get_write_buffer_size() < DRAIN_BYTES

    def when_writable(self, act: Callable[[], None]) -> None:
        """Call `act` when the link is writable, in a later turn; never when it closes first."""

        async def wait() -> None:
            with contextlib.suppress(OSError):
                await self.drain()
                act()

        self._wait(wait())

    def pause(self) -> None:
        """Read no more frames for now."""
        self._reading.clear()

    def resume(self) -> None:
        """Go on reading frames."""
        self._reading.set()

    def retire(self) -> None:
        """Close when what was queued is out."""
        self._wait(self.close_gently())

    def _wait(self, coroutine: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(coroutine)
        self._waits.add(task)
        task.add_done_callback(self._waits.discard)

    async def receive(self, size_max: int) -> bytes:
        """Return the next frame; raises LinkError, SealError, IncompleteReadError."""
        await self._reading.wait()
        size = int.from_bytes(await self._reader.readexactly(4), "big")
        if size > size_max + self.box.overhead_bytes:
            raise LinkError("size")
        record = await self._reader.readexactly(size)
        self.bytes_received += size + 4
        return self.box.open(record)

    def close(self) -> None:
        """Close at once; what was queued may be lost."""
        self._writer.transport.abort()

    async def close_gently(self) -> None:
        """Let what is queued out, for a moment, and close."""
        self._writer.close()
        with contextlib.suppress(OSError, TimeoutError):
            await asyncio.wait_for(self._writer.wait_closed(), 0.5)
        self.close()


class Transport(asyncio.DatagramProtocol):
    """One agent's sockets."""

    def __init__(
        self,
        bind: Address,
        seal: Seal,
        hello: Callable[[], Hello],
        handler: Handler,
        *,
        handshake_timeout_s: float,
        tls: StreamTls | None = None,
    ) -> None:
        self.counters: Counter[str] = Counter()
        self.dropped: Counter[tuple[str, str]] = Counter()  # (datagram | stream, reason)
        self.stranger: Address | None = None  # with another key or cluster; whoever tells of it clears it
        self.address: Address = bind  # as bound; set by `bind`, as is the family
        self.family = socket.AF_INET
        self._bind = bind
        self._seal = seal
        self._hello = hello
        self._handler = handler
        self._handshake_timeout_s = handshake_timeout_s
        self._tls = tls
        self._lobby = Lobby()
        self._links: set[Link] = set()
        self._accepted = 0  # links among them that others dialled
        self._tasks: set[asyncio.Task[None]] = set()  # the listener, accepted connections, links
        self._sockets: tuple[socket.socket, ...] = ()  # TCP and UDP; set by `bind`
        self._udp: asyncio.DatagramTransport | None = None
        seal.watch(self._close_revoked)
        if tls is not None:
            tls.watch(self._close_revoked)

    # --- life -----------------------------------------------------------------------------------------

    async def bind(self) -> None:
        """Take one port for both sockets, without receiving yet; raises OSError."""
        found = await asyncio.get_running_loop().getaddrinfo(*self._bind, type=socket.SOCK_STREAM)
        self.family, (host, port) = found[0][0], found[0][4][:2]
        self._sockets = _bind_both(self.family, str(host), int(port))
        self.address = self._sockets[0].getsockname()[:2]
        if not self._may_reach(self.address[0]):  # a name that stands for more than it says
            for sock in self._sockets:
                sock.close()
            raise OSError(errno.EACCES, f"without a cluster key, cannot bind gossip to {self.address[0]}")

    async def serve(self) -> None:
        """Begin to receive."""
        tcp, udp = self._sockets
        loop = asyncio.get_running_loop()
        self._udp, _ = await loop.create_datagram_endpoint(lambda: self, sock=udp)
        tcp.listen(128)
        self._track(self._listen(tcp))

    async def stop(self) -> None:
        """Close everything and wait until it is."""
        await asyncio.gather(*(link.close_gently() for link in list(self._links)))
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._udp is not None:
            self._udp.close()
            await asyncio.sleep(0)  # the transport closes its socket in the next turn of the loop
        for sock in self._sockets:
            sock.close()

    def compute_counters(self) -> Counter[str]:
        """Return the counters, with what went over links that are still up."""
        counters = Counter(self.counters)
        for link in self._links:
            counters["bytes_sent"] += link.bytes_sent
            counters["bytes_received"] += link.bytes_received
        return counters

    # --- datagrams ------------------------------------------------------------------------------------

    def send_datagram(self, to: Address, data: bytes) -> None:
        """Send, and forget."""
        if self._udp is None or self._udp.is_closing():
            return
        if not self._may_reach(to[0]):
            self.counters["datagrams_unsent"] += 1
            return
        try:
            self._udp.sendto(self._seal.seal_datagram(data), to)
        except (OSError, ValueError):
            # Another address family, or no route: the same as a datagram lost on the way.
            self.counters["datagrams_unsent"] += 1
            return
        self.counters["datagrams_sent"] += 1

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        """Open a datagram, or count why not; nothing is answered."""
        self.counters["datagrams_received"] += 1
        if len(data) > DATAGRAM_BYTES_MAX + DATAGRAM_OVERHEAD_BYTES:
            self.dropped["datagram", "size"] += 1
            return
        try:
            self._handler.handle_datagram(self._seal.open_datagram(data))
        except (SealError, WireError) as error:
            self.dropped["datagram", error.reason] += 1
            if error.reason in _STRANGE:
                self.stranger = addr[:2]

    def error_received(self, exc: Exception) -> None:  # noqa: ARG002 - probes find out who is gone
        """Count what the kernel heard back, such as a closed port."""
        self.counters["datagrams_refused"] += 1

    # --- streams --------------------------------------------------------------------------------------

    async def connect(self, address: Address, *, lasting: bool) -> Link:
        """Dial a peer and report the link as up; raises ReplicationError, OSError, TimeoutError."""
        local = None if is_wildcard(self.address[0]) else (self.address[0], 0)
        async with asyncio.timeout(self._handshake_timeout_s):
            if not self._may_reach(address[0]):
                raise LinkError("unsealed")
            authority = self._authority
            reader, writer = await asyncio.open_connection(
                *address,
                local_addr=local,
                family=self.family,
                ssl=None if self._tls is None else self._tls.client,
            )
            try:
                link = await self._open(
                    reader, writer, self._seal.dial(), authority, dialled=True, lasting=lasting
                )
            except asyncio.IncompleteReadError:
                # A key holder answers; this is what a closed door looks like.
                writer.transport.abort()
                raise LinkError("refused") from None
            except BaseException:
                writer.transport.abort()
                raise
        self._go_up(link)
        self._track(self._run(link))
        return link

    async def _listen(self, listener: socket.socket) -> None:
        """Accept connections; each is looked at in a task of its own."""
        loop = asyncio.get_running_loop()
        accepted = 0
        while True:
            try:
                sock, address = await loop.sock_accept(listener)
            except OSError:
                self.dropped["stream", "accept"] += 1
                await asyncio.sleep(_ACCEPT_PAUSE_S)
                continue
            self._track(self._accept(sock, address[0])).add_done_callback(partial(_close_after, sock))
            accepted += 1
            if accepted % _FAIR_FRAMES == 0:
                await asyncio.sleep(0)  # those that wait to be accepted do not suspend us

    async def _accept(self, sock: socket.socket, host: str) -> None:
        task = asyncio.current_task()
        assert task is not None
        ticket = self._lobby.enter(host, partial(self._turn_away, task))
        if ticket is None:
            self.dropped["stream", "too_many"] += 1
            return
        writer: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(self._handshake_timeout_s):
                authority = self._authority
                reader, writer = await self._wrap(sock)
                link = await self._open(
                    reader, writer, self._seal.accept(), authority, dialled=False, lasting=False
                )
            self._lobby.leave(ticket)
            if self._accepted >= LINKS_ACCEPTED_MAX:
                self.dropped["stream", "too_many"] += 1
                return
            self._accepted += 1
            self._go_up(link)
            try:
                await self._run(link)
            finally:
                self._accepted -= 1
        except (LinkError, SealError, WireError) as error:
            self.dropped["stream", error.reason] += 1
        except TimeoutError:
            self.dropped["stream", "timeout"] += 1
        except asyncio.IncompleteReadError:
            self.dropped["stream", "truncated"] += 1
        except ssl.SSLError:
            self.dropped["stream", "tls"] += 1
        except OSError:
            self.dropped["stream", "io"] += 1
        finally:
            self._lobby.leave(ticket)
            if writer is not None:
                writer.transport.abort()

    def _turn_away(self, task: asyncio.Task[None]) -> None:
        self.dropped["stream", "crowded_out"] += 1
        task.cancel()

    async def _wrap(self, sock: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Return the two ends of an accepted connection, inside TLS if there is any; raises OSError."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(loop=loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        context = None if self._tls is None else self._tls.server
        transport, _ = await loop.connect_accepted_socket(lambda: protocol, sock, ssl=context)
        return reader, asyncio.StreamWriter(transport, protocol, reader, loop)

    async def _open(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        handshake: Handshake,
        authority: bytes,
        *,
        dialled: bool,
        lasting: bool,
    ) -> Link:
        """Shake hands and exchange hellos; the dialer speaks first."""
        _tune(writer)
        if dialled:
            writer.write(handshake.first_bytes())
            box = handshake.finish(await reader.readexactly(HANDSHAKE_BYTES))
        else:
            box = handshake.finish(await reader.readexactly(HANDSHAKE_BYTES))
            writer.write(handshake.first_bytes())
        link = Link(reader, writer, box, dialled=dialled)
        ours = self._hello()
        if dialled:
            link.send(encode(Hello(ours.cluster, ours.sender, lasting)))
        theirs = decode_frame(await link.receive(HELLO_BYTES_MAX), size_max=HELLO_BYTES_MAX)
        if not isinstance(theirs, Hello):
            raise WireError("hello")
        if theirs.cluster != ours.cluster:
            raise LinkError("cluster")
        if not dialled:
            link.send(encode(ours))
        if theirs.sender.site == ours.sender.site:
            self._handler.handle_self(theirs.sender)
            raise LinkError("self")
        link.authority = authority
        link.peer = theirs.sender
        link.lasting = lasting if dialled else theirs.lasting
        return link

    def _go_up(self, link: Link) -> None:
        self._links.add(link)
        self._handler.handle_link_up(link)
        if not self._is_current(link):  # revoked while hands were shaken
            self._revoke(link)

    async def _run(self, link: Link) -> None:
        frames = 0
        try:
            while True:
                data = await link.receive(FRAME_BYTES_MAX)
                self._handler.handle_frame(link, data)
                frames += 1
                if frames % _FAIR_FRAMES == 0:
                    await asyncio.sleep(0)  # a full buffer is read without waiting; others get a turn
        except asyncio.IncompleteReadError:
            pass  # the other side closed it
        except (LinkError, SealError, WireError) as error:
            self.dropped["stream", error.reason] += 1
        except OSError:
            self.dropped["stream", "io"] += 1
        finally:
            link.close()
            self._links.discard(link)
            self.counters["bytes_sent"] += link.bytes_sent
            self.counters["bytes_received"] += link.bytes_received
            link.closed.set()
            self._handler.handle_link_down(link)

    def _track(self, coroutine: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # --- who is still let in ----------------------------------------------------------------------------

    @property
    def _authority(self) -> bytes:
        return b"" if self._tls is None else self._tls.authority

    def _is_current(self, link: Link) -> bool:
        return self._seal.holds(link.box) and link.authority == self._authority

    def _close_revoked(self) -> None:
        """Close the links that were made with what no longer opens a door; those who still may dial again."""
        for link in self._links:
            if not self._is_current(link):
                self._revoke(link)

    def _revoke(self, link: Link) -> None:
        self.counters["links_revoked"] += 1
        link.retire()

    def _may_reach(self, host: str) -> bool:
        return self._seal.secret or is_loopback(host)


def _bind_both(family: socket.AddressFamily, host: str, port: int) -> tuple[socket.socket, socket.socket]:
    """Return a TCP and a UDP socket on one port; when the system chooses it, that may take several tries."""
    attempts = 1 if port else 32
    for attempt in range(attempts):
        tcp = socket.socket(family, socket.SOCK_STREAM)
        udp = socket.socket(family, socket.SOCK_DGRAM)
        try:
            tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                tcp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            tcp.bind((host, port))
            udp.bind((host, tcp.getsockname()[1]))
            tcp.setblocking(False)
            udp.setblocking(False)
        except OSError as error:
            tcp.close()
            udp.close()
            if error.errno != errno.EADDRINUSE or attempt == attempts - 1:
                raise OSError(
                    error.errno, f"cannot bind gossip to {host} port {port}: {error.strerror}"
                ) from error
            continue
        return tcp, udp
    raise AssertionError("unreachable: the last attempt returns or raises")


def _close_after(sock: socket.socket, _task: asyncio.Task[None]) -> None:
    sock.close()


def _tune(writer: asyncio.StreamWriter) -> None:
    """Notice a dead path within seconds instead of TCP's quarter of an hour."""
    sock = writer.get_extra_info("socket")
    with contextlib.suppress(OSError, AttributeError):  # where the platform lacks an option, probes remain
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)
