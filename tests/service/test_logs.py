"""Logs: one JSON object a line, with its context, and never a secret."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from typing import Any

import pytest

from service.infra.logs import MASK, JsonFormatter, Redactor, configure_logging, log_context, secrets_of
from service.infra.settings import load_settings


def line(message: str, *args: object, redact: Redactor | None = None, **fields: Any) -> dict[str, Any]:
    record = logging.LogRecord("here", logging.INFO, __file__, 1, message, args, None)
    vars(record).update(fields)
    found: dict[str, Any] = json.loads(JsonFormatter(redact or Redactor()).format(record))
    return found


def test_lines_carry_context_and_fields() -> None:
    with log_context(audit_id="01J"), log_context(stage="sae"):
        inside = line("step %d", 3, seconds=1.5)
    assert {name: inside[name] for name in ("message", "audit_id", "stage", "seconds", "level", "logger")} == {
        "message": "step 3",
        "audit_id": "01J",
        "stage": "sae",
        "seconds": 1.5,
        "level": "INFO",
        "logger": "here",
    }
    assert "audit_id" not in line("after")


def test_several_lines_in_a_message_stay_one_line() -> None:
    record = logging.LogRecord("here", logging.INFO, __file__, 1, 'a\nb "c"', None, None)
    assert "\n" not in JsonFormatter(Redactor()).format(record)


@pytest.mark.parametrize(
    "secret",
    [
        "sk-safer-AbC_123-xyz",
        "hf_abcdefGHIJKL",
        "X-Amz-Signature=0123456789abcdef",
        "Bearer abc.def.ghi",
        "postgresql+psycopg://user:pass-word@host/db",
    ],
)
def test_what_looks_like_a_secret_is_masked(secret: str) -> None:
    hidden = secret.removeprefix("X-Amz-Signature=").removeprefix("Bearer ").removeprefix("postgresql+psycopg://user:")
    hidden = hidden.removesuffix("@host/db")
    text = json.dumps(line(f"got {secret} there", url=secret))
    assert hidden not in text
    assert text.count(MASK) == 2


def test_secret_settings_are_masked_by_value(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SAFER_S3_SECRET_KEY", "correct horse battery")
    monkeypatch.setenv("SAFER_DATABASE_URL", "postgresql+psycopg://u:canary-in-url@h/d")
    settings = load_settings()
    assert "correct horse battery" in secrets_of(settings)
    assert "correct horse" not in repr(settings)
    before = logging.getLogger().handlers[:]
    try:
        configure_logging(settings)
        logging.getLogger("x").error("failed with %s", {"key": "correct horse battery", "url": "u:canary-in-url@h"})
        try:
            raise RuntimeError("correct horse battery")
        except RuntimeError:
            logging.getLogger("x").exception("trace")
    finally:
        logging.getLogger().handlers[:] = before
    lines = [json.loads(text) for text in capsys.readouterr().err.splitlines()]
    assert len(lines) == 2
    assert "correct horse" not in json.dumps(lines)
    assert "Traceback" in lines[1]["exception"]


def test_what_libraries_warn_of_is_a_line_like_others() -> None:
    code = (
        "import warnings; from service.infra.logs import configure_logging; from service.infra.settings import load_settings\n"
        "configure_logging(load_settings())\n"
        "warnings.warn('mind\\nthe gap, hf_abcdefGHIJKL', RuntimeWarning)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (told,) = [json.loads(each) for each in done.stderr.splitlines()]
    assert (told["level"], told["logger"]) == ("WARNING", "py.warnings")
    assert "the gap" in told["message"]
    assert "hf_abc" not in done.stderr
