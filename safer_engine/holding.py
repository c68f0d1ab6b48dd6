"""Who holds a work area: a lock on its file, alone or together with others."""

from __future__ import annotations

import fcntl
import time
from typing import IO

_TURNS, _PAUSE = 50, 0.05


def hold(lock: IO[str], shared: bool = False) -> bool:
    """Lock the open lock file of a work area, or make a shared lock exclusive; False where another process holds it.

    Args:
        shared: together with others. Waits a moment then: one that leaves may hold it alone while it clears the area.
    """
    for turn in range(_TURNS if shared else 1):
        try:
            fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            return True
        except OSError:
            if shared and turn + 1 < _TURNS:
                time.sleep(_PAUSE)
    return False
