"""Write the JSON Schema of a policy: `python -m safer_engine.gate.schema docs/policy.schema.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from safer_engine.gate.policy import policy_schema


def schema_text() -> str:
    """The schema as it is published."""
    return json.dumps(policy_schema(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(schema_text(), encoding="utf-8")
