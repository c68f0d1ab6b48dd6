"""One of the processes that share a training: see `sharded_training`, which starts it.

python -m safer_engine.sharded_process FOLDER RANK COUNT
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safer_engine.errors import ResourceError, SaferError
from safer_engine.sharded_training import ORDER, PAIRS, STOP, error_fields, read_pairs

if TYPE_CHECKING:
    from safer_engine.science.rm_training import RewardTrainer
    from safer_engine.science.sharding import Share

_SAVING_SHARE = 0.05


class _Stdin:
    """What the process that started this one says: a line to stop; that it is gone ends this one."""

    def __init__(self) -> None:
        self.stop = False
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in sys.stdin:
            self.stop |= line.strip() == STOP
        os._exit(1)


def main(folder: Path, rank: int, count: int) -> int:
    """Train; returns an exit code."""
    heard = _Stdin()
    try:
        _work(folder, rank, count, heard)
    except SaferError as error:
        _tell(error_fields(error))
        return 1
    except Exception as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        memory = ResourceError("a GPU's memory does not suffice for the training", "smaller runtime.batch_tokens, or more GPUs")
        _tell(error_fields(memory))
        return 1
    return 0


def _tell(fields: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def _work(folder: Path, rank: int, count: int, heard: _Stdin) -> None:
    import torch.distributed as dist

    from safer_engine.machine import resolve_device
    from safer_engine.train_spec import TrainSpec

    order = json.loads((folder / ORDER).read_text(encoding="utf-8"))
    spec = TrainSpec.model_validate(order["spec"])
    on_gpu = resolve_device(spec.runtime.device).startswith("cuda")
    device = f"cuda:{rank}" if on_gpu else "cpu"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=count
    )
    try:
        trainer = _trainer(order, spec, folder, device, rank, count)
        _train(order, trainer, folder, heard)
    finally:
        dist.destroy_process_group()


def _trainer(order: dict[str, Any], spec: Any, folder: Path, device: str, rank: int, count: int) -> RewardTrainer:
    import torch
    from torch.distributed.device_mesh import init_device_mesh

    from safer_engine.model_training import Training
    from safer_engine.science.reward_model import find_blocks
    from safer_engine.science.sharding import Share
    from safer_engine.sources.base_models import load_base_tokenizer
    from safer_engine.sources.resolved import ResolvedModel

    if device != "cpu":
        torch.cuda.set_device(device)
    share = Share(rank, count, init_device_mesh(device.partition(":")[0], (count,)))
    base = ResolvedModel(Path(order["base"]["path"]), *(order["base"][name] for name in ("digest", "origin", "revision")))
    ready = load_base_tokenizer(base, spec.runtime)
    training = Training(spec, base, ready, read_pairs(folder / PAIRS), order["steps"])
    for turn in range(count):  # one after another: a whole model in memory at a time
        if turn == rank:
            loaded, model = training.load()
            share.shard(model, find_blocks(model)[1])
        share.wait()
    return training.trainer(loaded, model, device, share)


def _train(order: dict[str, Any], trainer: RewardTrainer, folder: Path, heard: _Stdin) -> None:
    """Steps, states now and then, lines by the first process; the same steps in all of them."""
    from safer_engine.train_loop import restore_state

    share, first = trainer.share, trainer.share.rank == 0
    curve = restore_state(Path(order["state"]), trainer, order["training"]) if order["state"] else []
    saved, pause, kept = time.monotonic(), float(order["every_seconds"]), 0
    while trainer.done < trainer.n_steps:
        curve.append(trainer.step())
        if first:
            _tell({"done": trainer.done, "of": trainer.n_steps})
        stop, due = _agreed(share, heard.stop, time.monotonic() - saved > pause)
        if stop or due or trainer.done == trainer.n_steps:
            began = time.monotonic()
            kept += 1
            _save(order, trainer, curve, folder / f"state-{kept}")
            saved = time.monotonic()
            pause = max(float(order["every_seconds"]), (saved - began) / _SAVING_SHARE)
        if stop:
            return


def _agreed(share: Share, *wishes: bool) -> tuple[bool, ...]:
    """What the first process wishes; its clock and its standard input count (collective)."""
    mine = wishes if share.rank == 0 else (False,) * len(wishes)
    return tuple(total > 0 for total in share.total(*map(float, mine)))


def _save(order: dict[str, Any], trainer: RewardTrainer, curve: list[Any], path: Path) -> None:
    """Write the state, by the first process, and tell of it (collective)."""
    from safer_engine.train_loop import write_state

    state = trainer.state()
    if trainer.share.rank == 0:
        write_state(path, state, curve, order["training"])
        _tell({"state": path.name})


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
