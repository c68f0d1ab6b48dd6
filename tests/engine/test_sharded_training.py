"""Trainings shared by two processes: as one process trains, to rounding; from either's checkpoint; stopped and broken."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from safer_engine.demo_data import build_base, generate
from safer_engine.errors import Interrupted, NumericalError, ResourceError
from safer_engine.science.rm_training import TokenPairs
from safer_engine.sharded_training import read_pairs, write_pairs
from safer_engine.train_spec import TrainSpec
from safer_engine.training import TrainResult, train_reward_model
from tests.engine.test_training import StopsAt
from tests.helpers.tiny_model import build_reward_model

pytestmark = pytest.mark.timeout(300)
DATA = generate(seed=1, n_groups=24)
RECIPE: dict[str, Any] = {"epochs": 1, "batch": 8, "lr": 3e-3, "max_length": 64}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [row["chosen"][0]["content"] for row in DATA.rows]
    return build_base(tmp_path_factory.mktemp("bases") / "llama", texts, width=16, blocks=2)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_reward_model(tmp_path_factory.mktemp("bases") / "bert", "bert", width=16, blocks=2)


def train(base: Path, out: Path, processes: int, observer: Any = None, **given: Any) -> TrainResult:
    document = {
        "base": str(base),
        "dataset": {"source": {"kind": "memory"}},
        "recipe": {**RECIPE, **given.pop("recipe", {})},
        "runtime": {"device": "cpu", "processes": processes, "checkpoint_seconds": 1e-6, "batch_tokens": 512},
        **given,
    }
    return train_reward_model(TrainSpec.model_validate(document), out, observer, rows=DATA.rows)


def weights(result: TrainResult) -> dict[str, torch.Tensor]:
    return load_file(next(result.path.glob("*.safetensors")))


def require_alike(one: TrainResult, other: TrainResult) -> None:
    assert len(one.record["curve"]) == len(other.record["curve"])
    for mine, its in zip(one.record["curve"], other.record["curve"], strict=True):
        assert (mine["step"], mine["tokens"], mine["accuracy"]) == (its["step"], its["tokens"], its["accuracy"])
        assert mine["loss"] == pytest.approx(its["loss"], rel=1e-3)
        assert mine["grad_norm"] == pytest.approx(its["grad_norm"], rel=1e-2)
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, weight in first.items():
        if name == "classifier.bias":  # moves both rewards of a pair alike: its gradient is rounding, which Adam makes large
            continue
        torch.testing.assert_close(weight.float(), second[name].float(), rtol=2e-3, atol=2e-4)


@pytest.fixture(scope="module")
def alone(base: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return train(base, tmp_path_factory.mktemp("alone") / "rm", 1)


def test_two_processes_train_the_model_that_one_does(base: Path, alone: TrainResult, tmp_path: Path) -> None:
    shared = train(base, tmp_path / "rm", 2)
    require_alike(alone, shared)
    start = weights(train(base, tmp_path / "untrained", 1, recipe={"lr": 1e-12}))
    moved = max(float((start[name].float() - weight.float()).abs().max()) for name, weight in weights(shared).items())
    assert moved > 1e-2  # so that they are alike for having learnt the same
    assert shared.record["key"] == alone.record["key"]
    assert train(base, tmp_path / "rm", 1).cached


@pytest.mark.full
@pytest.mark.parametrize(("first", "second"), [(2, 1), (1, 2)])
def test_either_goes_on_from_the_others_checkpoint(
    base: Path, alone: TrainResult, tmp_path: Path, first: int, second: int
) -> None:
    with pytest.raises(Interrupted):
        train(base, tmp_path / "rm", first, StopsAt(3))
    watcher = StopsAt(10**6)
    seen: list[float] = []
    watcher.progress = lambda stage, done, total, unit: seen.append(done)  # type: ignore[method-assign]
    require_alike(alone, train(base, tmp_path / "rm", second, watcher))
    steps = [done for done in seen if done <= len(alone.record["curve"])]
    assert min(steps) > 3  # the first steps are not taken again


@pytest.mark.full
def test_adapters_of_an_encoder_are_trained_in_shards(encoder: Path, tmp_path: Path) -> None:
    lora = {"rank": 2, "merge": True}
    require_alike(train(encoder, tmp_path / "one", 1, lora=lora), train(encoder, tmp_path / "two", 2, lora=lora))


@pytest.mark.full
def test_divergence_is_told_by_its_name(base: Path, tmp_path: Path) -> None:
    with pytest.raises(NumericalError, match="training diverged at step"):
        train(base, tmp_path / "rm", 2, recipe={"lr": 1e30, "clip": 1e30})
    assert not (tmp_path / "rm").exists()


@pytest.mark.full
def test_a_process_that_dies_ends_all_and_its_training_goes_on(base: Path, alone: TrainResult, tmp_path: Path) -> None:
    killed: list[int] = []

    def kill_one() -> None:
        while not killed:
            for pid in children(os.getpid()):
                line = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                state = list(tmp_path.rglob("checkpoint.safetensors"))
                if b"safer_engine.sharded_process" in line and state:
                    killed.append(pid)
                    os.kill(pid, signal.SIGKILL)
                    return
            time.sleep(0.02)

    thread = threading.Thread(target=kill_one)
    thread.start()
    with pytest.raises(ResourceError, match="process . of 2 ended with exit code -9"):
        train(base, tmp_path / "rm", 2)
    thread.join()
    assert not [pid for pid in children(os.getpid()) if b"sharded_process" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    require_alike(alone, train(base, tmp_path / "rm", 2))


def children(pid: int) -> list[int]:
    return [int(each) for task in Path(f"/proc/{pid}/task").iterdir() for each in (task / "children").read_text().split()]


def test_a_process_ends_with_the_one_that_started_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "safer_engine.sharded_process", str(tmp_path), "0", "2"]
    (tmp_path / "order.json").write_text(json.dumps({"spec": {}}))
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(60) != 0


def test_pairs_are_read_as_they_were_written(tmp_path: Path) -> None:
    sides = [tuple(np.arange(n, dtype=np.int32) for n in lengths) for lengths in ((3, 1, 2), (1, 4, 1))]
    pairs = TokenPairs(("a", "ü\n", "c"), *sides)
    write_pairs(tmp_path / "pairs", pairs)
    found = read_pairs(tmp_path / "pairs")
    assert found.pair_id == pairs.pair_id
    for one, other in ((pairs.chosen, found.chosen), (pairs.rejected, found.rejected)):
        assert [row.tolist() for row in one] == [row.tolist() for row in other]
