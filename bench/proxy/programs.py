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

from isthmus import __version__

from .processes import Program, find_port, running

HERE = Path(__file__).parent
# Debian keeps servers where the PATH of a user does not look.
PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
# Debian's packages, by program.
PACKAGES = {"nginx": "nginx-light", "haproxy": "haproxy", "wrk": "wrk"}
FILES = {"small": 128, "64k": 64 * 1024, "1m": 1024 * 1024}


def find(program: str) -> str | None:
    """Return the path of a program, or say which package has it and return None."""
    found = shutil.which(program, path=PATH)
    if found is None:
        print(f"{program} is not installed (Debian: apt-get install {PACKAGES[program]})")
    return found


def read_version(program: str) -> str:
    """Return the version that a program says it has."""
    said = subprocess.run([program, "-v"], capture_output=True, text=True, check=False)
    version = re.search(r"\d+\.\d+(\.\d+)?", said.stdout + said.stderr)
    return version[0] if version else "?"


def configure(template: str, folder: Path, port: int, upstream: int) -> Path:
    """Write a configuration from its template; return the file."""
    text = (HERE / template).read_text("utf-8")
    for name, value in (("folder", str(folder)), ("port", str(port)), ("upstream", str(upstream))):
        text = text.replace(f"@{name}@", value)
    file = folder / template
    file.write_text(text, "utf-8")
    return file


@contextmanager
def start_machine(nginx: str, folder: Path) -> Iterator[Program]:
    """Serve files of the sizes that are asked for."""
    folder.chmod(0o755)  # nginx serves as a user of its own when root starts it
    files = folder / "files"
    files.mkdir()
    for name, size in FILES.items():
        (files / name).write_bytes((b"isthmus " * (size // 8))[:size])
    port = find_port()
    file = configure("upstream.conf", folder, port, port)
    with running("machine", "", [nginx, "-c", str(file)], port, folder / "upstream.log") as program:
        yield program


@contextmanager
def start_proxies(folder: Path, nginx: str, upstream: int) -> Iterator[list[Program]]:
    """Start isthmus and the others that are there."""
    with ExitStack() as stack:
        programs = [stack.enter_context(start_isthmus(folder, upstream))]
        port = find_port()
        command = [nginx, "-c", str(configure("nginx.conf", folder, port, upstream))]
        programs.append(
            stack.enter_context(running("nginx", read_version(nginx), command, port, folder / "nginx.log"))
        )
        haproxy = find("haproxy")
        if haproxy is not None:
            port = find_port()
            command = [haproxy, "-db", "-f", str(configure("haproxy.cfg", folder, port, upstream))]
            programs.append(
                stack.enter_context(
                    running("HAProxy", read_version(haproxy), command, port, folder / "haproxy.log")
                )
            )
        yield programs


@contextmanager
def start_isthmus(folder: Path, upstream: int) -> Iterator[Program]:
    """Start a whole node with one worker: supervisor, agent and worker."""
    port = find_port()
    command = [sys.executable, "-c", "import sys; from isthmus.cli import main; sys.exit(main())", "run"]
    command += ["--listen", f"127.0.0.1:{port}", "--data", str(folder / "data"), "--workers", "1"]
    command += ["--admin-listen", "127.0.0.1:0", "--gossip-listen", "127.0.0.1:0", "--node", "bench"]
    command += ["--app", "bench", "--machine", f"127.0.0.1:{upstream}"]
    with running("isthmus", __version__, command, port, folder / "isthmus.log") as program:
        yield program
