"""The child process: computes one unit and ends. Its GPU memory is free when it has ended, however it ended.

It is forked from a server process that has imported torch (`preload`) but not touched the GPU.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import sys
import threading
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

from safer_engine.errors import Interrupted, SaferError
from safer_engine.publishing import DISK_HINT, is_full
from service.infra.logs import Redactor, secrets_of
from service.infra.settings import Settings, load_settings
from service.source_policy import LABELLER_KEY_VARIABLE
from workers.inputs import Names, names_of
from workers.observer import STOP, Line, LineHandler, PipeObserver
from workers.order import Order, lost_artifact
from workers.stage_run import perform, tidy

_MORE_LIKELY_KILLED = "500"


def main(order_json: str, pipe: Connection) -> None:
    """Compute the unit, telling the parent at the other end of the pipe what happens and how it ended."""
    settings = load_settings()
    redact, names = Redactor(secrets_of(settings)), names_of(settings)
    line = Line(pipe, lambda text: redact(names(text)))
    stopping = threading.Event()
    _isolate(settings, stopping)
    threading.Thread(target=_listen, args=(pipe, stopping), daemon=True).start()
    root = logging.getLogger()
    root.handlers[:] = [LineHandler(line)]
    root.setLevel(settings.log_level)
    logging.captureWarnings(True)
    line.send(**_ended(Order.from_json(order_json), settings, PipeObserver(line, stopping), names))


def _ended(order: Order, settings: Settings, observer: PipeObserver, names: Names) -> dict[str, Any]:
    """How the unit ended, as a message."""
    try:
        facts = perform(order, settings, observer, names)
        if order.key is None:
            tidy(settings)
        return {"kind": "finished", **facts}
    except Interrupted:
        return {"kind": "interrupted"}
    except SaferError as error:
        said = {"code": error.code, "message": error.message, "hint": error.hint, "retryable": error.retryable}
        return {"kind": "failed", **said, "lost": lost_artifact(error)}
    except MemoryError:
        return {"kind": "failed", "code": "resource_exhausted", "message": "out of memory", "hint": "", "retryable": True}
    except BaseException as error:  # the process ends here; its parent tells the job's owner and the operator
        if is_full(error):
            return {
                "kind": "failed",
                "code": "resource_exhausted",
                "message": "a disk is full",
                "hint": DISK_HINT,
                "retryable": True,
            }
        return {"kind": "failed", "code": "internal", "message": _described(error), "hint": "", "retryable": True}


def _described(error: BaseException) -> str:
    """Kind and place of an unexpected error. Its text is left out: it may quote the dataset."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno}" for frame in frames[-6:]]
    return f"unexpected {type(error).__name__} at {' > '.join(places)}"


def _isolate(settings: Settings, stopping: threading.Event) -> None:
    """Leave signals to the parent, dump no core (it would hold data and keys), and be the first to go when memory is short."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        stopping.set()

    nowhere = settings.folder / "cache" / "nowhere"
    nowhere.mkdir(parents=True, exist_ok=True)
    os.chdir(nowhere)  # a relative name in a spec leads to nothing
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, stop)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_MORE_LIKELY_KILLED)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    if settings.hub_token is not None:
        os.environ["HF_TOKEN"] = settings.hub_token.get_secret_value()
    os.environ.pop(LABELLER_KEY_VARIABLE, None)
    if settings.labeller_api_key is not None:
        os.environ[LABELLER_KEY_VARIABLE] = settings.labeller_api_key.get_secret_value()


def _listen(pipe: Connection, stopping: threading.Event) -> None:
    """Hear the parent out; when it is gone, end at once: what was published is safe, and its lease will run out."""
    while True:
        try:
            if pipe.recv_bytes() == STOP.encode():
                stopping.set()
        except (EOFError, OSError):
            os.kill(os.getpid(), signal.SIGKILL)
