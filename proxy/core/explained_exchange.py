"""An exchange whose answer says how it came about: lines `Isthmus-Trace`, one for each step.

Decides what is said, to a client that has proved that it may know. Used for such a request alone, so that the
others cost nothing. Invariant: the lines are few, short, and printable ASCII, whatever machines are called.
"""

from __future__ import annotations

import json
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from routing.explain import Verdict, describe, judge

from .traced_exchange import TracedExchange

if TYPE_CHECKING:
    from routing.balancer import Want
    from routing.replay import Replay
    from routing.table import Service
    from routing.target import Target

    from .framing import Data
    from .plane import Client, Machine, Plane
    from .replays import Course, Replays
    from .request_head import RequestHead
    from .response_head import ResponseHead

# Steps that are told: more than most requests take, and with the first line below 16 KB in all.
STEPS_MAX: Final = 15
# Machines that are looked at for each step, and those of them that are named.
JUDGED_MAX: Final = 256
NAMED_MAX: Final = 8
_DETAIL_CHARS_MAX: Final = 200

_GOOD: Final = frozenset((Verdict.CANDIDATE, Verdict.OVER_SOFT))

Step = dict[str, Any]


class ExplainedExchange(TracedExchange):
    """Keeps what its steps were."""

    __slots__ = ("asked", "queued_ms", "replay", "step", "steps", "steps_left_out")

    def __init__(
        self, plane: Plane, client: Client, head: RequestHead, service: Service, want: Want, forwarded: bytes
    ) -> None:
        super().__init__(plane, client, head, service, want, forwarded)
        self.asked = want  # as the client wishes, before anything changed it
        self.steps: list[Step] = []
        self.step: Step | None = None  # of the machine that has the request, or is being connected to
        self.steps_left_out = 0
        self.queued_ms = 0.0
        self.replay: Replay | None = None  # that is being followed

    # What happens

    def _reach(self, choice: Target) -> None:
        step = self._describe_choice(choice)
        self.step = step
        self._add(step)
        super()._reach(choice)

    def _leave_queue(self) -> None:
        self.queued_ms += (self.plane.now() - self.queued_at) * 1000
        super()._leave_queue()

    def _send(self, machine: Machine) -> None:
        if self.step is not None:
            self.step["sent_ms"] = self._tell_ms()
            self.step["reused"] = machine.reused
        super()._send(machine)

    def handle_connect_failed(self, code: str, detail: str) -> None:
        """Note why."""
        self._note_failure(code, detail)
        super().handle_connect_failed(code, detail)

    def handle_machine_lost(self, code: str, detail: str) -> None:
        """Note why."""
        self._note_failure(code, detail)
        super().handle_machine_lost(code, detail)

    def handle_response(self, head: ResponseHead, body: Data, ended: bool) -> None:
        """Note what the machine said, and tell the client all that was noted with its answer."""
        if self.step is not None:
            self.step["head_ms"] = self._tell_ms()
            self.step["status"] = head.status
        if head.replays is None and not head.replay_json:
            head.lines = [*head.lines, *self._render()]
        super().handle_response(head, body, ended)

    def _replay(self, replays: Replays, replay: Replay) -> None:
        if self.step is not None:
            self.step["replays"] = True
        self.replay = replay
        super()._replay(replays, replay)
        self.replay = None

    def _follow(self, course: Course) -> None:
        service, want, _ = course
        said = {"at_ms": self._tell_ms(), "app": service.app, **_describe_want(want)}
        cause = "replay" if self.replay is not None else "fallback" if self.steps else "remembered replay"
        self._add({"step": cause, **said})
        super()._follow(course)

    def _render_failure(self, code: str, detail: str, page: str, *, keep: bool) -> bytes:
        answer = super()._render_failure(code, detail, page, keep=keep)
        end = answer.find(b"\r\n") + 2
        lines = b"".join(line + b"\r\n" for line in self._render(code))
        return answer[:end] + lines + answer[end:]

    # What is told of it

    def _add(self, step: Step) -> None:
        if len(self.steps) < STEPS_MAX:
            self.steps.append(step)
        else:
            self.steps_left_out += 1

    def _note_failure(self, code: str, detail: str) -> None:
        if self.step is not None:
            self.step["failed_ms"] = self._tell_ms()
            self.step["error"] = code
            self.step["detail"] = detail[:_DETAIL_CHARS_MAX]

    def _tell_ms(self) -> float:
        return round((self.plane.now() - self.started) * 1000, 2)

    def _describe_choice(self, choice: Target) -> Step:
        plane, service, now = self.plane, self.service, self.plane.now()
        rtt_ms = plane.table.regions.rtt_ms(plane.settings.region, choice.region)
        verdict = judge(service, choice, now, self.want, self.tried)
        step: Step = {
            "step": "machine",
            "at_ms": self._tell_ms(),
            "machine": choice.id,
            "address": choice.address,
            "region": choice.region,
            "node": choice.node,
            "rtt_ms": round(rtt_ms, 1) if rtt_ms < float("inf") else None,
            "why": describe(verdict, service, choice, now, plane.table.ways)[:_DETAIL_CHARS_MAX],
        }
        dropped: dict[str, str] = {}
        more = 0
        for target in islice(service.targets(), JUDGED_MAX):
            verdict = judge(service, target, now, self.want, self.tried)
            if verdict in _GOOD or target is choice:
                continue
            if len(dropped) < NAMED_MAX:
                dropped[target.id] = verdict.value
            else:
                more += 1
        if dropped:
            step["dropped"] = dropped
        if more:
            step["dropped_more"] = more
        return step

    def _render(self, code: str = "") -> list[bytes]:
        settings = self.plane.settings
        first: Step = {
            "node": settings.node,
            "region": settings.region,
            "request": self.request_id.decode("ascii"),
            "app": self.service.app,
            "port": self.client.port,
            "ms": self._tell_ms(),
            **_describe_want(self.asked),
        }
        if self.queued_ms:
            first["queued_ms"] = round(self.queued_ms, 2)
        if self.steps_left_out:
            first["steps_left_out"] = self.steps_left_out
        if code:
            first["error"] = code
        return [
            b"Isthmus-Trace: " + json.dumps(step, separators=(",", ":")).encode("ascii")
            for step in (first, *self.steps)
        ]


def _describe_want(want: Want) -> Step:
    said: Step = {}
    if want.regions:
        said["regions"] = list(want.regions)
    if want.instance is not None:
        said["instance"] = want.instance
    if want.prefer_instance is not None:
        said["prefers"] = want.prefer_instance
    if want.key:
        said["sticky"] = True  # the key itself is a client's secret
    return said
