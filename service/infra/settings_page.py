"""The page of settings, from the settings themselves: `python -m service.infra.settings_page > docs/settings.md`."""

from __future__ import annotations

import sys
from typing import Any

from pydantic import SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from service.infra.settings import Settings

_HEAD = """# Settings

Every process of the service and its workers reads these environment variables at its start. A value that is wrong stops the
start and is named. Values marked *secret* are never shown, logged or stored. Lists are separated by commas.

| variable | default | limits | what it is |
| --- | --- | --- | --- |
"""
_BOUNDS = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))


def settings_page() -> str:
    """The page, in Markdown."""
    return _HEAD + "".join(f"{_row(name, field)}\n" for name, field in Settings.model_fields.items())


def _row(name: str, field: FieldInfo) -> str:
    secret = " *secret*" if "SecretStr" in str(field.annotation) else ""
    return f"| `SAFER_{name.upper()}` | {_shown(field.default)} | {_limits(field)} | {field.description}{secret} |"


def _shown(value: Any) -> str:
    if value is PydanticUndefined or value is None or value in ("", ()):
        return ""
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    if isinstance(value, tuple):
        value = ",".join(value)
    if isinstance(value, bool):
        value = str(value).lower()
    return f"`{value}`"


def _limits(field: FieldInfo) -> str:
    found = [f"{sign} {getattr(rule, name)}" for rule in field.metadata for name, sign in _BOUNDS if hasattr(rule, name)]
    return ", ".join(found) or _choices(str(field.annotation))


def _choices(annotation: str) -> str:
    if not annotation.startswith("typing.Literal["):
        return ""
    values = annotation.removeprefix("typing.Literal[").removesuffix("]").replace("'", "").split(", ")
    return ", ".join(f"`{value}`" for value in values if value)


if __name__ == "__main__":
    sys.stdout.write(settings_page())
