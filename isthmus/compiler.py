"""Makes extension modules of the modules that run for every request: `python -m isthmus.compiler`.

Decides which modules these are. Refuses to know what becomes of them (see `compiled`). Needs mypy, a C
compiler and Python's headers, and says so where one is missing: plain Python runs then. Invariant: the
manifest is written last, so that half of a compilation is never used.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import sysconfig
import tempfile
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path

from .compiled import FOLDER, GROUP, MANIFEST, ROOT, hash_sources

# Modules that run for a request or hold what such modules read. Left out are the listener, which runs for
# a connection.
MODULES = (
    *("proxy/downstream.py", "proxy/metrics.py", "proxy/pool.py", "proxy/settings.py", "proxy/sweeper.py"),
    *("proxy/upstream.py", "proxy/core/*.py"),
    *("proxy/peer_metrics.py", "proxy/peer_pool.py", "proxy/peer_session.py", "proxy/peer_upstream.py"),
    *("routing/balancer.py", "routing/catalog.py", "routing/explain.py", "routing/geo.py"),
    *("routing/health.py", "routing/hosts.py", "routing/loads.py", "routing/peering.py", "routing/replay.py"),
    *("routing/stickiness.py", "routing/table.py", "routing/target.py", "routing/types.py"),
)


def find_obstacle() -> str | None:
    """Return why nothing can be compiled here, or None."""
    if shutil.which(os.environ.get("CC", "cc").split()[0]) is None:
        return "there is no C compiler"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "Python's headers are missing (Debian: apt-get install python3-dev)"
    if find_spec("mypyc") is None or find_spec("setuptools") is None:
        return "mypy[mypyc] is not installed"
    return None


def list_sources(root: Path) -> list[str]:
    """Return the files to compile, relative to the root."""
    found = {file for pattern in MODULES for file in root.glob(pattern) if file.name != "__init__.py"}
    return sorted(file.relative_to(root).as_posix() for file in found)


def compile_modules(root: Path, folder: Path) -> None:
    """Compile into `folder`, whatever is there already. Raises SystemExit or what setuptools raises."""
    from mypyc.build import mypycify  # noqa: PLC0415 - only where something is compiled
    from setuptools import Distribution  # noqa: PLC0415 - as above
    from setuptools.command.build_ext import build_ext  # noqa: PLC0415 - as above

    sources = list_sources(root)
    hashes = hash_sources(root)
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        before = Path.cwd()
        os.chdir(root)  # mypyc names modules by their paths from here
        try:
            extensions = mypycify(
                ["--config-file=pyproject.toml", *sources],
                opt_level="2",
                target_dir=f"{scratch}/c",
                group_name=GROUP,
            )
            command = build_ext(Distribution({"ext_modules": extensions}))
            command.build_lib, command.build_temp = str(folder), f"{scratch}/o"
            command.ensure_finalized()
            command.run()
        finally:
            os.chdir(before)
    names = [extension.name for extension in extensions]
    manifest = {"suffix": EXTENSION_SUFFIXES[0], "modules": names, "sources": hashes}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")


def main() -> int:
    """Compile where that is possible; say in one line what came of it."""
    obstacle = find_obstacle()
    if obstacle is None:
        sys.stdout.write("compiling proxy and routing, a minute or two …\n")
        sys.stdout.flush()
        compile_modules(ROOT, FOLDER)
    else:
        sys.stdout.write(f"proxy and routing run as plain Python, not compiled: {obstacle}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
