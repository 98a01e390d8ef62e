"""A driver for Fly Machines, or whatever has the same API.

Decides which calls make a start, a stop and a suspend. Refuses to know more of the API than that. Invariant:
a machine is named by its own id in the app of that name, unless the configuration names another app.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import orjson

from isthmus.config_machines import FLY_API
from isthmus.machines.driver import DriverError, Machine, Made
from isthmus.machines.webhook import ask, explain_refusal

if TYPE_CHECKING:
    from isthmus.config_machines import DriverConfig

# While it stops or is suspended, it is looked at so often.
LOOK_S = 0.5


class FlyDriver:
    """Speaks the Machines API, with `Authorization: Bearer`."""

    # Somebody else may start and stop them too, and calls of the API are counted.
    poll_s = 30.0

    def __init__(self, config: DriverConfig) -> None:
        self._config = config
        self._base = (config.url or FLY_API).rstrip("/")

    async def start(self, machine: Machine) -> None:
        """Start or resume it; with another image first, if it is to have one. That starts it too."""
        if machine.release:
            config = (await self._call("GET", machine, "")).get("config")
            if isinstance(config, dict) and config.get("image") != machine.release:
                await self._call("POST", machine, "", {"config": {**config, "image": machine.release}})
                return
        await self._call("POST", machine, "start")

    async def stop(self, machine: Machine) -> None:
        """Stop it, and wait until it is."""
        await self._call("POST", machine, "stop")
        await self._wait(machine, "stopped")

    async def suspend(self, machine: Machine) -> bool:
        """Suspend it; the API refuses that for some machines, which are stopped."""
        try:
            await self._call("POST", machine, "suspend")
        except DriverError:
            await self.stop(machine)
            return False
        await self._wait(machine, "suspended")
        return True

    async def is_running(self, machine: Machine) -> bool | None:
        """Ask for its state."""
        answer = await self._call("GET", machine, "")
        state = answer.get("state")
        if state in {"started", "starting"}:
            return True
        return False if state in {"stopped", "suspended", "created", "destroyed", "failed"} else None

    async def create(self, like: Machine, region: str) -> Made:
        """Make one with the same configuration; its address is the private one."""
        config = (await self._call("GET", like, "")).get("config")
        path = f"/v1/apps/{quote(self._config.app or like.app, safe='')}/machines"
        made = await self._ask("POST", path, "a new machine", {"region": region, "config": config})
        if not made.get("id") or not made.get("private_ip"):
            raise DriverError("the Machines API does not say what it has made")
        host = f"[{made['private_ip']}]"
        return Made(str(made["id"]), host if like.port is None else f"{host}:{like.port}")

    def explain_end(self, machine: Machine) -> tuple[str, bool]:  # noqa: ARG002 — as Driver has it
        """Whoever has stopped it there did not say so here."""
        return "it was stopped elsewhere", True

    async def _wait(self, machine: Machine, state: str) -> None:
        try:
            async with asyncio.timeout(self._config.timeout_ms / 1000):
                while (await self._call("GET", machine, "")).get("state") != state:  # noqa: ASYNC110 — of others
                    await asyncio.sleep(LOOK_S)
        except TimeoutError:
            raise DriverError(f"it was not {state} within {self._config.timeout_ms} ms") from None

    async def _call(
        self, method: str, machine: Machine, action: str, body: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        app = self._config.app or machine.app
        path = f"/v1/apps/{quote(app, safe='')}/machines/{quote(machine.id, safe='')}"
        what = action or ("a look at it" if body is None else "another image")
        return await self._ask(method, f"{path}/{action}".rstrip("/"), what, body)

    async def _ask(self, method: str, path: str, what: str, body: dict[str, Any] | None) -> dict[str, Any]:
        payload = b"" if body is None else orjson.dumps(body)
        headers = {"Authorization": f"Bearer {self._config.token}", "Content-Type": "application/json"}
        status, answer = await ask(method, f"{self._base}{path}", self._config.timeout_ms, payload, headers)
        if not 200 <= status < 300:
            raise DriverError(f"the Machines API answers {what} with {explain_refusal(status, answer)}")
        try:
            found = orjson.loads(answer or b"{}")
        except orjson.JSONDecodeError:
            raise DriverError("the Machines API answers with what is not JSON") from None
        return found if isinstance(found, dict) else {}
