"""`isthmus key`: make cluster keys, and change the ring of a node while it runs.

Decides which order of steps is safe on one node: a key is added before it seals, and is removed when it seals
no more. Whether the other nodes have followed is for the operator to know. Invariant: the key file is valid
before and after each verb.
"""

from __future__ import annotations

import base64
import os
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isthmus.client import AdminClient
from isthmus.config import Config, ConfigError, decode_key
from isthmus.config_sources import load_config
from isthmus.credentials import compute_id, read_keys, write_keys
from isthmus.supervisor import read_node_info
from replication.seal import KEYS_MAX

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence


def add_parser(verbs: Any) -> None:
    """Add `key`."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "key",
        help="make a cluster key, or change those of this node",
        description="Alone: print 32 random bytes in base64, for gossip.keys or the key file. With a verb: "
        "show or change the key file (gossip.keys_file) and have the running node read it.",
    )
    parser.set_defaults(run=run)
    actions = parser.add_subparsers(metavar="VERB")
    for name, act, about in (
        ("list", run_list, "show the keys, the one that seals first"),
        ("add", run_add, "add a key that opens; without KEY, make one and print it"),
        ("use", run_use, "seal with a key from now on"),
        ("remove", run_remove, "remove a key, and close the streams that were made with it"),
    ):
        action = actions.add_parser(name, help=about, description=f"{about[:1].upper()}{about[1:]}.")
        action.add_argument("--config", metavar="FILE", type=Path, help="TOML file [ISTHMUS_CONFIG]")
        action.add_argument("--data", metavar="DIR", help="data directory of the node [ISTHMUS_DATA]")
        if name == "add":
            action.add_argument("key", metavar="KEY", nargs="?", help="in base64; - reads it from stdin")
        elif name != "list":
            action.add_argument("key", metavar="ID", help="of the key, as `list` shows it")
        action.set_defaults(run=act)


def run(_args: argparse.Namespace) -> int:
    """Print a new key."""
    print(_make_key())
    return 0


def run_list(args: argparse.Namespace) -> int:
    """Print the ids of the keys in the file, and say so when the node has others in use."""
    config, file = _find(args)
    ids = [compute_id(key) for key in read_keys(file)]
    for id_ in ids:
        print(f"{id_}  {'seals and opens' if id_ == ids[0] else 'opens'}")
    client = _running(config)
    in_use = client.get("/v1/keys") if client is not None else None
    if in_use is not None and in_use["keys"] != ids:
        told = in_use["problem"] or "it has not read the file since; send it SIGHUP"
        print(f"the running node uses {', '.join(in_use['keys'])}: {told}")
    return 0


def run_add(args: argparse.Namespace) -> int:
    """Add a key behind the others."""
    config, file = _find(args)
    text = sys.stdin.readline().strip() if args.key == "-" else args.key or _make_key()
    try:
        key = decode_key(text)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if args.key is None:
        print(text, flush=True)  # even if the node then refuses: the file has it
    keys = list(read_keys(file)) if file.exists() else []
    if key not in keys:
        if len(keys) == KEYS_MAX:
            raise ConfigError(f"{file} holds {KEYS_MAX} keys already; remove one first")
        _adopt(config, file, [*keys, key])
    return 0


def run_use(args: argparse.Namespace) -> int:
    """Put a key first."""
    config, file = _find(args)
    key, others = _pick(file, args.key)
    _adopt(config, file, [key, *others])
    return 0


def run_remove(args: argparse.Namespace) -> int:
    """Remove a key that does not seal."""
    config, file = _find(args)
    key, others = _pick(file, args.key)
    if key == read_keys(file)[0]:
        raise ConfigError(f"{args.key} is the key that seals; have another one used first")
    _adopt(config, file, others)
    return 0


def _make_key() -> str:
    return base64.b64encode(secrets.token_bytes(32)).decode()


def _find(args: argparse.Namespace) -> tuple[Config, Path]:
    given = args.config or os.environ.get("ISTHMUS_CONFIG") or None
    config = load_config(given and Path(given), {"data": args.data})
    if not config.gossip.keys_file:
        raise ConfigError("gossip.keys_file is not set; say with --config which node is meant")
    return config, Path(config.gossip.keys_file)


def _pick(file: Path, id_: str) -> tuple[bytes, list[bytes]]:
    """Return the key with an id, and the others in their order."""
    keys = read_keys(file)
    for key in keys:
        if compute_id(key) == id_:
            return key, [other for other in keys if other != key]
    raise ConfigError(f"{file} has no key {id_}; it has {', '.join(map(compute_id, keys))}")


def _adopt(config: Config, file: Path, keys: Sequence[bytes]) -> None:
    write_keys(file, [f"{base64.b64encode(key).decode()}  # {compute_id(key)}" for key in keys])
    client = _running(config)
    if client is None:
        sys.stderr.write(f"{file} is written; no node runs with the data directory {config.data}\n")
        return
    client.post("/v1/reload")


def _running(config: Config) -> AdminClient | None:
    info = read_node_info(Path(config.data))
    return None if info is None else AdminClient(info.admin, config.admin.token)
