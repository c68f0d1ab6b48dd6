"""Started in place of a command: the command then ends when the process that wanted it does, even one killed with -9.

Run as a script, `python -I -S tether.py PARENT COMMAND …`, with the standard library alone: it is there in a few
milliseconds. On Linux the kernel sends the signal, and nothing of this program remains; elsewhere it stays and watches.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from types import FrameType

_PR_SET_PDEATHSIG = 1
_WATCH_SECONDS = 0.5


def command_line(command: tuple[str, ...]) -> list[str]:
    """`command`, tied to this process. To be started from the main thread: Linux counts the starting thread as the parent."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]


def main(arguments: list[str]) -> int:
    """Become the command, or on systems other than Linux its guard. Returns its exit code in that case."""
    parent, command = int(arguments[0]), arguments[1:]
    if sys.platform != "linux":
        return _guard(parent, command)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != parent:  # it ended before the line above
        return 0
    os.execvp(command[0], command)  # noqa: S606 - no shell is wanted; replaces this process


def _guard(parent: int, command: list[str]) -> int:
    running = subprocess.Popen(command)  # noqa: S603 - the command of whoever started this program

    def forward(number: int, _frame: FrameType | None) -> None:
        running.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, forward)
    while running.poll() is None:
        if os.getppid() != parent:
            running.terminate()
        time.sleep(_WATCH_SECONDS)
    return running.returncode if running.returncode >= 0 else 128 - running.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
