"""cr-sqlite from npm in a Node process of its own.

Decides when it can take part. Knows nothing of what a round measures; crsqlite.mjs does. Invariant: nothing
is installed outside the bench's own directory, and the process ends with the `with` block.
"""

import json
import shutil
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

PACKAGE = "@vlcn.io/crsqlite-wasm@0.16.0"
HERE = Path(__file__).parent
INSTALLED = HERE / "node_modules"
INSTALL_TIMEOUT_S = 60
END_TIMEOUT_S = 10


class UnavailableError(Exception):
    """Why there is no cr-sqlite to compare with."""


def install() -> None:
    """Install the package where git ignores it, once; raises UnavailableError."""
    if (INSTALLED / "@vlcn.io" / "crsqlite-wasm").is_dir() and shutil.which("node"):
        return
    if not shutil.which("npm") or not shutil.which("node"):
        raise UnavailableError("cr-sqlite is left out: its package needs npm (Debian's nodejs and npm)")
    command = ["npm", "install", "--prefix", str(HERE), "--no-save", "--no-audit", "--no-fund", PACKAGE]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=INSTALL_TIMEOUT_S, text=True)
    except (subprocess.SubprocessError, OSError) as error:
        detail = str(getattr(error, "stderr", "") or error).strip().splitlines()
        raise UnavailableError(f"cr-sqlite is left out: npm cannot install it ({detail[-1]})") from error


class CrSqlite:
    """The Node process; `versions` is set on entry."""

    def __init__(self) -> None:
        self.versions: dict[str, str] = {}

    def __enter__(self) -> Self:
        """Install and start; raises UnavailableError."""
        install()
        self._process = subprocess.Popen(
            ["node", str(HERE / "crsqlite.mjs"), str(HERE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            self.versions = self._read()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the process."""
        self._end()

    def run_round(self, rows: int, batch: int, singles: int) -> dict[str, Any]:
        """Return `cpu` seconds by measure and `bytes`; raises UnavailableError when the process fails."""
        assert self._process.stdin is not None, "it is a pipe"
        self._process.stdin.write(json.dumps({"rows": rows, "batch": batch, "singles": singles}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None, "it is a pipe"
        line = self._process.stdout.readline()
        if not line:
            raise UnavailableError("cr-sqlite is left out: its process ended, see above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _end(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
