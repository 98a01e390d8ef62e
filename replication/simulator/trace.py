"""What happened, as lines: all of it in a hash, what matters to a reader in a timeline.

Decides what is kept. Knows nothing of what the lines mean. Invariant: the hash and the written trace are a
function of the lines alone, so that equal runs have equal traces whatever else differs.
"""

import hashlib
from collections import deque
from typing import BinaryIO

# Enough to see the minutes before a failure; a line is about a hundred bytes.
TIMELINE_LINES_MAX = 20_000


class Trace:
    """The record of one run."""

    def __init__(self, sink: BinaryIO | None = None) -> None:
        self.lines = 0
        self._hash = hashlib.blake2b(digest_size=16)
        self._sink = sink
        # (time, node or None for the network, text)
        self._timeline: deque[tuple[int, int | None, str]] = deque(maxlen=TIMELINE_LINES_MAX)

    def add(self, now_us: int, text: str) -> None:
        """Record what only matters to compare runs."""
        line = f"{now_us} {text}\n".encode()
        self.lines += 1
        self._hash.update(line)
        if self._sink is not None:
            self._sink.write(line)

    def note(self, now_us: int, node: int | None, text: str) -> None:
        """Record what a reader of the timeline wants to see."""
        self.add(now_us, text if node is None else f"n{node} {text}")
        self._timeline.append((now_us, node, text))

    def digest(self) -> str:
        """Return the hash of all lines so far."""
        return self._hash.hexdigest()

    def timeline(self, nodes: frozenset[int] | None, limit: int) -> list[str]:
        """Return the last lines about these nodes, or all nodes, and about the network."""
        chosen = [
            f"{now_us / 1e6:10.3f} s  {'network' if node is None else f'node {node}':8}  {text}"
            for now_us, node, text in self._timeline
            if nodes is None or node is None or node in nodes
        ]
        return chosen[-limit:]
