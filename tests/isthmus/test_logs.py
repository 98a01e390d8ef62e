from __future__ import annotations

import json
import logging
import sys
from typing import TYPE_CHECKING, Any

import pytest

from isthmus.logs import JsonFormatter, TextFormatter, escape, setup_logging

if TYPE_CHECKING:
    from collections.abc import Iterator

HOSTILE = "a\n12:00:00.000 error   agent  forged\x1b[2J\x00\x7f\x9b\u2028\udc80"


def record(message: str, *args: object, exc_info: Any = None, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("isthmus.test", logging.WARNING, "file.py", 1, message, args, exc_info)
    made.__dict__.update(extra)
    return made


def failure(message: str) -> Any:
    try:
        int(message)
    except ValueError as error:
        error.args = (message,)
        return sys.exc_info()


def test_text_line_tells_time_level_process_message_and_fields() -> None:
    line = TextFormatter("worker-0").format(record("moved %d", 3, machine="m1", took_ms=5))
    time, rest = line.split(" ", 1)
    assert len(time) == len("12:00:00.000")
    assert rest == "warning worker-0  moved 3  machine=m1  took_ms=5"


def test_json_line_tells_the_same_as_one_object() -> None:
    told = json.loads(JsonFormatter("agent").format(record("moved %d", 3, machine="m1", raw=b"x")))
    assert told.pop("time").endswith("+00:00")
    assert told == {
        "level": "warning",
        "process": "agent",
        "logger": "isthmus.test",
        "message": "moved 3",
        "machine": "m1",
        "raw": "b'x'",
    }


def test_hostile_value_stays_on_its_line_and_drives_no_terminal() -> None:
    for formatter in (TextFormatter("p"), JsonFormatter("p")):
        line = formatter.format(record("from %s", HOSTILE, path=HOSTILE))
        assert line.isprintable()
        line.encode()


def test_hostile_exception_can_not_pass_for_a_record() -> None:
    text = TextFormatter("p").format(record("failed", exc_info=failure(HOSTILE)))
    first, *below = text.split("\n")
    assert first.endswith("failed")
    assert below
    for line in below:
        assert line.startswith("  ")
        assert line.isprintable()
    told = json.loads(JsonFormatter("p").format(record("failed", exc_info=failure(HOSTILE))))
    assert "ValueError" in told["exception"]


def test_number_too_large_for_json_libraries_is_still_logged() -> None:
    assert str(1 << 70) in JsonFormatter("p").format(record("big", size=1 << 70))


def test_plain_text_is_left_as_it_is() -> None:
    assert escape("grüße, 世界") == "grüße, 世界"
    assert escape("a\tb\x7f") == "a\\tb\\x7f"


@pytest.fixture
def untouched_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    quiet = {name: logging.getLogger(name).level for name in ("aiohttp.access", "aiosqlite", "asyncio")}
    root.handlers.clear()
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, was in quiet.items():
        logging.getLogger(name).setLevel(was)


@pytest.mark.usefixtures("untouched_logging")
@pytest.mark.parametrize("form", ["text", "json"])
def test_level_and_form_are_as_configured(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(form, "warning", "agent")
    log = logging.getLogger("isthmus.test")
    log.info("not told")
    log.warning("told")
    written = capsys.readouterr().err
    assert len(written.splitlines()) == 1
    assert "not told" not in written
    assert written.startswith("{") == (form == "json")
