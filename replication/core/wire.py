"""What travels between nodes, as bytes: datagram and stream messages, in msgpack.

Decides what is well formed. Knows nothing of keys, sockets or what a message does; changeset payloads
and snapshot chunks are opaque. Invariant: `decode` returns a message whose every field has the type and
range that its class declares, or raises `WireError`; it never raises anything else, whatever the bytes.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import msgpack

from replication.core.change import EncodedChangeset
from replication.core.clock import HLC_MAX, Hlc, SiteId
from replication.core.codec import CodecError, unpack_foreign
from replication.core.fields import WireError as WireError  # noqa: PLC0414  part of this module's interface
from replication.core.fields import blob, by_site, optional, read_flag, read_row, read_site, rows, text, whole
from replication.core.member import (
    INCARNATION_MAX,
    NAME_CHARS_MAX,
    MemberInfo,
    MemberState,
    Update,
    is_address_literal,
)
from replication.core.vivaldi import DIMENSIONS, REACH_MS, Coordinate

PROTOCOL_VERSION = 1

# A datagram leaves room for the seal, UDP and IPv6 within 1280, the MTU that every IPv6 path has.
DATAGRAM_BYTES_MAX = 1160
# What a peer may make us hold before it is decoded; larger payloads and chunks travel in parts.
FRAME_BYTES_MAX = 4 * 1024 * 1024
# Before the peer has said who it is, it may not make us buffer more than this.
HELLO_BYTES_MAX = 4096

# The store packs a version into 40 bits: 34 years of a thousand changesets a second.
VERSION_MAX = 2**40
SITES_MAX = 16_384
RANGES_MAX = 4_096
ITEMS_MAX = 16_384
# The most that a message has is two: what was seen, and floors.
MAPS_MAX = 2
CLUSTER_CHARS_MAX = 64
# What one transaction may be when it travels in parts; who takes it in decides how much of that it wants.
PAYLOAD_BYTES_MAX = 2**32
# A part is one frame: small enough that probes and pushes on the same link do not wait for long.
PART_BYTES_MAX = 256 * 1024
TABLE_CHARS_MAX = 255
KEY_BYTES_MAX = 1024 * 1024
DIGEST_ROWS_MAX = 2**20
DIGEST_BYTES_MIN, DIGEST_BYTES_MAX = 8, 32
# Third-hand coordinates that are older than a day are of no use; the age saturates there.
AGE_S_MAX = 86_400

Range = tuple[int, int]
ChangesetId = tuple[SiteId, int]
DigestRange = tuple[bytes, int, bytes]


class Heartbeat(NamedTuple):
    """A site's word about itself, at a time of its own clock.

    All its changesets up to `hlc` are its versions up to `version`, and of every other member it has all
    that was written up to `complete_hlc`; `roll` is a digest of which members those are.
    """

    site: SiteId
    version: int
    hlc: Hlc
    complete_hlc: Hlc
    roll: int


class Whereabouts(NamedTuple):
    """Where a member is on the map of round trips, and how long ago it said so."""

    site: SiteId
    coordinate: Coordinate
    age_s: int


# --- messages -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ping:
    """A probe of `target`, which answers with an Ack of the same number."""

    number: int
    target: SiteId
    sender: MemberInfo
    updates: tuple[Update, ...] = ()
    coordinate: Coordinate | None = None


@dataclass(frozen=True, slots=True)
class Ack:
    """The answer to a Ping, also when it was relayed; `coordinate` is where the sender of the Ack is."""

    number: int
    sender: MemberInfo
    updates: tuple[Update, ...] = ()
    coordinate: Coordinate | None = None


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
    whereabouts: tuple[Whereabouts, ...] = ()


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
    """Asks for ranges of versions (site, first, last) out of the log.

    `offset` is how much of the payload of the very first version is there already.
    """

    session: int
    needs: tuple[tuple[SiteId, int, int], ...]
    offset: int = 0


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
    """A bounded part of a snapshot; order matters. `more` when the chunk goes on in the next frame."""

    session: int
    chunk: bytes
    more: bool = False


@dataclass(frozen=True, slots=True)
class Large:
    """Names changesets (site, version, bytes) that are there to be pulled, as they are too large to push."""

    ids: tuple[tuple[SiteId, int, int], ...]


@dataclass(frozen=True, slots=True)
class SyncPart:
    """Some bytes of one payload that does not fit a SyncChanges; parts come in order."""

    session: int
    site: SiteId
    version: int
    total_bytes: int
    offset: int
    data: bytes

    def __post_init__(self) -> None:
        if not 0 < len(self.data) <= min(PART_BYTES_MAX, self.total_bytes - self.offset):
            raise WireError("part")


@dataclass(frozen=True, slots=True)
class DigestAsk:
    """Asks for the digests of a table's rows behind a key, one for every `rows_max` rows at most."""

    session: int
    table: str
    after: bytes | None
    rows_max: int


@dataclass(frozen=True, slots=True)
class DigestRanges:
    """Digests of successive ranges of rows (upper key, rows, digest); `is_last` at the table's end."""

    session: int
    ranges: tuple[DigestRange, ...]
    is_last: bool


@dataclass(frozen=True, slots=True)
class StatesAsk:
    """Asks for rows with lower < key <= upper, as SyncState, SnapshotChunks, SyncDone; None is no bound."""

    session: int
    table: str
    lower: bytes | None
    upper: bytes | None


@dataclass(frozen=True, slots=True)
class Beats:
    """Heartbeats of any sites, passed on."""

    beats: tuple[Heartbeat, ...]


Datagram = Ping | Ack | PingRequest | Nack | Join | Rumors
Frame = (
    Hello | StreamPing | StreamAck | Members | Push | IHave | Graft | Prune
    | SyncOpen | SyncState | SyncBusy | SyncAsk | SyncChanges | SyncDone | SnapshotAsk | SnapshotChunk
    | Large | SyncPart | DigestAsk | DigestRanges | StatesAsk | Beats
)  # fmt: skip
Message = Datagram | Frame

# --- fields: how each type is checked on the way in and flattened on the way out ----------------------


@dataclass(frozen=True, slots=True)
class _Field:
    read: Callable[[Any], Any]
    write: Callable[[Any], Any]


def _same(value: Any) -> Any:
    return value


_read_incarnation = whole(0, INCARNATION_MAX - 1)
_read_version = whole(0, VERSION_MAX - 1)
_read_number = whole(1, VERSION_MAX - 1)  # of a changeset: a version that exists
_read_name = text(NAME_CHARS_MAX)
_read_host = text(45)  # the longest IPv6 literal
_read_port = whole(0, 65_535)
_read_state = whole(0, len(MemberState) - 1)
_read_hlc = whole(0, HLC_MAX)
_read_payload = blob(FRAME_BYTES_MAX)
_read_payload_bytes = whole(0, PAYLOAD_BYTES_MAX)
_read_roll = whole(0, 2**32 - 1)
_read_age_s = whole(0, AGE_S_MAX)
# A coordinate travels in whole microseconds, and its error in thousandths: no NaN, and half the bytes.
_read_reach_us = whole(-int(REACH_MS * 1000), int(REACH_MS * 1000))
_read_key = blob(KEY_BYTES_MAX)
_read_digest = blob(DIGEST_BYTES_MAX, DIGEST_BYTES_MIN)


def _read_info(value: Any) -> MemberInfo:
    try:
        return _make_info(*read_row(value, 5))
    except TypeError:  # something that cannot be hashed
        raise WireError("field") from None


# The same few members are named in every message; to check one costs as much as all else in a datagram.
@lru_cache(maxsize=4_096, typed=True)
def _make_info(site: Any, name: Any, host: Any, port: Any, incarnation: Any) -> MemberInfo:
    host = _read_host(host)
    if not is_address_literal(host) or _read_port(port) == 0:
        raise WireError("address")
    return MemberInfo(read_site(site), _read_name(name), host, port, _read_incarnation(incarnation))


def _write_info(info: MemberInfo) -> tuple[Any, ...]:
    return (info.site, info.name, info.host, info.port, info.incarnation)


def _read_update(value: Any) -> Update:
    info, state = read_row(value, 2)
    return Update(_read_info(info), MemberState(_read_state(state)))


def _write_updates(updates: tuple[Update, ...]) -> list[Any]:
    return [(_write_info(update.info), int(update.state)) for update in updates]


def _read_coordinate(value: Any) -> Coordinate:
    *vector, height, error = (_read_reach_us(item) / 1000 for item in read_row(value, DIMENSIONS + 2))
    if height < 0 or error < 0:
        raise WireError("field")
    return Coordinate(tuple(vector), height, error)


def _write_coordinate(place: Coordinate | None) -> list[int] | None:
    if place is None:
        return None
    return [round(value * 1000) for value in (*place.vector, place.height, place.error)]


def _read_whereabouts(value: Any) -> Whereabouts:
    site, place, age_s = read_row(value, 3)
    return Whereabouts(read_site(site), _read_coordinate(place), _read_age_s(age_s))


def _write_whereabouts(value: tuple[Whereabouts, ...]) -> list[Any]:
    return [(item.site, _write_coordinate(item.coordinate), item.age_s) for item in value]


def _read_changeset(value: Any) -> EncodedChangeset:
    site, version, payload = read_row(value, 3)
    return EncodedChangeset(read_site(site), _read_number(version), _read_payload(payload))


def _write_changeset(changeset: EncodedChangeset) -> tuple[Any, ...]:
    return (changeset.site, changeset.version, changeset.payload)


def _read_id(value: Any) -> ChangesetId:
    site, version = read_row(value, 2)
    return (read_site(site), _read_version(version))


def _read_large(value: Any) -> tuple[SiteId, int, int]:
    site, version, size = read_row(value, 3)
    return (read_site(site), _read_number(version), _read_payload_bytes(size))


def _read_need(value: Any) -> tuple[SiteId, int, int]:
    site, first, last = read_row(value, 3)
    if not 0 < _read_version(first) <= _read_version(last):
        raise WireError("field")
    return (read_site(site), first, last)


def _read_range(value: Any) -> Range:
    first, last = read_row(value, 2)
    return (_read_version(first), _read_version(last))


def _read_ranges(value: Any) -> tuple[Range, ...]:
    """Check that the ranges are in order and apart, so that nobody downstream needs to."""
    end = 0
    ranges = rows(_read_range, RANGES_MAX)(value)
    for first, last in ranges:
        if not end < first <= last:
            raise WireError("ranges")
        end = last
    return ranges


def _read_digest_range(value: Any) -> DigestRange:
    upper, count, digest = read_row(value, 3)
    return (_read_key(upper), whole(0, DIGEST_ROWS_MAX)(count), _read_digest(digest))


def _read_beat(value: Any) -> Heartbeat:
    site, version, hlc, complete, roll = read_row(value, 5)
    if _read_hlc(complete) > _read_hlc(hlc):
        raise WireError("field")
    return Heartbeat(read_site(site), _read_version(version), hlc, complete, _read_roll(roll))


def _plain(read: Callable[[Any], Any]) -> _Field:
    return _Field(read, _same)


def _many(read: Callable[[Any], Any], write: Callable[[Any], Any] = _same) -> _Field:
    return _Field(rows(read, ITEMS_MAX), write)


_UINT32 = _plain(whole(0, 2**32 - 1))
_SESSION = _UINT32
_FLAG = _plain(read_flag)
_SITE = _plain(read_site)
_INFO = _Field(_read_info, _write_info)
_UPDATES = _many(_read_update, _write_updates)
_COORDINATE = _Field(optional(_read_coordinate), _write_coordinate)
_IDS = _many(_read_id)
_SEEN = _plain(by_site(_read_ranges, SITES_MAX))
_CHANGESET = _Field(_read_changeset, _write_changeset)
_CHANGESETS = _many(_read_changeset, lambda value: [_write_changeset(item) for item in value])
_PAYLOAD = _plain(_read_payload)
_PAYLOAD_BYTES = _plain(_read_payload_bytes)
_TABLE = _plain(text(TABLE_CHARS_MAX))
_KEY = _plain(optional(_read_key))


class _Registry:
    """One table of kinds: the number on the wire, the class, and how its fields are read and written."""

    TABLE: ClassVar[dict[type[Any], tuple[_Field, ...]]] = {
        Ping: (_UINT32, _SITE, _INFO, _UPDATES, _COORDINATE),
        Ack: (_UINT32, _INFO, _UPDATES, _COORDINATE),
        PingRequest: (_UINT32, _INFO, _INFO, _UPDATES),
        Nack: (_UINT32, _INFO, _UPDATES),
        Join: (_INFO, _UPDATES),
        Rumors: (_INFO, _UPDATES),
        Hello: (_plain(text(CLUSTER_CHARS_MAX)), _INFO, _FLAG),
        StreamPing: (_UINT32,),
        StreamAck: (_UINT32,),
        Members: (_UPDATES, _many(_read_whereabouts, _write_whereabouts)),
        Push: (_CHANGESET,),
        IHave: (_IDS,),
        Graft: (_IDS,),
        Prune: (),
        SyncOpen: (_SESSION, _SEEN),
        SyncState: (_SESSION, _SEEN, _plain(by_site(_read_version, SITES_MAX))),
        SyncBusy: (_SESSION,),
        SyncAsk: (_SESSION, _many(_read_need), _PAYLOAD_BYTES),
        SyncChanges: (_SESSION, _CHANGESETS),
        SyncDone: (_SESSION, _FLAG),
        SnapshotAsk: (_SESSION,),
        SnapshotChunk: (_SESSION, _PAYLOAD, _FLAG),
        Large: (_many(_read_large),),
        SyncPart: (_SESSION, _SITE, _plain(_read_number), _PAYLOAD_BYTES, _PAYLOAD_BYTES, _PAYLOAD),
        DigestAsk: (_SESSION, _TABLE, _KEY, _plain(whole(1, DIGEST_ROWS_MAX))),
        DigestRanges: (_SESSION, _many(_read_digest_range), _FLAG),
        StatesAsk: (_SESSION, _TABLE, _KEY, _KEY),
        Beats: (_many(_read_beat),),
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


def get_kind(frame: bytes) -> type[Message]:
    """Return what kind of message `encode` made, without a look at the rest."""
    kind: type[Message] = _Registry.KINDS[frame[2]]
    return kind


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
        row = unpack_foreign(data, maps_max=MAPS_MAX)
    except CodecError as error:
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
