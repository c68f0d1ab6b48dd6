"""What a child does beside the engine's own work: sparing of GPU memory, names in a trained model's files, its messages."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from safer_engine.errors import ArtifactError, ResourceError
from safer_engine.pipeline import AuditRequest
from safer_engine.sources.resolved import ResolvedDataset, ResolvedInputs, ResolvedModel
from safer_engine.spec import AuditSpec
from safer_engine.store import LocalArtifactStore
from safer_engine.training import MODEL
from tests.helpers.workplace import ROOT
from workers.inputs import Names
from workers.observer import Line, LineHandler, PipeObserver
from workers.stage_run import publish_model, sparing


def request_on(device: str, tokens: int = 4096) -> AuditRequest:
    document = {
        "model": {"path": "m"},
        "dataset": {"source": {"kind": "memory"}},
        "runtime": {"device": device, "batch_tokens": tokens},
    }
    sources = ResolvedInputs(ResolvedModel(Path("m"), "d", "m"), ResolvedDataset("d", "m", lambda: iter(())))
    return AuditRequest(AuditSpec.model_validate(document), sources)


def needs(tokens: int, tried: list[int], error: type[Exception]) -> object:
    def work(request: AuditRequest) -> str:
        tried.append(request.spec.runtime.batch_tokens)
        if tried[-1] > tokens:
            raise error("out of memory")
        return "done"

    return work


def test_gpu_memory_that_does_not_suffice_halves_the_batches_and_goes_on() -> None:
    import torch

    for error in (ResourceError, torch.OutOfMemoryError):
        tried: list[int] = []
        notes: list[str] = []
        assert sparing(request_on("cuda:1"), needs(1000, tried, error), notes.append) == "done"  # type: ignore[arg-type]
        assert tried == [4096, 2048, 1024, 512]
        assert [note.split()[-4] for note in notes] == ["2048", "1024", "512"]


def test_halving_ends_and_other_errors_pass() -> None:
    tried: list[int] = []
    with pytest.raises(ResourceError, match="however small"):
        sparing(request_on("cuda"), needs(1, tried, ResourceError), lambda _: None)  # type: ignore[arg-type]
    assert tried == [4096, 2048, 1024, 512, 256, 128]
    for device, error in (("cpu", ResourceError), ("cuda", RuntimeError)):
        tried.clear()
        with pytest.raises(error):
            sparing(request_on(device), needs(1, tried, error), lambda _: None)  # type: ignore[arg-type]
        assert tried == [4096]


def test_files_of_a_trained_model_name_no_path_of_the_worker(tmp_path: Path) -> None:
    names = Names(tmp_path)
    names.add(tmp_path / "cache" / "x", "upload:abc")
    store = LocalArtifactStore(tmp_path / "store")
    with store.open_work("training", "k") as work:
        folder = work.scratch / MODEL
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"_name_or_path": f"{tmp_path}/cache/x", "a": 1}))
        (folder / "model.safetensors").write_bytes(b"\x00\x01")
        publish_model(work, names)
        assert json.loads(work.path("config.json").read_text()) == {"_name_or_path": "upload:abc", "a": 1}
        assert work.path("model.safetensors").read_bytes() == b"\x00\x01"
        (folder / "more").mkdir()
        with pytest.raises(ArtifactError, match="more"):
            publish_model(work, names)


def test_what_a_child_tells_is_plain_json_cleaned_and_bounded() -> None:
    ours, theirs = multiprocessing.Pipe()
    line = Line(theirs, lambda text: text.replace("/secret/place", "upload:abc"))
    observer = PipeObserver(line, threading.Event())
    observer.note("pairs", "read /secret/place " + "x" * 5000)
    observer.progress("pairs", 1, 2, "rows")
    observer.progress("pairs", 1, 2, "rows")  # too soon after the one before
    observer.progress("pairs", 2, 2, "rows")
    line.send("finished", inputs={"model": "/secret/place"})
    found = [json.loads(ours.recv_bytes()) for _ in range(4)]
    assert not ours.poll(0)
    assert found[0]["message"].startswith("read upload:abc xxx")
    assert len(found[0]["message"]) <= 2000
    assert [message.get("done") for message in found[1:3]] == [1.0, 2.0]
    assert found[3] == {"type": "finished", "inputs": {"model": "upload:abc"}}
    ours.close()
    line.send("note", message="nobody listens")


def test_logs_of_other_packages_lose_their_text() -> None:
    ours, theirs = multiprocessing.Pipe()
    handler = LineHandler(Line(theirs, str))
    for name in ("datasets.builder", "safer_engine.api"):
        handler.emit(logging.makeLogRecord({"name": name, "levelno": logging.WARNING, "msg": "row: %s", "args": ("dear diary",)}))
    other, own = (json.loads(ours.recv_bytes()) for _ in range(2))
    assert "diary" not in other["message"]
    assert "datasets.builder" in other["message"]
    assert own["message"] == "row: dear diary"


PRELOAD = """
import threading, workers.preload, torch
assert threading.active_count() == 1, threading.enumerate()
assert not torch.cuda.is_initialized()
"""
NO_TORCH = """
import sys
import workers.runner, workers.app, workers.start, service.jobs.dispatcher
assert not {"torch", "transformers", "pyarrow"} & set(sys.modules)
"""


@pytest.mark.parametrize("program", [PRELOAD, NO_TORCH], ids=["server of children", "parent"])
def test_what_is_imported_where(program: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
