"""Changes of a request for one replay, and looking into its fields.

Decides which fields an app may delete and set when it replays a request. Refuses to know where the request
goes. Invariant: how the request is framed, and what the proxy says itself, is never changed; the next replay
starts from the request as the client sent it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from routing.replay import INVALID, ReplayError

from . import fields
from .fields import request_kind
from .request_head import is_host

if TYPE_CHECKING:
    from routing.transform import Transform

    from .request_head import RequestHead

# Without these the request would be another one, or none.
_NEEDED: Final = frozenset(
    (
        fields.HOST,
        fields.CONTENT_LENGTH,
        fields.TRANSFER_ENCODING,
        fields.CONNECTION,
        fields.UPGRADE,
        fields.EXPECT,
    )
)


class Original(NamedTuple):
    """What a transform has changed, as it was."""

    target: bytes
    host: bytes
    lines: list[bytes]

    def put_back(self, head: RequestHead) -> None:
        """Undo the transform."""
        head.target, head.host, head.lines = self.target, self.host, self.lines


def apply_transform(head: RequestHead, transform: Transform) -> Original:
    """Change the request; returns what undoes it. Raises ReplayError, and has changed nothing then."""
    gone: set[bytes] = set()
    added: list[bytes] = []
    host = head.host
    for name in transform.deleted:
        if request_kind(name) in _NEEDED:
            raise ReplayError(INVALID, f"transform cannot delete {name.decode()}")
        gone.add(_fold(name))
    for name, value in transform.added:
        kind = request_kind(name)
        if kind == fields.HOST and is_host(value):
            host = value
        elif kind == fields.PASS:
            gone.add(_fold(name))
            added.append(name + b": " + value)
        else:
            raise ReplayError(INVALID, f"transform cannot set {name.decode()} to this value")
    original = Original(head.target, head.host, head.lines)
    head.lines = [line for line in head.lines if _fold(line[: line.find(b":")]) not in gone] + added
    head.target = head.target if transform.path is None else transform.path
    head.host = host
    return original


def _fold(name: bytes) -> bytes:
    """Return the name as the most lenient app reads it: CGI and WSGI make both dashes equal."""
    return name.lower().replace(b"_", b"-")


def find_values(head: RequestHead, name: bytes) -> list[bytes]:
    """Return what a request's fields of this name, in lower case, say."""
    prefix = name + b":"
    size = len(prefix)
    return [line[size:].strip() for line in head.lines if line[:size].lower() == prefix]


def find_cookie(head: RequestHead, name: bytes) -> bytes:
    """Return the value of the first cookie of this name; empty when there is none."""
    for value in find_values(head, b"cookie"):
        for pair in value.split(b";"):
            found, equals, text = pair.partition(b"=")
            if equals and found.strip() == name:
                return text.strip()
    return b""
