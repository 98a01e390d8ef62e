"""`isthmus reload` and `isthmus upgrade`: change a running node without a stop."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from isthmus.client import ClientError, add_client_flags, make_client

if TYPE_CHECKING:
    import argparse

    from isthmus.client import AdminClient

# Loading a new program, starting its processes, and the pause of the agent between two of them.
_UPGRADE_S = 180.0
_LOOK_S = 0.2
# Declared apps are written to a database that others may hold for a moment.
_RELOAD_S = 60.0


def add_parser(verbs: Any) -> None:
    """Add `reload` and `upgrade`."""
    reload: argparse.ArgumentParser = verbs.add_parser(
        "reload",
        help="have a running node read its configuration again",
        description="Have a running node read its configuration, keys and certificates again. If something "
        "in them is wrong, nothing changes.",
    )
    add_client_flags(reload)
    reload.set_defaults(run=run_reload)
    upgrade: argparse.ArgumentParser = verbs.add_parser(
        "upgrade",
        help="replace the processes of a running node by those of the program that is installed now",
        description="Replace the processes of a running node by those of the program that is installed now. "
        "No request fails; if the new ones do not come up, the old ones go on.",
    )
    add_client_flags(upgrade)
    upgrade.set_defaults(run=run_upgrade)


def run_reload(args: argparse.Namespace) -> int:
    """Reload, and print what changed."""
    answer = make_client(args).post("/v1/reload", wait_s=_RELOAD_S)
    print(f"changed: {', '.join(answer['changed']) or 'nothing'}")
    if answer["restart"]:
        print(f"takes a restart or an upgrade: {', '.join(answer['restart'])}")
    return 0


def run_upgrade(args: argparse.Namespace) -> int:
    """Upgrade, and wait until the new processes serve, or do not."""
    client = make_client(args)
    before: int = client.post("/v1/upgrade")["generation"]
    deadline = time.monotonic() + _UPGRADE_S
    while time.monotonic() < deadline:
        time.sleep(_LOOK_S)
        status = _look(client)
        if status is None or status["lifecycle"]["is_upgrading"]:
            continue
        if status["lifecycle"]["generation"] > before:
            print(f"{status['software']} serves on {status['node']}")
            return 0
        sys.stderr.write(f"isthmus: all goes on as before: {status['lifecycle']['upgrade_problem']}\n")
        return 1
    raise ClientError(f"the upgrade is not over after {_UPGRADE_S:.0f} s; the log of the node says more")


def _look(client: AdminClient) -> Any:
    try:
        return client.get("/v1/status")
    except ClientError:
        return None  # between two agents
