"""Text corpora: found, pinned and read like datasets; what is trained on is in the SAE's cache key and in the report."""

from __future__ import annotations

import dataclasses
import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from safer_engine.errors import DatasetRefused, SpecError
from safer_engine.report.build import ReportRequest, build_report
from safer_engine.sources.corpora import resolve_corpus, texts_of
from safer_engine.spec import AuditSpec, LocalSource, MemorySource
from safer_engine.stage import cache_key
from safer_engine.stages.sae import SaeStage
from tests.helpers import fake_artifacts
from tests.helpers.hub_stand_in import HubStandIn, commit_of
from tests.helpers.score_artifacts import NOWHERE
from tests.helpers.tiny_model import build_reward_model

TEXTS = ["One text.", "Noch einer – ü.", ""]


def local(path: Path, split: str | None = None) -> LocalSource:
    return LocalSource(path=str(path), split=split)


def test_lines_and_rows_give_the_same_texts(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("".join(f"{text}\n" for text in TEXTS))
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress((tmp_path / "c.txt").read_bytes()))
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in TEXTS))
    for name in ("c.txt", "c.txt.gz", "c.jsonl"):
        corpus = resolve_corpus(local(tmp_path / name))
        assert list(texts_of(corpus)) == list(texts_of(corpus)) == TEXTS
        assert (corpus.origin, corpus.revision) == (str(tmp_path / name), None)


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("x\n")
    second.write_text("x\n")
    assert resolve_corpus(local(first)).digest == resolve_corpus(local(second)).digest
    second.write_text("y\n")
    assert resolve_corpus(local(first)).digest != resolve_corpus(local(second)).digest


def test_what_is_no_corpus_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="in memory"):
        resolve_corpus(MemorySource())
    with pytest.raises(DatasetRefused, match="no file"):
        resolve_corpus(local(tmp_path / "absent.txt"))
    (tmp_path / "bad.txt.gz").write_bytes(gzip.compress(b"words\n" * 99)[:-9])
    with pytest.raises(DatasetRefused, match="can't be read"):
        list(texts_of(resolve_corpus(local(tmp_path / "bad.txt.gz"))))
    (tmp_path / "rows.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(DatasetRefused, match="row 1 .* has no `text`"):
        list(texts_of(resolve_corpus(local(tmp_path / "rows.jsonl"))))


def spec_with(source: dict[str, Any], model: Path | str = "m") -> dict[str, Any]:
    corpus = {"corpus": source, "tokens": 100}
    return {"model": {"path": str(model)}, "dataset": {"source": {"kind": "memory"}}, "sae": {"kind": "topk", "pretrain": corpus}}


PREPARE = """
import json, sys
from safer_engine.api import prepare
from safer_engine.sources.corpora import texts_of
from safer_engine.spec import AuditSpec
from safer_engine.stage import cache_key
from safer_engine.stages.sae import SaeStage

request = prepare(AuditSpec.model_validate_json(sys.argv[1]), [{"prompt": "p", "chosen": "a", "rejected": "b"}])
corpus = request.sources.corpus
key = cache_key(SaeStage(), request.spec, request.sources, {}, "default")
print("answer", json.dumps({"revision": corpus.revision, "key": key, "texts": list(texts_of(corpus))}))
"""


def prepared(environment: dict[str, str], document: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-c", PREPARE, json.dumps(document)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    (answer,) = (line.removeprefix("answer ") for line in done.stdout.splitlines() if line.startswith("answer "))
    found: dict[str, Any] = json.loads(answer)
    return found


def test_a_hub_corpus_is_pinned_to_the_commit_it_has_now(tmp_path: Path) -> None:
    build_reward_model(tmp_path / "model", "llama")
    repository = tmp_path / "hub" / "datasets" / "acme" / "web"
    repository.mkdir(parents=True)
    file = repository / "train.jsonl"
    file.write_text(json.dumps({"text": "first"}) + "\n")
    before = commit_of(repository)
    document = spec_with({"kind": "hub", "path": "acme/web"}, tmp_path / "model")
    with HubStandIn(tmp_path / "hub") as hub:
        environment = hub.environment(tmp_path / "home")
        first, again = prepared(environment, document), prepared(environment, document)
        pinned = prepared(environment, spec_with({"kind": "hub", "path": "acme/web", "revision": before}, tmp_path / "model"))
        file.write_text(json.dumps({"text": "second"}) + "\n")
        second = prepared(environment, document)
        fetched = [request for request in hub.requests if f"/resolve/{before}/" in request]
    assert (first["revision"], first["texts"]) == (before, ["first"])
    assert again == pinned == first, "the commit counts, not how it was named"
    assert (second["revision"], second["texts"]) == (commit_of(repository), ["second"])
    assert second["key"] != first["key"], "the hub moved on"
    assert fetched, "texts are read at the commit"


def test_the_key_follows_content_not_place(tmp_path: Path) -> None:
    keys = []
    for name, content in (("a.txt", "x\n"), ("b.txt", "x\n"), ("c.txt", "y\n")):
        (tmp_path / name).write_text(content)
        source = local(tmp_path / name)
        spec = AuditSpec.model_validate(spec_with(source.model_dump()))
        sources = type(NOWHERE)(NOWHERE.model, NOWHERE.dataset, corpus=resolve_corpus(source))
        keys.append(cache_key(SaeStage(), spec, sources, {}, "default"))
    assert keys[0] == keys[1] != keys[2]


def test_the_report_says_what_was_trained_on(tmp_path: Path) -> None:
    audit = fake_artifacts.build(tmp_path)
    (tmp_path / "c.txt").write_text("x\n")
    corpus = dataclasses.replace(resolve_corpus(local(tmp_path / "c.txt")), origin="acme/web", revision="abc")
    request = ReportRequest(audit.spec, dataclasses.replace(audit.sources, corpus=corpus), audit.found, "2026-01-02T03:04:05Z")
    record = build_report(request).provenance.inputs["corpus"]
    assert (record.origin, record.revision, record.digest) == ("acme/web", "abc", corpus.digest)
