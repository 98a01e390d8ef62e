"""What a service says of replays and of clients that choose: a part of its options.

Decides which rules are acceptable and what a path prefix of the replay cache covers. Refuses to know what
is cached. Invariant: prefixes and hosts are held in the form that `hosts` gives those of requests, so that
comparing bytes is comparing meanings.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple

from .hosts import normalise_host, normalise_path

if TYPE_CHECKING:
    from collections.abc import Mapping

REPLAY_NAMES: Final = ("client_routing", "replay_cache", "replay_from")
# Each is looked at when a request of a service with cached replays comes.
RULES_MAX: Final = 32
SOURCES_MAX: Final = 256
PREFIX_CHARS_MAX: Final = 1_024
# Fly's: below it asking costs less than remembering.
TTL_S_MIN: Final = 10
TTL_S_MAX: Final = 31_536_000  # a year; a longer one is a wrong unit
ANYBODY: Final = "*"
_NETWORK: Final = "network:"
_SOURCE: Final = re.compile(r"\*|(?:network:)?[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_NAME: Final = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,64}")
_PREFIX: Final = re.compile(r"[ -~]*")
_KEYS: Final = frozenset(("path_prefix", "ttl_seconds", "type", "name", "allow_bypass"))


class ReplayRule(NamedTuple):
    """Replays of requests below `prefix` are remembered by the value of a cookie or header."""

    host: bytes  # empty: any
    prefix: bytes
    ttl_s: int
    in_cookie: bool  # else in a header
    name: bytes  # of a header in lower case
    allow_bypass: bool

    def covers(self, host: bytes, path: bytes) -> bool:
        """True for requests that the rule is for; both normalised."""
        return self.host in {b"", host} and is_below(path, self.prefix)


class ReplayOptions(NamedTuple):
    """What one service says."""

    client_routing: bool = True  # whether clients may choose among its machines
    rules: tuple[ReplayRule, ...] = ()  # the longest prefix first
    sources: frozenset[str] = frozenset()  # who may replay to it from another network


AS_USUAL: Final = ReplayOptions()


def parse_replay_options(fields: Mapping[str, object]) -> ReplayOptions:
    """Return what `fields` say under REPLAY_NAMES. Raises ValueError."""
    client_routing = fields.get("client_routing", True)
    if not isinstance(client_routing, bool):
        raise ValueError("client_routing must be true or false")  # noqa: TRY004 - all of a row's faults are ValueErrors
    sources = fields.get("replay_from", [])
    if not isinstance(sources, list | tuple) or len(sources) > SOURCES_MAX:
        raise ValueError(f"replay_from must be a list of at most {SOURCES_MAX}")
    for source in sources:
        if not isinstance(source, str) or not _SOURCE.fullmatch(source):
            raise ValueError(f"replay_from: {ascii(source)[:80]} is no app, no network:NAME and not *")
    rules = fields.get("replay_cache", [])
    if not isinstance(rules, list | tuple) or len(rules) > RULES_MAX:
        raise ValueError(f"replay_cache must be a list of at most {RULES_MAX} rules")
    parsed = sorted(map(_parse_rule, rules), key=lambda rule: len(rule.prefix), reverse=True)
    return ReplayOptions(client_routing, tuple(parsed), frozenset(sources))


def _parse_rule(rule: object) -> ReplayRule:
    if not isinstance(rule, dict):
        raise ValueError("replay_cache: a rule must be an object")  # noqa: TRY004 - as above
    for key in rule:
        if key not in _KEYS:
            raise ValueError(f"replay_cache: unknown key {ascii(key)[:80]}")
    kind, name = rule.get("type"), rule.get("name")
    prefix, ttl_s = rule.get("path_prefix", "/"), rule.get("ttl_seconds")
    allow_bypass = rule.get("allow_bypass", False)
    if not isinstance(kind, str) or kind not in {"cookie", "header"}:
        raise ValueError("replay_cache: type must be cookie or header")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"replay_cache: name {ascii(name)[:80]} is none of a cookie or header")
    if not isinstance(ttl_s, int) or not TTL_S_MIN <= ttl_s <= TTL_S_MAX:
        raise ValueError(f"replay_cache: ttl_seconds must be within {TTL_S_MIN} and {TTL_S_MAX}")
    if not isinstance(prefix, str) or not isinstance(allow_bypass, bool):
        raise ValueError("replay_cache: path_prefix must be text and allow_bypass true or false")  # noqa: TRY004 - as above
    host, path = parse_prefix(prefix)
    named = name.encode("ascii")
    return ReplayRule(
        host, path, ttl_s, kind == "cookie", named if kind == "cookie" else named.lower(), allow_bypass
    )


def parse_prefix(text: str) -> tuple[bytes, bytes]:
    """Return host (empty: any) and path of a prefix of the replay cache. Raises ValueError.

    `/api`, `/api/` and `/api/*` are equal; before the path there may be a host, without scheme and port.
    """
    host, _, path = text.partition("/")
    path = path.removesuffix("*") if path.endswith("/*") or path == "*" else path
    wrong = not text or len(text) > PREFIX_CHARS_MAX or not _PREFIX.fullmatch(text)
    if wrong or any(mark in host for mark in ": ?#*\\") or any(mark in path for mark in " ?#*\\"):
        raise ValueError(f"{ascii(text)[:80]} is no prefix of a path, nor one with a host before it")
    return normalise_host(host.encode("ascii")), normalise_path(b"/" + path.encode("ascii"))


def is_below(path: bytes, prefix: bytes) -> bool:
    """True when a normalised path is the prefix or below it."""
    return prefix in {b"/", path} or path.startswith(prefix + b"/")


def admits(sources: frozenset[str], app: str, network: str) -> bool:
    """True when a service with these `sources` takes replays of this app."""
    return bool(sources) and not sources.isdisjoint((app, _NETWORK + network, ANYBODY))
