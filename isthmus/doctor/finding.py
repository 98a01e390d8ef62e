"""What a rule finds, and how bad that is.

Decides the order of severities. Invariant: every finding says what it is about, what is wrong, why that
matters, what would be hit, and what mends it.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from isthmus.doctor.facts import Snapshot


class Severity(IntEnum):
    """How soon somebody should look."""

    NOTICE = 1  # worth knowing
    WARNING = 2  # one fault away from an outage
    CRITICAL = 3  # users are hit, or will be without any further fault

    @property
    def word(self) -> str:
        """As it is written."""
        return self.name.lower()


class Finding(NamedTuple):
    """One thing that is wrong. A guess is one that the facts suggest and do not prove."""

    severity: Severity
    subject: str
    problem: str
    why: str
    blast: str
    mend: str
    guess: bool = False


class Rule(NamedTuple):
    """A name that stays, and what finds; it says nothing of what it has no facts about."""

    name: str
    about: str  # for the docs, and for who wonders what was looked at
    find: Callable[[Snapshot], Iterable[Finding]]


class Diagnosis(NamedTuple):
    """A finding, and the rule that it is from."""

    rule: str
    finding: Finding

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        fields = self.finding._asdict()
        return {"rule": self.rule, **fields, "severity": self.finding.severity.word}


def diagnose(snapshot: Snapshot, rules: Iterable[Rule]) -> list[Diagnosis]:
    """Return what all rules find, the worst first."""
    found = [Diagnosis(rule.name, finding) for rule in rules for finding in rule.find(snapshot)]
    return sorted(found, key=lambda one: (-one.finding.severity, one.rule, one.finding.subject))
