"""A link that records what is sent, for cores that speak to peers."""

from collections.abc import Callable

from replication.core.member import MemberInfo
from replication.core.wire import Frame, decode_frame


class FakeLink:
    """One end of a stream that leads nowhere."""

    def __init__(
        self,
        peer: MemberInfo,
        *,
        lasting: bool = True,
        on_close: Callable[["FakeLink"], None] = lambda _: None,
    ) -> None:
        self.peer = peer
        self.lasting = lasting
        self.is_writable = True
        self.is_closed = False
        self.is_paused = False
        self.is_retired = False
        self.frames: list[Frame] = []
        self.waits: list[Callable[[], None]] = []  # for the link to be writable
        self._on_close = on_close

    def send(self, frame: bytes) -> bool:
        if self.is_closed:
            return False
        self.frames.append(decode_frame(frame))
        return True

    def when_writable(self, act: Callable[[], None]) -> None:
        self.waits.append(act)

    def pause(self) -> None:
        self.is_paused = True

    def resume(self) -> None:
        self.is_paused = False

    def close(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            self._on_close(self)

    def retire(self) -> None:
        self.is_retired = True
        self.close()
