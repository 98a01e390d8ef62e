"""The command line's way to the admin API of a running node.

Decides which node is meant and how its refusals are told. Invariant: every failure is a ClientError with a
sentence that says what to do.
"""

from __future__ import annotations

import argparse
import http.client
import math
import os
import sys
import urllib.parse
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from isthmus.config import Config
from isthmus.config_sources import default_data_dir
from isthmus.logs import escape
from isthmus.supervisor import read_node_info

if TYPE_CHECKING:
    from collections.abc import Callable

TIMEOUT_S = 10.0


class ClientError(Exception):
    """The node could not be asked, or said no."""


class AdminClient:
    """Asks one node's admin API."""

    def __init__(self, base: str, token: str) -> None:
        self._token = token
        problem = f"--admin takes http://HOST:PORT, not `{base}`"
        try:
            parts = urllib.parse.urlsplit(base if "//" in base else f"//{base}")
            self._address = parts.netloc
            self._connection = http.client.HTTPConnection(self._address, timeout=TIMEOUT_S)
        except (ValueError, http.client.InvalidURL):  # half a bracket; a port that is no number
            raise ClientError(problem) from None
        if parts.scheme not in ("", "http") or not parts.netloc:
            raise ClientError(problem)

    def get(self, path: str, wait_s: float = 0.0) -> Any:
        """Return what is at the path; the node may take so long on purpose."""
        self._connection.timeout = TIMEOUT_S + wait_s
        return self._ask("GET", path, None)

    def post(self, path: str, body: Any = None, wait_s: float = 0.0) -> Any:
        """Change something, and return what the node says of it; it may take so long on purpose."""
        self._connection.timeout = TIMEOUT_S + wait_s
        return self._ask("POST", path, body)

    def delete(self, path: str) -> Any:
        """Remove something, and return what the node says of it."""
        return self._ask("DELETE", path, None)

    def _ask(self, method: str, path: str, body: Any) -> Any:
        headers: dict[str, str | bytes] = {}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}".encode()  # as text it would become Latin-1
        payload = None
        if body is not None:
            payload = orjson.dumps(body)
            headers["Content-Type"] = "application/json"
        connection = self._connection
        try:
            connection.request(method, path, payload, headers)
            response = connection.getresponse()
            content = response.read()
            if response.getheader("fly-proxy-error") or response.getheader("Via", "").endswith("isthmus"):
                raise ClientError(
                    f"{self._address} is where clients connect; say with --admin HOST:PORT where the admin "
                    "listener is (`isthmus run` prints it)"
                )
            answer = orjson.loads(content)
        except (OSError, http.client.HTTPException, ValueError) as error:
            why = "another program does" if isinstance(error, orjson.JSONDecodeError) else error
            raise ClientError(
                f"no isthmus answers at {self._address} ({why}); start one with `isthmus run`, "
                "or say where it is with --admin HOST:PORT"
            ) from None
        finally:
            connection.close()
        if response.status == HTTPStatus.UNAUTHORIZED:
            raise ClientError("the admin token is missing or wrong: give it with --token or ISTHMUS_TOKEN")
        if response.status >= 400:
            told = answer.get("error") if isinstance(answer, dict) else None
            raise ClientError(str(told or f"{self._address} answers with status {response.status}"))
        return answer


def tell_warnings(answer: dict[str, Any]) -> None:
    """Tell what the node did all the same, though it may be a mistake."""
    for warning in answer.get("warnings", ()):  # an older node has none
        sys.stderr.write(f"isthmus: warning: {escape(warning)}\n")


def quote(part: str) -> str:
    """Make a name fit for one segment of a path."""
    return urllib.parse.quote(part, safe="")


def add_client_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which node is asked."""
    parser.add_argument(
        "--admin", metavar="HOST:PORT", help="admin listener of the node to ask [ISTHMUS_ADMIN]"
    )
    parser.add_argument(
        "--data", metavar="DIR", type=Path, help="data directory of the node to ask [ISTHMUS_DATA]"
    )
    parser.add_argument("--token", help="admin token, where one is set [ISTHMUS_TOKEN]")


def add_asking_flags(parser: argparse.ArgumentParser) -> None:
    """Add these, and the flag that has the answer printed as it came."""
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_client_flags(parser)


def number_type(least: float, most: float, kind: type[float] = float) -> Callable[[str], float]:
    """Return the type of a flag that takes numbers from `least` to `most`."""

    def read(text: str) -> float:
        try:
            number = kind(text)
        except ValueError:
            number = math.nan
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"`{text}` is no number from {least:.10g} to {most:.10g}")
        return number

    return read


def make_client(args: argparse.Namespace) -> AdminClient:
    """Return a client for the node that the flags, the environment or the data directory name."""
    token = args.token or os.environ.get("ISTHMUS_TOKEN", "")
    base = args.admin or (None if args.data else os.environ.get("ISTHMUS_ADMIN"))
    if base:
        return AdminClient(base, token)
    data = find_data_dir(args)
    info = read_node_info(data)
    if info is None:
        raise ClientError(
            f"no isthmus runs with the data directory {data}; start one with `isthmus run`, "
            "or say which node to ask with --admin HOST:PORT or --data DIR"
        )
    return AdminClient(info.admin, token)


def find_data_dir(args: argparse.Namespace) -> Path:
    """Return the data directory that the flags or the environment name."""
    return Path(args.data or os.environ.get("ISTHMUS_DATA") or default_data_dir(os.environ))


def find_database(args: argparse.Namespace) -> Path:
    """Return the database of a node of this machine, for those who read the file and ask no node."""
    data = find_data_dir(args).absolute()
    database = Config(node="data", data=str(data)).database
    if not database.exists():
        raise ClientError(
            f"there is no database in {data}: start the node once, or say with --data DIR or ISTHMUS_DATA "
            "where one of this machine keeps its own; no node is asked here, so ISTHMUS_ADMIN is of no use"
        )
    return database
