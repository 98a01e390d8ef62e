"""Find the line of a TOML file on which a key stands, or an error.

Decides nothing about settings. Invariant: a line that is returned holds the key, or the nearest table or key
around it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tomllib

_HEADER = re.compile(r"\s*(\[\[?)\s*([^\]]+?)\s*\]\]?\s*(#.*)?$")
_KEY = re.compile(r"\s*([A-Za-z0-9_\-.\"' ]+?)\s*=")


def find_error_line(text: str, error: tomllib.TOMLDecodeError) -> int:
    """Return the 1-based line of a text on which `tomllib` could not go on."""
    told = re.search(r"\(at line (\d+), column \d+\)$", str(error))
    return int(told[1]) if told else max(1, len(text.splitlines()))


def find_line(text: str, path: str) -> int | None:
    """Return the 1-based line of a path such as `apps[1].machines[0].address`, or of what encloses it.

    `tomllib` has accepted the text.
    """
    wanted = _split(path)
    best: tuple[int, int] | None = None  # (how many parts match, line)
    table: list[str] = []
    counts: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        header = _HEADER.match(line)
        if header is not None:
            table = _enter(_split(header[2]), counts, repeated=header[1] == "[[")
            here = table
        else:
            key = _KEY.match(line)
            if key is None:
                continue
            here = table + _split(key[1])
        depth = len(here)
        if here == wanted[:depth] and (best is None or depth > best[0]):
            best = (depth, number)
    return best[1] if best else None


def _split(path: str) -> list[str]:
    """`apps[1].name` becomes ["apps", "[1]", "name"]; an index that is not told counts as the first."""
    parts = re.findall(r"\[\d+\]|\[\.\.\.\]|[^.\[\]]+", path)
    return ["[0]" if part == "[...]" else part.strip(" \"'") for part in parts]


def _enter(names: list[str], counts: dict[str, int], *, repeated: bool) -> list[str]:
    """Return the path of a table header, with the index of every array of tables on the way."""
    path: list[str] = []
    for depth, name in enumerate(names):
        path.append(name)
        key = ".".join(path)
        if repeated and depth == len(names) - 1:
            counts[key] = counts.get(key, -1) + 1
            for nested in [other for other in counts if other.startswith(f"{key}.")]:
                del counts[nested]
        if key in counts:
            path.append(f"[{counts[key]}]")
    return path
