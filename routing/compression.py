"""Which answers of a service are compressed, and how: `compression` in `services.options`.

Decides which wishes are acceptable, and what is compressed when nothing is said. Refuses to know how it is
done. Invariant: no coding is named twice, and none is slower than what a worker can do between two requests.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

# In the order in which they are preferred: as small as one another here, zstd in a third of the time of br.
CODINGS: Final = ("zstd", "br", "gzip")
# Text, and the few others that shrink; everything else is either compressed already or rare.
TYPES: Final = (
    *("text/*", "*+json", "*+xml", "application/json", "application/javascript", "application/xml"),
    *("application/x-ndjson", "application/wasm", "font/otf", "font/ttf", "image/bmp", "image/x-icon"),
)
TYPES_MAX: Final = 64
# A smaller answer fits into one packet anyway.
BYTES_MIN: Final = 1_024
# Above 70 MB/s; the next levels save a few hundredths at half of the speed.
LEVELS: Final = {"gzip": 4, "br": 4, "zstd": 3}
# Higher levels take milliseconds for each read, in which no other request is served.
LEVEL_MAX: Final = 9
NAMES: Final = ("codings", "types", "bytes_min", *(f"{coding}_level" for coding in LEVELS))

_TYPE: Final = re.compile(r"[a-z0-9][a-z0-9!#$&^_.+-]*/(?:\*|[a-z0-9][a-z0-9!#$&^_.+-]*)|\*\+[a-z0-9.-]+")


@dataclass(frozen=True, slots=True)
class Compression:
    """The wishes of one service; types in lower case."""

    codings: tuple[str, ...]  # those preferred first
    types: frozenset[bytes]
    prefixes: tuple[bytes, ...]  # `text/*` as `text/`
    suffixes: tuple[bytes, ...]  # `*+json` as `+json`
    bytes_min: int
    gzip_level: int
    br_level: int
    zstd_level: int

    def suits(self, media_type: bytes) -> bool:
        """True when answers of this type are compressed; in lower case, without parameters."""
        return (
            media_type in self.types
            or media_type.startswith(self.prefixes)
            or media_type.endswith(self.suffixes)
        )


def parse_compression(value: object) -> Compression | None:
    """Return the wishes of an object, True for usual ones, None for false. Raises ValueError."""
    if isinstance(value, bool):
        return parse_compression({}) if value else None
    if not isinstance(value, dict):
        raise ValueError("compression must be an object, true or false")  # noqa: TRY004 - as all of a row's faults
    for name in value:
        if name not in NAMES:
            raise ValueError(f"unknown option {ascii(name)[:64]} in compression")
    codings = _read_texts(value, "codings", CODINGS)
    if not codings or len(set(codings)) != len(codings) or not set(codings) <= set(CODINGS):
        raise ValueError(f"compression.codings must be some of {', '.join(CODINGS)}")
    types = [name.lower() for name in _read_texts(value, "types", TYPES)]
    if len(types) > TYPES_MAX or not all(_TYPE.fullmatch(name) for name in types):
        raise ValueError(f"compression.types must be at most {TYPES_MAX} like text/css, text/* or *+json")
    return Compression(
        codings=codings,
        types=frozenset(name.encode() for name in types if "*" not in name),
        prefixes=tuple(name[:-1].encode() for name in types if name.endswith("*")),
        suffixes=tuple(name[1:].encode() for name in types if name.startswith("*")),
        bytes_min=_read_number(value, "bytes_min", BYTES_MIN, 0, 2**31 - 1),
        gzip_level=_read_number(value, "gzip_level", LEVELS["gzip"], 1, LEVEL_MAX),
        br_level=_read_number(value, "br_level", LEVELS["br"], 0, LEVEL_MAX),
        zstd_level=_read_number(value, "zstd_level", LEVELS["zstd"], 1, LEVEL_MAX),
    )


def _read_texts(fields: dict[str, object], name: str, usual: tuple[str, ...]) -> tuple[str, ...]:
    texts = fields.get(name, usual)
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"compression.{name} must be a list of texts")
    return tuple(texts)


def _read_number(fields: dict[str, object], name: str, usual: int, least: int, most: int) -> int:
    number = fields.get(name, usual)
    if not isinstance(number, int) or isinstance(number, bool) or not least <= number <= most:
        raise ValueError(f"compression.{name} must be a whole number from {least} to {most}")
    return number
