"""The application around routing, proxy and replication: command line, processes, wiring, admin API."""

import sys

from .compiled import FINDER

__version__ = "0.1.0"

# Before anything of proxy or routing is imported.
sys.meta_path.insert(0, FINDER)
