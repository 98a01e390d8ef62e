"""One probe of one machine: a connection, and for HTTP a request and as much of its answer as is needed.

Decides what happened and whether that passes. Refuses to know how often, and what becomes of it. Invariant: a
probe finds out whether a new connection works, so none is kept; it takes no longer than its check allows, and
its outcome is short and printable whatever the machine sends.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final, NamedTuple

import httptools

from proxy.reach import ForbiddenError, Reach, explain

if TYPE_CHECKING:
    from isthmus.checking.definition import Definition

log = logging.getLogger(__name__)

# Outcomes are for a person to read; more than this is cut.
OUTPUT_CHARS_MAX: Final = 400
SUMMARY_CHARS_MAX: Final = 200
# What an answer is looked through for a text, and what a head may be.
BODY_BYTES_MAX: Final = 65_536
HEAD_BYTES_MAX: Final = 65_536
EXCERPT_BYTES: Final = 512


class Outcome(NamedTuple):
    """What a probe found: what happened, the same for the same fault, and a piece of what came with it."""

    passed: bool
    summary: str
    excerpt: str = ""

    @property
    def output(self) -> str:
        """Both, for a person."""
        return (f"{self.summary}: {self.excerpt}" if self.excerpt else self.summary)[:OUTPUT_CHARS_MAX]


class Prober:
    """Makes the probes of one node."""

    def __init__(self, reach: Reach) -> None:
        self._reach = reach

    async def probe(self, definition: Definition) -> Outcome:
        """Probe once. Raises nothing but CancelledError."""
        check = definition.check
        try:
            async with asyncio.timeout(check.timeout_ms / 1000):
                return await self._probe(definition)
        except TimeoutError:
            return Outcome(False, f"no answer within {check.timeout_ms} ms")
        except ForbiddenError as error:
            return Outcome(False, str(error)[:SUMMARY_CHARS_MAX])
        except OSError as error:
            return Outcome(False, explain(error)[:SUMMARY_CHARS_MAX])
        except Exception as error:
            log.exception("a probe failed by itself", extra={"machine": definition.machine})
            return Outcome(False, f"the probe failed by itself: {error!r}"[:SUMMARY_CHARS_MAX])

    async def _probe(self, definition: Definition) -> Outcome:
        loop = asyncio.get_running_loop()
        transport, answer = await self._reach.connect(
            lambda: _Answer(definition, loop.create_future()),
            definition.host,
            definition.port,
            definition.tls,
        )
        try:
            if not definition.request:
                return Outcome(True, "connected")
            transport.write(definition.request)
            return await answer.outcome
        finally:
            transport.abort()


class _Answer(asyncio.Protocol):
    """Reads an answer until it is known whether it passes. `outcome` is set once."""

    def __init__(self, definition: Definition, outcome: asyncio.Future[Outcome]) -> None:
        self.outcome = outcome
        self._definition = definition
        self._wanted = definition.check.body.encode()
        self._parser = httptools.HttpResponseParser(self)
        self._head_bytes = 0
        self._reason = b""
        self._status = 0  # of the final answer, once its head is here
        self._body = bytearray()

    def data_received(self, data: bytes) -> None:
        """Take bytes of the answer."""
        if self.outcome.done():
            return
        if not self._status:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            if not self._status:
                self._finish(False, "what it answers is not HTTP")
            else:
                self._judge()
        if not self._status and self._head_bytes > HEAD_BYTES_MAX:
            self._finish(False, "the head of its answer does not end")

    def connection_lost(self, exc: Exception | None) -> None:
        """The machine has closed the connection: that ends an answer without a length, too."""
        if self._status:
            self._judge()
        else:
            said = explain(exc) if isinstance(exc, OSError) else "no answer"
            self._finish(False, f"it closed the connection: {said}")

    # Of the parser

    def on_status(self, reason: bytes) -> None:
        """Take a piece of the reason phrase."""
        self._reason = (self._reason + reason)[:SUMMARY_CHARS_MAX]

    def on_headers_complete(self) -> None:
        """Decide by the status alone if that is enough."""
        status = self._parser.get_status_code()
        if status < 200:
            self._reason = b""
            return
        self._status = status
        if self._definition.takes_status(status) and not self._wanted:
            self._finish(True, self._told())

    def on_body(self, body: bytes) -> None:
        """Take a piece of the body."""
        if self.outcome.done():
            return
        self._body += body[: BODY_BYTES_MAX - len(self._body)]
        enough = BODY_BYTES_MAX if self._is_expected() else EXCERPT_BYTES
        if len(self._body) >= enough or (self._is_expected() and self._wanted in self._body):
            self._judge()

    def on_message_complete(self) -> None:
        """All of the answer is here."""
        if self._status:
            self._judge()

    def _is_expected(self) -> bool:
        return self._definition.takes_status(self._status)

    def _told(self) -> str:
        return f"{self._status} {make_printable(self._reason)}".strip()

    def _judge(self) -> None:
        if self.outcome.done():
            return
        summary, excerpt = self._told(), make_printable(bytes(self._body[:EXCERPT_BYTES]))
        if not self._is_expected():
            self._finish(False, summary, excerpt)
        elif self._wanted not in self._body:
            self._finish(False, f"{summary} without `{self._definition.check.body[:64]}`", excerpt)
        else:
            self._finish(True, summary)

    def _finish(self, passed: bool, summary: str, excerpt: str = "") -> None:
        if not self.outcome.done():
            self.outcome.set_result(Outcome(passed, summary[:SUMMARY_CHARS_MAX], excerpt))


def make_printable(raw: bytes) -> str:
    """Return bytes as one line of text in which nothing drives a terminal."""
    text = raw.decode("utf-8", "replace")
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())
