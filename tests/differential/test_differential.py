"""Where isthmus, nginx and HAProxy disagree, the documentation says why."""

from __future__ import annotations

import pytest
import uvloop

from tests.differential.comparison import PAGE, compare, find_unexplained, name_versions, render
from tests.differential.peers import PACKAGES, find

MISSING = [package for program, package in PACKAGES.items() if find(program) is None]


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: apt-get install {' '.join(MISSING)}")
def test_every_disagreement_with_other_proxies_is_explained() -> None:
    page = PAGE.read_text("utf-8")
    if name_versions() not in page:
        pytest.skip(f"{name_versions()}: docs/differences.md is about other versions")
    comparison = uvloop.run(compare())
    assert find_unexplained(comparison) == []
    # python -m tests.differential writes it anew.
    assert render(comparison) == page
