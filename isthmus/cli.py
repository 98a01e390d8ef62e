"""The command `isthmus`: finds the verb, runs it, and tells failures in one line.

Decides exit codes: 0 done, 1 refused or failed, 2 wrong usage. Knows nothing of what a verb does.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any, Never

from isthmus import __version__
from isthmus.client import ClientError
from isthmus.commands import (
    app,
    apply,
    db,
    demo,
    deploy,
    doctor,
    explain,
    key,
    lifecycle,
    listing,
    machine,
    releases,
    rollout,
    run,
    scale,
    simulate,
    staged,
    status,
)
from isthmus.config import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

_VERBS = (
    run,
    lifecycle,
    app,
    apply,
    machine,
    deploy,
    releases,
    scale,
    listing,
    status,
    explain,
    doctor,
    db,
    staged,
    rollout,
    key,
    demo,
    simulate,
)


class _Verbs:
    """Has each verb say of itself at least what the list of verbs says of it."""

    def __init__(self, verbs: Any) -> None:
        self._verbs = verbs

    def add_parser(self, name: str, **options: Any) -> argparse.ArgumentParser:
        """Add a verb; `description` may say more than `help`."""
        told: str = options["help"]
        parser: argparse.ArgumentParser = self._verbs.add_parser(
            name, **{"description": f"{told[0].upper()}{told[1:]}.", **options}
        )
        return parser


class _Parser(argparse.ArgumentParser):
    """The parser of the command line, or of one of its verbs."""

    def add_subparsers(self, **options: Any) -> Any:
        """Have verbs, which are parsers of this kind too."""
        return _Verbs(super().add_subparsers(**options))

    def error(self, message: str) -> Never:
        """Tell of wrong usage, and exit."""
        self.exit(2, f"{self.format_usage()}{self.prog}: {message}; see `{self.prog} --help`\n")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = _Parser(
        prog="isthmus",
        description="An edge HTTP proxy without a control plane.",
        epilog="`isthmus VERB --help` says more about a verb.",
    )
    parser.add_argument("--version", action="version", version=f"isthmus {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for verb in _VERBS:
        verb.add_parser(verbs)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = make_parser().parse_args(argv)
    try:
        code: int = args.run(args)
    except (ConfigError, ClientError) as error:
        sys.stderr.write(f"isthmus: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output went away, as `head` does.
        sys.stderr.close()
        return 0
    return code


if __name__ == "__main__":
    sys.exit(main())
