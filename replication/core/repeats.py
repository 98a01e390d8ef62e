"""Which failures are worth telling again.

Decides by what failed, how, and when it was last told. Invariant: a failure that goes on is told once a
minute, however often it happens, and another one at once.
"""

# A file that is damaged fails each write and look: with a stack each, the log would fill the disk.
AGAIN_MS = 60_000.0


class Repeats:
    """What was told last of each thing that can fail; there are few of these."""

    def __init__(self) -> None:
        self._told: dict[str, tuple[str, float]] = {}

    def is_news(self, what: str, reason: str, now_ms: float) -> bool:
        """Return whether to tell of this failure, and take it that this is done."""
        reason_before, told_ms = self._told.get(what, ("", float("-inf")))
        if reason == reason_before and now_ms - told_ms < AGAIN_MS:
            return False
        self._told[what] = (reason, now_ms)
        return True
