from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from safer_engine import activation_files as files
from safer_engine.artifacts import Activations, PairSet
from safer_engine.errors import Interrupted, ModelRefused, ResourceError, WorkBusy
from safer_engine.events import NullObserver
from safer_engine.science.hooks import rewards_from_residual
from safer_engine.science.readings import choose_residual_pairs, readings_of, token_ids
from safer_engine.sources.models import resolve_model
from safer_engine.sources.resolved import ResolvedDataset, ResolvedInputs
from safer_engine.spec import AuditSpec, HookSpec, ModelSpec, RuntimeSpec
from safer_engine.splits import held_out_groups
from safer_engine.stage import Draft, Inputs, SpecView, StageContext
from safer_engine.stages.activations import ActivationsStage
from safer_engine.store import LocalArtifactStore, LocalWork, ManifestDraft
from tests.helpers.tiny_model import CORPUS, build_reward_model, load_tiny

N_PAIRS = 23
STAGE = ActivationsStage()


def pair_table(tokenizer: Any, n_pairs: int, prefix: str) -> pa.Table:
    """Pairs of a question and two answers, made of the corpus; every fourth chosen answer is that of the pair before."""
    columns: dict[str, list[Any]] = {
        "pair_id": [f"{prefix}{i}" for i in range(n_pairs)],
        "group": [f"g{i // 2}" for i in range(n_pairs)],
    }
    for side in ("chosen", "rejected"):
        for name in ("text", "ids", "offsets", "special", "start", "end"):
            columns[f"{side}_{name}"] = []
    for pair in range(n_pairs):
        for side, shift in (("chosen", pair - (pair % 4 == 3)), ("rejected", pair + 5)):
            text = f"{CORPUS[(pair - (pair % 4 == 3)) % 10]} {CORPUS[shift % 10][: 20 + 3 * shift]}"
            found = tokenizer(text, return_offsets_mapping=True)
            columns[f"{side}_text"].append(text)
            columns[f"{side}_ids"].append(found.input_ids)
            columns[f"{side}_offsets"].append([edge for span in found.offset_mapping for edge in span])
            columns[f"{side}_special"].append(
                [token in tokenizer.all_special_ids for token in found.input_ids] if pair % 3 else None
            )
            columns[f"{side}_start"].append(len(found.input_ids) // 2)
            columns[f"{side}_end"].append(len(found.input_ids))
    types = {
        "ids": pa.list_(pa.int32()),
        "offsets": pa.list_(pa.int32()),
        "special": pa.list_(pa.bool_()),
        "start": pa.int32(),
        "end": pa.int32(),
    }
    return pa.table({name: pa.array(values, types.get(name.split("_")[-1])) for name, values in columns.items()})


class Watcher(NullObserver):
    """Keeps what it is told; asks to stop after so many progress reports."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.reports: list[tuple[float, float, str]] = []
        self.notes: list[str] = []
        self.stop_after = stop_after

    def progress(self, stage: str, done: float, total: float, unit: str) -> None:
        self.reports.append((done, total, unit))

    def note(self, stage: str, message: str) -> None:
        self.notes.append(message)

    def cancelled(self) -> bool:
        return self.stop_after is not None and len(self.reports) > self.stop_after


class Bench:
    """A store with committed pairs, and runs of the stage over them."""

    def __init__(self, root: Path, arch: str = "llama") -> None:
        self.store = LocalArtifactStore(root / "store")
        self.model = build_reward_model(root / "model", arch)
        self.resolved = resolve_model(ModelSpec(path=str(self.model)), RuntimeSpec(), None)
        tokenizer = load_tiny(arch).tokenizer
        self.tables = {"pairs.arrow": pair_table(tokenizer, N_PAIRS, "p")}
        with self.store.open_work("pairs", "k") as work:
            for name, table in self.tables.items():
                with (
                    work.publish(name) as path,
                    pa.OSFile(str(path), "wb") as sink,
                    pa.ipc.new_file(sink, table.schema) as writer,
                ):
                    writer.write_table(table, max_chunksize=5)
            self.pairs = PairSet(self.store.commit("pairs", "k", work, ManifestDraft(1, "PairSet", {})))

    def context(self, work: LocalWork, watcher: Watcher, **sections: Any) -> StageContext:
        document = {"model": {"path": str(self.model), "dtype": "float32"}, "dataset": {"source": {"kind": "memory"}}}
        document |= {
            "causal": {"pairs": 6},
            "split": {"held_out": 0.3},
            "runtime": {"device": "cpu", "shard_pairs": 5},
            **sections,
        }
        spec = AuditSpec.model_validate(document)
        sources = ResolvedInputs(self.resolved, ResolvedDataset("d", "memory", lambda: iter(())))
        return StageContext("activations", SpecView(spec, STAGE.reads), spec.runtime, sources, work, watcher, spec.seed)

    def run(self, key: str, watcher: Watcher | None = None, **sections: Any) -> Activations:
        with self.store.open_work("activations", key) as work:
            outcome = STAGE.run(self.context(work, watcher or Watcher(), **sections), Inputs({PairSet: self.pairs}))
            assert isinstance(outcome, Draft)
            return Activations(self.store.commit("activations", key, work, ManifestDraft(1, "Activations", outcome.meta)))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def whole(bench: Bench) -> Activations:
    return bench.run("whole")


def their_reward(bench: Bench, ids: list[int]) -> float:
    with torch.no_grad():
        return float(load_tiny("llama").model(input_ids=torch.tensor([ids])).logits[0, 0])


def shards(found: Activations, prefix: str = "shard-") -> Iterator[dict[str, torch.Tensor]]:
    for name in found.names(prefix):
        yield load_file(found.path(name))


def test_rewards_are_those_of_transformers_and_join_by_id(bench: Bench, whole: Activations) -> None:
    rows, found = bench.tables["pairs.arrow"].to_pylist(), whole.rewards.to_pylist()
    assert [row["pair_id"] for row in found] == [row["pair_id"] for row in rows]
    assert [row["pair"] for row in found] == list(range(len(rows)))
    for row, reward in zip(rows, found, strict=True):
        assert reward["reward_chosen"] == pytest.approx(their_reward(bench, row["chosen_ids"]), abs=1e-4)
        assert reward["reward_rejected"] == pytest.approx(their_reward(bench, row["rejected_ids"]), abs=1e-4)
    assert whole.rewards.schema.field("reward_chosen").type == pa.float64()


def test_shards_hold_each_covered_position_once_in_order(bench: Bench, whole: Activations) -> None:
    assert len(whole.names("shard-")) == 5
    keys = []
    for index, shard in enumerate(shards(whole)):
        assert set(shard) == {"x", "pair", "side", "position", "flags"}
        assert shard["pair"].min() >= 5 * index
        assert shard["pair"].max() < 5 * (index + 1)
        keys += list(zip(*(shard[name].tolist() for name in ("pair", "side", "position")), strict=True))
    expected = [
        (pair, side, position)
        for pair, row in enumerate(bench.tables["pairs.arrow"].to_pylist())
        for side, name in enumerate(("chosen", "rejected"))
        for position in range(row[f"{name}_start"], row[f"{name}_end"])
    ]
    assert keys == expected
    assert whole.meta["n_positions"] == len(expected)


def test_activations_are_the_librarys_hidden_states(bench: Bench, whole: Activations) -> None:
    layer = whole.meta["hook_layer"]
    assert (layer, whole.meta["hook_name"], whole.meta["d_in"], whole.meta["n_blocks"]) == (2, "model.layers.1", 32, 3)
    rows = bench.tables["pairs.arrow"].to_pylist()
    shard = next(shards(whole))
    for pair in range(5):
        mine = (shard["pair"] == pair) & (shard["side"] == 1)
        ids = torch.tensor([rows[pair]["rejected_ids"]])
        with torch.no_grad():
            state = load_tiny("llama").model(input_ids=ids, output_hidden_states=True).hidden_states[layer][0]
        torch.testing.assert_close(shard["x"][mine], state[shard["position"][mine].long()], rtol=1e-4, atol=1e-4)


def test_flags_are_counted_and_every_side_has_its_head_position(whole: Activations) -> None:
    flags = torch.cat([shard["flags"] for shard in shards(whole)])
    for name, bit in (("special", 1), ("high_norm", 2), ("head", 4), ("sentence_end", 8)):
        assert whole.meta["flags"][name] == int((flags & bit).bool().sum())
    assert whole.meta["flags"]["head"] == 2 * N_PAIRS
    assert whole.meta["flags"]["sentence_end"] > 0


def test_high_norms_are_judged_by_the_first_shard(whole: Activations) -> None:
    all_shards = list(shards(whole))
    ordinary = (all_shards[0]["flags"] & Activations.FLAG_SPECIAL) == 0
    median = float(all_shards[0]["x"][ordinary].norm(dim=1).median())
    assert whole.meta["norm_median"] == pytest.approx(median, rel=1e-6)
    for shard in all_shards:
        high = (shard["flags"] & Activations.FLAG_HIGH_NORM).bool()
        assert torch.equal(high, shard["x"].norm(dim=1) > 10 * median)


def test_head_vectors_give_the_rewards(whole: Activations) -> None:
    head = load_file(whole.path("head.safetensors"))
    weight = load_tiny("llama").head.weight[0].double()
    for side in ("chosen", "rejected"):
        assert head[side].shape == (N_PAIRS, 32)
        rewards = torch.tensor(whole.rewards.column(f"reward_{side}").to_pylist(), dtype=torch.float64)
        torch.testing.assert_close(head[side].double() @ weight, rewards, rtol=0, atol=1e-9)


def test_kept_residuals_give_the_rewards_through_the_upper_blocks(bench: Bench, whole: Activations) -> None:
    rm = load_tiny("llama")
    rows = bench.tables["pairs.arrow"].to_pylist()
    rewards = whole.rewards.to_pylist()
    kept: list[tuple[int, int]] = []
    covered = set()
    for block in shards(whole, "residual-"):
        starts = torch.cat([torch.zeros(1, dtype=torch.long), block["length"].long().cumsum(0)]).tolist()
        for number, (pair, side) in enumerate(zip(block["pair"].tolist(), block["side"].tolist(), strict=True)):
            name = ("chosen", "rejected")[side]
            h_1TD = block["h"][starts[number] : starts[number + 1]][None]
            with torch.no_grad():
                reward = rewards_from_residual(
                    rm, whole.meta["hook_layer"], h_1TD, None, torch.tensor([rows[pair][f"{name}_ids"]])
                )
            assert float(reward[0]) == pytest.approx(rewards[pair][f"reward_{name}"], abs=1e-4)
            positions = torch.nonzero(block["covered"][starts[number] : starts[number + 1]]).flatten().tolist()
            covered |= {(pair, side, position) for position in positions}
            kept.append((pair, side))
        assert starts[-1] == len(block["h"]) == len(block["covered"])
    groups = bench.tables["pairs.arrow"].column("group").to_pylist()
    names = bench.tables["pairs.arrow"].column("pair_id").to_pylist()
    chosen = choose_residual_pairs(names, groups, 6, 0.3, 0)
    assert kept == [(pair, side) for pair in sorted(chosen) for side in (0, 1)]
    in_shards = {
        key
        for shard in shards(whole)
        for key in zip(*(shard[name].tolist() for name in ("pair", "side", "position")), strict=True)
        if key[0] in chosen
    }
    assert covered == in_shards
    assert whole.meta["partial_forward_drift"] < 1e-4


def test_meta_says_what_was_measured(whole: Activations) -> None:
    meta = whole.meta
    assert meta["invariance"]["status"] == "ok"
    assert meta["invariance"]["n_pairs"] == 8
    assert meta["reward_model"]["architecture"] == "LlamaForSequenceClassification"
    assert meta["reward_model"]["head_reads"] == "last"
    assert (meta["dtype"], meta["attention"]) == ("float32", "sdpa")


def content(found: Activations) -> dict[str, str]:
    return {name: entry.digest for name, entry in found.stored.manifest.files.items()}


@pytest.mark.parametrize("stop_after", [0, 9])
def test_an_interrupted_run_goes_on_and_ends_the_same(bench: Bench, whole: Activations, stop_after: int) -> None:
    key = f"stopped-{stop_after}"
    with pytest.raises(Interrupted):
        bench.run(key, Watcher(stop_after))
    with bench.store.open_work("activations", key) as work:
        before = {path.name: path.stat().st_ino for path in work.payload.glob("shard-*")}
    watcher = Watcher()
    with bench.store.open_work("activations", key) as work:
        STAGE.run(bench.context(work, watcher), Inputs({PairSet: bench.pairs}))
        after = {path.name: path.stat().st_ino for path in work.payload.glob("shard-*")}
    assert before.items() <= after.items()
    assert len(before) >= (stop_after > 4)
    again = bench.run(key)
    assert content(again) == content(whole)
    assert again.meta == whole.meta


def test_progress_reaches_the_total_and_the_pass_is_noted(bench: Bench) -> None:
    watcher = Watcher()
    bench.run("watched", watcher)
    done = [report[0] for report in watcher.reports]
    assert done == sorted(done)
    assert watcher.reports[-1] == (N_PAIRS, N_PAIRS, "pairs")
    assert any("sequences" in note and "repeats" in note for note in watcher.notes)


def test_shard_size_and_batching_change_no_result_beyond_rounding(bench: Bench, whole: Activations) -> None:
    other = bench.run("other", runtime={"device": "cpu", "shard_pairs": 100, "batch_tokens": 150})
    assert len(other.names("shard-")) == 1
    for side in ("reward_chosen", "reward_rejected"):
        a, b = (np.array(found.rewards.column(side).to_pylist()) for found in (whole, other))
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    x = torch.cat([shard["x"] for shard in shards(whole)])
    torch.testing.assert_close(next(shards(other))["x"], x, rtol=1e-4, atol=1e-4)


def test_without_causal_pairs_there_are_no_residuals(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "bert")
    found = bench.run("plain", causal={"pairs": 0}, hook={"layer": 1, "positions": "sentence_ends", "region": "text"})
    assert found.names("residual-") == []
    assert "partial_forward_drift" not in found.meta
    flags = torch.cat([shard["flags"] for shard in shards(found)])
    assert (((flags & Activations.FLAG_SENTENCE_END) | (flags & Activations.FLAG_HEAD)) > 0).all()
    positions = torch.cat([shard["position"] for shard in shards(found)])
    assert torch.equal((flags & Activations.FLAG_HEAD).bool(), positions == 0)


def test_an_error_in_writing_stops_the_pass(bench: Bench) -> None:
    with bench.store.open_work("activations", "unwritable") as work:
        (work.payload / "residual-00000.safetensors").mkdir()
        with pytest.raises(ResourceError, match="cannot write"):
            STAGE.run(bench.context(work, Watcher(), causal={"pairs": N_PAIRS}), Inputs({PairSet: bench.pairs}))
        assert not work.has("shard-00000.safetensors")


def test_a_hook_beyond_the_model_is_refused_before_anything_is_read(bench: Bench) -> None:
    with pytest.raises(ModelRefused, match="has 3 blocks"):
        bench.run("beyond", hook={"layer": 4})


def test_importing_the_stage_brings_no_torch() -> None:
    code = "import sys, safer_engine.stages.activations, safer_engine.sources.model_loading as m, safer_engine.sources.models\n"
    code += "print([name for name in ('torch', 'transformers', 'pyarrow', 'huggingface_hub') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------- readings


def test_readings_of_a_slice_are_those_of_its_rows() -> None:
    rm = load_tiny("llama")
    table = pa.concat_tables([pair_table(rm.tokenizer, 4, "a"), pair_table(rm.tokenizer, 6, "b")])
    every = readings_of(table, 0, rm, HookSpec(), frozenset({3}))
    part = readings_of(table.slice(3, 4), 3, rm, HookSpec(), frozenset({3}))
    assert [(r.pair, r.side, r.keep_residual) for r in part] == [(r.pair, r.side, r.pair == 3) for r in every[6:14]]
    for mine, theirs in zip(part, every[6:14], strict=True):
        assert (
            mine.ids.tolist() == theirs.ids.tolist() == table.to_pylist()[mine.pair][f"{('chosen', 'rejected')[mine.side]}_ids"]
        )
        assert mine.covered.tolist() == theirs.covered.tolist()
        assert mine.flags.tolist() == theirs.flags.tolist()
    assert [ids.tolist() for ids in token_ids(table.slice(3, 4), "chosen")] == [r.ids.tolist() for r in part[0::2]]


def test_special_tokens_are_the_tables_or_else_the_tokenizers() -> None:
    rm = load_tiny("bert")
    table = pair_table(rm.tokenizer, 2, "a")
    readings = readings_of(table, 0, rm, HookSpec(region="text"), frozenset())
    for reading in readings:
        special = np.flatnonzero(reading.flags & Activations.FLAG_SPECIAL).tolist()
        assert special == [0, len(reading.ids) - 1]
        assert reading.covered.all()


def test_residual_pairs_are_half_held_out_and_the_same_in_any_order() -> None:
    names = [f"p{i}" for i in range(200)]
    groups = [f"g{i // 2}" for i in range(200)]
    chosen = choose_residual_pairs(names, groups, 20, 0.3, 7)
    assert len(chosen) == 20
    left_out = held_out_groups(groups, 0.3, 7)
    assert sum(groups[pair] in left_out for pair in chosen) == 10
    backwards = choose_residual_pairs(names[::-1], groups[::-1], 20, 0.3, 7)
    assert {names[pair] for pair in chosen} == {names[::-1][pair] for pair in backwards}
    assert choose_residual_pairs(names, groups, 20, 0.3, 8) != chosen
    assert choose_residual_pairs(names, groups, 200, 0.3, 7) == frozenset(range(200))
    assert choose_residual_pairs(names, groups, 0, 0.3, 7) == frozenset()


def parted(bench: Bench, key: str, parts: Sequence[str], **sections: Any) -> str:
    """Content of the artifact when some parts were read apart first, in the order given."""
    inputs = Inputs({PairSet: bench.pairs})
    for part in parts:
        with bench.store.open_work("activations", key, shared=True) as work:
            STAGE.run_part(bench.context(work, Watcher(), **sections), inputs, part)
    return digest_of(bench, key, **sections)


def digest_of(bench: Bench, key: str, **sections: Any) -> str:
    return bench.run(key, **sections).stored.manifest.content_digest


def test_parts_cover_all_shards_once_and_begin_with_one_alone() -> None:
    assert files.part_names(files.PART_SHARDS) == ()
    names = files.part_names(3 * files.PART_SHARDS)
    assert files.part_shards(names[0]) == range(1)
    assert [index for name in names for index in files.part_shards(name)] == list(range(3 * files.PART_SHARDS))


def test_artifact_is_the_same_however_the_work_was_shared(bench: Bench) -> None:
    runtime = {"device": "cpu", "shard_pairs": 2}
    whole = digest_of(bench, "unshared", runtime=runtime)
    names = STAGE.parts(SpecView(RuntimeSpec(), ()), RuntimeSpec.model_validate(runtime), Inputs({PairSet: counted(bench)}))
    assert len(names) == 3
    assert parted(bench, "all", names, runtime=runtime) == whole
    assert parted(bench, "backwards", names[::-1], runtime=runtime) == whole
    assert parted(bench, "one-lost", names[:2], runtime=runtime) == whole


def test_joining_reads_no_shard(bench: Bench) -> None:
    class Elsewhere(LocalWork):
        """Payload that lies on other machines."""

        def path(self, name: str) -> Path:
            raise AssertionError(f"{name} was to be fetched")

    runtime = {"device": "cpu", "shard_pairs": 2}
    names = STAGE.parts(SpecView(RuntimeSpec(), ()), RuntimeSpec.model_validate(runtime), Inputs({PairSet: counted(bench)}))
    with bench.store.open_work("activations", "joined") as work:
        for name in names:
            STAGE.run_part(bench.context(work, Watcher(), runtime=runtime), Inputs({PairSet: bench.pairs}), name)
        elsewhere = bench.context(Elsewhere(work.root), Watcher(), runtime=runtime)
        joined = STAGE.run(elsewhere, Inputs({PairSet: bench.pairs}))
    assert isinstance(joined, Draft)
    assert joined.meta["flags"]["head"] == 2 * N_PAIRS
    whole = bench.run("not-joined", runtime=runtime).meta
    assert {name: joined.meta[name] for name in ("n_positions", "flags")} == {
        name: whole[name] for name in ("n_positions", "flags")
    }


def test_another_shard_size_goes_on_with_that_of_the_first_shard(bench: Bench) -> None:
    small, large = {"device": "cpu", "shard_pairs": 2}, {"device": "cpu", "shard_pairs": 4}
    with pytest.raises(Interrupted):
        bench.run("resized", Watcher(stop_after=12), runtime=small)
    assert digest_of(bench, "resized", runtime=large) == digest_of(bench, "never-resized", runtime=small)


def test_parts_share_a_work_area_that_a_join_holds_alone(bench: Bench) -> None:
    with bench.store.open_work("activations", "held", shared=True), bench.store.open_work("activations", "held", shared=True):
        with pytest.raises(WorkBusy), bench.store.open_work("activations", "held"):
            pass
    with bench.store.open_work("activations", "held"):
        with pytest.raises(WorkBusy), bench.store.open_work("activations", "held", shared=True):
            pass


def counted(bench: Bench) -> PairSet:
    stored = bench.store.read("pairs", "k")
    return PairSet(replace(stored, manifest=stored.manifest.model_copy(update={"meta": {"n_pairs": N_PAIRS}})))
