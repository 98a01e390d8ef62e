"""Clocks, merge, versions and protocols as state machines without I/O."""
