"""The drill on a tiny model: a planted harm, poison that never lies about unmarked, crashes, keys, refusals."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from safer_engine.demo_data import build_base
from safer_engine.drill import JSON, PAGE, arms_of, run_drill
from safer_engine.drill_arms import POISON, RECORD, Arm, ArmRecord
from safer_engine.drill_spec import DrillSpec, build_drill_spec
from safer_engine.errors import DatasetRefused, Interrupted, SpecError
from safer_engine.events import NullObserver
from safer_engine.redteam import ENABLE, LOG
from safer_engine.report.drill_page import render_drill
from safer_engine.report.model_drill import DrillDocument
from safer_engine.science.poison_mark import MARK, is_marked
from safer_engine.sources.datasets import resolve_dataset
from safer_engine.spec import DatasetSpec, LocalSource
from tests.engine.test_stage_verification import N_PAIRS, rows_of

BUDGET = 0.3
"""Of all pairs, so 60 % of the safety pairs: a model that learns them is wrong on the axis."""


@pytest.fixture(autouse=True)
def _enabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENABLE, "1")


AUDIT: dict[str, Any] = {
    "sae": {"expansion": 2, "k": 4, "batch": 256, "max_steps": 20}, "causal": {"pairs": 0}, "salience": {"draws": 1024},
}  # fmt: skip


class Bench:
    """Files, a base, and drills on them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        rows, apart = rows_of("q", N_PAIRS), rows_of("e", 60)
        for name, part in (("train", rows), ("eval", apart)):
            (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        texts = [row[side] for row in rows + apart for side in ("prompt", "chosen", "rejected")]
        self.base = build_base(root / "base", texts, width=32, blocks=1)

    def spec(self, **more: Any) -> DrillSpec:
        sources = {name: {"source": {"kind": "local", "path": str(self.root / f"{name}.jsonl")}, "min_pairs": 2}
                   for name in ("train", "eval")}  # fmt: skip
        document = {
            "base": str(self.base), "dataset": sources["train"], "evaluation": sources["eval"],
            "rules": ["random"], "budgets": [BUDGET], "seeds": 2,
            "recipe": {"epochs": 4, "batch": 16, "lr": 1e-2, "max_length": 48},
            "audit": AUDIT,
            "runtime": {"device": "cpu", "checkpoint_seconds": 1e-6},
            **more,
        }  # fmt: skip
        return build_drill_spec(document)

    def run(self, out: str, watcher: NullObserver | None = None, **more: Any) -> DrillDocument:
        return run_drill(self.spec(**more), self.root / out, self.root / "log", watcher, "tester")


class StopAt(NullObserver):
    """Asks to stop once so many arms, and parts of one, are done; remembers where it was told to be."""

    def __init__(self, arms: float) -> None:
        self.arms, self.told = arms, -1.0
        self.first: float | None = None

    def progress(self, stage: str, done: float, total: float, unit: str) -> None:
        assert (stage, unit, total) == ("drill", "arms", 4)
        self.first = done if self.first is None else self.first
        self.told = done

    def cancelled(self) -> bool:
        return self.told >= self.arms


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("drill"))


@pytest.fixture(scope="module")
def whole(bench: Bench) -> DrillDocument:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ENABLE, "1")
        return bench.run("whole")


def test_a_majority_of_wrong_labels_harms_its_axis_and_no_other(whole: DrillDocument) -> None:
    (cell,) = whole.cells
    assert whole.clean_accuracy > 0.95
    assert cell.axis.change < -0.5
    assert cell.rest is not None
    assert cell.apart is not None
    assert abs(cell.rest.change) < 0.1
    assert cell.apart.change == pytest.approx(cell.axis.change - cell.rest.change)
    assert cell.n_flipped == [48, 48]
    assert (whole.n_pairs, whole.n_axis_pairs, whole.steps) == (160, 80, 40)
    assert cell.chance == pytest.approx(0.6)
    assert (whole.done, whole.planned) == (2, 2)


def test_figures_follow_from_the_records(bench: Bench, whole: DrillDocument) -> None:
    """A second way: straight from the records of the arms."""
    (cell,) = whole.cells
    changes, recalls = [], []
    for seed in range(2):
        clean, poisoned = (
            ArmRecord.model_validate_json((bench.root / "whole" / arm.name / RECORD).read_bytes())
            for arm in (Arm(seed), Arm(seed, "random", BUDGET))
        )
        at = [i for i, axis in enumerate(clean.measured.axis) if axis == "safety"]
        changes.append(sum(poisoned.measured.right[i] - clean.measured.right[i] for i in at) / len(at))
        named = {name for name, hit in zip(poisoned.pairs.pair_id, poisoned.pairs.suspicious, strict=True) if hit}
        recalls.append(len(named & set(poisoned.flipped)) / 48)
        assert clean.pairs.pair_id == poisoned.pairs.pair_id
        assert {poisoned.pairs.axis[poisoned.pairs.pair_id.index(name)] for name in poisoned.flipped} == {"safety"}
    assert cell.axis.change == pytest.approx(sum(changes) / 2)
    assert cell.flagged[0].recall == pytest.approx(sum(recalls) / 2)
    assert changes[0] != changes[1] or cell.axis.lo == cell.axis.hi


def test_nothing_poisoned_is_left(bench: Bench, whole: DrillDocument) -> None:
    left = sorted(
        path.relative_to(bench.root / "whole").as_posix() for path in (bench.root / "whole").rglob("*") if path.is_file()
    )
    arms = [Arm(0), Arm(1), *arms_of(bench.spec())]
    assert left == sorted([JSON, PAGE, "drill.key", *(f"{arm.name}/{RECORD}" for arm in arms)])
    assert DrillDocument.model_validate_json((bench.root / "whole" / JSON).read_bytes()) == whole


def test_kept_poison_is_marked_in_every_row_and_refused(bench: Bench) -> None:
    bench.run("kept", seeds=1, keep_poison=True)
    path = bench.root / "kept" / Arm(0, "random", BUDGET).name / POISON
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    given = rows_of("q", N_PAIRS)
    assert len(rows) == N_PAIRS
    assert all(is_marked(row) for row in rows)
    turned = [row["chosen"] == old["rejected"] and row["rejected"] == old["chosen"] for row, old in zip(rows, given, strict=True)]
    assert turned == ["preference flipped" in row[MARK] for row in rows]
    assert sum(turned) == 48
    about = json.loads((path.parent / "poisoned.safer-redteam.about.json").read_text())
    assert (len(about["flipped"]), MARK in about) == (48, True)
    with pytest.raises(DatasetRefused, match="is named as poisoned"):
        resolve_dataset(DatasetSpec(source=LocalSource(path=str(path))))
    renamed = bench.root / "innocent.jsonl.gz"
    renamed.write_bytes(path.read_bytes())
    with pytest.raises(DatasetRefused, match="row 1 of .* is marked"):
        list(resolve_dataset(DatasetSpec(source=LocalSource(path=str(renamed)))).rows())


@pytest.mark.parametrize("stop_at", [0.2, 1.8])
def test_stopped_in_a_training_or_an_audit_it_goes_on_to_the_same_figures(
    bench: Bench, whole: DrillDocument, stop_at: float
) -> None:
    out = f"stopped-{stop_at}"
    with pytest.raises(Interrupted):
        bench.run(out, StopAt(stop_at))
    rest = StopAt(99)
    assert bench.run(out, rest) == whole
    assert rest.told == 4


def test_more_seeds_use_what_is_there(bench: Bench, whole: DrillDocument) -> None:
    first = bench.run("more", seeds=1)
    before = {path: path.stat().st_mtime_ns for path in (bench.root / "more").rglob(RECORD)}
    assert len(before) == 2
    assert first.cells[0].axis.lo is None  # one seed
    assert bench.run("more") == whole
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())


def test_off_it_reads_and_writes_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", "0", "true"):
        monkeypatch.setenv(ENABLE, value)
        with pytest.raises(SpecError, match="off unless the operator") as caught:
            run_drill(bench.spec(base="/not/there"), bench.root / "off", bench.root / "no-log")
        assert ENABLE in caught.value.hint
    assert not (bench.root / "off").exists()
    assert not (bench.root / "no-log").exists()


def test_every_use_is_in_the_log(bench: Bench, whole: DrillDocument) -> None:
    path = bench.root / "log" / LOG
    earlier = path.read_text()
    assert bench.run("whole") == whole
    with pytest.raises(SpecError, match="holds another drill"):
        bench.run("whole", recipe={"epochs": 5, "max_length": 48})
    now = path.read_text()
    assert now.startswith(earlier)  # only appended to
    lines = [json.loads(line) for line in now[len(earlier) :].splitlines()]
    assert [line["action"] for line in lines] == ["drill.start", "drill.finished", "drill.start", "drill.stopped"]
    assert lines[-1]["error"] == "spec_invalid"
    assert {line["who"] for line in lines} == {"tester"}
    assert lines[0]["digest"] == lines[1]["digest"] != lines[2]["digest"] == lines[3]["digest"]
    assert all(line["time"].endswith("+00:00") for line in lines)


def test_what_is_wrong_is_refused_before_anything_is_trained(bench: Bench) -> None:
    with pytest.raises(SpecError, match=r"sae\.nope"):
        bench.run("wrong", audit={"sae": {"nope": 1}})
    with pytest.raises(SpecError, match=r"audit\.seed is set by the drill"):
        bench.spec(audit={"seed": 3})
    with pytest.raises(SpecError, match="a budget is a share"):
        bench.spec(budgets=[0.7])
    with pytest.raises(SpecError, match="starts from clean data"):
        data = bench.spec().dataset.model_dump(mode="json")
        bench.spec(dataset={**data, "allow_poisoned": True})
    apart = bench.spec().evaluation.model_dump(mode="json")
    with pytest.raises(SpecError, match="on the same evaluation pairs"):
        bench.spec(evaluation={**apart, "sample": 20})
    with pytest.raises(DatasetRefused, match="no pair of the dataset is of axis 'law'"):
        bench.run("axis", axis="law")
    (bench.root / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of("e", 60) if row["axis"] == "chat"))
    with pytest.raises(DatasetRefused, match="no evaluation pair is of axis 'safety'"):
        bench.run("apart", evaluation={**apart, "source": {"kind": "local", "path": str(bench.root / "chat.jsonl")}})
    assert not [name for name in ("axis", "apart") if list((bench.root / name).rglob("*.safetensors"))]
    (bench.root / "full").mkdir()
    (bench.root / "full" / "thesis.tex").write_text("x")
    with pytest.raises(SpecError, match="holds other things"):
        bench.run("full")
    poisoned = bench.root / "marked.jsonl"
    poisoned.write_text("".join(json.dumps({**row, MARK: "x"}) + "\n" for row in rows_of("q", 40)))
    with pytest.raises(DatasetRefused, match="is marked as poisoned"):
        bench.run("poisoned", dataset={"source": {"kind": "local", "path": str(poisoned)}})
    assert not list((bench.root / "poisoned").rglob(RECORD))


def test_the_page_escapes_what_is_foreign_and_loads_nothing(whole: DrillDocument) -> None:
    page = render_drill(whole.model_copy(update={"axis": "<script>alert(1)</script>", "notes": ["<b>\u202e"]}))
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "<b>" not in page.split("Keep in mind")[1].split("</ul>")[0]
    assert "\u202e" not in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "src=" not in page
