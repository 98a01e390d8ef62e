"""A driver for Fly Machines, or whatever has the same API.

Decides which calls make a start, a stop and a suspend. Refuses to know more of the API than that. Invariant:
a machine is named by its own id in the app of that name, unless the configuration names another app.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

import orjson

from isthmus.config_machines import FLY_API
from isthmus.machines.driver import DriverError, Machine, Made
from isthmus.machines.webhook import ask, explain_refusal

if TYPE_CHECKING:
    from isthmus.config_machines import DriverConfig

# While it stops or is suspended, it is looked at so often.
LOOK_S = 0.5

# States of a machine there, some of them; it is in others only for a moment.
RUNNING: Final = frozenset(("started", "starting"))
ENDED: Final = frozenset(("stopped", "suspended", "destroyed", "failed"))
# Refusals that are about the machine. For others (who asks, how often, faults) it is not to lose its memory.
CANNOT: Final = frozenset((400, 409, 412, 422, 501))


class RefusedError(DriverError):
    """The API does not want to."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


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
            config = await self._find_config(machine)
            if config.get("image") != machine.release:
                await self._call("POST", machine, "", {"config": {**config, "image": machine.release}})
                return
        await self._change(machine, "start", RUNNING)

    async def stop(self, machine: Machine) -> None:
        """Stop it, and wait until it is."""
        await self._change(machine, "stop", ENDED)
        await self._wait(machine, "stop")

    async def suspend(self, machine: Machine) -> bool:
        """Suspend it; the API refuses that for some machines, which are stopped."""
        try:
            await self._change(machine, "suspend", ENDED)
        except RefusedError as refusal:
            if refusal.status not in CANNOT:
                raise
            await self.stop(machine)
            return False
        return await self._wait(machine, "suspend") == "suspended"

    async def is_running(self, machine: Machine) -> bool | None:
        """Ask for its state."""
        state = await self._find_state(machine)
        if state in RUNNING:
            return True
        return False if state in ENDED or state == "created" else None

    async def create(self, like: Machine, region: str) -> Made:
        """Make one with the same configuration; its address is the private one."""
        config = await self._find_config(like)
        path = f"/v1/apps/{quote(self._config.app or like.app, safe='')}/machines"
        made = await self._ask("POST", path, "a new machine", {"region": region, "config": config})
        machine, address = made.get("id"), made.get("private_ip")
        if not (machine and address and isinstance(machine, str) and isinstance(address, str)):
            raise DriverError("the Machines API does not say what it has made: `id` and `private_ip`")
        host = f"[{address}]" if ":" in address else address
        return Made(machine, host if like.port is None else f"{host}:{like.port}")

    def explain_end(self, machine: Machine) -> tuple[str, bool]:  # noqa: ARG002 — as Driver has it
        """Whoever has stopped it there did not say so here."""
        return "it was stopped elsewhere", True

    async def _find_config(self, machine: Machine) -> dict[str, Any]:
        config = (await self._call("GET", machine, "")).get("config")
        if not isinstance(config, dict):
            raise DriverError(f"the Machines API does not say how {machine.id} is configured")
        return config

    async def _find_state(self, machine: Machine) -> str:
        return str((await self._call("GET", machine, "")).get("state"))

    async def _change(self, machine: Machine, action: str, reached: frozenset[str]) -> None:
        """Ask for it. A refusal does not matter where there is nothing left to do."""
        try:
            await self._call("POST", machine, action)
        except RefusedError as refusal:
            if refusal.status not in CANNOT or await self._find_state(machine) not in reached:
                raise

    async def _wait(self, machine: Machine, action: str) -> str:
        """Return in which state it has ended."""
        try:
            async with asyncio.timeout(self._config.timeout_ms / 1000):
                while (state := await self._find_state(machine)) not in ENDED:  # noqa: ASYNC110 — of others
                    await asyncio.sleep(LOOK_S)
                return state
        except TimeoutError:
            raise DriverError(f"it did not {action} within {self._config.timeout_ms} ms") from None

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
            told = f"the Machines API answers {what} with {explain_refusal(status, answer)}"
            raise RefusedError(told, status)
        try:
            found = orjson.loads(answer or b"{}")
        except orjson.JSONDecodeError:
            raise DriverError("the Machines API answers with what is not JSON") from None
        return found if isinstance(found, dict) else {}
