"""Structured logs on standard error: one line a record, as text or as JSON.

Decides the form of a line. Invariant: nothing that came from outside can begin a new line or drive a
terminal, because control characters are escaped in every value.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

import orjson

_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


def setup_logging(form: str, level: str, process: str) -> None:
    """Send every log record of this process to standard error, in `form` "text" or "json"."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(process) if form == "json" else TextFormatter(process))
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    # These tell of every connection or query; they are for the debugging of those libraries.
    for noisy in ("aiohttp.access", "aiosqlite", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return {key: value for key, value in record.__dict__.items() if key not in _STANDARD}


def escape(text: str) -> str:
    """Return the text with control characters written as escapes."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class TextFormatter(logging.Formatter):
    """`12:00:00.000 info  worker-0  what happened  key=value`."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line, and a traceback's lines below it."""
        time = datetime.fromtimestamp(record.created, UTC).strftime("%H:%M:%S.%f")[:-3]
        extra = "".join(f"  {key}={escape(str(value))}" for key, value in _fields(record).items())
        line = f"{time} {record.levelname.lower():<7} {self._process}  {escape(record.getMessage())}{extra}"
        if record.exc_info:
            # An exception's message may hold anything; indented, none of its lines can pass for a record.
            below = self.formatException(record.exc_info).splitlines()
            line = "\n".join([line, *(f"  {escape(text)}" for text in below)])
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, process, logger, message, and the record's own fields."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line of JSON."""
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return _dump(entry)


def _dump(entry: dict[str, Any]) -> str:
    try:
        line = orjson.dumps(entry, default=str, option=orjson.OPT_NON_STR_KEYS).decode()
    except TypeError:
        line = ""  # lone surrogates, or integers above 64 bits
    if line.isprintable() and line:
        return line
    # JSON leaves C1 control characters and line separators as they are; ASCII has only DEL of that kind.
    return json.dumps(entry, default=str, skipkeys=True).replace("\x7f", "\\u007f")
