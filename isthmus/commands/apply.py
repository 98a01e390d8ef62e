"""`isthmus apply`: a fly.toml becomes an app of the cluster."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from isthmus.client import ClientError, add_asking_flags, make_client, tell_warnings
from isthmus.fly_toml import FlyApp, FlyTomlError, read_fly_toml
from isthmus.logs import escape

if TYPE_CHECKING:
    import argparse


def add_parser(verbs: Any) -> None:
    """Add `apply`."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "apply",
        help="have an app be as a fly.toml says",
        description="Have an app be as a fly.toml says: services, checks, limits, options. What of the file "
        "has no effect here is told, with its line. Machines and hosts stay as they are.",
    )
    parser.add_argument("file", metavar="FILE", nargs="?", default="fly.toml", type=Path)
    parser.add_argument("--app", metavar="NAME", default="", help="its name (as the file says)")
    parser.add_argument(
        "--host", metavar="HOST", action="append", default=[], help="what leads to it as well"
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would change")
    add_asking_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Read the file, say what it comes to, and apply it."""
    try:
        read = read_fly_toml(args.file.read_text("utf-8"), args.app)
    except (OSError, UnicodeDecodeError) as error:
        raise ClientError(f"cannot read {args.file}: {getattr(error, 'strerror', None) or error}") from None
    except FlyTomlError as error:
        raise ClientError(f"{args.file}:{error}") from None
    body = read.app | {"hosts": args.host}
    query = "exact=1&dry_run=1" if args.dry_run else "exact=1"
    answer = make_client(args).post(f"/v1/apps?{query}", body)
    tell_warnings(answer)
    if args.json:
        notes = [note._asdict() for note in read.notes]
        shown = {"app": body, "changes": answer["changes"], "notes": notes}
        print(orjson.dumps(shown, option=orjson.OPT_INDENT_2).decode())
    else:
        _print(args, read, answer)
    return 0


def _print(args: argparse.Namespace, read: FlyApp, answer: dict[str, Any]) -> None:
    for note in read.notes:
        sys.stderr.write(f"{args.file}:{note.line or 1}: {escape(note.key)}: {escape(note.text)}\n")
    for change in answer["changes"]:
        before, after = (orjson.dumps(change[key]).decode() for key in ("before", "after"))
        print(escape(f"{change['what']}: {before} -> {after}"))
    name = read.app["name"]
    if not answer["changes"]:
        print(f"app {name} is as {args.file} says")
    else:
        print(f"app {name} would be changed" if args.dry_run else f"app {name} changed")
    if not answer["hosts"]:
        print(f"no host leads to {name} yet: isthmus apply --host HOST")
