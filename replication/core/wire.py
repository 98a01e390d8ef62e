"""What travels between nodes, as bytes: datagram and stream messages, in msgpack.

Decides what is well formed. Knows nothing of keys, sockets or what a message does; changeset payloads
and snapshot chunks are opaque. Invariant: `decode` returns a message whose every field has the type and
range that its class declares, or raises `WireError`; it never raises anything else, whatever the bytes.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

import msgpack

from replication.core.change import EncodedChangeset
from replication.core.clock import SiteId
from replication.core.member import (
    INCARNATION_MAX,
    NAME_CHARS_MAX,
    MemberInfo,
    MemberState,
    Update,
    is_address_literal,
)
from replication.errors import ReplicationError

PROTOCOL_VERSION = 1

# A datagram leaves room for the seal, UDP and IPv6 within 1280, the MTU that every IPv6 path has.
DATAGRAM_BYTES_MAX = 1160
# A changeset travels whole, so this bounds the largest transaction that can be broadcast.
FRAME_BYTES_MAX = 64 * 1024 * 1024
# Before the peer has said who it is, it may not make us buffer more than this.
HELLO_BYTES_MAX = 4096

# The store packs a version into 40 bits: 34 years of a thousand changesets a second.
VERSION_MAX = 2**40
SITES_MAX = 16_384
RANGES_MAX = 4_096
ITEMS_MAX = 16_384
CLUSTER_CHARS_MAX = 64

Range = tuple[int, int]
ChangesetId = tuple[SiteId, int]


class WireError(ReplicationError):
    """The peer sent bytes that are not a message; `reason` is one of few words, fit for a metric's label."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


# --- messages -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ping:
    """A probe of `target`, which answers with an Ack of the same number."""

    number: int
    target: SiteId
    sender: MemberInfo
    updates: tuple[Update, ...] = ()


@dataclass(frozen=True, slots=True)
class Ack:
    """The answer to a Ping, also when it was relayed."""

    number: int
    sender: MemberInfo
    updates: tuple[Update, ...] = ()


@dataclass(frozen=True, slots=True)
class PingRequest:
    """Asks a third member to probe `target` in the sender's stead."""

    number: int
    target: MemberInfo
    sender: MemberInfo
    updates: tuple[Update, ...] = ()


@dataclass(frozen=True, slots=True)
class Nack:
    """A relay's word that it is there but its target did not answer: the prober's own network is fine."""

    number: int
    sender: MemberInfo
    updates: tuple[Update, ...] = ()


@dataclass(frozen=True, slots=True)
class Join:
    """Makes the sender known and asks for a few Rumors datagrams of members in return."""

    sender: MemberInfo
    updates: tuple[Update, ...] = ()


@dataclass(frozen=True, slots=True)
class Rumors:
    """Membership gossip that asks for nothing."""

    sender: MemberInfo
    updates: tuple[Update, ...] = ()


@dataclass(frozen=True, slots=True)
class Hello:
    """The first message on a stream, both ways; `lasting` when the dialer means to keep the link."""

    cluster: str
    sender: MemberInfo
    lasting: bool


@dataclass(frozen=True, slots=True)
class StreamPing:
    """A probe over the stream, for networks that lose datagrams only."""

    number: int


@dataclass(frozen=True, slots=True)
class StreamAck:
    """The answer to a StreamPing."""

    number: int


@dataclass(frozen=True, slots=True)
class Members:
    """A node's member list, exchanged when it syncs."""

    updates: tuple[Update, ...]


@dataclass(frozen=True, slots=True)
class Push:
    """A changeset, sent eagerly along the broadcast tree."""

    changeset: EncodedChangeset


@dataclass(frozen=True, slots=True)
class IHave:
    """Names changesets that the sender could push."""

    ids: tuple[ChangesetId, ...]


@dataclass(frozen=True, slots=True)
class Graft:
    """Asks for changesets and makes the link part of the tree."""

    ids: tuple[ChangesetId, ...]


@dataclass(frozen=True, slots=True)
class Prune:
    """Takes the link out of the tree: the sender gets these changesets from somewhere else."""


@dataclass(frozen=True, slots=True)
class SyncOpen:
    """Starts a session with what the sender has seen."""

    session: int
    seen: dict[SiteId, tuple[Range, ...]]


@dataclass(frozen=True, slots=True)
class SyncState:
    """What the asked node has seen, and from which version on its log can serve each site."""

    session: int
    seen: dict[SiteId, tuple[Range, ...]]
    floors: dict[SiteId, int]


@dataclass(frozen=True, slots=True)
class SyncBusy:
    """The asked node serves enough sessions already."""

    session: int


@dataclass(frozen=True, slots=True)
class SyncAsk:
    """Asks for ranges of versions (site, first, last) out of the log."""

    session: int
    needs: tuple[tuple[SiteId, int, int], ...]


@dataclass(frozen=True, slots=True)
class SyncChanges:
    """A bounded part of what was asked for."""

    session: int
    changesets: tuple[EncodedChangeset, ...]


@dataclass(frozen=True, slots=True)
class SyncDone:
    """The end of the answer to a SyncAsk or SnapshotAsk; not `complete` when the asked node gave up."""

    session: int
    complete: bool


@dataclass(frozen=True, slots=True)
class SnapshotAsk:
    """Asks for all rows, because the log no longer reaches back far enough."""

    session: int


@dataclass(frozen=True, slots=True)
class SnapshotChunk:
    """A bounded part of a snapshot; order matters."""

    session: int
    chunk: bytes


Datagram = Ping | Ack | PingRequest | Nack | Join | Rumors
Frame = (
    Hello | StreamPing | StreamAck | Members | Push | IHave | Graft | Prune
    | SyncOpen | SyncState | SyncBusy | SyncAsk | SyncChanges | SyncDone | SnapshotAsk | SnapshotChunk
)  # fmt: skip
Message = Datagram | Frame

# --- fields: how each type is checked on the way in and flattened on the way out ----------------------

T = TypeVar("T")
Reader = Callable[[Any], Any]
Writer = Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class _Field:
    read: Reader
    write: Writer


def _same(value: Any) -> Any:
    return value


def _uint(limit: int) -> Reader:
    def read(value: Any) -> int:
        # `type(…) is` because True is an int to isinstance.
        if type(value) is not int or not 0 <= value < limit:
            raise WireError("field")
        return value

    return read


def _bytes(value: Any) -> bytes:
    if type(value) is not bytes:
        raise WireError("field")
    return value


def _site(value: Any) -> SiteId:
    if type(value) is not bytes or len(value) != 16:
        raise WireError("field")
    return SiteId(value)


def _text(limit: int) -> Reader:
    def read(value: Any) -> str:
        if type(value) is not str or not 0 < len(value) <= limit or not value.isprintable():
            raise WireError("field")
        return value

    return read


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise WireError("field")
    return value


def _row(value: Any, arity: int) -> tuple[Any, ...]:
    if type(value) is not tuple or len(value) != arity:
        raise WireError("field")
    return value


def _rows(value: Any, limit: int) -> tuple[Any, ...]:
    if type(value) is not tuple or len(value) > limit:
        raise WireError("field")
    return value


_read_incarnation = _uint(INCARNATION_MAX)
_read_version = _uint(VERSION_MAX)
_read_name = _text(NAME_CHARS_MAX)
_read_host = _text(45)  # the longest IPv6 literal
_read_port = _uint(65_536)


def _read_info(value: Any) -> MemberInfo:
    site, name, host, port, incarnation = _row(value, 5)
    host = _read_host(host)
    if not is_address_literal(host) or _read_port(port) == 0:
        raise WireError("address")
    return MemberInfo(_site(site), _read_name(name), host, port, _read_incarnation(incarnation))


def _write_info(info: MemberInfo) -> tuple[Any, ...]:
    return (info.site, info.name, info.host, info.port, info.incarnation)


def _read_update(value: Any) -> Update:
    info, state = _row(value, 2)
    if type(state) is not int or not 0 <= state < len(MemberState):
        raise WireError("field")
    return Update(_read_info(info), MemberState(state))


def _read_updates(value: Any) -> tuple[Update, ...]:
    return tuple(_read_update(item) for item in _rows(value, ITEMS_MAX))


def _write_updates(updates: tuple[Update, ...]) -> list[Any]:
    return [(_write_info(update.info), int(update.state)) for update in updates]


def _read_changeset(value: Any) -> EncodedChangeset:
    site, version, payload = _row(value, 3)
    if _read_version(version) == 0:
        raise WireError("field")
    return EncodedChangeset(_site(site), version, _bytes(payload))


def _write_changeset(changeset: EncodedChangeset) -> tuple[Any, ...]:
    return (changeset.site, changeset.version, changeset.payload)


def _read_ids(value: Any) -> tuple[ChangesetId, ...]:
    pairs = (_row(item, 2) for item in _rows(value, ITEMS_MAX))
    return tuple((_site(site), _read_version(version)) for site, version in pairs)


def _read_need(value: Any) -> tuple[SiteId, int, int]:
    site, first, last = _row(value, 3)
    if not 0 < _read_version(first) <= _read_version(last):
        raise WireError("field")
    return (_site(site), first, last)


def _read_ranges(value: Any) -> tuple[Range, ...]:
    """Check that the ranges are in order and apart, so that nobody downstream needs to."""
    end = 0
    ranges = []
    for item in _rows(value, RANGES_MAX):
        first, last = _row(item, 2)
        if not end < _read_version(first) <= _read_version(last):
            raise WireError("ranges")
        end = last
        ranges.append((first, last))
    return tuple(ranges)


def _read_by_site(read: Callable[[Any], T]) -> Callable[[Any], dict[SiteId, T]]:
    def read_map(value: Any) -> dict[SiteId, T]:
        if type(value) is not dict or len(value) > SITES_MAX:
            raise WireError("field")
        return {_site(site): read(item) for site, item in value.items()}

    return read_map


_UINT32 = _Field(_uint(2**32), _same)
_SESSION = _UINT32
_SITE = _Field(_site, _same)
_INFO = _Field(_read_info, _write_info)
_UPDATES = _Field(_read_updates, _write_updates)
_IDS = _Field(_read_ids, _same)
_SEEN = _Field(_read_by_site(_read_ranges), _same)
_CHANGESET = _Field(_read_changeset, _write_changeset)
_CHANGESETS = _Field(
    lambda value: tuple(_read_changeset(item) for item in _rows(value, ITEMS_MAX)),
    lambda value: [_write_changeset(item) for item in value],
)
_NEEDS = _Field(lambda value: tuple(_read_need(item) for item in _rows(value, ITEMS_MAX)), _same)


class _Registry:
    """One table of kinds: the number on the wire, the class, and how its fields are read and written."""

    TABLE: ClassVar[dict[type[Any], tuple[_Field, ...]]] = {
        Ping: (_UINT32, _SITE, _INFO, _UPDATES),
        Ack: (_UINT32, _INFO, _UPDATES),
        PingRequest: (_UINT32, _INFO, _INFO, _UPDATES),
        Nack: (_UINT32, _INFO, _UPDATES),
        Join: (_INFO, _UPDATES),
        Rumors: (_INFO, _UPDATES),
        Hello: (_Field(_text(CLUSTER_CHARS_MAX), _same), _INFO, _Field(_flag, _same)),
        StreamPing: (_UINT32,),
        StreamAck: (_UINT32,),
        Members: (_UPDATES,),
        Push: (_CHANGESET,),
        IHave: (_IDS,),
        Graft: (_IDS,),
        Prune: (),
        SyncOpen: (_SESSION, _SEEN),
        SyncState: (_SESSION, _SEEN, _Field(_read_by_site(_read_version), _same)),
        SyncBusy: (_SESSION,),
        SyncAsk: (_SESSION, _NEEDS),
        SyncChanges: (_SESSION, _CHANGESETS),
        SyncDone: (_SESSION, _Field(_flag, _same)),
        SnapshotAsk: (_SESSION,),
        SnapshotChunk: (_SESSION, _Field(_bytes, _same)),
    }
    # A kind's number is its place in the table: new kinds go to the end, retired ones leave a hole.
    KINDS: ClassVar[list[type[Any]]] = list(TABLE)
    NUMBERS: ClassVar[dict[type[Any], int]] = {kind: number for number, kind in enumerate(KINDS)}
    NAMES: ClassVar[dict[type[Any], tuple[str, ...]]] = {
        kind: tuple(item.name for item in fields(kind)) for kind in KINDS
    }


_DATAGRAMS = frozenset(_Registry.NUMBERS[kind] for kind in (Ping, Ack, PingRequest, Nack, Join, Rumors))


def encode(message: Message) -> bytes:
    """Return the bytes of a message."""
    kind = type(message)
    row: list[Any] = [PROTOCOL_VERSION, _Registry.NUMBERS[kind]]
    for name, field in zip(_Registry.NAMES[kind], _Registry.TABLE[kind], strict=True):
        row.append(field.write(getattr(message, name)))
    return msgpack.packb(row, use_bin_type=True)


def decode_datagram(data: bytes) -> Datagram:
    """Return the datagram message in the bytes; raises WireError."""
    if len(data) > DATAGRAM_BYTES_MAX:
        raise WireError("size")
    message: Datagram = _decode(data, datagram=True)
    return message


def decode_frame(data: bytes, *, size_max: int = FRAME_BYTES_MAX) -> Frame:
    """Return the stream message in the bytes; raises WireError."""
    if len(data) > size_max:
        raise WireError("size")
    message: Frame = _decode(data, datagram=False)
    return message


def _decode(data: bytes, *, datagram: bool) -> Any:
    try:
        # A collection cannot hold more items than the message has bytes, so the limits bound memory to a
        # multiple of what was received; the extension's own stack bounds the depth.
        row = msgpack.unpackb(
            data,
            use_list=False,
            raw=False,
            strict_map_key=True,
            max_array_len=max(SITES_MAX, ITEMS_MAX),
            max_map_len=SITES_MAX,
            max_ext_len=0,
        )
    except (ValueError, TypeError, RecursionError, MemoryError, msgpack.UnpackException) as error:
        raise WireError("msgpack") from error
    if type(row) is not tuple or len(row) < 2:
        raise WireError("shape")
    version, number = row[0], row[1]
    if type(version) is not int or version != PROTOCOL_VERSION:
        raise WireError("version")
    if type(number) is not int or not 0 <= number < len(_Registry.KINDS):
        raise WireError("kind")
    if (number in _DATAGRAMS) is not datagram:
        raise WireError("kind")
    kind = _Registry.KINDS[number]
    specs = _Registry.TABLE[kind]
    if len(row) != len(specs) + 2:
        raise WireError("shape")
    return kind(*[field.read(value) for field, value in zip(specs, row[2:], strict=True)])


def compute_update_bytes(update: Update) -> int:
    """Return an upper bound of what an update adds to a datagram: the fixed parts plus its two texts."""
    info = update.info
    return 48 + len(info.name.encode()) + len(info.host)


def fit_updates(updates: Iterable[Update], budget_bytes: int) -> tuple[Update, ...]:
    """Return the longest prefix of the updates that fits into the budget."""
    chosen = []
    for update in updates:
        budget_bytes -= compute_update_bytes(update)
        if budget_bytes < 0:
            break
        chosen.append(update)
    return tuple(chosen)
