"""Clients that occupy connections and want little: `python -m bench.proxy.crowd KIND PORT COUNT`.

Decides what each kind does, once a second for each connection. Says with a line that all are connected, and
goes on until its input ends; then it prints how many had been cut and were connected again. Invariant: there
are as many connections as were asked for, all the time.
"""

import contextlib
import os
import selectors
import socket
import sys
import time

KINDS = ("idle", "heads", "readers")
# A node takes only so many of one client; the whole of 127.0.0.0/8 is this machine.
CONNECTIONS_PER_ADDRESS = 500
REQUEST = b"GET /%b HTTP/1.1\r\nHost: bench.test\r\nUser-Agent: crowd\r\nAccept: */*\r\n\r\n"
# A slow head begins so, and then has a byte of a value each second.
HEAD = b"GET /small HTTP/1.1\r\nHost: bench.test\r\nX-Slow: "
# What a slow reader takes each second: just enough not to be cut.
READ_BYTES = 4096
# Small, so that little of an answer is out of the proxy's hands.
RECEIVE_BYTES = 4096
PERIOD_S = 1.0
SLICES = 250
# Such clients have machines of their own: they are not to take the processor from the others.
NICE = 10


def connect(kind: str, port: int, number: int) -> socket.socket:
    """Return a connection that has begun what its kind does."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
    client.settimeout(30)
    client.bind((f"127.0.1.{1 + number // CONNECTIONS_PER_ADDRESS}", 0))
    client.connect(("127.0.0.1", port))
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if kind == "heads":
        client.sendall(HEAD)
    else:
        client.sendall(REQUEST % (b"small" if kind == "idle" else b"1m"))
        answer = client.recv(READ_BYTES)
        if not answer.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"the client {number} gets {answer!r}")
    client.setblocking(False)
    return client


def go_on(kind: str, client: socket.socket) -> bool:
    """Do what is done each second; False when the connection was ended."""
    try:
        if kind == "heads":
            client.send(b"x")
            return True
        return bool(client.recv(READ_BYTES))
    except BlockingIOError:
        return True
    except OSError:
        return False


def main() -> None:
    os.nice(NICE)
    kind, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    clients = [connect(kind, port, number) for number in range(count)]
    print("ready", flush=True)
    again = 0
    with selectors.DefaultSelector() as selector:
        selector.register(sys.stdin, selectors.EVENT_READ)
        at = time.monotonic()
        turn = 0
        while not selector.select(max(0.0, at - time.monotonic())):
            if time.monotonic() < at:
                continue
            at += PERIOD_S / SLICES
            for number in range(turn, count, SLICES):
                if not go_on(kind, clients[number]):
                    clients[number].close()
                    with contextlib.suppress(OSError):
                        clients[number] = connect(kind, port, number)
                    again += 1
            turn = (turn + 1) % SLICES
    print(again)


if __name__ == "__main__":
    main()
