"""`isthmus run`: one node, until it is told to stop."""

from __future__ import annotations

import asyncio
import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isthmus import __version__, compiled
from isthmus.config_sources import load_config
from isthmus.credentials import read_ring
from isthmus.logs import setup_logging
from isthmus.succession import find_command, read_or_revive, take_over
from isthmus.supervisor import NodeInfo, Supervisor, check_files

if TYPE_CHECKING:
    import argparse

    from isthmus.config import Config

# Flags and the settings that they give.
_SETTINGS = {
    "listen": "proxy.listen",
    "tls_listen": "tls.listen",
    "tls_certificates": "tls.certificates",
    "admin_listen": "admin.listen",
    "gossip_listen": "gossip.listen",
    "peering_listen": "peering.listen",
    "advertise": "gossip.advertise",
    "join": "gossip.join",
    "node": "node",
    "region": "region",
    "data": "data",
    "workers": "workers",
    "log_level": "log.level",
    "log_format": "log.format",
}


def add_parser(verbs: Any) -> None:
    """Add `run`."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "run",
        help="run a node",
        description="Run a node: proxy, agent and admin listener. Everything has a default. Flags win over "
        "the environment (ISTHMUS_…), and that over the file.",
    )
    parser.add_argument("--config", metavar="FILE", type=Path, help="TOML file [ISTHMUS_CONFIG]")
    parser.add_argument("--listen", metavar="HOST:PORT", help="where clients connect (127.0.0.1:8080)")
    parser.add_argument("--tls-listen", metavar="HOST:PORT", help="where clients connect over TLS")
    parser.add_argument(
        "--tls-certificates",
        metavar="PATH",
        action="append",
        help="a directory of certificates and keys, or CERT:KEY",
    )
    parser.add_argument(
        "--admin-listen", metavar="HOST:PORT", help="admin API and dashboard (127.0.0.1:8471)"
    )
    parser.add_argument(
        "--gossip-listen", metavar="HOST:PORT", help="where other nodes connect (127.0.0.1:8472)"
    )
    parser.add_argument(
        "--peering-listen",
        metavar="HOST:PORT",
        help="where other nodes send requests for machines of this one",
    )
    parser.add_argument(
        "--advertise", metavar="HOST:PORT", help="gossip address to tell others, if not the one above"
    )
    parser.add_argument(
        "--join",
        metavar="HOST:PORT",
        action="append",
        help="a node to join; a name stands for all its addresses",
    )
    parser.add_argument("--node", metavar="NAME", help="name of this node (the host's)")
    parser.add_argument("--region", metavar="CODE", help="region of this node")
    parser.add_argument("--data", metavar="DIR", help="where the database lives")
    parser.add_argument(
        "--workers", metavar="N", type=int, help="worker processes; 0 runs all in one process (1)"
    )
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"))
    parser.add_argument("--log-format", choices=("text", "json"))
    parser.add_argument(
        "--dry-run", action="store_true", help="load everything, check the configuration, and exit"
    )
    front = parser.add_argument_group("front one app")
    front.add_argument("--app", metavar="NAME", help="an app to serve")
    front.add_argument("--host", metavar="HOST", action="append", help="a host name that leads to it (any)")
    front.add_argument(
        "--machine", metavar="HOST:PORT", action="append", help="where it runs; may be repeated"
    )
    front.add_argument("--check", metavar="PATH", help="probe each machine at this path")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """Run until SIGTERM or Ctrl-C."""
    file = args.config or (Path(os.environ["ISTHMUS_CONFIG"]) if os.environ.get("ISTHMUS_CONFIG") else None)
    flags: dict[str, Any] = {setting: getattr(args, flag) for flag, setting in _SETTINGS.items()}
    flags["apps"] = _front(args)

    def read(*, is_start: bool = False) -> Config:
        return load_config(file, flags, is_start=is_start)

    handover = take_over(os.environ)
    config = read_or_revive(lambda: read(is_start=True), handover)
    setup_logging(config.log.format, config.log.level, "node")
    if args.dry_run:
        return _rehearse(config)

    compiled.FINDER.warn()
    software = f"isthmus {__version__} ({compiled.describe()})"

    def announce(info: NodeInfo) -> None:
        print(_banner(software, config, info), flush=True)

    if config.workers == 0 and handover is None:
        # All parts of the node are loaded here and not above: a supervisor needs none of them.
        from isthmus.single import run_single  # noqa: PLC0415 — see above

        run_single(config, announce, read)
    else:
        command = find_command()
        asyncio.run(Supervisor(config, announce, read=read, command=command, handover=handover).run())
    return 0


def _rehearse(config: Config) -> int:
    """Load what a node's processes load, and look at the files that the configuration names."""
    for module in ("isthmus.agent_role", "isthmus.child", "isthmus.single", "isthmus.worker_role"):
        importlib.import_module(module)
    check_files(config)
    read_ring(config.gossip)
    print(f"the configuration of node {config.node} is good; nothing was started")
    return 0


def _front(args: argparse.Namespace) -> list[dict[str, Any]] | None:
    if args.app is None:
        if args.machine or args.host or args.check:
            args.parser.error("--machine, --host and --check go with --app NAME")
        return None
    app: dict[str, Any] = {
        "name": args.app,
        "machines": [{"address": address} for address in args.machine or ()],
    }
    if args.host:
        app["hosts"] = args.host
    if args.check:
        app["checks"] = [{"path": args.check}]
    return [app]


def _banner(software: str, config: Config, info: NodeInfo) -> str:
    sealed = "sealed with the cluster key" if config.gossip.sealed else "no cluster key, this machine only"
    tls = f"   https://{info.tls}" if info.tls else ""
    peering = f"  peers   {info.peering}\n" if info.peering else ""
    return (
        f"{software}   node {info.node}   region {info.region}\n"
        f"  proxy   http://{info.listen}{tls}\n"
        f"  admin   http://{info.admin}\n"
        f"  gossip  {info.gossip} ({sealed})\n{peering}"
        f"  data    {config.data}"
    )
