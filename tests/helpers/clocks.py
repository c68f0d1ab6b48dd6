"""Processes whose clock is off, by libfaketime: parent and children alike, whatever library asks for the time."""

from __future__ import annotations

import os
import re
from pathlib import Path

from tests.helpers.servers import missing
from tests.helpers.workplace import ROOT

_SITE = Path(__file__).with_name("off_clock")
_SHARED = Path("/dev/shm")
_LIBRARY = "faketime/libfaketimeMT.so.1"


def off_by(seconds: int) -> dict[str, str]:
    """Environment of a process whose clock is so many seconds ahead; below 0, behind.

    Files are dated by it too. Time that only goes on, by which pauses are measured, is left as it is.
    """
    sweep()
    found = next(iter(sorted(Path("/usr/lib").glob(f"*/{_LIBRARY}"))), None)
    if found is None:
        missing("libfaketime (Debian: libfaketime)")
    return {
        "LD_PRELOAD": str(found),
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(_SITE))),
        "FAKETIME": f"{seconds:+d}",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }


def sweep() -> None:
    """Remove what libfaketime keeps in memory for processes that are gone: it refuses to run where another left the same name."""
    for path in _SHARED.glob("*faketime_*"):
        number = re.search(r"\d+$", path.name)
        if number is not None and not Path("/proc", number[0]).exists():
            path.unlink(missing_ok=True)
