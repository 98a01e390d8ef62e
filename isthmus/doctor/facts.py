"""What a doctor knows: one node's view of the cluster, and the state of that node itself.

Decides the shape of the facts, as they travel over the admin API. Draws no conclusion. Invariant: what is not
known is None, and never a value that could be taken for one.
"""

from __future__ import annotations

from functools import cached_property

from msgspec import Struct


class NodeFacts(Struct, frozen=True):
    """One node, as the one asked sees it."""

    name: str
    region: str = ""
    state: str = "alive"  # as membership has it: alive, suspect, dead, left, unknown
    is_self: bool = False
    software: str = ""
    staleness_ms: int | None = None
    clock_ahead_ms: int | None = None  # of the clock of the node asked
    gossip_host: str = ""
    addresses: tuple[str, ...] = ()  # of gossip, of all that take part under this name

    @property
    def is_present(self) -> bool:
        """Whether it takes part."""
        return self.state in {"alive", "suspect"}


class MachineFacts(Struct, frozen=True):
    """One machine."""

    id: str
    app: str
    node: str
    region: str
    address: str = ""
    state: str = "started"
    is_routable: bool = True
    verdict: str = ""
    load: int = 0  # in flight, on average over the last seconds
    has_driver: bool = False
    since_ms: int = 0  # when it came into its state; 0: not known
    relays: tuple[str, ...] | None = None  # nodes to go through to it; None: it is connected to


class CheckFacts(Struct, frozen=True):
    """One check of a service."""

    name: str
    type: str = "http"
    path: str = "/"
    interval_ms: int = 5_000
    timeout_ms: int = 2_000
    failures: int = 2
    status: tuple[tuple[int, int], ...] = ((200, 299),)  # what passes
    wants_body: bool = False


class ServiceFacts(Struct, frozen=True):
    """How an app is reached on one port."""

    app: str
    port: int = 0
    soft_limit: int = 20
    hard_limit: int | None = None
    checks: tuple[CheckFacts, ...] = ()
    is_raw: bool = False
    autostart: bool = True
    primary_region: str = ""


class HostFacts(Struct, frozen=True):
    """One row of `hostnames`."""

    hostname: str
    path: str
    app: str


class RejectedFacts(Struct, frozen=True):
    """A row that routing cannot use."""

    table: str
    key: str
    reason: str


class CertificateFacts(Struct, frozen=True):
    """A certificate of the node asked, or an authority that an app's machines are held to."""

    use: str  # what it is for, for a person
    source: str  # the file, or where else it is
    names: tuple[str, ...] = ()
    begins_ms: int = 0
    expires_ms: int = 0
    mend: str = ""


class ExerciseFacts(Struct, frozen=True):
    """When something was last done, by the notes of the node asked."""

    at_ms: int
    backup: str = ""


class StagedFacts(Struct, frozen=True):
    """A change that workers are kept from."""

    id: str
    state: str  # waiting, trying, suspect, quarantined
    rows: tuple[str, ...] = ()  # table and key


class BehindFacts(Struct, frozen=True):
    """A node that could not take up what was rolled out to all."""

    id: str
    kind: str  # config, schema
    node: str
    detail: str = ""


class LocalFacts(Struct, frozen=True):
    """The node asked itself."""

    workers: int = 1
    cores: int = 1
    files_max: int | None = None  # that a process may open
    connections_max: int = 0  # of one worker
    disk_free_bytes: int | None = None
    disk_total_bytes: int | None = None
    data: str = ""
    read_only: str | None = None  # why its database takes no writes
    schema_problem: str = ""
    parked: int = 0
    site_conflict: str = ""  # a node that writes as the same site
    reload_problem: str = ""
    credentials_problem: str = ""
    gossip_host: str = "127.0.0.1"
    is_sealed: bool = False
    links: tuple[str, ...] | None = None  # nodes that changes come from and go to
    backup: ExerciseFacts | None = None
    restore: ExerciseFacts | None = None
    staged: tuple[StagedFacts, ...] = ()


class ProbeFacts(Struct, frozen=True):
    """What became of a check's request at a path that nothing serves."""

    app: str
    machine: str
    check: str
    path: str
    passed: bool
    output: str = ""


class Snapshot(Struct, frozen=True, dict=True):
    """All that the rules look at."""

    now_ms: int
    node: str
    region: str = ""
    nodes: tuple[NodeFacts, ...] = ()
    apps: tuple[str, ...] = ()
    hosts: tuple[HostFacts, ...] = ()
    services: tuple[ServiceFacts, ...] = ()
    machines: tuple[MachineFacts, ...] = ()
    rejected: tuple[RejectedFacts, ...] = ()
    behind: tuple[BehindFacts, ...] = ()
    certificates: tuple[CertificateFacts, ...] = ()
    local: LocalFacts | None = None
    probes: tuple[ProbeFacts, ...] | None = None  # None: nobody asked for them

    @cached_property
    def present(self) -> list[NodeFacts]:
        """The nodes that take part."""
        return [node for node in self.nodes if node.is_present]

    def machines_of(self, app: str) -> list[MachineFacts]:
        """Return the machines of an app."""
        return self._machines_by_app.get(app, [])

    def services_of(self, app: str) -> list[ServiceFacts]:
        """Return the services of an app."""
        return self._services_by_app.get(app, [])

    @cached_property
    def _machines_by_app(self) -> dict[str, list[MachineFacts]]:
        found: dict[str, list[MachineFacts]] = {}
        for machine in self.machines:
            found.setdefault(machine.app, []).append(machine)
        return found

    @cached_property
    def _services_by_app(self) -> dict[str, list[ServiceFacts]]:
        found: dict[str, list[ServiceFacts]] = {}
        for service in self.services:
            found.setdefault(service.app, []).append(service)
        return found
