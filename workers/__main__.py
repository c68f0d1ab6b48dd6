"""`python -m workers`: a worker. With `--once`, one unit from SQL, then the end.

Imported again in every child process, so it imports little.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys


def main(arguments: list[str] | None = None) -> int:
    """Run a worker. Returns the exit code: 0 done or stopped, 2 refused, 4 failed; 75: hears nothing, or waited in vain."""
    parser = argparse.ArgumentParser(prog="python -m workers", description="Compute the stages of jobs.")
    parser.add_argument("--queues", help="queues to serve, comma-separated: cpu, gpu (default: SAFER_QUEUES)")
    parser.add_argument(
        "--once", action="store_true", help="take one unit that waits, and exit: 0 done or nothing to do, 4 failed"
    )
    parser.add_argument("--wait", type=_seconds, metavar="SECONDS", help="with --once: wait so long for a unit; 75 if none came")
    options = parser.parse_args(arguments)
    if options.wait is not None and not options.once:
        parser.error("--wait is for --once: without it a worker waits for ever")
    # From here on, since starting takes seconds: as the first process of a container it would not be stopped by default.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    from safer_engine.errors import SaferError, SpecError
    from service.errors import SchemaMismatch
    from workers.start import run

    try:
        return run(options.queues, once=options.once, wait=options.wait)
    except SaferError as error:
        sys.stderr.write(f"error [{error.code}]: {error.message}\n" + (f"  hint: {error.hint}\n" if error.hint else ""))
        return 2 if isinstance(error, (SpecError, SchemaMismatch)) else 4


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise ValueError(text)
    return value


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
