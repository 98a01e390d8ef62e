"""Checks: probes of machines, what becomes of their results, and who makes them."""
