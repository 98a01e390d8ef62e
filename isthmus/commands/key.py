"""`isthmus key`: a new cluster key."""

from __future__ import annotations

import base64
import secrets
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse


def add_parser(verbs: Any) -> None:
    """Add `key`."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "key", help="print a new cluster key", description="Print 32 random bytes in base64, for gossip.keys."
    )
    parser.set_defaults(run=run)


def run(_args: argparse.Namespace) -> int:
    """Print the key."""
    print(base64.b64encode(secrets.token_bytes(32)).decode())
    return 0
