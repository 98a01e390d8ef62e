"""`isthmus db schema`: the replicated tables, and how they are brought to another schema.

Showing them asks a running node. `plan` reads the file beside it. `apply`, `rollback` and `forget` change the
file of a stopped node, whose locks they hold; a running one is asked for what only adds.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from isthmus.client import ClientError, add_asking_flags, add_client_flags, find_database, make_client
from isthmus.commands.listing import format_table
from isthmus.config import Config, ConfigError
from isthmus.supervisor import lock_data_dir
from isthmus.wording import count_of
from replication.errors import ReplicationError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from replication.schema_plan import Plan

_FILE_HELP = "a schema file with all tables of yours; without it those that the node has, and this isthmus's"


def add_schema_parser(actions: Any) -> None:
    """Add `schema` with its actions to those of `db`."""
    schema: argparse.ArgumentParser = actions.add_parser(
        "schema", help="show the replicated tables as the node has them, or change them"
    )
    add_asking_flags(schema)
    schema.set_defaults(run=run_show)
    steps = schema.add_subparsers(metavar="ACTION")

    plan = steps.add_parser("plan", help="show what it takes to bring the database to a schema file")
    plan.add_argument("file", metavar="FILE", type=Path, nargs="?", help=_FILE_HELP)
    plan.set_defaults(run=run_plan)

    apply = steps.add_parser("apply", help="carry out a plan; on a stopped node, unless it only adds")
    apply.add_argument("file", metavar="FILE", type=Path, nargs="?", help=_FILE_HELP)
    apply.add_argument("--plan", metavar="ID", required=True, help="the id that `plan` printed for it")
    apply.set_defaults(run=run_apply)

    rollback = steps.add_parser("rollback", help="undo the last plan, on a stopped node")
    rollback.set_defaults(run=run_rollback)

    forget = steps.add_parser("forget", help="delete what is kept for undoing plans, on a stopped node")
    forget.set_defaults(run=run_forget)
    for action in (apply, rollback, forget):
        action.add_argument("--yes", action="store_true", help="do not ask")
    add_client_flags(apply)
    for action in (plan, rollback, forget):
        action.add_argument(
            "--data", metavar="DIR", type=Path, help="data directory of the node [ISTHMUS_DATA]"
        )
    plan.add_argument("--json", action="store_true", help="print JSON")


def run_show(args: argparse.Namespace) -> int:
    """Print the replicated tables as SQL."""
    answer = make_client(args).get("/v1/db/schema")
    if args.json:
        print(orjson.dumps(answer, option=orjson.OPT_INDENT_2).decode())
        return 0
    for table in answer["tables"]:
        print(
            f"-- merge: {table['merge']}", *(f"{sql};" for sql in (table["sql"], *table["indexes"])), sep="\n"
        )
        print()
    return 0


def run_plan(args: argparse.Namespace) -> int:
    """Print the steps, what they lose, and the id that `apply` wants."""
    with _told():
        plan, _ = _read_plan(args)
    if args.json:
        steps = [
            {"text": step.text, "online": step.is_online, "lost": step.lost, "note": step.note}
            | {"refused": step.refused}
            for step in plan.steps
        ]
        print(orjson.dumps({"id": plan.id, "steps": steps}, option=orjson.OPT_INDENT_2).decode())
        return 0
    print(_tell_plan(plan))
    if any(step.refused for step in plan.steps):
        print("change those rows first, then plan again")
    return 0


def run_apply(args: argparse.Namespace) -> int:
    """Carry out the plan of that id; refuse when it is not what it would take any more."""
    from isthmus.declared import make_plan  # noqa: PLC0415 — other verbs start without it
    from replication.schema_apply import apply_plan  # noqa: PLC0415 — see above

    with _told():
        plan, declared = _read_plan(args)
        _check_shown(args, plan)
        print(_tell_plan(plan))
        _confirm(args, "Carry it out?")
        try:
            with _stopped(args) as connection:
                _check_shown(args, make_plan(connection, _read_file(args))[0])
                apply_plan(connection, plan, declared)
        except ConfigError:
            if not plan.only_adds:
                raise
            make_client(args).post("/v1/db/schema", {"sql": declared})
            print("done; the running node has it")
            return 0
    print("done; `isthmus db schema rollback` undoes it, until `isthmus db schema forget`")
    return 0


def _check_shown(args: argparse.Namespace, plan: Plan) -> None:
    if plan.id != args.plan:
        raise ClientError(
            f"the plan is {plan.id} by now, not {args.plan}; look at it: isthmus db schema plan"
        )


def run_rollback(args: argparse.Namespace) -> int:
    """Undo the last plan."""
    from replication.schema_apply import read_attic  # noqa: PLC0415 — other verbs start without it
    from replication.schema_rollback import rollback  # noqa: PLC0415 — see above

    with _told(), _stopped(args) as connection:
        pasts = read_attic(connection)
        if not pasts:
            raise ClientError("there is no plan to undo")
        _confirm(args, f"Undo plan {pasts[0].plan}? Columns that it added go, with their values.")
        rollback(connection)
    print(f"plan {pasts[0].plan} is undone")
    return 0


def run_forget(args: argparse.Namespace) -> int:
    """Delete what is kept for undoing."""
    from replication.schema_apply import forget, read_attic  # noqa: PLC0415 — other verbs start without it

    with _told(), _stopped(args) as connection:
        count = len(read_attic(connection))
        if count:
            _confirm(args, f"Delete for good what {count} plan{'s' * (count > 1)} took away?")
            forget(connection)
    print(f"{count_of(count, 'plan')} forgotten")
    return 0


def _read_plan(args: argparse.Namespace) -> tuple[Plan, str]:
    """Return the plan, and the text of the schema file that it is for."""
    from isthmus.declared import read_plan  # noqa: PLC0415 — other verbs start without it

    return read_plan(find_database(args), _read_file(args))


def _read_file(args: argparse.Namespace) -> str | None:
    return None if args.file is None else args.file.read_text("utf-8")


def _tell_plan(plan: Plan) -> str:
    if not plan.steps:
        return f"plan {plan.id}: nothing to do"
    rows = []
    for step in plan.steps:
        told = ["nothing is rewritten" if step.is_online else "rewrites the table"]
        told += [f"loses {step.lost}" if step.text.startswith("drop") else step.lost] if step.lost else []
        told += [text for text in (step.note, step.refused) if text]
        rows.append([f"  {step.text}", "; ".join(told)])
    return f"plan {plan.id}\n{format_table(['  step', 'what it does'], rows)}"


def _confirm(args: argparse.Namespace, question: str) -> None:
    if args.yes:
        return
    if not sys.stdin.isatty():
        raise ClientError("nothing was changed: this needs a terminal to ask in, or --yes")
    if input(f"{question} [y/N] ").strip().lower() not in ("y", "yes"):
        raise ClientError("nothing was changed")


@contextlib.contextmanager
def _stopped(args: argparse.Namespace) -> Iterator[sqlite3.Connection]:
    """Provide the file of a stopped node, alone, with all that was written to it gathered."""
    from isthmus.declared import open_alone  # noqa: PLC0415 — other verbs start without it

    database = find_database(args)
    data_lock = asyncio.run(lock_data_dir(Config(node="schema", data=str(database.parent))))
    try:
        with open_alone(database) as connection:
            yield connection
    finally:
        os.close(data_lock)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ClientError(f"{error.filename}: {error.strerror}") from None
    except (ReplicationError, sqlite3.Error, UnicodeDecodeError) as error:
        raise ClientError(str(error)) from None
