"""What all tests share.

They run plain Python, whatever was compiled; with ISTHMUS_COMPILED=1 compiled modules or not at all.

Property tests draw the same examples in every run, so that a failure is of the change that is tested; run
them with `--hypothesis-profile=default` to look for new ones.
"""

import os

import pytest
from hypothesis import settings

from isthmus import compiled, compiler

# For what the tests start, too. Read when the first module of proxy or routing is imported.
os.environ.setdefault(compiled.VARIABLE, "0")
obstacle = compiler.find_obstacle()
if os.environ[compiled.VARIABLE] == "1" and obstacle is not None:
    pytest.exit(f"compiled modules are not tested: {obstacle}", returncode=0)

settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")
