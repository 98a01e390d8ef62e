from __future__ import annotations

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.toml_lines import find_line

TEXT = """\
node = "a"            # 1
proxy.listen = "b"    # 2
[admin]               # 3
listen = "c"          # 4

  [ gossip ] # six
  "join" = [          # 7
    "d",              # 8
  ]
[regions.lab]         # 10
latitude = 1          # 11
[[apps]]              # 12
name = "one"          # 13
machines = [          # 14
  { address = "e" },  # 15
]
[[apps]]              # 17
name = "two"          # 18
[[apps.machines]]     # 19
address = "f"         # 20
[[apps.machines]]     # 21
address = "g"         # 22
[[apps]]              # 23
[[apps.machines]]     # 24
address = "h"         # 25
"""


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("node", 1),
        ("proxy.listen", 2),
        ("admin.listen", 4),
        ("gossip.join", 7),
        ("gossip.join[0]", 7),
        ("regions.lab.latitude", 11),
        ("apps[0].name", 13),
        ("apps[1].name", 18),
        ("apps[1].machines[0].address", 20),
        ("apps[1].machines[1].address", 22),
        ("apps[2].machines[0].address", 25),
    ],
)
def test_key_is_found_on_its_line(path: str, line: int) -> None:
    tomllib.loads(TEXT)
    assert find_line(TEXT, path) == line


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("admin.token", 3),
        ("gossip", 6),
        ("regions.lab.longitude", 10),
        ("apps[0].machines[0].address", 14),
        ("apps[1].machines[1].region", 21),
        ("apps[2].name", 23),
        ("apps[...].name", 13),
    ],
)
def test_absent_key_is_found_where_it_would_be(path: str, line: int) -> None:
    assert find_line(TEXT, path) == line


@pytest.mark.parametrize("path", ["", "log", "log.level"])
def test_what_the_file_says_nothing_of_has_no_line(path: str) -> None:
    assert find_line(TEXT, path) is None


@given(st.text(max_size=200), st.text(max_size=40))
def test_any_text_and_path_give_a_line_of_the_text_or_none(text: str, path: str) -> None:
    found = find_line(text, path)
    assert found is None or 1 <= found <= len(text.splitlines())
