"""Rollouts: settings or tables for all nodes, taken up by some first, watched, then by all, or taken back."""
