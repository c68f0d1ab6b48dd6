"""A training shared by several processes of this machine: they are started, watched, and stopped together.

The processes (`sharded_process`) are told what to do by a file, and tell what they do by lines of JSON. They write states to a
folder; this process keeps the newest as checkpoint, in the same form as a training in one process does, so that either goes on
from the other's.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, TYPE_CHECKING, Any

from safer_engine.errors import Interrupted, ModelRefused, NumericalError, ResourceError, SaferError, SpecError
from safer_engine.machine import resolve_device

if TYPE_CHECKING:
    from safer_engine.model_training import Told, Training
    from safer_engine.science.rm_training import TokenPairs
    from safer_engine.train_loop import Checkpoints

ORDER, PAIRS = "order.json", "pairs.safetensors"
STOP = "stop"
_ERRORS: dict[str, type[SaferError]] = {each.code: each for each in (ModelRefused, NumericalError, ResourceError, SpecError)}
_POLL_SECONDS = 0.2
_LAST_WORDS = 2000
_SMALLER = "often too little memory: smaller runtime.batch_tokens, or more processes"


def train_in_processes(training: Training, checkpoints: Checkpoints, told: Told) -> None:
    """Train from the last checkpoint to the end, the state of which is left as checkpoint.

    Raises:
        NumericalError: training diverged. Interrupted: `told` asked to stop; the state is kept. ResourceError: a process ended.
        SpecError: there are fewer GPUs than processes.
    """
    count = training.spec.runtime.processes
    _require_gpus(resolve_device(training.spec.runtime.device), count)
    with TemporaryDirectory(prefix="safer-sharded-") as name:
        folder = Path(name)
        _write_order(folder, training, checkpoints)
        with _started(folder, count) as processes:
            _watch(processes, folder, checkpoints, told)


def _require_gpus(device: str, count: int) -> None:
    if not device.startswith("cuda"):
        return
    import torch

    if torch.cuda.device_count() < count:
        there = torch.cuda.device_count()
        raise SpecError(f"runtime.processes is {count}, and this machine has {there} GPUs", f"give at most {there}")


def _write_order(folder: Path, training: Training, checkpoints: Checkpoints) -> None:
    """What all processes read: see `sharded_process.Order`."""
    base = training.base
    state = checkpoints.work.fetch(checkpoints.name)
    order = {
        "spec": training.spec.model_dump(mode="json"),
        "base": {"path": str(base.path), "digest": base.digest, "origin": base.origin, "revision": base.revision},
        "steps": training.steps,
        "state": None if state is None else str(state),
        "training": checkpoints.training,
        "every_seconds": checkpoints.every_seconds,
    }
    (folder / ORDER).write_text(json.dumps(order), encoding="utf-8")
    write_pairs(folder / PAIRS, training.pairs)


def write_pairs(path: Path, pairs: TokenPairs) -> None:
    """Pairs as a file of tensors: the tokens of each side end to end, where each row ends, and the ids."""
    import numpy as np
    from safetensors.numpy import save_file

    tensors: dict[str, Any] = {}
    for side, rows in (("chosen", pairs.chosen), ("rejected", pairs.rejected)):
        tensors[side] = np.concatenate([np.asarray(row, dtype=np.int32) for row in rows])
        tensors[f"{side}_ends"] = np.cumsum([len(row) for row in rows], dtype=np.int64)
    save_file(tensors, path, metadata={"pair_id": json.dumps(pairs.pair_id)})


def read_pairs(path: Path) -> TokenPairs:
    """What `write_pairs` wrote."""
    import numpy as np
    from safetensors import safe_open

    from safer_engine.science.rm_training import TokenPairs

    with safe_open(path, framework="np") as handle:
        names = tuple(json.loads(handle.metadata()["pair_id"]))
        sides = [np.split(handle.get_tensor(side), handle.get_tensor(f"{side}_ends")[:-1]) for side in ("chosen", "rejected")]
    return TokenPairs(names, *map(tuple, sides))


class _Process:
    """One of the processes, its lines in a queue that all share."""

    def __init__(self, folder: Path, rank: int, count: int, lines: queue.Queue[dict[str, Any]]) -> None:
        self.words = folder / f"stderr-{rank}"
        threads = max(1, (os.cpu_count() or 1) // count)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": "lo"}
        command = [sys.executable, "-m", "safer_engine.sharded_process", str(folder), str(rank), str(count)]
        with self.words.open("wb") as words:
            self.running = subprocess.Popen(  # noqa: S603 - this interpreter, our own module
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=words, text=True
            )
        assert self.running.stdout is not None
        self.ears = threading.Thread(target=_hear, args=(self.running.stdout, lines), daemon=True)
        self.ears.start()

    def ask_to_stop(self) -> None:
        """Ask it to keep its state and end."""
        assert self.running.stdin is not None
        try:
            self.running.stdin.write(f"{STOP}\n")
            self.running.stdin.flush()
        except OSError:
            return  # it has ended

    def last_words(self) -> str:
        """The last line that it wrote about an error."""
        lines = self.words.read_bytes()[-_LAST_WORDS:].decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""


def _hear(stream: IO[str], lines: queue.Queue[dict[str, Any]]) -> None:
    for line in stream:
        if line.startswith("{"):  # libraries may print other things
            lines.put(json.loads(line))


@contextmanager
def _started(folder: Path, count: int) -> Iterator[tuple[list[_Process], queue.Queue[dict[str, Any]]]]:
    """The processes; none is left afterwards."""
    lines: queue.Queue[dict[str, Any]] = queue.Queue()
    processes: list[_Process] = []
    try:
        for rank in range(count):
            processes.append(_Process(folder, rank, count, lines))
        yield processes, lines
    finally:
        for process in processes:
            process.running.kill()
            process.running.wait()


def _watch(
    started: tuple[list[_Process], queue.Queue[dict[str, Any]]], folder: Path, checkpoints: Checkpoints, told: Told
) -> None:
    """Hear what the processes tell until all have ended well. Raises as `train_in_processes`."""
    processes, lines = started
    stopped = False
    while True:
        codes = [process.running.poll() for process in processes]
        for process, code in zip(processes, codes, strict=True):
            if code is not None:
                process.ears.join()  # all that it said is in the queue
        try:
            line = lines.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            if any(code not in (None, 0) for code in codes):
                _raise_ended(processes, codes)
            if all(code == 0 for code in codes):
                break
            continue
        _settle(line, folder, checkpoints)
        if "done" in line and told(line["done"], line["of"]) and not stopped:
            stopped = True
            processes[0].ask_to_stop()
    if stopped:
        raise Interrupted("stopped on request", "run the same command again to go on")


def _settle(line: dict[str, Any], folder: Path, checkpoints: Checkpoints) -> None:
    """Keep a state that a line tells of. Raises the error that it tells of."""
    if "error" in line:
        error = line["error"]
        raise _ERRORS.get(error["code"], ResourceError)(error["message"], error["hint"])
    if "state" in line:
        with checkpoints.work.publish(checkpoints.name, scratch=True) as path:
            shutil.move(folder / line["state"], path)


def _raise_ended(processes: list[_Process], codes: list[int | None]) -> None:
    rank, code = next((rank, code) for rank, code in enumerate(codes) if code not in (None, 0))
    said = processes[rank].last_words()
    raise ResourceError(f"process {rank} of {len(processes)} ended with exit code {code}{f': {said}' if said else ''}", _SMALLER)


def error_fields(error: SaferError) -> dict[str, Any]:
    """What a process tells of an error."""
    return {"error": {"code": error.code, "message": error.message, "hint": error.hint}}
