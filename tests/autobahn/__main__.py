"""`make autobahn`: Autobahn's WebSocket suite against its own server, directly and through the proxy.

The suite (autobahntestsuite on PyPI) runs on Python 2.7 only, which has to be there: `python2.7` on the PATH,
or named by PYTHON2. It is installed into the folder given. No result may be worse through the proxy than
without it; those of the direct run are not judged. Takes some minutes; `--cases 1.*,5.*` runs a part.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

# Best first. INFORMATIONAL and UNIMPLEMENTED are not judged by the suite itself.
RANKS = (
    "OK",
    "NON-STRICT",
    "INFORMATIONAL",
    "UNIMPLEMENTED",
    "UNCLEAN",
    "WRONG CODE",
    "FAILED BY CLIENT",
    "FAILED",
)
# With which packages of its time it works is left to pip.
PACKAGE = "autobahntestsuite==25.10.1"
START_S = 20.0
# A plain PYTHONPATH would miss packages that are spread over folders; and the server is to listen on
# loopback only, where the proxy can have the same port on another address.
START = """
import site
site.addsitedir({site!r})
from twisted.internet import reactor
listen = reactor.listenTCP
reactor.listenTCP = lambda port, factory, *rest: listen(port, factory, 50, "127.0.0.1")
from autobahntestsuite.wstest import run
run()
"""


def find_python() -> str:
    """Return a Python 2.7 that runs."""
    for name in (os.environ.get("PYTHON2", ""), "python2.7", "python2"):
        found = shutil.which(name) if name else None
        if found is not None:
            # What is on the PATH may be a shim for versions that are not chosen.
            tried = subprocess.run([found, "-c", ""], capture_output=True, check=False)
            if tried.returncode == 0:
                return found
    raise SystemExit(
        "there is no Python 2.7, which Autobahn's suite needs: name one with PYTHON2=/path/to/python2.7"
    )


def install(python: str, folder: Path) -> list[str]:
    """Install the suite unless it is there; returns the command that runs it."""
    site = folder / "site"
    if not site.is_dir():
        command = [python, "-m", "pip", "install", "--quiet", "--target", str(site), PACKAGE]
        subprocess.run(command, check=True)
    return [python, "-W", "ignore", "-c", START.format(site=str(site))]


def find_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(command: list[str], **options: object) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options)
    try:
        yield process
    finally:
        process.terminate()
        process.communicate()


def wait_until_open(port: int) -> None:
    deadline = time.monotonic() + START_S
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert time.monotonic() < deadline, "the suite's server does not start"
        time.sleep(0.1)


def run_suite(suite: list[str], folder: Path, cases: list[str]) -> dict[str, dict[str, dict[str, object]]]:
    """Run the cases; returns the suite's results by way and case."""
    server_port = find_port()
    reports = folder / "reports"
    shutil.rmtree(reports, ignore_errors=True)
    server = [*suite, "-m", "testeeserver", "-w", f"ws://127.0.0.1:{server_port}"]
    # Autobahn's server refuses a Host with another port than its own, so the proxy has the same one.
    address = ("127.0.0.2", str(server_port))
    proxy = [sys.executable, "-m", "tests.fakes.small_proxy", "1000", str(server_port), *address]
    with running(server, stderr=subprocess.DEVNULL), running(proxy) as process:
        assert process.stdout is not None
        assert int(process.stdout.readline()) == server_port
        wait_until_open(server_port)
        clients = [
            start_client(suite, folder, way, f"ws://{host}:{server_port}", cases)
            for way, host in (("direct", "127.0.0.1"), ("proxy", address[0]))
        ]
        try:
            assert [client.wait() for client in clients] == [0, 0], f"the suite failed: {folder}/*.log"
        finally:
            for client in clients:
                client.kill()
    results: dict[str, dict[str, dict[str, object]]] = {}
    for way in ("direct", "proxy"):
        results |= json.loads((reports / way / "index.json").read_text("utf-8"))
    return results


def start_client(
    suite: list[str], folder: Path, way: str, url: str, cases: list[str]
) -> subprocess.Popen[bytes]:
    """Start the side of the suite that asks; both ways at the same time, for most of it is waiting."""
    spec = folder / f"{way}.json"
    servers = [{"agent": way, "url": url}]
    outcome = {"outdir": str(folder / "reports" / way), "servers": servers}
    spec.write_text(json.dumps(outcome | {"cases": cases, "exclude-cases": [], "exclude-agent-cases": {}}))
    with (folder / f"{way}.log").open("wb") as log:
        return subprocess.Popen([*suite, "-m", "fuzzingclient", "-s", str(spec)], stdout=log, stderr=log)


def find_worse(results: dict[str, dict[str, dict[str, object]]]) -> list[str]:
    """Return the cases whose results are worse through the proxy."""
    found = []
    for case, direct in results["direct"].items():
        through = results["proxy"].get(case, {"behavior": "FAILED", "behaviorClose": "FAILED"})
        for kind in ("behavior", "behaviorClose"):
            before, after = str(direct[kind]), str(through[kind])
            if RANKS.index(after) > RANKS.index(before):
                found.append(f"{case}: {kind} {after}, directly {before}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.autobahn", description=__doc__)
    parser.add_argument(
        "--folder", type=Path, default=Path(".autobahn"), help="for the suite and its reports"
    )
    parser.add_argument("--cases", default="*", help="with commas between them")
    given = parser.parse_args()
    folder = given.folder.resolve()
    folder.mkdir(exist_ok=True)
    started = time.monotonic()
    results = run_suite(install(find_python(), folder), folder, given.cases.split(","))
    for way, cases in results.items():
        counts: dict[str, int] = {}
        for result in cases.values():
            counts[str(result["behavior"])] = counts.get(str(result["behavior"]), 0) + 1
        print(f"{way}: {len(cases)} cases, {counts}")
    worse = find_worse(results)
    print(*worse, sep="\n")
    print(f"{len(worse)} results are worse through the proxy ({time.monotonic() - started:.0f} s)")
    sys.exit(bool(worse))


if __name__ == "__main__":
    main()
