"""Rules about nodes: who is there, what they run, and the state of the one that is asked.

Decides when a number is too high or too low, with the reason beside it. Refuses to know where facts come
from. Invariant: what the asked node says of itself is told of that node, and of no other.
"""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

from isthmus.doctor.finding import Finding, Rule, Severity
from isthmus.wording import count_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from isthmus.doctor.facts import CertificateFacts, LocalFacts, NodeFacts, Snapshot

CRITICAL, WARNING, NOTICE = Severity.CRITICAL, Severity.WARNING, Severity.NOTICE

_DAY_MS = 86_400_000
# Changes arrive within a second; half a minute is a fault, five minutes are a table of another time.
STALE_MS = 30_000
VERY_STALE_MS = 300_000
# NTP keeps machines within some milliseconds. Beyond 5 s (`MAX_DRIFT_MS`) what a node writes is held back.
SKEW_MS = 500
HELD_BACK_MS = 5_000
# Long enough to find out why a renewal did not happen; of certificates made for a few days, a third of that.
EXPIRY_MS = 21 * _DAY_MS
EXPIRY_SOON_MS = 3 * _DAY_MS
# Others write all the time: a backup of last week is another cluster. A drill is for what changed since.
BACKUP_AGE_MS = 7 * _DAY_MS
DRILL_AGE_MS = 90 * _DAY_MS
# Below it the WAL of one large change does not fit.
DISK_BYTES_LEAST = 256 << 20
DISK_SHARE_LEAST = 0.10
# Two for each connection with a request, and those of the process itself.
FILES_PER_CONNECTION = 2
# From so many cores on, one worker leaves most of the machine idle.
CORES_FOR_WORKERS = 4


def _describe(*names: str) -> str:
    return ", ".join(names)


def find_few_nodes(snapshot: Snapshot) -> Iterator[Finding]:
    """A cluster, or a region of it, that stands or falls with one node."""
    present = snapshot.present
    if len(present) == 1:
        yield Finding(
            NOTICE,
            "cluster",
            f"{present[0].name} is its only node",
            "nothing serves, and no copy of the table is left, when it goes",
            "everything",
            "isthmus run --join HOST:PORT on another machine",
        )
        return
    regions: dict[str, list[NodeFacts]] = {}
    for node in present:
        if node.region:
            regions.setdefault(node.region, []).append(node)
    if len(regions) == 1:
        yield Finding(
            NOTICE,
            "cluster",
            f"all {len(present)} nodes are in {next(iter(regions))}",
            "a region fails as a whole",
            "everything",
            "isthmus run --region ANOTHER --join HOST:PORT",
        )
    served = {machine.region for machine in snapshot.machines}
    alone = sorted(region for region, nodes in regions.items() if len(nodes) == 1 and region in served)
    if alone and len(regions) > 1:
        names = [regions[region][0].name for region in alone]
        yield Finding(
            NOTICE,
            ", ".join(alone),
            f"{names[0]} is its only node" if len(names) == 1 else f"one node each: {', '.join(names)}",
            "clients there, and the checks of machines there, depend on one host",
            f"requests that come in at {' or '.join(alone)}, until clients go elsewhere",
            f"isthmus run --region {alone[0]} --join HOST:PORT on another machine there",
        )


def find_gone_nodes(snapshot: Snapshot) -> Iterator[Finding]:
    """Nodes that are gone and still own machines."""
    present = {node.name for node in snapshot.present}
    states = {node.name: node.state for node in snapshot.nodes}
    owned: dict[str, list[str]] = {}
    for machine in snapshot.machines:
        if machine.node not in present:
            owned.setdefault(machine.node, []).append(machine.id)
    for name, machines in sorted(owned.items()):
        yield Finding(
            WARNING,
            name,
            f"it is {states.get(name, 'unknown')} and owns {count_of(len(machines), 'machine')}",
            "nobody starts, stops or deploys them; others only judge whether they answer",
            _describe(*sorted(machines)[:5]),
            f"start {name} again, or isthmus machine remove {min(machines)}",
        )


def find_namesakes(snapshot: Snapshot) -> Iterator[Finding]:
    """Nodes that take part under one name."""
    for node in snapshot.nodes:
        if len(node.addresses) > 1:
            yield Finding(
                CRITICAL,
                node.name,
                f"{len(node.addresses)} nodes have this name: {_describe(*node.addresses)}",
                "each writes the rows of that name as its own, over those of the other",
                f"the row, the machines and the checks of {node.name}",
                "isthmus run --node NAME, another one for each of them",
            )


def find_stale_nodes(snapshot: Snapshot) -> Iterator[Finding]:
    """Nodes of which little is heard."""
    for node in snapshot.present:
        if node.is_self or node.staleness_ms is None or node.staleness_ms < STALE_MS:
            continue
        yield Finding(
            CRITICAL if node.staleness_ms >= VERY_STALE_MS else WARNING,
            node.name,
            f"what it wrote in the last {node.staleness_ms / 1000:.0f} s is not known to {snapshot.node}",
            "its machines are routed to by a state that may be over",
            f"requests that come in at {snapshot.node} for machines of {node.name}",
            "isthmus status --json on both: peers, apply_queue and gaps; then the network between them",
        )


def find_skewed_clocks(snapshot: Snapshot) -> Iterator[Finding]:
    """Nodes whose clock is not that of the others."""
    ahead = {node.name: node.clock_ahead_ms for node in snapshot.present if node.clock_ahead_ms is not None}
    skewed = {name: ms for name, ms in ahead.items() if ms >= SKEW_MS}
    if not skewed:
        return
    if len(skewed) == len(ahead) > 1:
        most = min(skewed.values())
        yield Finding(
            CRITICAL if most >= HELD_BACK_MS else WARNING,
            snapshot.node,
            f"its clock is {most / 1000:.1f} s behind those of all {len(ahead)} other nodes",
            "of two writes the one with the later time wins: what is written here may lose to an older one",
            f"what {snapshot.node} writes; over {HELD_BACK_MS // 1000} s it takes nothing from the others",
            "start an NTP client (timedatectl set-ntp true)",
            guess=True,
        )
        return
    # A clock that is ahead takes along those that hear of it.
    name = max(skewed, key=lambda node: (skewed[node], node))
    yield Finding(
        CRITICAL if skewed[name] >= HELD_BACK_MS else WARNING,
        name,
        f"its clock is {skewed[name] / 1000:.1f} s ahead of that of {snapshot.node}",
        "of two writes the one with the later time wins: its writes beat newer ones of others"
        + (", and are held back by them now" if skewed[name] >= HELD_BACK_MS else ""),
        f"rows that {name} and others both write",
        f"start an NTP client on {name} (timedatectl set-ntp true)",
    )


def find_versions(snapshot: Snapshot) -> Iterator[Finding]:
    """Nodes that run different versions."""
    by_software: dict[str, list[str]] = {}
    for node in snapshot.present:
        if node.software:
            by_software.setdefault(node.software, []).append(node.name)
    if len(by_software) < 2:
        return
    usual = max(by_software, key=lambda software: (len(by_software[software]), software))
    for software, names in sorted(by_software.items()):
        if software != usual:
            yield Finding(
                WARNING,
                _describe(*sorted(names)),
                f"{software}, where {len(by_software[usual])} nodes run {usual}",
                "nodes next to each other understand each other, and a cluster is not to stay between two",
                "what one version knows and the other passes over",
                f"isthmus upgrade on {_describe(*sorted(names))}, once the new version is installed",
            )


def find_links(snapshot: Snapshot) -> Iterator[Finding]:
    """A node that hears of all others through one."""
    local, others = snapshot.local, [node for node in snapshot.present if not node.is_self]
    if local is None or local.links is None or len(others) < 2 or len(local.links) > 1:
        return
    through = f"through {local.links[0]} alone" if local.links else "from nobody"
    yield Finding(
        WARNING if local.links else CRITICAL,
        snapshot.node,
        f"it hears of {len(others)} other nodes {through}",
        "changes stop when that link fails, until another one is made",
        f"how fresh routing is at {snapshot.node}",
        "let the gossip port through to the other nodes (isthmus nodes shows their addresses)",
    )


def find_unsealed(snapshot: Snapshot) -> Iterator[Finding]:
    """Gossip that anybody can read and write."""
    local = snapshot.local
    if local is None or local.is_sealed:
        return
    hosts = {local.gossip_host, *(node.gossip_host for node in snapshot.present)} - {""}
    open_hosts = sorted(host for host in hosts if not _is_loopback(host))
    if open_hosts:
        yield Finding(
            CRITICAL,
            snapshot.node,
            f"gossip has no key and goes to {_describe(*open_hosts[:3])}",
            "whoever reaches the port can read the table, and route any app to a machine of their own",
            "everything",
            "isthmus key makes one; put it into gossip.keys_file of every node, and restart them",
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def find_expiring(snapshot: Snapshot) -> Iterator[Finding]:
    """Certificates that have expired, or soon will."""
    for certificate in snapshot.certificates:
        left_ms = certificate.expires_ms - snapshot.now_ms
        lifetime_ms = certificate.expires_ms - certificate.begins_ms
        if left_ms < min(EXPIRY_MS, lifetime_ms // 3):
            yield _describe_expiry(
                certificate, left_ms, is_soon=left_ms < min(EXPIRY_SOON_MS, lifetime_ms // 10)
            )


def _describe_expiry(certificate: CertificateFacts, left_ms: int, *, is_soon: bool) -> Finding:
    when = (
        f"expires in {left_ms / _DAY_MS:.1f} days"
        if left_ms > 0
        else f"expired {-left_ms / _DAY_MS:.1f} days ago"
    )
    return Finding(
        CRITICAL if is_soon else WARNING,
        certificate.names[0] if certificate.names else certificate.source,
        f"{certificate.use}: the certificate in {certificate.source} {when}",
        "whoever checks it refuses the connection from that moment on",
        f"all connections with it{': ' + _describe(*certificate.names[:3]) if certificate.names else ''}",
        certificate.mend,
    )


def find_backups(snapshot: Snapshot) -> Iterator[Finding]:
    """Backups that were never made, or never put back."""
    local = snapshot.local
    if local is None or not (snapshot.apps or snapshot.machines):
        return  # nothing is in it yet
    what = "every node holds the same rows: a wrong DELETE is on all of them within a second"
    if local.backup is None:
        yield _on_backup(
            snapshot, NOTICE, "no backup was made here", what, "isthmus db backup DIRECTORY --keep 7"
        )
    else:
        age_ms = snapshot.now_ms - local.backup.at_ms
        if age_ms > BACKUP_AGE_MS:
            problem = f"the last backup here is {age_ms // _DAY_MS} days old"
            yield _on_backup(
                snapshot, WARNING, problem, what, "isthmus db backup DIRECTORY --keep 7, from a timer"
            )
        drill = f"isthmus db drill {local.backup.backup}".rstrip()
        why = "whether a backup serves is known once it was put back, and not before"
        if local.restore is None:
            yield _on_backup(snapshot, WARNING, "no backup was ever put back here", why, drill)
        elif snapshot.now_ms - local.restore.at_ms > DRILL_AGE_MS:
            days = (snapshot.now_ms - local.restore.at_ms) // _DAY_MS
            yield _on_backup(snapshot, NOTICE, f"the last backup was put back {days} days ago", why, drill)


def _on_backup(snapshot: Snapshot, severity: Severity, problem: str, why: str, mend: str) -> Finding:
    return Finding(severity, snapshot.node, problem, why, "the whole table, after a mistake", mend)


def find_local_trouble(snapshot: Snapshot) -> Iterator[Finding]:
    """What the asked node itself is in trouble with."""
    local, node = snapshot.local, snapshot.node
    if local is None:
        return
    if local.read_only:
        yield Finding(
            CRITICAL,
            node,
            f"its database takes no writes: {local.read_only}",
            "it goes on routing by what it has; checks and changes made here reach nobody",
            f"all changes at {node}, and the checks of its machines",
            f"df -h {local.data}; make room, and it goes on by itself",
        )
    if local.site_conflict:
        yield Finding(
            CRITICAL,
            node,
            f"{local.site_conflict} writes as the same site",
            "both give the same versions to different changes, as after a copied data directory",
            "what either of them wrote since",
            f"stop {local.site_conflict}, remove its data directory, and start it",
        )
    for problem, what, mend in (
        (local.schema_problem, "the schema was altered behind its back", "isthmus db schema plan"),
        (local.reload_problem, "its configuration was refused", "mend the file, then isthmus reload"),
        (
            local.credentials_problem,
            "keys or certificates were refused",
            "mend the files, then isthmus reload",
        ),
    ):
        if problem:
            why = "it goes on with what it had, and will not start with what there is now"
            yield Finding(WARNING, node, f"{what}: {problem}", why, f"the next restart of {node}", mend)
    if local.parked:
        yield Finding(
            WARNING,
            node,
            f"{local.parked} changesets could not be applied here",
            "their rows are missing here until they are",
            f"what {node} routes by",
            "isthmus db parked",
        )


def find_unusable_rows(snapshot: Snapshot) -> Iterator[Finding]:
    """Rows that routing cannot use."""
    for row in snapshot.rejected:
        yield Finding(
            WARNING,
            f"{row.table} {row.key}",
            f"routing cannot use the row: {row.reason}",
            "it counts as absent on every node",
            "whatever it was written for",
            f"write it right or delete it, with isthmus db exec: table {row.table}, key {row.key}",
        )


def find_resources(snapshot: Snapshot) -> Iterator[Finding]:
    """A host that is too small, or not used."""
    local = snapshot.local
    if local is None:
        return
    yield from _judge_disk(snapshot.node, local)
    wanted = local.connections_max * FILES_PER_CONNECTION
    if local.files_max is not None and local.files_max < wanted:
        yield Finding(
            NOTICE,
            snapshot.node,
            f"a worker may open {local.files_max} files, and connections_max would take {wanted}",
            "connections beyond half of the files are turned away, long before connections_max",
            f"new clients of {snapshot.node} under load",
            "LimitNOFILE=1048576 in its systemd unit, or ulimit -n",
        )
    if local.workers <= 1 and local.cores >= CORES_FOR_WORKERS:
        yield Finding(
            NOTICE,
            snapshot.node,
            f"{local.workers} worker on {local.cores} cores"
            if local.workers
            else f"no workers on {local.cores} cores",
            "a worker uses one core, and is all that serves while it is restarted",
            f"requests at {snapshot.node}",
            f"set workers = {min(local.cores, 8)}",
        )


def _judge_disk(node: str, local: LocalFacts) -> Iterator[Finding]:
    free, total = local.disk_free_bytes, local.disk_total_bytes
    if free is None or not total:
        return
    is_critical = free < DISK_BYTES_LEAST
    if is_critical or free / total < DISK_SHARE_LEAST:
        yield Finding(
            CRITICAL if is_critical else WARNING,
            node,
            f"{free / 2**30:.1f} GiB are free where {local.data} is: {100 * free / total:.0f} %",
            "with a full disk the node turns read-only: it routes, and nothing changes any more",
            f"all changes at {node}, and the checks of its machines",
            f"du -xh {local.data} | sort -h | tail; make room",
        )


def find_quarantined(snapshot: Snapshot) -> Iterator[Finding]:
    """Changes that killed workers, and wait for somebody to decide."""
    for change in snapshot.local.staged if snapshot.local is not None else ():
        if change.state not in {"suspect", "quarantined"}:
            continue
        is_certain = change.state == "quarantined"
        rows = ", ".join(change.rows[:3]) + (", …" if len(change.rows) > 3 else "")
        yield Finding(
            WARNING if is_certain else NOTICE,
            rows or change.id,
            "a change of it is quarantined" if is_certain else "a worker died while it tried a change of it",
            "the rest goes on without the change, and whoever wrote it may not know",
            "what the change was for",
            f"isthmus staged; then write it right, or isthmus staged drop {change.id}",
        )


def find_behind(snapshot: Snapshot) -> Iterator[Finding]:
    """Nodes that could not take up what was rolled out to all."""
    for behind in snapshot.behind:
        what = "settings" if behind.kind == "config" else "tables"
        yield Finding(
            WARNING,
            behind.node,
            f"it could not take up the {what} of rollout {behind.id}: {behind.detail or 'no reason given'}",
            f"it goes on with the {what} that it had, and all others have other ones",
            f"what goes through {behind.node}",
            f"mend what it says, then isthmus rollout retry {behind.id}",
        )


RULES = (
    Rule("few-nodes", "a cluster or a region with one node, a cluster in one region", find_few_nodes),
    Rule("gone-nodes", "nodes that are gone and still own machines", find_gone_nodes),
    Rule("namesakes", "nodes that have one name", find_namesakes),
    Rule("stale-nodes", "nodes of which nothing new is known", find_stale_nodes),
    Rule("skewed-clocks", "nodes whose clock is ahead of the others, or behind them", find_skewed_clocks),
    Rule("versions", "nodes that run different versions", find_versions),
    Rule("links", "a node that hears of all others through one of them", find_links),
    Rule("unsealed", "gossip without a key beyond loopback", find_unsealed),
    Rule("expiring", "certificates that have expired or soon will", find_expiring),
    Rule("backups", "backups that were never made, are old, or were never put back", find_backups),
    Rule(
        "local-trouble",
        "a database that takes no writes, refused files, parked changesets",
        find_local_trouble,
    ),
    Rule("quarantined", "staged changes that killed workers", find_quarantined),
    Rule("behind", "nodes that could not take up what was rolled out", find_behind),
    Rule("unusable-rows", "rows that routing cannot use", find_unusable_rows),
    Rule("resources", "a disk that is nearly full, too few files, one worker on many cores", find_resources),
)
