"""What was learned of other nodes: which of their machines cannot be connected to, and which nodes cannot.

Decides for how long that is believed. Refuses to know connections; time comes from outside. Invariant:
nothing is believed for ever, and one success is enough to forget it.
"""

from __future__ import annotations

from typing import Final

# After the first failure, then twice as long each time. Going through a node costs one round trip between
# nodes and no failure, so a machine may be left alone for long; a node that does not answer is soon back.
MACHINE_WAIT_S: Final = 30.0
MACHINE_WAIT_S_MAX: Final = 600.0
NODE_WAIT_S: Final = 1.0
NODE_WAIT_S_MAX: Final = 8.0
# Remembered at a time; beyond it everything is learned anew.
KNOWN_MAX: Final = 4_096


class Detours:
    """What is not to be tried for a while, by any name."""

    __slots__ = ("_known", "_wait_max_s", "_wait_s")

    def __init__(self, wait_s: float, wait_max_s: float) -> None:
        self._wait_s = wait_s
        self._wait_max_s = wait_max_s
        self._known: dict[str, tuple[float, float]] = {}  # until when, and how long it was

    def knows(self, name: str) -> bool:
        """True when it failed and has not been found to work since."""
        return name in self._known

    def is_due(self, name: str, now: float) -> bool:
        """True when it may be tried: it did not fail, or that is long ago."""
        known = self._known.get(name)
        return known is None or known[0] <= now

    def fail(self, name: str, now: float) -> None:
        """It did not work."""
        if len(self._known) >= KNOWN_MAX and name not in self._known:
            self._known.clear()
        known = self._known.get(name)
        wait_s = self._wait_s if known is None else min(known[1] * 2, self._wait_max_s)
        self._known[name] = now + wait_s, wait_s

    def succeed(self, name: str) -> None:
        """It works."""
        self._known.pop(name, None)

    def hold(self, name: str, now: float, for_s: float) -> None:
        """It is being tried: others are not to try it meanwhile."""
        known = self._known.get(name)
        if known is not None:
            self._known[name] = now + for_s, known[1]
