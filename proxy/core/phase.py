"""Where an exchange stands."""

from __future__ import annotations

from enum import Enum
from typing import Final


class Phase(Enum):
    """Where an exchange stands."""

    REACHING = 1  # choosing and connecting
    QUEUED = 2  # every machine that would do is at its hard limit
    WAITING = 3  # sent, or being sent; no final head yet
    RELAYING = 4  # the head of the answer was passed on
    READING_REPLAY = 5  # collecting a JSON instruction
    DONE = 6


# An attribute of the enumeration would cost a look-up at each comparison.
REACHING: Final = Phase.REACHING
QUEUED: Final = Phase.QUEUED
WAITING: Final = Phase.WAITING
RELAYING: Final = Phase.RELAYING
READING_REPLAY: Final = Phase.READING_REPLAY
DONE: Final = Phase.DONE
