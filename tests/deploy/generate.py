"""Writes what follows from something else: `make chart`, or `python -m tests.deploy.generate`.

The table of values in the chart's README (from the comments of values.yaml), the settings in its schema (from the service's
settings), and the golden renderings.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from service.infra.settings import Settings
from tests.deploy.rendering import CHART, GOLDEN, SETS, text_of

README, SCHEMA, VALUES_FILE = CHART / "README.md", CHART / "values.schema.json", CHART / "values.yaml"
BEGIN, END = "<!-- values -->\n", "<!-- end of values -->\n"
OF_THE_CHART = {
    *("home", "database_url", "broker_url", "store_url", "presign", "host", "port", "allowed_hosts", "public_url"),
    *("s3_endpoint", "s3_region", "s3_access_key", "s3_secret_key", "s3_sse", "s3_kms_key", "metrics_public"),
    *("callback_secret", "secret_pepper", "hub_token", "labeller_api_key", "queues", "device", "precision_device"),
    *("worker_memory_bytes", "cache_bytes", "artifact_cache_bytes", "metrics_port", "terminate_seconds"),
}
"""Settings that other values of the chart give."""
_KEPT = ("type", "enum", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "description")
_KEY = re.compile(r"( *)([A-Za-z][A-Za-z0-9]*):")


def documented_values(text: str) -> list[tuple[str, str]]:
    """(path, description) of every value, in order. A value's description is the comment right above it."""
    found: list[tuple[str, str]] = []
    above: list[str] = []
    parents: list[tuple[int, str]] = []
    inside = 10_000  # indentation of the last value that has a description: what is deeper belongs to it
    for line in text.splitlines():
        key = _KEY.match(line)
        if not line.strip():
            above = []
        elif line.strip().startswith("#"):
            above.append(line.strip().lstrip("# "))
        elif key and len(key[1]) <= inside:
            parents = [each for each in parents if each[0] < len(key[1])] + [(len(key[1]), key[2])]
            if above:
                found.append((".".join(name for _, name in parents), " ".join(above)))
            inside, above = (len(key[1]) if above else 10_000), []
    return found


def value_at(values: Any, path: str) -> Any:
    """The value at a path `a.b.c`."""
    for name in path.split("."):
        values = values[name]
    return values


def values_table() -> str:
    """The table of values, in Markdown."""
    text = VALUES_FILE.read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    rows = ["| value | default | what it is |\n| --- | --- | --- |\n"]
    for path, description in documented_values(text):
        default = json.dumps(value_at(values, path), ensure_ascii=False).replace("|", "\\|")
        rows.append(f"| `{path}` | `{default}` | {description} |\n")
    return "".join(rows)


def readme() -> str:
    """The chart's README with the table as it should be."""
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{values_table()}\n{END}{after}"


def settings_schema() -> dict[str, Any]:
    """JSON Schema of the value `settings`: all settings of the service that no other value gives."""
    known = Settings.model_json_schema()["properties"]
    properties = {name: _setting(about) for name, about in known.items() if name not in OF_THE_CHART}
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _setting(about: dict[str, Any]) -> dict[str, Any]:
    kept = {name: about[name] for name in _KEPT if name in about}
    if kept.get("type") == "array":
        kept["items"] = {"type": "string", "minLength": 1}
    return kept


def schema() -> str:
    """The chart's schema with the settings as they should be."""
    document = json.loads(SCHEMA.read_text(encoding="utf-8"))
    document["properties"]["settings"] = settings_schema()
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def generated() -> dict[Path, str]:
    """Every file that is made from something else, and what should be in it."""
    goldens = {GOLDEN / f"{name}.yaml": text_of(name) for name in SETS}
    return {README: readme(), SCHEMA: schema(), **goldens}


if __name__ == "__main__":
    # The schema first: Helm reads it when it renders.
    SCHEMA.write_text(schema(), encoding="utf-8")
    GOLDEN.mkdir(exist_ok=True)
    for path, text in generated().items():
        path.write_text(text, encoding="utf-8")
