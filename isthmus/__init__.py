"""The application around routing, proxy and replication: command line, processes, wiring, admin API."""

__version__ = "0.1.0"
