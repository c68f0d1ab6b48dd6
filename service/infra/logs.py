"""JSON lines on standard error: one object a line, with the job and stage at hand, and no secret or dataset text in it."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from pydantic import SecretStr

from service.infra.settings import Settings, unknown_settings

MASK = "***"
_CONTEXT: ContextVar[dict[str, str] | None] = ContextVar("safer_log_context", default=None)
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}
_PATTERNS = (
    re.compile(r"sk-safer-[A-Za-z0-9_-]+"),
    re.compile(r"\bhf_[A-Za-z0-9]{8,}"),
    re.compile(r"(?<=://)[^/@\s:]*:[^/@\s]+(?=@)"),
    re.compile(r"(?i)(?<=X-Amz-Signature=)[0-9a-f]+|(?<=X-Amz-Credential=)[^&\s\"]+|(?<=X-Amz-Security-Token=)[^&\s\"]+"),
    re.compile(r"(?i)(?<=bearer )\S+"),
)
_MIN_SECRET = 6
"""Shorter values of secret settings are not looked for: they would mask ordinary words."""


@contextmanager
def log_context(**names: str) -> Iterator[None]:
    """Add fields (`audit_id`, `stage`) to every line logged inside, in this thread or task."""
    token = _CONTEXT.set({**(_CONTEXT.get() or {}), **names})
    try:
        yield
    finally:
        _CONTEXT.reset(token)


def secrets_of(settings: Settings) -> tuple[str, ...]:
    """Values of the settings that are secret, longest first."""
    values = (value.get_secret_value() for _, value in settings if isinstance(value, SecretStr))
    return tuple(sorted((value for value in values if len(value) >= _MIN_SECRET), key=len, reverse=True))


class Redactor:
    """Masks secrets by value, and what looks like one."""

    def __init__(self, secrets: tuple[str, ...] = ()) -> None:
        self._secrets = secrets

    def __call__(self, text: str) -> str:
        """The text without secrets."""
        for secret in self._secrets:
            text = text.replace(secret, MASK)
        for pattern in _PATTERNS:
            text = pattern.sub(MASK, text)
        return text


class JsonFormatter(logging.Formatter):
    """A record as one JSON object: at, level, logger, message, context, fields given as `extra`, and an exception's trace."""

    def __init__(self, redact: Redactor) -> None:
        super().__init__()
        self._redact = redact

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter.format`."""
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {"at": at, "level": record.levelname, "logger": record.name, "message": record.getMessage()}
        line |= _CONTEXT.get() or {}
        line |= {name: value for name, value in vars(record).items() if name not in _STANDARD and not name.startswith("_")}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(_within(line, self._redact), ensure_ascii=False, default=lambda value: self._redact(str(value)))


def _within(value: Any, redact: Redactor) -> Any:
    """The value with every string in it redacted: masking the JSON text instead could cut through its quotes."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {redact(str(name)): _within(each, redact) for name, each in value.items()}
    return [_within(each, redact) for each in value] if isinstance(value, (list, tuple)) else value


def configure_logging(settings: Settings) -> None:
    """Send all logs of this process, and what libraries warn of, to standard error as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(Redactor(secrets_of(settings))))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level)
    logging.captureWarnings(True)
    for loud in ("alembic", "botocore", "boto3", "urllib3", "httpx", "httpcore", "uvicorn.access"):
        logging.getLogger(loud).setLevel(logging.WARNING)
    for line in unknown_settings():
        logging.getLogger(__name__).warning("%s", line)
