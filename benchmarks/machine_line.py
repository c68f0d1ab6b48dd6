"""The machine a figure was measured on, in one line."""

from __future__ import annotations

import datetime
import os
import platform
from importlib import metadata
from pathlib import Path


def machine_line() -> str:
    """Processor, cores, memory, versions and date."""
    model = next((line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers"))
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    return f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB, Python {platform.python_version()}, {versions}, {today}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
