"""Who is in the cluster and who answers: SWIM with Lifeguard's local health and suspicion.

Decides whom to probe, suspect, declare dead, and what to gossip. Knows nothing of sockets, keys, clocks
or of what members are for: it takes messages and the time, and returns outputs. Invariant: a member's
state follows `member.is_newer`, and no claim about ourselves but our own is ever told as true.

After Das, Gupta, Motivala 2002 and Dadgar, Phillips, Currey 2018; the vocabulary and the knobs are those
of hashicorp/memberlist. Departures: the dead are remembered and approached now and then, so that two
halves of a cluster find each other again; and a claim that contradicts what we hold is sent back to the
one it is about, so that it is refuted at once.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from replication.core.atlas import Atlas
from replication.core.clock import SiteId
from replication.core.member import Address, Member, MemberInfo, MemberState, Update, is_jump_sane, is_newer
from replication.core.probe import LocalHealth, Probe, ProbeOrder, Relay, Rng, jitter, pick
from replication.core.rumors import Rumors as RumorQueue
from replication.core.suspicion import Suspicion, compute_confirmations_wanted, compute_suspicion_bounds_ms
from replication.core.timers import Timers
from replication.core.twins import TwinWatch
from replication.core.vivaldi import Coordinate
from replication.core.wire import (
    DATAGRAM_BYTES_MAX,
    Ack,
    Datagram,
    Join,
    Members,
    Nack,
    Ping,
    PingRequest,
    Rumors,
    compute_update_bytes,
    fit_updates,
)

# msgpack's framing of a message around its members, and a coordinate.
_ENVELOPE_BYTES = 64
# Long enough for syncs to spread what a member wrote before it left.
_SETTLE_MS = 600_000


@dataclass(frozen=True, slots=True)
class SwimSettings:
    """The knobs; a killed peer is dead for all after about two probe intervals and the suspicion."""

    probe_interval_ms: float = 1_000  # one datagram a second per node, at any cluster size
    probe_timeout_ms: float = 400  # above the longest round trip between two regions, about 330 ms
    indirect_probes: int = 3  # memberlist's: finds one good path among three with p = 0.97 at 30 % loss
    suspicion_factor: float = 3  # 3 s up to ten nodes, 6 s at a hundred: long enough for a refutation
    suspicion_patience: float = 2  # Lifeguard's 6 would let detection take 18 s in a small cluster
    gossip_interval_ms: float = 200  # reaches a hundred nodes in about a second
    gossip_fanout: int = 3
    retransmit_factor: int = 4  # memberlist's
    reconnect_interval_ms: float = 1_500  # how soon the halves of a healed cluster find each other
    join_backoff_ms: float = 250  # first wait after joins that nobody answered, doubled up to the next
    join_backoff_max_ms: float = 5_000
    forget_ms: float = 24 * 3600 * 1000  # a node that is away for longer has to announce itself
    members_max: int = 4_096  # bounds what a liar can make us remember


# --- outputs ------------------------------------------------------------------------------------------


class SendDatagram(NamedTuple):
    """Send a message to an address; it may get lost."""

    address: Address
    message: Datagram


class ProbeStream(NamedTuple):
    """Send a StreamPing to the member; an answer is handed to `handle_stream_ack`."""

    site: SiteId
    number: int


class MemberChanged(NamedTuple):
    """A member is new or its state changed; `previous` is None for a new one."""

    info: MemberInfo
    state: MemberState
    previous: MemberState | None


class SiteConflict(NamedTuple):
    """Another node runs with our site id: two databases give out the same versions. Told once a minute."""

    twin: MemberInfo


Output = SendDatagram | ProbeStream | MemberChanged | SiteConflict

# --- timers -------------------------------------------------------------------------------------------


class _ProbeRound(NamedTuple):
    pass


class _ProbeTimeout(NamedTuple):
    number: int


class _ProbeEnd(NamedTuple):
    number: int


class _RelayTimeout(NamedTuple):
    number: int


class _SuspicionDue(NamedTuple):
    site: SiteId


class _GossipRound(NamedTuple):
    pass


class _ReconnectRound(NamedTuple):
    pass


_Token = (
    _ProbeRound | _ProbeTimeout | _ProbeEnd | _RelayTimeout | _SuspicionDue | _GossipRound | _ReconnectRound
)


class Swim:
    """One node's membership."""

    def __init__(self, me: MemberInfo, settings: SwimSettings, rng: Rng) -> None:
        self.me = me  # its incarnation grows with each refutation
        self.members: dict[SiteId, Member] = {}  # all but us; the dead are forgotten after `forget_ms`
        self.reachable: dict[SiteId, Member] = {}  # those of them that are, kept as all of them are many
        self.counters: Counter[str] = Counter()
        self.health = LocalHealth()
        self.atlas = Atlas(me.site, rng)
        self._twins = TwinWatch(me)
        self._settings = settings
        self._rng = rng
        self._timers: Timers[_Token] = Timers()
        self._rumors = RumorQueue(settings.retransmit_factor)
        self._order = ProbeOrder()
        self._probes: dict[int, Probe] = {}  # by number, from Ping to the end of the interval
        self._relays: dict[int, Relay] = {}  # by number, until the target answers or the timeout
        self._number = rng.randrange(2**31)
        self._join: tuple[Address, ...] = ()
        self._joins_failed = 0  # since there was last anyone alive
        self._leaving = False
        self._out: list[Output] = []
        self._on_timer: dict[type, Callable[..., None]] = {
            _ProbeRound: self._begin_probe,
            _ProbeTimeout: self._on_probe_timeout,
            _ProbeEnd: self._on_probe_end,
            _RelayTimeout: self._on_relay_timeout,
            _SuspicionDue: self._on_suspicion_due,
            _GossipRound: self._on_gossip_round,
            _ReconnectRound: self._on_reconnect_round,
        }

    # --- inputs ---------------------------------------------------------------------------------------

    def start(self, now_ms: float) -> list[Output]:
        """Set the rounds going and approach the join addresses."""
        self._twins.start(now_ms)
        self._timers.set(now_ms + jitter(self._rng, self._settings.probe_interval_ms), _ProbeRound())
        self._timers.set(now_ms + jitter(self._rng, self._settings.gossip_interval_ms), _GossipRound())
        self._on_reconnect_round(_ReconnectRound(), now_ms)
        return self._drain()

    def remember(self, infos: Iterable[MemberInfo], now_ms: float) -> None:
        """Count members as alive that are known from before; call it before `start`."""
        self.members.update(
            (info.site, Member(info, MemberState.ALIVE, now_ms))
            for info in infos
            if info.site != self.me.site
        )
        self.reachable.update(self.members)

    def set_join_addresses(self, addresses: Iterable[Address]) -> None:
        """Replace the addresses to try while nobody, or somebody, is missing."""
        self._join = tuple(address for address in addresses if address != self.me.address)

    def next_at(self) -> float | None:
        """Return when `tick` is due."""
        return self._timers.next_at()

    def tick(self, now_ms: float) -> list[Output]:
        """Do all that is due."""
        while (token := self._timers.pop_due(now_ms)) is not None:
            self._on_timer[type(token)](token, now_ms)
        return self._drain()

    def handle_message(self, message: Datagram, now_ms: float) -> list[Output]:
        """Take a datagram of a key holder, whose claims are nevertheless weighed one by one."""
        sender = message.sender
        if sender.site == self.me.site:
            self.counters["messages_from_self"] += 1
            self._tell_of_twin(sender, is_told=self._twins.handle_message(sender, now_ms))
            return self._drain()
        self._handle_update(Update(sender, MemberState.ALIVE), sender.site, now_ms)
        for update in message.updates:
            self._handle_update(update, sender.site, now_ms)
        self.heard(sender.site, now_ms)
        match message:
            case Ping():
                self._note_place(sender.site, message.coordinate, now_ms)
                self._handle_ping(message, now_ms)
            case Ack():
                self._note_place(sender.site, message.coordinate, now_ms)
                self._handle_ack(message, now_ms)
            case PingRequest():
                self._handle_ping_request(message, now_ms)
            case Nack():
                probe = self._probes.get(message.number)
                if probe is not None and sender.site in probe.relays:
                    probe.nacks.add(sender.site)
            case Join():
                self._handle_join(message, now_ms)
            case Rumors():
                self._nudge_if_fallen(sender.site, now_ms)
        return self._drain()

    def handle_members(self, message: Members, accuser: SiteId, now_ms: float) -> list[Output]:
        """Take a peer's member list."""
        for update in message.updates:
            self._handle_update(update, accuser, now_ms)
        for site, place, age_s in message.whereabouts:
            self._note_place(site, place, now_ms - age_s * 1000)
        return self._drain()

    def handle_hello(self, info: MemberInfo, now_ms: float) -> list[Output]:
        """Take the claim that opened a stream."""
        if info.site != self.me.site:
            self._handle_update(Update(info, MemberState.ALIVE), info.site, now_ms)
            self.heard(info.site, now_ms)
        return self._drain()

    def handle_self_hello(self, info: MemberInfo, now_ms: float) -> list[Output]:
        """Take a hello with our own site, which is refused: of ourselves, or of a twin."""
        self._tell_of_twin(info, is_told=self._twins.handle_hello(info, now_ms))
        return self._drain()

    def handle_stream_ack(self, site: SiteId, number: int, now_ms: float) -> list[Output]:
        """Take the answer to a ProbeStream."""
        probe = self._probes.get(number)
        if probe is not None and probe.site == site and probe.streamed:
            self.counters["probes_saved_by_stream"] += 1
            self._finish_probe(number)
        self.heard(site, now_ms)
        return self._drain()

    def handle_link_lost(self, site: SiteId) -> None:
        """Probe a member next whose stream broke."""
        self._order.hurry(site)

    def heard(self, site: SiteId, now_ms: float) -> None:
        """Note that the member itself sent something."""
        member = self.members.get(site)
        if member is not None:
            member.heard_ms = now_ms

    def leave(self) -> list[Output]:
        """Tell members that we go on purpose; call it twice, a little apart, against loss."""
        self._leaving = True
        farewell = Update(self.me, MemberState.LEFT)
        for member in pick(self._rng, list(self.reachable.values()), 16):
            self._send(member.info.address, Rumors(self.me, (farewell,)))
        return self._drain()

    def measure(self) -> dict[str, tuple[int, int]]:
        """Return what each memory holds, and the most that it may hold."""
        limit = self._settings.members_max
        return {
            "members": (len(self.members), limit),
            "rumors": (len(self._rumors), limit + 1),  # one of ourselves
            "relays": (len(self._relays), limit),
        }

    def export(self, limit: int, now_ms: float) -> Members:
        """Return our member list, ourselves first, for a stream."""
        others = [member.update for member in pick(self._rng, list(self.members.values()), limit - 1)]
        places = self.atlas.export((update.info.site for update in others), now_ms)
        return Members((Update(self.me, MemberState.ALIVE), *others), places)

    def estimate_rtt_ms(self, site: SiteId) -> float | None:
        """Return the round trip to a member: as measured, or else as the map has it."""
        member = self.members.get(site)
        if member is not None and member.rtt_ms is not None:
            return member.rtt_ms
        return self.atlas.estimate_rtt_ms(self.me.site, site)

    def get_twin(self, now_ms: float) -> MemberInfo | None:
        """Return the node that runs with our site id, if there was a sign of one lately."""
        return self._twins.get(now_ms)

    def compute_roll(self, now_ms: float) -> list[SiteId]:
        """Return the other members to whom everything has to get, and who may yet write something.

        The dead count until they are forgotten, those who left only while what they wrote still spreads.
        """
        return [
            site
            for site, member in self.members.items()
            if member.state is not MemberState.LEFT or now_ms - member.changed_ms < _SETTLE_MS
        ]

    # --- messages -------------------------------------------------------------------------------------

    def _handle_ping(self, ping: Ping, now_ms: float) -> None:
        if ping.target != self.me.site:
            # Meant for the node that had this address before; silence makes the sender notice.
            self.counters["pings_for_another"] += 1
            return
        self._nudge_if_fallen(ping.sender.site, now_ms)
        updates = self._take_updates(ping.sender.site, self.me)
        self._send(ping.sender.address, Ack(ping.number, self.me, updates, self.atlas.place))

    def _handle_ack(self, ack: Ack, now_ms: float) -> None:
        relay = self._relays.get(ack.number)
        if relay is not None:
            if ack.sender.site == relay.target:
                del self._relays[ack.number]
                self._send(relay.origin, Ack(relay.number, self.me, self._take_updates(None, self.me)))
            return
        probe = self._probes.get(ack.number)
        if probe is None or (ack.sender.site != probe.site and ack.sender.site not in probe.relays):
            self.counters["acks_unexpected"] += 1
            return
        if ack.sender.site == probe.site:
            self._note_rtt(self.members[probe.site], now_ms - probe.sent_ms)
            if ack.coordinate is not None:
                self.atlas.observe(probe.site, ack.coordinate, now_ms - probe.sent_ms)
        self._finish_probe(ack.number)

    def _handle_ping_request(self, request: PingRequest, now_ms: float) -> None:
        if len(self._relays) >= self._settings.members_max or request.target.site == self.me.site:
            return
        number = self._next_number()
        self._relays[number] = Relay(request.sender.address, request.number, request.target.site)
        updates = self._take_updates(request.target.site, self.me)
        ping = Ping(number, request.target.site, self.me, updates, self.atlas.place)
        self._send(request.target.address, ping)
        # Half a timeout leaves the Nack time to be back before the prober's interval ends.
        self._timers.set(now_ms + self._settings.probe_timeout_ms / 2, _RelayTimeout(number))

    def _handle_join(self, join: Join, now_ms: float) -> None:
        self._nudge_if_fallen(join.sender.site, now_ms)
        others = [
            member.update
            for member in self.members.values()
            if member.state is not MemberState.LEFT and member.info.site != join.sender.site
        ]
        budget = self._updates_budget(self.me)
        remaining = pick(self._rng, others, len(others))
        for _ in range(4):  # a stranger with a key gets four datagrams; the sync brings the rest
            part = fit_updates(remaining, budget)
            self._send(join.sender.address, Rumors(self.me, part))
            remaining = remaining[len(part) :]
            if not remaining:
                break

    # --- claims ---------------------------------------------------------------------------------------

    def _handle_update(self, update: Update, accuser: SiteId, now_ms: float) -> None:
        if update.info.site == self.me.site:
            self._handle_claim_about_us(update, now_ms)
            return
        known = self.members.get(update.info.site)
        if known is None:
            if update.state is MemberState.ALIVE:
                self._add(update.info, now_ms)
            return
        if update.info is known.info and update.state is known.state and known.suspicion is None:
            return  # nearly all of them, and so worth an early end
        if not is_jump_sane(update.info.incarnation, known.info.incarnation):
            self.counters["claims_refused"] += 1
        elif is_newer(update, known.update):
            self._set(known, update, accuser, now_ms)
        elif update == known.update and known.suspicion is not None:
            if known.suspicion.confirm(accuser):
                self._rumors.add(known.update)
                self._timers.set(known.suspicion.compute_deadline_ms(), _SuspicionDue(known.info.site))
        elif update.state is MemberState.ALIVE and known.state is MemberState.DEAD:
            # Somebody can hear it: tell it what is said of it, so that it can refute.
            self._nudge_if_fallen(known.info.site, now_ms)

    def _handle_claim_about_us(self, claim: Update, now_ms: float) -> None:
        if self._leaving or claim.info.incarnation < self.me.incarnation:
            return
        same = claim.info.incarnation == self.me.incarnation
        if claim.state is MemberState.ALIVE and same and claim.info.address == self.me.address:
            return
        if not is_jump_sane(claim.info.incarnation + 1, self.me.incarnation):
            self.counters["claims_refused"] += 1
            return
        if claim.state is MemberState.ALIVE:
            # Another life of ours with a clock ahead of this one, or another node with our database.
            if self._twins.is_refuted_later(now_ms):
                return
            self._tell_of_twin(claim.info, is_told=self._twins.handle_claim(claim.info, now_ms))
            self.counters["identity_conflicts"] += 1
        else:
            self.health.worsen()
        self.counters["refutations"] += 1
        self.me = self.me.with_incarnation(claim.info.incarnation + 1)
        self._twins.note_refutation(self.me)
        self._rumors.add(Update(self.me, MemberState.ALIVE))

    def _tell_of_twin(self, twin: MemberInfo, *, is_told: bool) -> None:
        if is_told:
            self.counters["twins_told"] += 1
            self._out.append(SiteConflict(twin))

    def _note_place(self, site: SiteId, place: Coordinate | None, said_ms: float) -> None:
        if place is None or site not in self.members:
            return
        if not self.atlas.note(site, place, said_ms):
            self.counters["coordinates_refused"] += 1

    def _add(self, info: MemberInfo, now_ms: float) -> None:
        if len(self.members) >= self._settings.members_max and not self._forget_one():
            self.counters["members_refused"] += 1
            return
        self._forget_former(info)
        self.members[info.site] = self.reachable[info.site] = Member(info, MemberState.ALIVE, now_ms)
        self._joins_failed = 0
        self._rumors.add(Update(info, MemberState.ALIVE))
        self._out.append(MemberChanged(info, MemberState.ALIVE, None))

    def _set(self, member: Member, update: Update, accuser: SiteId, now_ms: float) -> None:
        previous = member.state
        moved = member.info.address != update.info.address
        member.info = update.info
        member.state = update.state
        member.suspicion = None
        if previous is not update.state:
            member.changed_ms = now_ms
        if update.state is MemberState.SUSPECT:
            self._begin_suspicion(member, accuser, now_ms)
        if moved:
            self._forget_former(update.info)
        if member.is_reachable:
            self.reachable[update.info.site] = member
            self._joins_failed = 0
        else:
            self.reachable.pop(update.info.site, None)
        self._rumors.add(update)
        if previous is not update.state or moved:
            self.counters[f"became_{update.state.name.lower()}"] += 1
            self._out.append(MemberChanged(update.info, update.state, previous))
        if not member.is_reachable and self._is_replaced(update.info):
            self._forget(update.info.site)
            self._rumors.add(update)  # others may still hold it for alive

    def _begin_suspicion(self, member: Member, accuser: SiteId, now_ms: float) -> None:
        count = 1 + len(self.reachable)
        shortest, longest = compute_suspicion_bounds_ms(
            count,
            self._settings.probe_interval_ms,
            factor=self._settings.suspicion_factor,
            patience=self._settings.suspicion_patience,
        )
        wanted = compute_confirmations_wanted(count, self._settings.indirect_probes)
        member.suspicion = Suspicion(now_ms, shortest, longest, wanted, {accuser})
        self._timers.set(member.suspicion.compute_deadline_ms(), _SuspicionDue(member.info.site))

    def _on_suspicion_due(self, token: _SuspicionDue, now_ms: float) -> None:
        member = self.members.get(token.site)
        if member is None or member.suspicion is None or member.suspicion.compute_deadline_ms() > now_ms:
            return
        self._set(member, Update(member.info, MemberState.DEAD), self.me.site, now_ms)

    def _nudge_if_fallen(self, site: SiteId, now_ms: float) -> None:
        """Tell a member what we hold against it, and others too: one of them may reach it when we do not."""
        member = self.members.get(site)
        if member is None or member.state is MemberState.ALIVE or self._leaving:
            return
        if now_ms - member.nudged_ms < self._settings.probe_interval_ms:
            return
        member.nudged_ms = now_ms
        self._rumors.add(member.update)
        self._send(member.info.address, Join(self.me, (member.update,)))

    def _forget_former(self, info: MemberInfo) -> None:
        """Let go of fallen members whose address somebody else has taken."""
        for site, member in list(self.members.items()):
            if site != info.site and member.info.address == info.address:
                if member.is_reachable:
                    self._order.hurry(site)
                else:
                    self._forget(site)

    def _is_replaced(self, info: MemberInfo) -> bool:
        """Return whether a later node is reached at a member's address: it is not coming back."""
        return any(
            later.info.address == info.address and later.info.incarnation > info.incarnation
            for later in self.reachable.values()
        )

    def _forget_one(self) -> bool:
        fallen = [member for member in self.members.values() if not member.is_reachable]
        if not fallen:
            return False
        self._forget(min(fallen, key=lambda member: member.changed_ms).info.site)
        return True

    def _forget(self, site: SiteId) -> None:
        del self.members[site]
        self.reachable.pop(site, None)
        self.atlas.forget(site)
        self._rumors.drop(site)

    # --- probing --------------------------------------------------------------------------------------

    def _begin_probe(self, token: _ProbeRound, now_ms: float) -> None:
        interval = self.health.scale(self._settings.probe_interval_ms)
        self._timers.set(now_ms + jitter(self._rng, interval), token)
        site = self._order.next(self._rng, self.members, self._is_probed)
        if site is None:
            return
        self.counters["probes"] += 1
        member = self.members[site]
        number = self._next_number()
        self._probes[number] = Probe(site, now_ms)
        updates = self._take_updates(site, self.me)
        self._send(member.info.address, Ping(number, site, self.me, updates, self.atlas.place))
        self._timers.set(now_ms + self.health.scale(self._settings.probe_timeout_ms), _ProbeTimeout(number))
        self._timers.set(now_ms + interval, _ProbeEnd(number))

    def _is_probed(self, site: SiteId) -> bool:
        return site in self.reachable

    def _on_probe_timeout(self, token: _ProbeTimeout, _now_ms: float) -> None:
        probe = self._probes.get(token.number)
        if probe is None or probe.site not in self.members:
            return
        target = self.members[probe.site].info
        candidates = [
            member
            for member in self.members.values()
            if member.state is MemberState.ALIVE and member.info.site != probe.site
        ]
        for relay in pick(self._rng, candidates, self._settings.indirect_probes):
            probe.relays.add(relay.info.site)
            updates = self._take_updates(relay.info.site, self.me, target)
            self._send(relay.info.address, PingRequest(token.number, target, self.me, updates))
        probe.streamed = True
        self._out.append(ProbeStream(probe.site, token.number))

    def _on_probe_end(self, token: _ProbeEnd, now_ms: float) -> None:
        probe = self._probes.pop(token.number, None)
        if probe is None:
            return
        self.counters["probes_failed"] += 1
        # With relays that answered "no" our own network works; without their word we may be at fault.
        missing = len(probe.relays) - len(probe.nacks)
        if missing or not probe.relays:
            self.health.worsen(max(1, missing))
        member = self.members.get(probe.site)
        if member is None or not member.is_reachable:
            return
        claim = Update(member.info, MemberState.SUSPECT)
        if member.suspicion is None:
            self._set(member, claim, self.me.site, now_ms)
        else:
            self._handle_update(claim, self.me.site, now_ms)

    def _finish_probe(self, number: int) -> None:
        del self._probes[number]
        self.health.improve()

    def _on_relay_timeout(self, token: _RelayTimeout, now_ms: float) -> None:
        relay = self._relays.get(token.number)
        if relay is None:
            return
        if relay.nacked:
            del self._relays[token.number]
            return
        relay.nacked = True
        self._send(relay.origin, Nack(relay.number, self.me))
        # An Ack that is merely slow is still passed on.
        self._timers.set(now_ms + self._settings.probe_interval_ms, token)

    def _note_rtt(self, member: Member, rtt_ms: float) -> None:
        # TCP's smoothing (RFC 6298): one slow answer in eight counts.
        member.rtt_ms = rtt_ms if member.rtt_ms is None else member.rtt_ms + (rtt_ms - member.rtt_ms) / 8

    def _forget_old(self, now_ms: float) -> None:
        if len(self.reachable) == len(self.members):
            return
        for site, member in list(self.members.items()):
            if not member.is_reachable and now_ms - member.changed_ms > self._settings.forget_ms:
                self._forget(site)

    # --- gossip and finding each other ----------------------------------------------------------------

    def _on_gossip_round(self, token: _GossipRound, now_ms: float) -> None:
        self._timers.set(now_ms + jitter(self._rng, self._settings.gossip_interval_ms), token)
        if not self._rumors:
            return
        for member in pick(self._rng, list(self.reachable.values()), self._settings.gossip_fanout):
            updates = self._take_updates(member.info.site, self.me)
            if updates:
                self._send(member.info.address, Rumors(self.me, updates))

    def _on_reconnect_round(self, token: _ReconnectRound, now_ms: float) -> None:
        self._forget_old(now_ms)
        fallen: dict[Address, Member] = {}
        if len(self.reachable) < len(self.members):
            fallen = {item.info.address: item for item in self.members.values() if not item.is_reachable}
        if self.reachable:
            wait = self._settings.reconnect_interval_ms
            hosts = {host for host, _ in self._join}
            taken = {info.address for item in self.reachable.values() if (info := item.info).host in hosts}
            strangers = [address for address in self._join if address not in taken]
            dead = [address for address, member in fallen.items() if member.state is MemberState.DEAD]
            targets = pick(self._rng, list(dict.fromkeys(strangers + dead)), 1)
        else:
            doubled = self._settings.join_backoff_ms * 2 ** min(self._joins_failed, 16)
            wait = min(self._settings.join_backoff_max_ms, doubled)
            self._joins_failed += 1
            targets = pick(self._rng, list(dict.fromkeys([*self._join, *fallen])), 16)
        for address in targets:
            self.counters["joins_sent"] += 1
            known = fallen.get(address)
            self._send(address, Join(self.me, (known.update,) if known is not None else ()))
        self._timers.set(now_ms + jitter(self._rng, wait), token)

    # --- sending --------------------------------------------------------------------------------------

    def _updates_budget(self, *infos: MemberInfo) -> int:
        return (
            DATAGRAM_BYTES_MAX
            - _ENVELOPE_BYTES
            - sum(compute_update_bytes(Update(info, MemberState.ALIVE)) for info in infos)
        )

    def _take_updates(self, receiver: SiteId | None, *infos: MemberInfo) -> tuple[Update, ...]:
        """Return the updates that ride along; what we hold against the receiver goes first."""
        budget = self._updates_budget(*infos)
        member = self.members.get(receiver) if receiver is not None else None
        first: list[Update] = []
        if member is not None and member.state is not MemberState.ALIVE:
            first.append(member.update)
            budget -= compute_update_bytes(member.update)
        return (*first, *self._rumors.take(budget, len(self.members) + 1, but=receiver))

    def _send(self, address: Address, message: Datagram) -> None:
        self._out.append(SendDatagram(address, message))

    def _next_number(self) -> int:
        self._number = (self._number + 1) % 2**32
        return self._number

    def _drain(self) -> list[Output]:
        out, self._out = self._out, []
        return out
