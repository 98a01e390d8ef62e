"""`isthmus db query|exec|schema|backup|restore|drill`: the replicated database itself.

`query` and `exec` ask a running node; `schema` is in db_schema.py. `backup` and `restore` work on the file in
data directory: a backup is made beside a running node, in a process of its own, and needs none.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import os
import re
import sqlite3
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from isthmus.admin.tokens import WAIT_MS
from isthmus.client import (
    ClientError,
    add_asking_flags,
    find_data_dir,
    find_database,
    make_client,
    quote,
)
from isthmus.commands.db_drill import add_drill_parser
from isthmus.commands.db_parked import add_parked_parser
from isthmus.commands.db_schema import add_schema_parser
from isthmus.commands.listing import format_table
from isthmus.config import Config
from isthmus.exercises import Exercise, note_exercise
from isthmus.supervisor import lock_data_dir
from isthmus.wording import count_of
from replication.errors import ReplicationError

if TYPE_CHECKING:
    from replication.backup import Restored

_NAMED = re.compile(r"[:@$]([A-Za-z_]\w*)=(.*)", re.DOTALL)
_PARAM_HELP = (
    "a value for a `?`, in order, or NAME=VALUE for a :NAME with its colon; a number is a number, null is "
    "NULL, x'…' a blob, anything else (or what is in double quotes: \"5\") a text"
)


def add_parser(verbs: Any) -> None:
    """Add `db` with its actions."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "db", help="query, change, back up or restore the replicated database"
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)

    query = actions.add_parser("query", help="read with one SQL statement")
    query.add_argument("sql", metavar="SQL", help="the statement; - reads it from standard input")
    query.add_argument(
        "--after", metavar="TOKEN", help="wait for a write, as `db exec` names it, to get here"
    )
    query.add_argument(
        "--wait", metavar="TIME", type=_parse_wait, help="with --after: how long, as 500ms or 5s [5s]"
    )
    _add_statement_flags(query)
    query.set_defaults(run=run_query)

    execute = actions.add_parser("exec", help="write with SQL statements, as one transaction")
    execute.add_argument(
        "sql", metavar="SQL", nargs="+", help="statements, separated by ; - reads them from standard input"
    )
    _add_statement_flags(execute)
    execute.set_defaults(run=run_exec)

    add_schema_parser(actions)
    add_parked_parser(actions)

    backup = actions.add_parser(
        "backup",
        help="copy the database to a file, while the node runs or not",
        description="Copy the database to a file, while the node runs or not. It is read where it lies, on "
        "the machine of the node, and no node is asked: --data or ISTHMUS_DATA says where that is, and "
        "ISTHMUS_ADMIN says nothing here.",
    )
    backup.add_argument("target", metavar="PATH", type=Path, help="a new file, or a directory to put one in")
    backup.add_argument(
        "--keep", metavar="N", type=int, help="with a directory, which is made: remove all but the newest N"
    )
    _add_file_flags(backup)
    backup.set_defaults(run=run_backup)

    add_drill_parser(actions, _add_file_flags)

    restore = actions.add_parser("restore", help="put a backup into the data directory of a stopped node")
    restore.add_argument("backup", metavar="FILE", type=Path, help="what `isthmus db backup` made")
    restore.add_argument(
        "--same-node",
        action="store_true",
        help="be the node that the backup is of again; needs its peers at the start",
    )
    _add_file_flags(restore)
    restore.set_defaults(run=run_restore)


def _add_statement_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--param", metavar="VALUE", action="append", default=[], help=_PARAM_HELP)
    add_asking_flags(parser)


def _add_file_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="DIR", type=Path, help="data directory of the node [ISTHMUS_DATA]")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run_query(args: argparse.Namespace) -> int:
    """Ask, and print a table."""
    sql = _read_sql([args.sql])
    body = {"sql": sql, "params": _parse_params(args.param)}
    if args.wait is not None and args.after is None:
        raise ClientError("--wait says how long to wait for the write that --after names")
    if args.after is None:
        answer = make_client(args).post("/v1/db/query", body)
    else:
        wait_ms = WAIT_MS if args.wait is None else args.wait
        path = f"/v1/db/query?after={quote(args.after)}&wait_ms={wait_ms}"
        answer = make_client(args).post(path, body, wait_s=wait_ms / 1000)
    if args.json:
        _print_json(answer)
    elif answer["columns"]:
        rows = [[_show(value) for value in row] for row in answer["rows"]]
        print(format_table([_printable(name) for name in answer["columns"]], rows))
    return 0


def run_exec(args: argparse.Namespace) -> int:
    """Write, and print what was changed."""
    statements = split_statements(_read_sql(args.sql))
    params = _parse_params(args.param)
    if isinstance(params, list) and params and len(statements) > 1:
        raise ClientError("values for `?` go with one statement; use names (:NAME) with several")
    body = {"statements": [{"sql": sql, "params": params} for sql in statements]}
    answer = make_client(args).post("/v1/db/exec", body)
    if args.json:
        _print_json(answer)
        return 0
    for count in answer["rows_affected"]:
        print(f"{count_of(count, 'row')} affected")
    print("no value changed" if answer["token"] is None else f"token {answer['token']}")
    return 0


def run_backup(args: argparse.Namespace) -> int:
    """Make a backup and say what is in it."""
    from replication.backup import make_backup  # noqa: PLC0415 — other verbs start without it

    database = find_database(args)
    try:
        made = make_backup(database, args.target.absolute(), _now_ms(), keep=args.keep)
    except ReplicationError as error:
        raise ClientError(str(error)) from None
    note_exercise(database.parent, "backup", Exercise(_now_ms(), str(made.path), made.taken_ms))
    if args.json:
        _print_json(
            {
                "path": str(made.path),
                "site": made.site.hex(),
                "version": made.version,
                "taken_ms": made.taken_ms,
                "size_bytes": made.size_bytes,
            }
        )
        return 0
    print(
        f"{made.path}: {made.size_bytes} bytes, site {made.site.hex()} up to version {made.version}, verified"
    )
    return 0


def run_restore(args: argparse.Namespace) -> int:
    """Put a backup in place and say under which identity."""
    from replication.backup import restore_backup  # noqa: PLC0415 — other verbs start without it
    from replication.database import lock_file  # noqa: PLC0415 — see above

    config = Config(node="restore", data=str(find_data_dir(args).absolute()))
    data_lock = asyncio.run(lock_data_dir(config))
    try:
        agent_lock = lock_file(config.database)
        try:
            done = restore_backup(
                args.backup.absolute(), config.database, _now_ms(), keep_site=args.same_node
            )
        finally:
            os.close(agent_lock)
        put_back = Exercise(_now_ms(), str(args.backup.absolute()), done.backup.taken_ms)
        note_exercise(config.database.parent, "restore", put_back)
    except ReplicationError as error:
        raise ClientError(str(error)) from None
    finally:
        os.close(data_lock)
    if args.json:
        _print_json(
            {
                "database": str(config.database),
                "site": done.site.hex(),
                "backup_site": done.backup.site.hex(),
                "backup_version": done.backup.version,
                "taken_ms": done.backup.taken_ms,
                "replaced": None if done.replaced is None else str(done.replaced),
            }
        )
        return 0
    print(_tell_restored(config.database, done))
    return 0


def _tell_restored(database: Path, done: Restored) -> str:
    taken = datetime.fromtimestamp(done.backup.taken_ms / 1000, UTC)
    lines = [f"{database}: as of {taken:%Y-%m-%d %H:%M:%S} UTC"]
    if done.replaced is not None:
        lines.append(f"what was there is now {done.replaced}")
    if done.site == done.backup.site:
        lines.append(
            f"site {done.site.hex()} again, from version {done.backup.version} on; when it starts, it first "
            "fetches from all others what it wrote later"
        )
    else:
        lines.append(
            f"site {done.site.hex()}, a new one; it knows {done.backup.site.hex()} "
            f"up to version {done.backup.version}"
        )
    return "\n".join(lines)


def _parse_wait(text: str) -> int:
    """Return milliseconds; raises ArgumentTypeError."""
    match = re.fullmatch(r"(\d{1,9})(ms|s)", text, re.ASCII)
    if match is None:
        raise argparse.ArgumentTypeError(f"`{text}` is no time: give it as 500ms or 5s")
    return int(match[1]) * (1000 if match[2] == "s" else 1)


def split_statements(text: str) -> list[str]:
    """Return the statements of a text, as SQLite's own shell tells them apart."""
    statements: list[str] = []
    start = 0
    for at, char in enumerate(text, 1):
        if char == ";" and sqlite3.complete_statement(text[start:at]):
            statements.append(text[start:at].strip())
            start = at
    rest = text[start:].strip()
    return [sql for sql in (*statements, rest) if sql.strip("; \n")]


def parse_param(text: str) -> Any:
    """Return a value from the command line, as the admin API takes it."""
    if text == "null":
        return None
    if re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    if re.fullmatch(r"[+-]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][+-]?\d+)?", text):
        return float(text)
    if re.fullmatch(r"[xX]'([0-9a-fA-F]{2})*'", text):
        return {"blob": base64.b64encode(bytes.fromhex(text[2:-1])).decode()}
    if len(text) > 1 and text[0] == text[-1] == '"':
        return text[1:-1]
    return text


def _parse_params(texts: list[str]) -> list[Any] | dict[str, Any]:
    named = [_NAMED.fullmatch(text) for text in texts]
    if not any(named):
        return [parse_param(text) for text in texts]
    if not all(named):
        raise ClientError("values are given either by order or by name (:NAME=VALUE), not both")
    return {match[1]: parse_param(match[2]) for match in named if match is not None}


def _read_sql(texts: list[str]) -> str:
    return "\n;\n".join(sys.stdin.read() if text == "-" else text for text in texts)


def _show(value: Any) -> str:
    """Return a value as a cell: one line, and nothing that would steer a terminal."""
    match value:
        case None:
            return "NULL"
        case {"blob": blob}:
            return f"x'{base64.b64decode(blob).hex()}'"
        case {"real": real}:
            return str(real)
    return _printable(str(value))


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _print_json(data: Any) -> None:
    print(orjson.dumps(data, option=orjson.OPT_INDENT_2).decode())


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
