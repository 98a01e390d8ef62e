"""A driver that has somebody else start and stop machines: a signed POST for each.

Decides the form of the request and which answers will do. Refuses to know what happens there. Invariant: what
is sent can be checked to come from this node, for this machine, now: the signature covers time and body.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import aiohttp
import msgspec
import orjson

from isthmus.machines.driver import DriverError, Machine, Made

if TYPE_CHECKING:
    from isthmus.config_machines import DriverConfig

# What of an answer that refuses is told.
ANSWER_CHARS_MAX = 200
# The description of a machine takes a few kilobytes.
ANSWER_BYTES_MAX = 1 << 20


def sign(secret: str, at_s: int, body: bytes) -> str:
    """Return HMAC-SHA256 over `<time>.<body>`, in hexadecimal, as `isthmus-signature` has it."""
    return hmac.new(secret.encode(), b"%d." % at_s + body, hashlib.sha256).hexdigest()


async def ask(
    method: str, url: str, timeout_ms: int, body: bytes, headers: dict[str, str]
) -> tuple[int, bytes]:
    """Send one request; follows no redirect. Raises DriverError when there is no answer.

    What it says names the host alone: users, paths and queries of a URL may be secrets, and all nodes see it.
    """
    answer = bytearray()
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(timeout_ms / 1000)) as session,
            session.request(method, url, data=body, headers=headers, allow_redirects=False) as response,
        ):
            async for piece in response.content.iter_any():
                answer += piece
                if len(answer) > ANSWER_BYTES_MAX:
                    raise aiohttp.ClientPayloadError(f"more than {ANSWER_BYTES_MAX} bytes")
            return response.status, bytes(answer)
    except (TimeoutError, aiohttp.ClientError, OSError, ValueError) as error:
        host = urlsplit(url).netloc.rpartition("@")[2]
        told = str(error).replace(url, host) or f"no answer within {timeout_ms} ms"
        raise DriverError(f"{host}: {told}") from None


def explain_refusal(status: int, answer: bytes) -> str:
    """Return what an answer says that will not do."""
    text = " ".join(answer.decode("utf-8", "replace").split())
    return f"{status}: {text[:ANSWER_CHARS_MAX]}" if text else str(status)


class _Answer(msgspec.Struct):
    """What a webhook says of the machine that it has made."""

    machine: Annotated[str, msgspec.Meta(min_length=1)]
    address: Annotated[str, msgspec.Meta(min_length=1)]


class WebhookDriver:
    """Posts `{"action", "machine", "app", "region", "address", "node", "release"}`.

    Actions are start, stop, suspend and create.
    2xx: it is done, or will be. 501 to a suspend: stop it in place of that. Anything else is a failure.
    """

    poll_s = 3_600.0  # it is not asked

    def __init__(self, config: DriverConfig, node: str) -> None:
        self._config = config
        self._node = node

    async def start(self, machine: Machine) -> None:
        """Have it started."""
        await self._post("start", machine)

    async def stop(self, machine: Machine) -> None:
        """Have it stopped."""
        await self._post("stop", machine)

    async def suspend(self, machine: Machine) -> bool:
        """Have it suspended, or stopped where that is not to be had."""
        if (await self._post("suspend", machine))[0] != 501:
            return True
        await self.stop(machine)
        return False

    async def is_running(self, machine: Machine) -> bool | None:  # noqa: ARG002 — as Driver has it
        """A webhook is not asked: it may not know."""
        return None

    async def create(self, like: Machine, region: str) -> Made:
        """Have one more made; the answer has its id as `machine`, and its `address`."""
        _, answer = await self._post("create", like._replace(id="", region=region))
        try:
            made = msgspec.json.decode(answer, type=_Answer)
        except ValueError:  # of msgspec, and of text that is not UTF-8
            raise DriverError("the webhook does not say what it has made: `machine` and `address`") from None
        return Made(made.machine, made.address)

    def explain_end(self, machine: Machine) -> tuple[str, bool]:  # noqa: ARG002 — as Driver has it
        """Nobody says so."""
        return "it ended", True

    async def _post(self, action: str, machine: Machine) -> tuple[int, bytes]:
        address = machine.host if machine.port is None else f"{machine.host}:{machine.port}"
        body = orjson.dumps(
            {
                "action": action,
                "machine": machine.id,
                "app": machine.app,
                "region": machine.region,
                "address": address,
                "node": self._node,
                "release": machine.release,
            }
        )
        at_s = int(time.time())
        headers = {
            "Content-Type": "application/json",
            "isthmus-timestamp": str(at_s),
            "isthmus-signature": sign(self._config.secret, at_s, body),
        }
        status, answer = await ask("POST", self._config.url, self._config.timeout_ms, body, headers)
        if not (200 <= status < 300 or (status == 501 and action == "suspend")):
            raise DriverError(f"the webhook refuses to {action} it with {explain_refusal(status, answer)}")
        return status, answer
