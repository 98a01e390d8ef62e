"""`isthmus demo` as a newcomer meets it: every command that it prints is run."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from isthmus.demo.world import plan_places
from tests.integration.processes import Program, closing_all, request, wait_for

if TYPE_CHECKING:
    from pathlib import Path

PORTS_NEEDED = 40


def free_base_port() -> int:
    """Return a base from which a whole row of ports is free, and of those that the system gives nobody."""
    for base in range(10_000 + os.getpid() % 1_000 * 10, 32_000, PORTS_NEEDED):
        try:
            for port in range(base + 1, base + PORTS_NEEDED):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return base
    raise AssertionError("no row of free ports")


def start(directory: Path, base: int) -> Program:
    environment = {"TMPDIR": str(directory)}
    demo = Program("demo", directory, "isthmus.cli", "demo", "--base-port", str(base), env=environment)
    wait_for("the demo to serve", lambda: "Ctrl-C stops everything" in demo.said() or demo.process.poll())
    return demo


def printed_commands(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(("curl ", ".venv/"))]


def run(command: str) -> str:
    """Do what a printed command says; curl's few flags are read here, as not every machine has curl."""
    program, *words = shlex.split(command.split(" | ", maxsplit=1)[0])
    if program != "curl":
        words = [sys.executable, "-m", "isthmus.cli", *words]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
        return done.stdout
    parser = argparse.ArgumentParser()
    parser.add_argument("-s", action="store_true")
    parser.add_argument("-X", dest="method")
    parser.add_argument("-d", dest="body")
    parser.add_argument("url")
    flags = parser.parse_args(words)
    url = urlsplit(flags.url)
    body = None if flags.body is None else flags.body.encode()
    answer = request(url.netloc, url.path, flags.method or ("GET" if body is None else "POST"), body)
    assert answer.status < 300, (command, answer.text)
    return answer.text


def test_every_printed_command_does_what_it_says(tmp_path: Path) -> None:
    base = free_base_port()
    with closing_all() as started:
        demo = start(tmp_path, base)
        started.append(demo)
        nearest, region, instance, write, table, stop, gone, back, listing = printed_commands(demo.said())
        assert re.match(r"hello from machine ams-[12] in ams\n", run(nearest))
        assert re.match(r"hello from machine iad-[12] in iad\nreplayed: instance=syd-", run(region))
        assert re.match(r"hello from machine syd-2 in syd\n", run(instance))
        assert re.match(r"written on iad-[12] in iad\n", run(write))
        assert run(table).count('"region": "syd"') == 2
        run(stop)
        assert gone.endswith("| grep -c ams-1")
        wait_for("ams-1 to be gone in syd", lambda: "ams-1" not in run(gone))
        run(back)
        wait_for("ams-1 to be back in iad", lambda: "ams-1" in run(listing))

        demo.process.send_signal(signal.SIGINT)
        assert demo.process.wait(60) == 0
        assert demo.said().endswith("stopped; nothing is left behind\n")
        assert list(tmp_path.glob("isthmus-demo-*")) == []

        again = start(tmp_path, base)
        started.append(again)
        assert again.process.poll() is None, again.said()


@pytest.mark.parametrize("what", ["proxy", "machine"])
def test_a_taken_port_is_named_with_the_way_out(tmp_path: Path, what: str) -> None:
    base = free_base_port()
    place = plan_places(base)[1]
    address = place.proxy if what == "proxy" else place.machines[0][1]
    port = int(address.rsplit(":", 1)[1])
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        with closing_all() as started:
            demo = start(tmp_path, base)
            started.append(demo)
            assert demo.process.wait(30) == 1
    assert f"port {port} is taken" in demo.said()
    assert "make demo BASE_PORT=" in demo.said()
