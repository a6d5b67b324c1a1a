"""The log, on stderr: a line of JSON or of text for each record, with the id of the request that it is about."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any, Literal

from .record import RECORD

LogFormat = Literal["text", "json"]


def configure_logs(log_format: LogFormat, level: str) -> None:
    """Sets logging up, unless the program that this runs in has done so.

    Args:
        log_format: of each line.
        level: "debug", "info", "warning" or "error", of what Loopsway says; libraries say nothing below "info".
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if log_format == "json" else TextLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    # No line tells these, and looking them up takes a third of making a record.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging.getLogger("loopsway").setLevel(level.upper())


class JsonLines(logging.Formatter):
    """An object a line: time, level, logger, message, the record's own fields, and the exception if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        facts = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            facts["exception"] = self.formatException(record.exc_info)
        return json.dumps(facts)


class TextLines(logging.Formatter):
    """The same for people: fields stand at the end, as key=value."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s%(fields_text)s")

    def format(self, record: logging.LogRecord) -> str:
        record.fields_text = "".join(f" {key}={value}" for key, value in _fields(record).items())
        return super().format(record)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields = getattr(record, "fields", {})
    request = RECORD.get()
    return fields if request is None else {"request_id": request.request_id} | fields
