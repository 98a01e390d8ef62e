"""The settings of all nodes, as a node keeps them beside its database.

Decides which are in use when a trial has not ended. Refuses to know what they say. Invariant: until a trial
has ended well, what was in use before it is on disk too, and a node that starts goes on with that.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

_CURRENT: Final = "rolled-out.toml"
_FORMER: Final = "rolled-out.toml.before"


class Overlay:
    """The files of one data directory. All methods block, and may raise OSError."""

    def __init__(self, data: Path) -> None:
        self._current = data / _CURRENT
        self._former = data / _FORMER

    def read(self, *, is_start: bool = False) -> str:
        """Return the settings, or "" where none were rolled out. At a start, none that are on trial count."""
        for file in (self._former, self._current) if is_start else (self._current,):
            try:
                return file.read_text("utf-8")
            except (OSError, ValueError):
                continue
        return ""

    def put_on_trial(self, settings: str) -> None:
        """Replace the settings, and keep those that were there until `settle` or `put_back`."""
        if not self._former.exists():
            _write(self._former, self.read())
        _write(self._current, settings)

    def put(self, settings: str) -> None:
        """Replace the settings by those that need no trial, and end any."""
        _write(self._current, settings)
        self.settle()

    def settle(self) -> None:
        """Forget what was there before a trial."""
        self._former.unlink(missing_ok=True)

    def put_back(self) -> bool:
        """End a trial that has not ended well; False when there is none."""
        if not self._former.exists():
            return False
        self._former.replace(self._current)
        return True


def _write(file: Path, text: str) -> None:
    fresh = file.with_name(f"{file.name}.new")
    with fresh.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    fresh.replace(file)
