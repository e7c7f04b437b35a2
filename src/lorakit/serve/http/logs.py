"""The server's log: one JSON object a line, each with the id of its request."""

from __future__ import annotations

import json
import logging
import time
import traceback
from typing import Any, TextIO


class JsonLines(logging.Formatter):
    """A log record as a line of JSON. What was passed as `extra={"data": {...}}` is added to the line."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        line: dict[str, Any] = {"time": when, "level": record.levelname.lower(), "event": record.getMessage()}
        line |= getattr(record, "data", {})
        if record.exc_info and record.exc_info[1] is not None:
            line["traceback"] = "".join(traceback.format_exception(record.exc_info[1]))
        return json.dumps(line, default=str, ensure_ascii=False)


def log_to(stream: TextIO, level: int = logging.INFO) -> None:
    """Send lorakit's log, and uvicorn's warnings, to a stream as lines of JSON."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    for name, least in (("lorakit", level), ("uvicorn", max(level, logging.WARNING))):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(least)
