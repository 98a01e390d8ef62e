"""One child process, also one that an earlier program in this process has started.

Decides nothing. Invariant: a process is waited for exactly once, so that its id means no other one until
`returncode` is set.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import signal
    from collections.abc import Sequence


class Process:
    """A child that runs or has ended; `returncode` is set when it has, and negative after a signal."""

    def __init__(self, pid: int, popen: subprocess.Popen[bytes] | None = None) -> None:
        """Begin to wait for a child. To be called with a running event loop."""
        self.pid = pid
        self.returncode: int | None = None
        self._popen = popen
        self._ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        # A descriptor of the process would do it as well, but not every kernel and sandbox has them.
        threading.Thread(target=self._wait, name=f"wait-{pid}", daemon=True).start()

    @classmethod
    def start(cls, args: Sequence[str], pass_fds: Sequence[int]) -> Process:
        """Run a program in a session of its own, with these descriptors beside the standard ones."""
        popen = subprocess.Popen(  # noqa: S603 - the program is ours
            args,
            pass_fds=pass_fds,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C in the terminal is the supervisor's to handle
        )
        return cls(popen.pid, popen)

    def _wait(self) -> None:
        try:
            _, status = os.waitpid(self.pid, 0)
            code = os.waitstatus_to_exitcode(status)
        except ChildProcessError:
            code = 255  # somebody else has waited for it
        with contextlib.suppress(RuntimeError):  # the event loop may be closed
            self._loop.call_soon_threadsafe(self._on_end, code)

    def _on_end(self, code: int) -> None:
        self.returncode = code
        if self._popen is not None:
            self._popen.returncode = code
        self._ended.set()

    async def wait(self) -> int:
        """Return the exit code once there is one."""
        await self._ended.wait()
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, unless the process has ended."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)
