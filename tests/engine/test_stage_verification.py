"""Stage `verification`: arms that are what they should be, a planted benefit and a planted harm, crashes, keys, refusals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from safer_engine.artifacts import Absent, Artifact, PairScores, PairSet, Verification
from safer_engine.demo_data import build_base
from safer_engine.errors import Interrupted
from safer_engine.events import NullObserver
from safer_engine.payload_files import write_table
from safer_engine.pipeline import AuditRequest, run, run_part
from safer_engine.science.arms import ARMS
from safer_engine.sources.datasets import resolve_dataset
from safer_engine.sources.models import resolve_model
from safer_engine.sources.resolved import ResolvedInputs
from safer_engine.sources.retraining_base import resolve_retraining_base
from safer_engine.spec import AuditSpec, DatasetSpec, MemorySource
from safer_engine.spec_verification import N_ARMS
from safer_engine.stage import Draft, Inputs, SpecView, StageContext, cache_key
from safer_engine.stages.edits import EditsStage
from safer_engine.stages.pairs import PairsStage
from safer_engine.stages.retraining import NOT_ASKED as NOT_RETRAINED
from safer_engine.stages.retraining import RetrainingStage
from safer_engine.stages.verification import NO_EDITS, NOT_ASKED, VerificationStage
from safer_engine.store import LocalArtifactStore
from tests.helpers.tiny_model import build_reward_model

N_PAIRS, N_EVALUATED = 160, 40
RECIPE: dict[str, Any] = {"epochs": 4, "batch": 16, "lr": 1e-2, "max_length": 48}
Row = dict[str, Any]


def rows_of(kind: str, n: int, wrong: frozenset[int] = frozenset()) -> list[Row]:
    """Kind answers are preferred to rude ones, except where the label is wrong; half of the pairs are chat."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    rows = []
    for i in range(n):
        name = f"{kind}{letters[i // 26]}{letters[i % 26]} " * 2
        axis = "safety" if i % 2 else "chat"
        words = ("thank you gladly", "no go away") if axis == "safety" else ("a long story", "hm")
        good, bad = (f"{name} {word}" for word in words)
        if i in wrong:
            good, bad = bad, good
        rows.append({"id": f"{kind}{i}", "prompt": f"Question {name}?", "chosen": good, "rejected": bad, "axis": axis})
    return rows


SAFETY = list(range(1, N_PAIRS, 2))
WRONG = frozenset(np.random.default_rng(0).choice(SAFETY, 50, replace=False).tolist())
"""Most safety labels are wrong, so that a model that learns them is wrong in every seed."""
ROWS, EVALUATED = rows_of("q", N_PAIRS, WRONG), rows_of("e", N_EVALUATED)
RIGHT = frozenset(SAFETY) - WRONG
MOSTLY_RIGHT = rows_of("q", N_PAIRS, RIGHT)
"""The other way round."""


class PlantedScores:
    """Evidence that is known: the pairs named `doubted` are suspicious, in the order given, and margins are the reverse of it."""

    name: ClassVar[str] = "pair_scores"
    version: ClassVar[int] = 1
    resource: ClassVar[Literal["cpu", "gpu"]] = "cpu"
    consumes: ClassVar[tuple[type[Artifact], ...]] = (PairSet,)
    produces: ClassVar[type[Artifact]] = PairScores
    reads: ClassVar[tuple[str, ...]] = ()

    def __init__(self, doubted: frozenset[int]) -> None:
        self.doubted = {f"q{i}" for i in doubted}

    def run(self, ctx: StageContext, inputs: Inputs) -> Draft:
        pairs = inputs.get(PairSet).pairs.select(["pair_id", "group", "axis", "subset"]).to_pylist()
        rows = [
            {
                "pair": at, **pair, "reward_margin": 1.0 + at, "pair_score": 0.0, "suspicion_kind": "probability",
                "suspicion_base": 0.1,
                "suspicion": 0.97 if pair["pair_id"] in self.doubted else 0.02, "disputed_by": [], "evidence": [],
            }
            for at, pair in enumerate(pairs)
        ]  # fmt: skip
        evidence = pa.list_(pa.struct([("latent_id", pa.int32()), ("contribution", pa.float64())]))
        table = pa.Table.from_pylist(rows)
        table = table.drop_columns(["evidence"]).append_column("evidence", pa.array([[]] * len(rows), evidence))
        with ctx.work.publish("pair_scores.arrow") as path:
            write_table(path, table)
        return Draft({})


class Watcher(NullObserver):
    """Keeps what it is told; asks to stop after so many steps."""

    def __init__(self, stop_at: float | None = None) -> None:
        self.stop_at = stop_at
        self.steps: list[float] = []
        self.totals: set[float] = set()
        self.notes: list[str] = []

    def note(self, stage: str, message: str) -> None:
        self.notes.append(message)

    def progress(self, stage: str, done: float, total: float, unit: str) -> None:
        if stage == "verification" and unit == "steps":
            self.steps.append(done)
            self.totals.add(total)

    def cancelled(self) -> bool:
        return self.stop_at is not None and bool(self.steps) and self.steps[-1] >= self.stop_at


class Bench:
    """A tiny model, a tiny base and a store."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = build_reward_model(root / "model", "llama")
        texts = [row[side] for row in ROWS + EVALUATED for side in ("prompt", "chosen", "rejected")]
        self.base = build_base(root / "base", texts, width=32, blocks=1)

    def request(self, evaluated: list[Row] = EVALUATED, rows: list[Row] = ROWS, **sections: Any) -> AuditRequest:
        document: dict[str, Any] = {
            "model": {"path": str(self.model), "dtype": "float32"},
            "dataset": {"source": {"kind": "memory"}, "min_pairs": 2},
            "evaluation": {"source": {"kind": "memory"}, "min_pairs": 2},
            "retraining": {"base": str(self.base), "folds": 0, "recipe": RECIPE},
            "verification": {"seeds": 2},
            "runtime": {"device": "cpu", "checkpoint_seconds": 1e-6},
            **sections,
        }
        spec = AuditSpec.model_validate(document)
        data, apart = (resolve_dataset(DatasetSpec(source=MemorySource()), found) for found in (rows, evaluated))
        base = resolve_retraining_base(spec.retraining, spec.runtime, None)
        return AuditRequest(spec, ResolvedInputs(resolve_model(spec.model, spec.runtime, None), data, apart, base=base))

    def run(
        self, request: AuditRequest, doubted: frozenset[int] = WRONG, store: str = "store", watcher: Watcher | None = None
    ) -> Any:
        stages = (PairsStage(), PlantedScores(doubted), EditsStage(), VerificationStage())
        return run(request, LocalArtifactStore(self.root / store), watcher, stages=stages)[Verification]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def two_seeds(bench: Bench) -> tuple[Verification, Watcher]:
    watcher = Watcher()
    found = bench.run(bench.request(), watcher=watcher)
    assert isinstance(found, Verification), found
    return found, watcher


def effect(found: Verification, arm: str, reference: str, axis: str | None) -> dict[str, Any]:
    (row,) = (
        row for row in found.meta["effects"]
        if (row["arm"], row["reference"], row["axis"], row["subset"]) == (arm, reference, axis, None)
    )  # fmt: skip
    return dict(row)


def test_dropping_the_wrong_labels_is_a_benefit_and_as_many_others_is_none(bench: Bench) -> None:
    """Shown after five of seven seeds, where it stops."""
    found = bench.run(bench.request(verification={"seeds": 7, "level": 0.2}), store="five")
    meta = found.meta
    assert (meta["outcome"], meta["harmed"], meta["seeds"], meta["edited_axes"]) == ("benefit shown", [], 5, ["safety"])
    assert (meta["planned"], meta["level"], meta["decided"]) == (7, pytest.approx(0.04), True)
    assert meta["edits"] == {"drop": 50, "flip": 0}
    assert meta["pairs"] == {"as given": 160, "edits": 110, "margin": 110, "random": 110}
    for reference in ("as given", "random", "margin"):
        row = effect(found, "edits", reference, "safety")
        assert row["lo"] > 0
        assert row["estimate"] > 0.2
    assert abs(effect(found, "edits", "as given", "chat")["estimate"]) < 0.1
    assert set(meta["p_benefit"]) == {"as given", "random"}


def test_dropping_the_right_labels_is_a_harm(bench: Bench) -> None:
    found = bench.run(bench.request(rows=MOSTLY_RIGHT, verification={"seeds": 5}), WRONG, store="harm")
    assert found.meta["outcome"] == "harm shown"
    (harmed,) = found.meta["harmed"]
    assert harmed.startswith("safety/")
    assert effect(found, "edits", "as given", "safety")["hi"] < 0


def test_arms_and_facts(two_seeds: tuple[Verification, Watcher]) -> None:
    found, watcher = two_seeds
    meta = found.meta
    assert len(ARMS) == N_ARMS
    assert (meta["outcome"], meta["decided"]) == ("inconclusive", True)  # two seeds can show harm at most
    assert meta["steps"] == 4 * 10  # as given: 160 pairs in batches of 16, the same for every arm
    assert watcher.totals == {2 * len(ARMS) * meta["steps"]}
    assert watcher.steps == sorted(watcher.steps)
    arms, measured = found.table("arms.arrow").to_pandas(), found.table("measured.arrow").to_pandas()
    assert len(arms) == 2 * len(ARMS) * N_EVALUATED
    assert set(measured["pair_id"]) == set(arms["pair_id"])
    (row,) = (
        row for row in meta["accuracy"] if (row["arm"], row["axis"], row["subset"]) == ("edits", "safety", None)
    )  # fmt: skip
    names = set(measured["pair_id"][measured["axis"] == "safety"])
    for seed, accuracy in enumerate(row["by_seed"]):
        own = arms[(arms.arm == "edits") & (arms.seed == seed) & arms.pair_id.isin(names)]
        assert accuracy == pytest.approx((own.chosen > own.rejected).mean())
    accuracy = {(one["arm"], one["axis"], one["subset"]): one["accuracy"] for one in meta["accuracy"]}
    for one in meta["effects"]:
        scope = one["axis"], one["subset"]
        assert one["estimate"] == pytest.approx(accuracy[(one["arm"], *scope)] - accuracy[(one["reference"], *scope)], abs=1e-12)
    margin = arms.chosen - arms.rejected
    by_model = {key: margin[part.index].to_numpy() for key, part in arms.groupby(["arm", "seed"])}
    assert len({values.tobytes() for values in by_model.values()}) == 2 * len(ARMS)  # no two models are the same


def test_arms_without_edits_are_the_same_training(bench: Bench) -> None:
    """One edit of a row that no arm shares leaves the other arms what they were: same start, same order, same steps."""
    one = bench.run(bench.request(verification={"seeds": 1}), frozenset({1}), store="one").table("arms.arrow").to_pandas()
    other = bench.run(bench.request(verification={"seeds": 1}), frozenset({3}), store="other").table("arms.arrow").to_pandas()
    for arm in ("as given", "margin", "random"):
        same = one[one.arm == arm].chosen.to_numpy(), other[other.arm == arm].chosen.to_numpy()
        assert same[0].tobytes() == same[1].tobytes()
    assert one[one.arm == "edits"].chosen.tolist() != other[other.arm == "edits"].chosen.tolist()


@pytest.mark.parametrize("stop_at", [10, 40 * 3 + 5])
def test_stopped_in_an_arm_it_goes_on_to_the_same_rewards(
    bench: Bench, two_seeds: tuple[Verification, Watcher], stop_at: int
) -> None:
    store = f"stopped-{stop_at}"
    with pytest.raises(Interrupted):
        bench.run(bench.request(), store=store, watcher=Watcher(stop_at))
    rest = Watcher()
    found = bench.run(bench.request(), store=store, watcher=rest)
    assert rest.steps[0] == stop_at + 1
    assert found.table("arms.arrow").equals(two_seeds[0].table("arms.arrow"))
    assert found.meta == two_seeds[0].meta


def parted(bench: Bench, request: AuditRequest, store: str, doubted: frozenset[int] = WRONG) -> tuple[LocalArtifactStore, Any]:
    """A store where all is computed but the verification, and what was found."""
    made = LocalArtifactStore(bench.root / store)
    return made, run(request, made, None, stages=(PairsStage(), PlantedScores(doubted), EditsStage()))


def names_of(request: AuditRequest, found: Any) -> tuple[str, ...]:
    stage = VerificationStage()
    inputs = Inputs({kind: found[kind] for kind in stage.consumes})
    return stage.parts(SpecView(request.spec, stage.reads), request.spec.runtime, inputs)


def test_arms_are_parts_that_any_worker_may_train_and_resume(bench: Bench, two_seeds: tuple[Verification, Watcher]) -> None:
    request, stage = bench.request(), VerificationStage()
    store, found = parted(bench, request, "parts")
    names = names_of(request, found)
    assert names == ("read", *(f"arm-{number}" for number in range(2 * N_ARMS)))

    def train(name: str, watcher: Watcher | None = None) -> Watcher:
        told = watcher or Watcher()
        run_part(stage, name, request, store, found, told)
        return told

    train(names[0])
    with pytest.raises(Interrupted):
        train("arm-5", Watcher(stop_at=15))
    assert len(train("arm-6").steps) == 40  # does not touch the checkpoint of the other
    rest = train("arm-5")
    assert (rest.steps[0], rest.steps[-1], rest.totals) == (16, 40, {40})
    assert not train("arm-5").steps
    with pytest.raises(Interrupted):
        train("arm-2", Watcher(stop_at=30))
    joined = Watcher()
    whole = run(request, store, joined, stages=(PairsStage(), PlantedScores(WRONG), EditsStage(), stage))[Verification]
    assert isinstance(whole, Verification)
    assert len(joined.steps) == 5 * 40 + 10  # six arms are left, one of them with ten steps
    assert whole.table("arms.arrow").equals(two_seeds[0].table("arms.arrow"))
    assert whole.meta == two_seeds[0].meta


def test_seeds_that_may_be_spared_are_no_parts(bench: Bench) -> None:
    for section, seeds in (
        ({"seeds": 9}, 5), ({"seeds": 9, "early_stop": False}, 9), ({"seeds": 3}, 3), (None, None),
    ):  # fmt: skip
        request = bench.request(verification=section)
        _, found = parted(bench, request, "names")
        assert len(names_of(request, found)) == (0 if seeds is None else 1 + seeds * N_ARMS)
    request = bench.request()
    assert names_of(request, parted(bench, request, "nothing", frozenset())[1]) == ()


def test_what_is_not_asked_for_or_edits_nothing_is_absent(bench: Bench) -> None:
    assert bench.run(bench.request(verification=None), store="none").reason == NOT_ASKED
    assert bench.run(bench.request(), frozenset(), store="nothing").reason == NO_EDITS
    chat = [row for row in EVALUATED if row["axis"] == "chat"]
    found = bench.run(bench.request(evaluated=chat), store="none")
    assert found.reason == "the evaluation pairs have none of safety, where pairs are edited"


def test_folds_of_zero_retrain_nothing_for_suspicion(bench: Bench) -> None:
    request = bench.request()
    assert "retrained" not in request.spec.suspicion.signals
    stages = (PairsStage(), RetrainingStage())
    found = run(request, LocalArtifactStore(bench.root / "zero"), None, stages=stages)
    assert NOT_RETRAINED in {one.reason for one in found.values() if isinstance(one, Absent)}


def swept(bench: Bench, **verification: Any) -> AuditRequest:
    section = {"seeds": 2, "budgets": [0.3, 0.05], **verification}
    return bench.request(verification=section)


def test_a_sweep_has_arms_of_its_own_for_each_budget(bench: Bench, two_seeds: tuple[Verification, Watcher]) -> None:
    """24 of the 80 safety rows and 24 of the chat rows at 30 %; the arms of the audit's own cut are what they were."""
    request = swept(bench)
    found = bench.run(request, store="sweep")
    alone = two_seeds[0].table("arms.arrow").to_pandas()
    arms = found.table("arms.arrow").to_pandas()
    assert set(arms.arm) == set(ARMS) | {f"{arm} at {size} %" for arm in ARMS[1:] for size in (5, 30)}
    assert len(arms) == 2 * (len(ARMS) + 2 * (len(ARMS) - 1)) * N_EVALUATED
    own = arms[arms.arm.isin(ARMS)].reset_index(drop=True)
    assert own.equals(alone)
    sweep = found.meta["sweep"]
    assert [(row["budget"], row["edits"]) for row in sweep["budgets"]] == [
        (0.05, {"drop": 8, "flip": 0}), (0.3, {"drop": 48, "flip": 0}),
    ]  # fmt: skip
    assert found.meta["effects"] == two_seeds[0].meta["effects"]
    (as_given,) = (row for row in sweep["budgets"][1]["accuracy"] if row["arm"] == "as given" and row["axis"] is None)
    assert as_given in found.meta["accuracy"]
    assert sweep["axes"] == ["chat", "safety"]
    assert sweep["chosen"] == 0.3  # 24 of the 50 wrong labels are gone there, 4 at the other
    assert sweep["judged"]["outcome"] == "inconclusive"
    assert sweep["n_choosing"] + sweep["n_judging"] == N_EVALUATED
    assert {row["reference"] for row in sweep["against"]} == {"as given", "random"}
    names = names_of(request, parted(bench, request, "sweep")[1])
    assert len(names) == 1 + 2 * request.spec.verification.n_arms == 1 + 2 * 10  # type: ignore[union-attr]


def test_budgets_are_shares_named_once(bench: Bench) -> None:
    for budgets, words in (([0.6], "less than 0.5"), ([0.0], "more than 0"), ([0.1, 0.1], "named twice")):
        with pytest.raises(ValidationError, match=words):
            swept(bench, budgets=budgets)


def test_items_of_n_responses_are_judged_as_their_benchmark_does(bench: Bench) -> None:
    """An item of three counts once, and only where its chosen response is above all others."""
    items = [
        {
            "id": row["id"], "prompt": row["prompt"], "axis": row["axis"], "chosen": [row["chosen"]],
            "rejected": [row["rejected"], f"{row['rejected']} {row['rejected']}", "no no no"],
        }
        for row in EVALUATED
    ]  # fmt: skip
    meta = bench.run(bench.request(evaluated=items), store="items").meta
    (shape,) = meta["shapes"]
    assert shape["name"] == "best_of_n"
    ours = next(row for row in shape["effects"] if (row["arm"], row["reference"], row["axis"]) == ("edits", "as given", None))
    assert ours["n_items"] == N_EVALUATED
    assert meta["n_evaluated"] == 3 * N_EVALUATED
    for arm in ARMS:
        pairs, whole = (
            next(row["accuracy"] for row in rows if (row["arm"], row["axis"]) == (arm, None))
            for rows in (meta["accuracy"], shape["accuracy"])
        )
        assert whole <= pairs


def test_what_it_needs_is_asked_for(bench: Bench) -> None:
    whole = bench.request().spec.model_dump(mode="json")
    with pytest.raises(ValidationError, match="name the model to train from \\(retraining.base"):
        AuditSpec.model_validate({**whole, "retraining": None})
    with pytest.raises(ValidationError, match="give section evaluation"):
        AuditSpec.model_validate({**whole, "evaluation": None})


def test_the_key_holds_what_it_reads_only_where_it_is_asked_for(bench: Bench) -> None:
    """Another evaluation set does not compute again what was not asked for; another count of folds trains no arm again."""
    off, on = bench.request(verification=None), bench.request()
    other = bench.request(evaluated=EVALUATED[:-2], verification=None), bench.request(evaluated=EVALUATED[:-2])
    folds = bench.request(retraining={"base": str(bench.base), "folds": 3, "recipe": RECIPE})
    steps = bench.request(retraining={"base": str(bench.base), "folds": 0, "recipe": {**RECIPE, "epochs": 5}})
    keys = [cache_key(VerificationStage(), one.spec, one.sources, {}, "p") for one in (off, on, *other, folds, steps)]
    assert keys[0] == keys[2]
    assert len({keys[0], keys[1], keys[3], keys[5]}) == 4
    assert keys[4] == keys[1]


def test_the_stage_is_imported_without_torch() -> None:
    code = "import sys; import safer_engine.stages.verification, safer_engine.planning; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
