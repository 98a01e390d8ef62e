"""The command `isthmus`: finds the verb, runs it, and tells failures in one line.

Decides exit codes: 0 done, 1 refused or failed, 2 wrong usage. Knows nothing of what a verb does.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

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
    explain,
    doctor,
    db,
    staged,
    rollout,
    key,
    demo,
    simulate,
)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = argparse.ArgumentParser(
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
