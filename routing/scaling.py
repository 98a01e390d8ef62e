"""When machines are started and stopped by themselves: `autostart` and its neighbours in `services.options`.

Decides which wishes are acceptable; refuses to know how a machine is started. Invariant: a service without
any of them has its machines started when somebody asks, and never stopped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

# As in the JSON, where they stand beside the other options of the service.
NAMES: Final = ("autostart", "autostop", "min_machines_running", "primary_region")
AUTOSTOPS: Final = ("off", "stop", "suspend")
MACHINES_MAX: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class Scaling:
    """As on Fly: `min_running` counts in the primary region only."""

    autostart: bool = True
    autostop: str = "off"
    min_running: int = 0
    primary_region: str = ""  # empty: no region has a minimum


USUAL: Final = Scaling()


def parse_scaling(fields: dict[str, object]) -> Scaling:
    """Return what the options say. Raises ValueError."""
    autostart = fields.get("autostart", True)
    if not isinstance(autostart, bool):
        raise ValueError("autostart must be true or false")  # noqa: TRY004 - as all of a row's faults
    autostop = fields.get("autostop", "off")
    # Fly's API answers with booleans for the two that it had first.
    autostop = {True: "stop", False: "off"}[autostop] if isinstance(autostop, bool) else autostop
    if not isinstance(autostop, str) or autostop not in AUTOSTOPS:
        raise ValueError(f"autostop must be one of {', '.join(AUTOSTOPS)}")
    least = fields.get("min_machines_running", 0)
    if not isinstance(least, int) or isinstance(least, bool) or not 0 <= least <= MACHINES_MAX:
        raise ValueError("min_machines_running must be a number of machines")
    primary = fields.get("primary_region", "")
    if not isinstance(primary, str) or len(primary) > 32:
        raise ValueError("primary_region must be the code of a region")
    return Scaling(autostart, autostop, least, primary)
