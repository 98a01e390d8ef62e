"""Keeps links to the peers that are wanted.

Decides when to dial again. Knows nothing of what flows over a link. Invariant: to a peer that is wanted
there is a link, or one is being dialled, or the wait for that runs.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping

from replication.core.clock import SiteId
from replication.core.linktable import LinkTable
from replication.core.member import Address
from replication.core.probe import Rng, jitter
from replication.errors import ReplicationError
from replication.transport import Link, LinkError, Transport

log = logging.getLogger(__name__)


class Links(LinkTable[Link]):
    """The links of one agent, by peer."""

    def __init__(
        self,
        transport: Transport,
        rng: Rng,
        *,
        on_peer_up: Callable[[SiteId], None],
        on_peer_down: Callable[[SiteId], None],
        redial_ms: float,
        redial_max_ms: float,
    ) -> None:
        super().__init__(on_peer_up=on_peer_up, on_peer_down=on_peer_down)
        self._transport = transport
        self._rng = rng
        self._redial_ms = redial_ms
        self._redial_max_ms = redial_max_ms
        self._wanted: dict[SiteId, tuple[Address, asyncio.Task[None]]] = {}

    async def borrow(self, site: SiteId, address: Address) -> tuple[Link, bool]:
        """Return a link to a peer, and whether it was dialled for this and is to be closed after."""
        link = self.get(site)
        if link is not None:
            return link, False
        link = await self._transport.connect(address, lasting=False)
        if link.peer.site != site:
            link.close()
            raise LinkError("another_peer")
        return link, True

    # --- which links are wanted -----------------------------------------------------------------------

    def want(self, wanted: Mapping[SiteId, Address]) -> None:
        """Keep a link dialled to each of these peers and to no others."""
        for site in list(self._wanted):
            address, task = self._wanted[site]
            if wanted.get(site) != address:
                task.cancel()
                del self._wanted[site]
        for site, address in wanted.items():
            if site not in self._wanted:
                self._wanted[site] = (address, asyncio.ensure_future(self._keep(site, address)))

    async def stop(self) -> None:
        """Dial nobody any more."""
        tasks = [task for _, task in self._wanted.values()]
        self._wanted.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep(self, site: SiteId, address: Address) -> None:
        failures = 0
        while True:
            link = await self._dial(site, address)
            if link is not None:
                up_since = asyncio.get_running_loop().time()
                try:
                    await link.closed.wait()
                finally:
                    # Also when this peer is no longer wanted. The other side may keep its own link.
                    link.close()
                if asyncio.get_running_loop().time() - up_since > self._redial_max_ms / 1000:
                    failures = 0  # one that breaks at once, time and again, counts as failing
            failures += 1
            wait_ms = min(self._redial_max_ms, self._redial_ms * 2 ** min(failures - 1, 16))
            await asyncio.sleep(jitter(self._rng, wait_ms) / 1000)

    async def _dial(self, site: SiteId, address: Address) -> Link | None:
        try:
            link = await self._transport.connect(address, lasting=True)
        except (ReplicationError, OSError, TimeoutError) as error:
            self.counters["dials_failed"] += 1
            log.debug("dialling %s: %r", address, error)
            return None
        if link.peer.site != site:
            # Somebody else lives there now; membership will hear of it.
            self.counters["dials_failed"] += 1
            link.close()
            return None
        self.counters["dials"] += 1
        return link
