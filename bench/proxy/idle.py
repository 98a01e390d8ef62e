"""`make bench-idle`: what connections cost that wait for their next request.

Opens many keep-alive connections, asks once on each, and looks at how much the worker's resident memory grew.
Invariant: a connection that is closed or not answered fails the run.
"""

import argparse
import resource
import signal
import socket
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path

from bench.table import Target, describe_machine, print_table, show_number
from isthmus import compiled

from .__main__ import MEMORY_LIMIT_MB, find_busiest
from .crowd import CONNECTIONS_PER_ADDRESS
from .processes import Program, read_cpu, read_memory
from .programs import find, start_isthmus, start_machine

CONNECTIONS = 10_000
BYTES_LIMIT = 12_288
REQUEST = b"GET /small HTTP/1.1\r\nHost: bench.test\r\nUser-Agent: idle\r\nAccept: */*\r\n\r\n"
SETTLE_S = 1.0
SPARE_FILES = 200


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="make bench-idle", description=__doc__)
    parser.add_argument("--connections", type=int, default=CONNECTIONS)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was started is stopped then too
    nginx = find("nginx")
    if nginx is None:
        print("nginx is the machine behind the proxy: there is no bench without.")
        return 1
    # A worker takes half as many connections as it may open files: each may need one to a machine.
    count = min(options.connections, raise_files_limit(3 * options.connections) // 2 - SPARE_FILES)
    wishes = {"compiled": "1"} if compiled.is_compiled() else {}
    rows = []
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        machine = stack.enter_context(start_machine(nginx, folder))
        print(describe_machine(), flush=True)
        for form, wish in {**wishes, "plain Python": "0"}.items():
            node = stack.enter_context(start_isthmus(form, folder, machine.port, wish))
            started, each = measure(node, count)
            rows += [
                show_row(f"worker at start, MB, {form}", started / 1e6, MEMORY_LIMIT_MB),
                show_row(f"bytes per idle connection of {count:,}, {form}", each, BYTES_LIMIT),
            ]
    print_table(["isthmus", "figure", "target", ""], rows)
    return 0


def show_row(title: str, figure: float, limit: float) -> list[str]:
    """Return a line of the table."""
    target = Target(limit, at_least=False)
    return [title, show_number(figure), target.show(""), target.compare(figure)]


def raise_files_limit(wanted: int) -> int:
    """Let this process and those that it starts open so many files, as far as they may; return how many."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(wanted, hard), max(wanted, hard)))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def measure(node: Program, count: int) -> tuple[float, float]:
    """Return the resident bytes of a worker before, and how many more it has for each connection."""
    memory = {pid: read_memory(pid) for pid in read_cpu(node.pid)}
    cpu = read_cpu(node.pid)
    with ExitStack() as stack:
        clients = [stack.enter_context(connect(node.port, number)) for number in range(count)]
        time.sleep(SETTLE_S)
        spent = {pid: seconds - cpu.get(pid, 0.0) for pid, seconds in read_cpu(node.pid).items()}
        worker = find_busiest(spent)
        grown = read_memory(worker) - memory[worker]
        for client in clients:
            ask(client)
    return memory[worker], grown / count


def connect(port: int, number: int) -> socket.socket:
    """Return a connection that has carried a request."""
    host = f"127.0.1.{1 + number // CONNECTIONS_PER_ADDRESS}"
    client = socket.create_connection(("127.0.0.1", port), 30, (host, 0))
    ask(client)
    return client


def ask(client: socket.socket) -> None:
    """Ask once, and read the answer, of which the head is known to fit into one piece."""
    client.sendall(REQUEST)
    answer = client.recv(4096)
    head, _, body = answer.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200") or b"Connection: close" in head:
        raise RuntimeError(head.decode("latin-1"))
    length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
    while len(body) < length:
        body += client.recv(4096)


if __name__ == "__main__":
    raise SystemExit(main())
