"""The estimates of docs/scale.md: formulas against files, against `planning`, and the page against the code."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import scale_model as model
from benchmarks.scale_tables import PAGE, RESULTS, filled, limits_of, tables, thousands
from safer_engine.pipeline import STAGES, StagePlan
from safer_engine.planning import AuditSize, ModelSize, Workload, estimate_of
from safer_engine.rates import MATMUL, rate_name
from safer_engine.spec import AuditSpec

DOCUMENT: dict[str, Any] = json.loads(RESULTS.read_text())
MEASURED = model.Measured(DOCUMENT)
RUNS = DOCUMENT["service"]["runs"]
GIVEN = model.Assumptions()


def test_the_page_shows_what_the_code_computes() -> None:
    page = PAGE.read_text(encoding="utf-8")
    made = tables(MEASURED)
    assert set(re.findall(r"<!-- table: (\w+) -->", page)) == set(made)
    assert filled(page, made) == page


@pytest.mark.parametrize("run", RUNS, ids=lambda run: str(run["pairs"]))
def test_formulas_give_the_sizes_of_the_measured_files(run: dict[str, Any]) -> None:
    sizes = model.Sizes(run["pairs"], run["tokens"], run["positions"], run["d_in"], width=4)
    found = {name: size for stage in run["stages"].values() for name, size in stage.get("bytes", {}).items()}
    header = 400 * sizes.shards
    assert 0 <= found["shard-N.safetensors"] - model.shard_bytes(sizes) <= header
    assert 0 <= found["head.safetensors"] - model.head_bytes(sizes) <= 400
    d_sae, k = 8 * run["d_in"], DOCUMENT["service"]["spec"]["sae"]["k"]
    assert found["sae.safetensors"] == pytest.approx(model.sae_bytes(run["d_in"], d_sae), rel=0.01)
    kept = DOCUMENT["service"]["spec"]["causal"]["pairs"]
    assert found["residual-N.safetensors"] == pytest.approx(model.residual_bytes(sizes, kept), rel=0.2)
    most = 2 * run["pairs"] * model.distinct_latents(d_sae, k, run["positions"] / (2 * run["pairs"]))
    assert found["acts.safetensors"] < model.acts_bytes(run["pairs"], most)
    assert sizes.shards == run["shards"]
    assert sizes.parts + 1 == run["stages"]["activations"]["units"]


def test_every_measured_job_went_through_without_a_second_try() -> None:
    assert [stage.get("failures", 0) for run in RUNS for stage in run["stages"].values() if stage.get("failures")] == []


def test_work_is_counted_as_plans_count_it(tmp_path: Path) -> None:
    shape, pairs = model.SHAPES[1], 10_000
    sizes = model.sizes_of(shape, pairs, GIVEN)
    reading = int(2 * GIVEN.tokens * GIVEN.evaluation_pairs)
    load = Workload(pairs, GIVEN.evaluation_pairs, int(sizes.tokens) + reading, reading, int(sizes.positions), True, True)
    size = ModelSize(shape.d_in, shape.n_blocks, shape.body_parameters, shape.parameters, 2 * shape.parameters)
    spec = AuditSpec.model_validate({"model": {"path": "rm", "dtype": "bfloat16"}, "dataset": {"source": {"kind": "memory"}}})
    rates = tmp_path / "rates.json"
    rates.write_text(json.dumps({rate_name(MATMUL, spec): 1e12}))
    planned = tuple(StagePlan(stage.name, stage.resource, None, "compute") for stage in STAGES)
    stages = estimate_of(spec, AuditSize(load, size), planned, rates).stages
    found = model.flops(shape, sizes, GIVEN)
    together = (stages["activations"].work or 0) + (stages["evaluation"].work or 0)
    assert found["activations"] == pytest.approx(together, rel=1e-9)
    for name in ("sae", "latents"):
        assert found[name] == pytest.approx(stages[name].work, rel=1e-3)
    disk = model.shard_bytes(sizes) + model.head_bytes(sizes) + model.residual_bytes(sizes, spec.causal.pairs)
    assert disk == pytest.approx(stages["activations"].disk_bytes, rel=0.02)


def test_shapes_have_the_sizes_of_their_names() -> None:
    assert [round(shape.parameters / 1e9, 1) for shape in model.SHAPES] == [1.2, 7.5, 69.5]


def test_a_line_is_found_and_its_residual_told() -> None:
    line = model.fit({1: 3.0, 2: 5.0, 4: 9.0})
    assert line.fixed == pytest.approx(1.0)
    assert line.slope == pytest.approx(2.0)
    assert line.residual == pytest.approx(0.0, abs=1e-9)
    assert model.fit({1: 1.0, 2: 4.0, 3: 9.0}).fixed == 0.0
    assert model.fit({1: 5.0, 2: 5.0, 3: 2.0}).slope == 0.0
    assert model.fit({1: 1.0, 2: 1.0, 3: 4.0}).residual > 0.2


def test_no_sae_lets_more_latents_fire_than_one_of_equal_chances() -> None:
    rng = np.random.default_rng(0)
    seen = [len({int(one) for _ in range(50) for one in rng.choice(256, 8, replace=False)}) for _ in range(200)]
    assert np.mean(seen) == pytest.approx(model.distinct_latents(256, 8, 50), rel=0.02)


def test_limits_are_in_order_and_a_model_that_needs_several_gpus_is_told_first() -> None:
    for shape in model.SHAPES:
        limits = limits_of(shape, MEASURED)
        assert [one.pairs for one in limits] == sorted(one.pairs for one in limits)
        assert (limits[0].pairs == 0) == (shape.name == "70B")


def test_a_mark_without_a_table_is_an_error() -> None:
    with pytest.raises(KeyError, match="nothing"):
        filled("<!-- table: nothing -->\nx\n<!-- end -->", {})


@pytest.mark.parametrize(("number", "shown"), [(12, "12"), (1_500, "1.5 k"), (10_000, "10 k"), (2e6, "2 M"), (3.4e9, "3.4 G")])
def test_counts_are_short(number: float, shown: str) -> None:
    assert thousands(number) == shown
