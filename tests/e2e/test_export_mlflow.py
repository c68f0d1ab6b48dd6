"""`safer-audit export --to mlflow` against a real server: figures and files arrive, once; what was interrupted is completed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from cli.main import run_main
from safer_engine.exports.finished_audit import finished_audit
from safer_engine.exports.mlflow_run import REPORT_TAG, Tracking, log_audit
from safer_engine.report.model_causal import CausalReport
from tests.cli.test_export import audit
from tests.engine.test_evidence_markdown import one_set
from tests.helpers.mlflow_server import Mlflow, mlflow_server

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mlflow]:
    server = mlflow_server(tmp_path_factory.mktemp("mlflow"))
    try:
        yield server
    finally:
        server.stop()


def runs(mlflow: Mlflow, experiment: str) -> list[dict[str, object]]:
    found = mlflow.get("experiments/get-by-name", experiment_name=experiment)["experiment"]["experiment_id"]
    return list(mlflow.post("runs/search", experiment_ids=[found]).get("runs", []))


def test_an_audit_becomes_one_run(mlflow: Mlflow, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = audit(tmp_path / "audit")
    asked = ["export", str(folder), "--to", "mlflow", "--tracking-uri", mlflow.url, "--experiment", "audits & more"]
    assert run_main(asked) == 0
    first = capsys.readouterr().out.strip()
    (run,) = runs(mlflow, "audits & more")
    info, data = run["info"], run["data"]
    assert isinstance(info, dict)
    assert isinstance(data, dict)
    assert info["status"] == "FINISHED"
    assert str(info["run_id"]) in first
    metrics = {one["key"]: one["value"] for one in data["metrics"]}
    assert metrics["accuracy evaluation/all"] == pytest.approx(0.9)
    assert metrics["accuracy evaluation/all lo"] < 0.9 < metrics["accuracy evaluation/all hi"]
    assert any(name.startswith("accuracy evaluation/x _ _img src_x_") for name in metrics)
    params = {one["key"]: one["value"] for one in data["params"]}
    assert params["preset"] == "standard"
    tags = {one["key"]: one["value"] for one in data["tags"]}
    assert tags[REPORT_TAG] == hashlib.sha256((folder / "report.json").read_bytes()).hexdigest()
    place = str(info["artifact_uri"]).removeprefix("mlflow-artifacts:/")
    stored = httpx.get(f"{mlflow.url}/api/2.0/mlflow-artifacts/artifacts/{place}/report.json", timeout=60)
    assert stored.content == (folder / "report.json").read_bytes()
    cited = httpx.get(f"{mlflow.url}/api/2.0/mlflow-artifacts/artifacts/{place}/evidence.json", timeout=60)
    assert run_main(["export", str(folder), "--to", "evidence", "-o", str(tmp_path / "apart")]) == 0
    assert cited.content == (tmp_path / "apart" / "evidence.json").read_bytes()
    capsys.readouterr()
    assert run_main(asked) == 0
    said = capsys.readouterr()
    assert said.out.strip() == first
    assert "nothing was changed" in said.err
    assert len(runs(mlflow, "audits & more")) == 1


def test_a_run_that_was_interrupted_is_completed(mlflow: Mlflow, tmp_path: Path) -> None:
    found = finished_audit(audit(tmp_path / "audit"), "AUDIT")
    causal = CausalReport(n_pairs=90, n_features=12, n_controls=3, margin_mean=1, margin_sd=1, null_pooled=0, null_reason="",
                          correlation=None, effects=[], sets=[one_set("safety", None, -0.2)])  # fmt: skip
    found = replace(found, report=found.report.model_copy(update={"causal": causal}))
    server = Tracking.at(mlflow.url)
    made = log_audit(found, server, "interrupted", "by name")
    mlflow.post("runs/update", run_id=made.run_id, status="RUNNING")
    again = log_audit(found, server, "interrupted", None)
    assert (again.run_id, again.made) == (made.run_id, True)
    (run,) = runs(mlflow, "interrupted")
    assert isinstance(run["info"], dict)
    assert (run["info"]["status"], run["info"]["run_name"]) == ("FINISHED", "by name")
    assert isinstance(run["data"], dict)
    metrics = {one["key"]: one["value"] for one in run["data"]["metrics"]}
    assert metrics["safety set ablated accuracy change/all"] == pytest.approx(-0.2)
    assert metrics["safety set ablated accuracy change/all lo"] == pytest.approx(-0.3)
