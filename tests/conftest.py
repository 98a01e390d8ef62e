"""What all tests share.

Property tests draw the same examples in every run, so that a failure is of the change that is tested; run
them with `--hypothesis-profile=default` to look for new ones.
"""

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")
