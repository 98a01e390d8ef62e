"""Probe the machines that this node owns, and write what changes into the table.

Decides when a machine is probed and what counts as passing. Knows nothing of routing: it only writes rows.
Invariant: one task for each wanted check, and a row is written only when its status changes, so that a
steady fleet makes no traffic.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import aiohttp
import msgspec

from isthmus.config import CheckConfig, format_address
from routing.catalog import parse_address

if TYPE_CHECKING:
    from collections.abc import Iterable

    from isthmus.registry import Database
    from replication.metrics import Sample

log = logging.getLogger(__name__)


METRICS = {
    "isthmus_checks_total": ("counter", "Probes of machines by result"),
    "isthmus_checks_running": ("gauge", "Checks that this node runs"),
}

# A probe's answer is for a person to read; more than this is cut.
OUTPUT_CHARS_MAX = 200

# After the database could not be read.
RETRY_S = 1.0

# The tables whose changes can change what is to be probed.
WATCHED_TABLES = frozenset({"machines", "services"})

_DECODER = msgspec.json.Decoder(list[CheckConfig])


class _Wanted(NamedTuple):
    """One check of one machine; a change in any part restarts it."""

    machine: str
    name: str
    host: str
    port: int
    check: CheckConfig


def _read_checks(machine: Any, address: Any, internal_port: Any, raw: Any) -> list[_Wanted]:
    """Return the checks of one machine. Raises ValueError or MsgspecError: any client may write the rows."""
    if not (isinstance(machine, str) and isinstance(address, str) and isinstance(raw, str)):
        raise ValueError("its row or that of its service holds what is no text")  # noqa: TRY004 — a fault of the row
    host, own_port = parse_address(address)
    port = internal_port if own_port is None else own_port
    if not isinstance(port, int):
        raise ValueError(f"neither {address} nor its service names a port")  # noqa: TRY004 — a fault of the row
    return [
        _Wanted(machine, check.name or f"{check.type}-{i}", host, port, check)
        for i, check in enumerate(_DECODER.decode(raw))
    ]


class Checker:
    """Runs the checks of one node.

    `_tasks` has one entry for each check that should run. `_dirty` is set when the table changed in a way
    that may change them, and cleared when that has been looked at.
    """

    def __init__(self, database: Database, node: str) -> None:
        self._database = database
        self._node = node
        self._tasks: dict[_Wanted, asyncio.Task[None]] = {}
        self._dirty = asyncio.Event()
        self._session: aiohttp.ClientSession | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._results: Counter[str] = Counter()

    async def start(self) -> None:
        """Begin probing."""
        # A probe must find out whether a new connection works, so none is kept.
        connector = aiohttp.TCPConnector(force_close=True, limit=256)
        self._session = aiohttp.ClientSession(connector=connector, headers={"User-Agent": "isthmus-check"})
        self._dirty.set()
        self._keeper = asyncio.create_task(self._keep())

    async def stop(self) -> None:
        """Stop probing and wait until nothing runs."""
        tasks = [task for task in (self._keeper, *self._tasks.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks.clear()
        if self._session is not None:
            await self._session.close()

    def on_tables_changed(self, tables: Iterable[str]) -> None:
        """Look again at what should be probed, if one of the tables matters."""
        if not WATCHED_TABLES.isdisjoint(tables):
            self._dirty.set()

    def samples(self) -> list[Sample]:
        """Return the metrics of the checks."""
        found: list[Sample] = [("isthmus_checks_running", (), float(len(self._tasks)))]
        found += [("isthmus_checks_total", (("status", s),), float(n)) for s, n in self._results.items()]
        return found

    async def _keep(self) -> None:
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            try:
                await self._reconcile()
            except Exception:
                log.exception("cannot read which machines to check; trying again")
                self._dirty.set()
                await asyncio.sleep(RETRY_S)

    async def _reconcile(self) -> None:
        wanted = await self._wanted()
        for gone in [key for key in self._tasks if key not in wanted]:
            self._tasks.pop(gone).cancel()
        for key in wanted:
            if key not in self._tasks:
                self._tasks[key] = asyncio.create_task(self._run(key))
        await self._forget_results({(key.machine, key.name) for key in wanted})

    async def _wanted(self) -> list[_Wanted]:
        answer = await self._database.query(
            "SELECT m.id, m.address, s.internal_port, s.checks"
            " FROM machines m JOIN services s ON s.app = m.app"
            " WHERE m.node = ? AND m.state = 'started' ORDER BY m.id, s.port",
            (self._node,),
        )
        # A name is half of the key of a result: of two checks with one name only the first can have it.
        wanted: dict[tuple[str, str], _Wanted] = {}
        for row in answer.rows:
            try:
                checks = _read_checks(*row)
            except (ValueError, msgspec.MsgspecError) as error:
                shown = {"machine": f"{row[0]!s:.64}", "error": str(error)[:OUTPUT_CHARS_MAX]}
                log.warning("a check cannot be read", extra=shown)
                continue
            for check in checks:
                wanted.setdefault((check.machine, check.name), check)
        return list(wanted.values())

    async def _forget_results(self, wanted: set[tuple[str, str]]) -> None:
        """Remove this node's results of checks that no longer run: an old verdict must not stand for ever."""
        answer = await self._database.query("SELECT machine, name FROM checks WHERE node = ?", (self._node,))
        old = [row for row in answer.rows if tuple(row) not in wanted]
        if old:
            await self._database.execute(
                [("DELETE FROM checks WHERE machine = ? AND name = ?", row) for row in old]
            )

    async def _run(self, wanted: _Wanted) -> None:
        check = wanted.check
        interval_s = check.interval_ms / 1000
        await asyncio.sleep(check.grace_ms / 1000)
        status = ""
        while True:
            now_status, output = await self._probe(wanted)
            self._results[now_status] += 1
            if now_status != status:
                log.info(
                    "check changed",
                    extra={
                        "machine": wanted.machine,
                        "check": wanted.name,
                        "status": now_status,
                        "output": output,
                    },
                )
                if await self._write(wanted, now_status, output):
                    status = now_status
            # Jitter, so that the probes of many nodes and machines do not come in step.
            await asyncio.sleep(interval_s * random.uniform(0.9, 1.1))

    async def _write(self, wanted: _Wanted, status: str, output: str) -> bool:
        """Write a result; False when the database refuses, so that the next round tries again."""
        row = (wanted.machine, wanted.name, self._node, status, output, time.time_ns() // 1_000_000)
        try:
            await self._database.execute(
                [
                    (
                        (
                            "INSERT INTO checks (machine, name, node, status, output, updated_ms)"
                            " VALUES (?, ?, ?, ?, ?, ?)"
                            " ON CONFLICT DO UPDATE SET node = excluded.node, status = excluded.status,"
                            " output = excluded.output, updated_ms = excluded.updated_ms"
                        ),
                        row,
                    )
                ]
            )
        except Exception:
            log.exception("a check's result could not be written", extra={"machine": wanted.machine})
            return False
        return True

    async def _probe(self, wanted: _Wanted) -> tuple[str, str]:
        """Probe once; returns the status and what a person should read."""
        check = wanted.check
        host, port = wanted.host, wanted.port
        try:
            async with asyncio.timeout(check.timeout_ms / 1000):
                if check.type == "tcp":
                    _, writer = await asyncio.open_connection(host, port)
                    writer.close()
                    return "passing", "connected"
                return await self._probe_http(check, f"http://{format_address(host, port)}{check.path}")
        except TimeoutError:
            return "critical", f"no answer within {check.timeout_ms} ms"
        except (OSError, aiohttp.ClientError) as error:
            return "critical", (str(error) or type(error).__name__)[:OUTPUT_CHARS_MAX]

    async def _probe_http(self, check: CheckConfig, url: str) -> tuple[str, str]:
        assert self._session is not None, "start() comes first"
        async with self._session.request(check.method, url, allow_redirects=False) as response:
            passing = 200 <= response.status < 300
            told = f"{response.status} {response.reason or ''}".strip()
            return "passing" if passing else "critical", told[:OUTPUT_CHARS_MAX]
