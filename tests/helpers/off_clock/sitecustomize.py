"""Imported by Python at its start where this folder is on the path: under libfaketime that leaves monotonic time alone, the
system call behind `time.sleep` is refused, so pauses are made by another.
"""

import select
import time


def sleep(seconds: float, /) -> None:
    """See `time.sleep`."""
    if seconds < 0:
        raise ValueError("sleep length must be non-negative")
    select.select((), (), (), seconds)


time.sleep = sleep  # type: ignore[assignment]
