"""The service runs where the engine's libraries are not installed (Dockerfile.service)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys

class Engine:
    absent = set(
        "numpy torch pandas transformers datasets scipy sklearn peft accelerate safetensors tokenizers huggingface_hub".split()
    )

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Engine())
import service.__main__, service.client.client, service.http.app, service.manage, service.source_policy
print("RESULT imported")
"""


def test_the_service_is_imported_without_the_engines_libraries() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, cwd=root)
    assert done.stdout.splitlines()[-1:] == ["RESULT imported"], done.stderr
