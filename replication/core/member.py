"""What one node believes about another: the records that membership gossip carries.

Decides which of two claims about a member is the newer one. Knows nothing of probes, timers or
sockets. Invariant: for one incarnation a claim only moves forward, alive → suspect → dead → left;
only the member itself moves back to alive, with a higher incarnation.
"""

import enum
from dataclasses import dataclass, replace
from ipaddress import ip_address

from replication.core.clock import SiteId
from replication.core.suspicion import Suspicion

Address = tuple[str, int]

# Incarnations start as the wall clock in ms when the node started (about 2^41), so that a restart is
# newer than the life before it without writing anything down. A claim may be ahead of what is known
# by a year at most, so a liar needs 2^27 lies, each refuted and counted, to run the counter out.
INCARNATION_MAX = 2**62
INCARNATION_JUMP_MAX = 2**35

NAME_CHARS_MAX = 64


class MemberState(enum.IntEnum):
    """How far a member has fallen; the number is its rank within one incarnation and its code on the wire."""

    ALIVE = 0
    SUSPECT = 1
    DEAD = 2
    LEFT = 3


@dataclass(frozen=True, slots=True)
class MemberInfo:
    """Who a member is and where it is reached; all of it is the member's own claim."""

    site: SiteId
    name: str
    host: str
    port: int
    incarnation: int

    @property
    def address(self) -> Address:
        """Where its datagrams and streams go."""
        return (self.host, self.port)

    def with_incarnation(self, incarnation: int) -> "MemberInfo":
        """Return the same member in another incarnation."""
        return replace(self, incarnation=incarnation)


@dataclass(frozen=True, slots=True)
class Update:
    """A claim that a member is in a state; the unit of membership gossip."""

    info: MemberInfo
    state: MemberState


@dataclass(slots=True)
class Member:
    """Another node as this one sees it."""

    info: MemberInfo
    state: MemberState
    changed_ms: float  # when `state` was set
    heard_ms: float | None = None  # when it last sent us something itself
    rtt_ms: float | None = None  # smoothed, of direct probes
    suspicion: Suspicion | None = None  # set while SUSPECT
    nudged_ms: float = float("-inf")  # when it was last told what is wrongly said of it

    @property
    def update(self) -> Update:
        """What we claim about it."""
        return Update(self.info, self.state)

    @property
    def is_reachable(self) -> bool:
        """Whether it counts as part of the cluster: a suspect does until it is dead."""
        return self.state in (MemberState.ALIVE, MemberState.SUSPECT)


def is_newer(claim: Update, known: Update) -> bool:
    """Return whether the claim supersedes what is known: higher incarnation, then further fallen."""
    return (claim.info.incarnation, claim.state) > (known.info.incarnation, known.state)


def is_jump_sane(incarnation: int, known: int) -> bool:
    """Return whether a claimed incarnation is near enough to the known one to be believed."""
    return incarnation < INCARNATION_MAX and incarnation - known <= INCARNATION_JUMP_MAX


def is_address_literal(host: str) -> bool:
    """Return whether the host is an IP literal; names never travel, so that gossip cannot start look-ups."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return "%" not in host  # a zone index means something only on the machine that wrote it
