"""A whole audit, small: through the Python interface and through the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import safer_engine
from safer_engine import demo_data
from safer_engine.artifacts import Absent, CausalEffects, Verification
from safer_engine.errors import DatasetRefused, SpecError
from safer_engine.events import NullObserver
from safer_engine.pipeline import STAGES
from tests.helpers.tiny_model import build_reward_model

ROOT = Path(__file__).parents[2]
SMALL = {"sae": {"max_steps": 40, "min_steps": 40, "batch": 256, "k": 8}, "causal": {"pairs": 24}, "runtime": {"device": "cpu"}}
FLAGS = [
    *("--set", "sae.max_steps=40", "--set", "sae.min_steps=40", "--set", "sae.batch=256", "--set", "sae.k=8"),
    *("--set", "causal.pairs=24", "--device", "cpu"),
]
FILES = {
    "report.html",
    "report.md",
    "report.json",
    "edits.jsonl",
    "evaluation.jsonl",
    "features.parquet",
    "pair_scores.parquet",
    "sae",
    ".safer-audit.json",
}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    data = demo_data.generate(seed=1, n_groups=80)
    demo_data.write_demo(folder, data)
    build_reward_model(folder / "rm", "llama")
    return folder


@pytest.fixture(scope="module")
def finished(material: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[safer_engine.AuditReport, Path]:
    folder = tmp_path_factory.mktemp("finished")
    return audit_of(material, folder / "store", folder / "out"), folder


def audit_of(material: Path, store: Path, out: Path, observer: Any = None, **more: Any) -> safer_engine.AuditReport:
    named = {"model": str(material / "rm"), "dataset": str(material / "preferences.jsonl")}
    return safer_engine.audit(
        {**named, "evaluation": str(material / "evaluation.jsonl"), **SMALL}, store=store, out=out, observer=observer, **more
    )


def command(material: Path, folder: Path, *more: str) -> list[str]:
    named = ["--model", str(material / "rm"), "--dataset", str(material / "preferences.jsonl")]
    places = [
        "--eval-dataset",
        str(material / "evaluation.jsonl"),
        "--store",
        str(folder / "store"),
        "--out",
        str(folder / "out"),
    ]
    return [sys.executable, "-m", "cli.main", "run", *named, *places, *FLAGS, *more]


def without_timing(out: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    report["provenance"].pop("timing")
    return report


def test_an_audit_leaves_everything_a_team_reads(finished: tuple[safer_engine.AuditReport, Path], material: Path) -> None:
    report, folder = finished
    assert {path.name for path in (folder / "out").iterdir()} == FILES
    rows = (material / "preferences.jsonl").read_text().splitlines()
    assert len(report.edits) == len(rows)
    assert report.edits["pair_id"].tolist() == [json.loads(row)["id"] for row in rows]
    assert set(report.edits["action"]) <= {"keep", "review", "drop"}
    assert report.pairs["suspicion"].between(0, 1).all()
    assert {"latent_id", "salience", "safety_feature"} <= set(report.features.columns)
    assert report.html.read_bytes().startswith(b"<!")
    assert isinstance(report.artifacts[CausalEffects], CausalEffects)
    assert isinstance(report.artifacts[Verification], Absent)


def test_report_json_has_the_promised_keys_and_fits_its_schema(finished: tuple[safer_engine.AuditReport, Path]) -> None:
    report = json.loads((finished[1] / "out" / "report.json").read_text())
    keys = "schema_version spec provenance dataset reward_model evaluation sae features labels causal edits verification verdict"
    assert list(report) == keys.split()
    jsonschema.validate(report, json.loads((ROOT / "docs" / "report.schema.json").read_text()))
    assert report["verification"] is None
    assert report["provenance"]["not_computed"]["verification"]


def test_a_budget_is_cut_within_each_axis(
    finished: tuple[safer_engine.AuditReport, Path], material: Path, tmp_path: Path
) -> None:
    edits = audit_of(material, finished[1] / "store", tmp_path / "out", edits={"budget": 0.04}).edits
    for axis, of_axis in edits.groupby("axis"):
        dropped = of_axis[of_axis["action"] == "drop"]
        assert abs(len(dropped) - 0.04 * len(of_axis)) <= 1, axis
        kept = of_axis[of_axis["action"] == "keep"]
        assert dropped["suspicion"].min() >= kept["suspicion"].max()


class Outcomes(NullObserver):
    def __init__(self) -> None:
        self.seen: dict[str, str] = {}

    def stage_finished(self, stage: str, outcome: str, seconds: float) -> None:
        self.seen[stage] = outcome


def test_a_second_run_computes_nothing(finished: tuple[safer_engine.AuditReport, Path], material: Path, tmp_path: Path) -> None:
    watcher = Outcomes()
    audit_of(material, finished[1] / "store", tmp_path / "out", watcher)
    assert set(watcher.seen.values()) == {"cached"}
    assert (tmp_path / "out" / "report.json").read_bytes() == (finished[1] / "out" / "report.json").read_bytes()


def test_the_same_seed_gives_the_same_report_but_for_its_timing(
    finished: tuple[safer_engine.AuditReport, Path], material: Path, tmp_path: Path
) -> None:
    audit_of(material, tmp_path / "store", tmp_path / "out")
    assert without_timing(tmp_path / "out") == without_timing(finished[1] / "out")
    for name in ("edits.jsonl", "evaluation.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (finished[1] / "out" / name).read_bytes()


def test_a_late_knob_recomputes_late_stages_only(
    finished: tuple[safer_engine.AuditReport, Path], material: Path, tmp_path: Path
) -> None:
    watcher = Outcomes()
    report = audit_of(material, finished[1] / "store", tmp_path / "out", watcher, edits={"budget": 0.1})
    computed = {stage for stage, outcome in watcher.seen.items() if outcome == "computed"}
    assert computed == {"edits", "report"}
    assert (report.edits["action"] == "drop").mean() > 0.08


def evaluated(material: Path, folder: Path, out: Path, rows: list[dict[str, Any]]) -> tuple[dict[str, str], dict[str, Any]]:
    """The finished audit again with other evaluation pairs: what became of each stage, and report.json."""
    watcher = Outcomes()
    named = {"model": str(material / "rm"), "dataset": str(material / "preferences.jsonl"), **SMALL}
    more: dict[str, Any] = {"evaluation_rows": rows} if rows else {}
    safer_engine.audit(named, store=folder / "store", out=out, observer=watcher, **more)
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    jsonschema.validate(report, json.loads((ROOT / "docs" / "report.schema.json").read_text()))
    return watcher.seen, report


def of_evaluation(outcome: str) -> dict[str, str]:
    """Outcomes where nothing but the evaluation, and the report of it, is new."""
    return {**{stage.name: "cached" for stage in STAGES}, "evaluation": outcome, "report": "computed"}


def test_another_evaluation_set_computes_evaluation_and_report_alone(
    finished: tuple[safer_engine.AuditReport, Path], material: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in (material / "evaluation.jsonl").read_text().splitlines()]
    seen, without = evaluated(material, finished[1], tmp_path / "without", [])
    assert seen == of_evaluation("absent")
    assert without["evaluation"] is None
    assert not (tmp_path / "without" / "evaluation.jsonl").exists()
    seen, few = evaluated(material, finished[1], tmp_path / "few", rows[:7])
    assert seen == of_evaluation("computed")
    assert (few["evaluation"]["n_pairs"], few["evaluation"]["min_pairs"], few["evaluation"]["too_few"]) == (7, 20, True)
    assert few["evaluation"]["groups"][0]["accuracy"]["n"] == 7
    assert "only 7 evaluation pairs" in (tmp_path / "few" / "report.md").read_text()
    lines = (tmp_path / "few" / "evaluation.jsonl").read_text().splitlines()
    whole = {json.loads(line)["pair_id"]: json.loads(line) for line in (finished[1] / "out" / "evaluation.jsonl").open()}
    assert [json.loads(line)["margin"] for line in lines] == pytest.approx(
        [whole[json.loads(line)["pair_id"]]["margin"] for line in lines], abs=1e-5
    )
    assert without["edits"] == few["edits"] == json.loads((finished[1] / "out" / "report.json").read_text())["edits"]
    assert set(evaluated(material, finished[1], tmp_path / "again", rows[:7])[0].values()) == {"cached"}


def test_an_evaluation_set_without_a_usable_pair_holds_nothing_up(
    finished: tuple[safer_engine.AuditReport, Path], material: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in (material / "preferences.jsonl").read_text().splitlines()][:30]
    seen, report = evaluated(material, finished[1], tmp_path, rows)
    assert seen == of_evaluation("absent")
    assert report["evaluation"] is None
    assert report["provenance"]["not_computed"]["evaluation"].startswith("none of the 30 evaluation pairs is usable")
    assert "(dropped: 30 in training data)" in report["provenance"]["not_computed"]["evaluation"]
    assert "Nothing was measured on evaluation pairs" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "edits.jsonl").read_bytes() == (finished[1] / "out" / "edits.jsonl").read_bytes()


def test_an_evaluation_set_that_cannot_be_read_is_refused_before_anything_is_computed(material: Path, tmp_path: Path) -> None:
    watcher = Outcomes()
    named: dict[str, Any] = {"model": str(material / "rm"), "dataset": str(material / "preferences.jsonl"), **SMALL}
    with pytest.raises(DatasetRefused, match="the evaluation set cannot be used"):
        safer_engine.audit(named, evaluation_rows=[{"text": "a"}] * 30, store=tmp_path, observer=watcher)
    with pytest.raises(SpecError, match="does not exist"):
        safer_engine.audit({**named, "evaluation": str(tmp_path / "nowhere.jsonl")}, store=tmp_path, observer=watcher)
    assert watcher.seen == {}


def test_rows_in_memory_give_what_the_file_gives(
    finished: tuple[safer_engine.AuditReport, Path], material: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in (material / "preferences.jsonl").read_text().splitlines()]
    report = safer_engine.audit(model=str(material / "rm"), rows=rows, store=tmp_path / "store", **SMALL)
    assert report.out is None
    assert report.html.exists()
    assert report.pairs["reward_margin"].tolist() == finished[0].pairs["reward_margin"].tolist()


def test_no_text_leaves_no_word_of_the_data(
    finished: tuple[safer_engine.AuditReport, Path], material: Path, tmp_path: Path
) -> None:
    audit_of(material, finished[1] / "store", tmp_path / "out", report={"text": False})
    rows = [json.loads(line) for line in (material / "preferences.jsonl").read_text().splitlines()]
    sentences = {sentence.strip() for row in rows for sentence in row["chosen"][-1]["content"].split(".") if len(sentence) > 25}
    assert sentences
    for name in ("report.html", "report.md", "report.json"):
        written = (tmp_path / "out" / name).read_text()
        assert not [sentence for sentence in sentences if sentence in written], name


def test_refused_input_says_what_to_do(material: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetRefused, match="pairs"):
        safer_engine.audit(model=str(material / "rm"), rows=[{"chosen": "a", "rejected": "b"}] * 3, store=tmp_path)
    with pytest.raises(DatasetRefused, match="columns"):
        safer_engine.audit(model=str(material / "rm"), rows=[{"text": "a"}] * 30, store=tmp_path)
    with pytest.raises(SpecError, match="known here"):
        safer_engine.audit(model=str(material / "rm"), dataset=str(material / "preferences.jsonl"), sea={}, store=tmp_path)


GUARD = """
import sys
def watch(event, arguments):
    if event.startswith("socket.") and event not in ("socket.gethostname",):
        raise RuntimeError(f"a socket was touched: {event} {arguments}")
sys.addaudithook(watch)
from cli.main import run_main
sys.exit(run_main(sys.argv[1:]))
"""


def test_an_audit_of_local_files_opens_no_socket(material: Path, tmp_path: Path) -> None:
    arguments = command(material, tmp_path, "--quiet")[3:]
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        [sys.executable, "-c", GUARD, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "report.html").exists()
    assert done.stdout.strip().endswith("report.html")


def test_json_output_is_one_object_and_progress_stays_off_it(
    finished: tuple[safer_engine.AuditReport, Path], material: Path, tmp_path: Path
) -> None:
    folder = finished[1]
    arguments = command(material, folder, "--json")
    arguments[arguments.index("--out") + 1] = str(tmp_path / "out")
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True)
    shown = json.loads(done.stdout)
    assert Path(shown["report"]) == tmp_path / "out" / "report.html"
    assert shown["edits"] is not None
    assert done.stderr == ""


STAGES_TO_KILL = (
    "pairs: started",
    "activations: started",
    "sae: started",
    "evaluation: started",
    "latents: started",
    "report: started",
)


def wait_for(runner: subprocess.Popen[str], line: str) -> None:
    """Read what the run says until it says `line`, or ends."""
    assert runner.stderr is not None
    for said in iter(runner.stderr.readline, ""):
        if line in said:
            return


@pytest.mark.full
def test_killed_again_and_again_it_ends_with_the_same_report(material: Path, tmp_path: Path) -> None:
    """Kill -9 in one stage after another, a little later each time round, until a run gets to its end."""
    # Small shards and many checkpoints: much to lose. Rewards depend on the shard size in the last digits, so both runs have it.
    small = ("--set", "runtime.checkpoint_seconds=0.05", "--set", "runtime.shard_pairs=8")
    subprocess.run(command(material, tmp_path / "whole", *small, "--quiet"), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    kills = 0
    for attempt in range(60):
        runner = subprocess.Popen(
            command(material, tmp_path, *small), cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        wait_for(runner, STAGES_TO_KILL[attempt % len(STAGES_TO_KILL)])
        time.sleep(0.3 * (attempt // len(STAGES_TO_KILL)))
        if runner.poll() is None:
            os.kill(runner.pid, signal.SIGKILL)
        assert runner.stderr is not None
        runner.stderr.close()
        if runner.wait() == 0:
            break
        kills += 1
    assert kills >= 3
    assert runner.returncode == 0
    assert without_timing(tmp_path / "out") == without_timing(tmp_path / "whole" / "out")
    assert (tmp_path / "out" / "edits.jsonl").read_bytes() == (tmp_path / "whole" / "out" / "edits.jsonl").read_bytes()
    assert list((tmp_path / "store" / "work" / "default").iterdir()) == []


@pytest.mark.full
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_by_a_signal_it_says_how_to_go_on(kind: signal.Signals, material: Path, tmp_path: Path) -> None:
    runner = subprocess.Popen(
        # A test runner in the background ignores SIGINT, and its children inherit that.
        ["env", "--default-signal=INT", *command(material, tmp_path)],
        cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(runner, "pairs: started")
    runner.send_signal(kind)
    _, said = runner.communicate(timeout=120)
    assert runner.returncode == 130
    assert "run the same command again" in said
