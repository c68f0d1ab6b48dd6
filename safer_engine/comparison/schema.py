"""Write the JSON Schema of comparison.json: `python -m safer_engine.comparison.schema docs/comparison.schema.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from safer_engine.comparison.model import json_schema


def schema_text() -> str:
    """The schema as it is published."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(schema_text(), encoding="utf-8")
