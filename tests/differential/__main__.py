"""`python -m tests.differential`: compare with nginx and HAProxy, and write docs/differences.md."""

from __future__ import annotations

import sys

import uvloop

from tests.differential.comparison import PAGE, compare, find_unexplained, render

if __name__ == "__main__":
    comparison = uvloop.run(compare())
    PAGE.write_text(render(comparison), "utf-8")
    unexplained = find_unexplained(comparison)
    print(*unexplained, sep="\n")
    sys.exit(bool(unexplained))
