"""Which modules run compiled: those of proxy/ and routing/ that `isthmus.compiler` made extension modules of.

Decides between these and their sources, once in a process and before the first of them is imported. Refuses
to know how they are made. Invariant: all of them are compiled or none, and never from other sources than
those that are here: a change that was not compiled makes all of them plain, and who serves warns of it.

ISTHMUS_COMPILED=0 asks for plain Python; 1 for compiled modules or an error, which is what tests want.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

VARIABLE: Final = "ISTHMUS_COMPILED"
ROOT: Final = Path(__file__).parent.parent
FOLDER: Final = Path(__file__).parent / "_compiled"
MANIFEST: Final = "manifest.json"
PACKAGES: Final = ("proxy", "routing")
# What all compiled modules share, a module of its own.
GROUP: Final = "isthmus"
_TOP: Final = frozenset((*PACKAGES, f"{GROUP}__mypyc"))


class StaleError(Exception):
    """The compiled modules are not those of these sources."""


def hash_sources(root: Path) -> dict[str, str]:
    """Return the SHA-256 of every source that compiled code was made of or knows constants of."""
    return {
        file.relative_to(root).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for package in PACKAGES
        for file in sorted((root / package).rglob("*.py"))
    }


def read_files(root: Path, folder: Path) -> dict[str, Path]:
    """Return the file of each compiled module; none when nothing was compiled. Raises StaleError."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        return {}
    suffix = EXTENSION_SUFFIXES[0]
    if manifest["suffix"] != suffix:
        raise StaleError(f"they were compiled for another Python, {manifest['suffix']}")
    then, now = manifest["sources"], hash_sources(root)
    changed = [path for path in sorted({*then, *now}) if then.get(path) != now.get(path)]
    if changed:
        raise StaleError(f"{changed[0]} changed since then")
    return {name: folder / (name.replace(".", "/") + suffix) for name in manifest["modules"]}


class Finder:
    """Finds compiled modules before Python finds their sources."""

    def __init__(self) -> None:
        self._files: dict[str, Path] | None = None  # set when the first module is asked for
        self._problem = ""  # why the compiled modules are of no use; set with the above

    @property
    def files(self) -> dict[str, Path]:
        """The compiled modules of this process; none when it runs plain Python."""
        if self._files is None:
            wish = os.environ.get(VARIABLE, "")
            try:
                self._files = choose_files(wish, sys.modules)
            except StaleError as error:
                if wish == "1":
                    raise
                self._files, self._problem = {}, str(error)
        return self._files

    def warn(self) -> None:
        """Say to standard error why compiled modules are not used, once for this process and its children."""
        if self.files or not self._problem:
            return
        sys.stderr.write(
            f"isthmus: the compiled modules are not used, plain Python is slower: {self._problem} "
            "(make compile)\n"
        )
        os.environ[VARIABLE] = "0"

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return where a compiled module is; see importlib.abc.MetaPathFinder."""
        del path, target
        if name.partition(".")[0] not in _TOP:
            return None
        file = self.files.get(name)
        return None if file is None else importlib.util.spec_from_file_location(name, file)


def choose_files(
    wish: str, loaded: Mapping[str, object], root: Path = ROOT, folder: Path = FOLDER
) -> dict[str, Path]:
    """Return the compiled modules to run.

    Raises StaleError when there are some that are out of date, or none and the wish is '1'.
    """
    if wish == "0":
        return {}
    files = read_files(root, folder)
    if not files or any(name in loaded for name in files):
        # Imported before isthmus was: a mixture would have two of each class.
        if wish == "1":
            raise StaleError("nothing was compiled, or proxy or routing was imported before isthmus")
        return {}
    return files


FINDER: Final = Finder()


def is_compiled() -> bool:
    """True when this process runs compiled modules."""
    return bool(FINDER.files)


def describe() -> str:
    """Return one word or two on what runs, for people."""
    return "compiled" if is_compiled() else "plain Python"
