"""Keys, skipping, resuming and absence, on stages small enough to see through."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from safer_engine import pipeline
from safer_engine.artifacts import Absent, Activations, Artifact, CausalEffects, PairSet
from safer_engine.attempts import Attempt, added
from safer_engine.cost import Cost
from safer_engine.errors import ArtifactError, DamagedArtifact, Interrupted, SaferError
from safer_engine.events import NullObserver
from safer_engine.machine import measured
from safer_engine.pipeline import STAGES, AuditRequest, plan, run, run_part, run_stage
from safer_engine.sources.resolved import ResolvedDataset, ResolvedInputs, ResolvedModel
from safer_engine.spec import RuntimeSpec
from safer_engine.spec_layers import Layer, build_spec
from safer_engine.splits import held_out_groups
from safer_engine.stage import Draft, Inputs, StageContext, cache_key
from safer_engine.store import LocalArtifactStore


class Numbers:
    """Publishes units one by one; stops when told to."""

    name: ClassVar[str] = "numbers"
    version: ClassVar[int] = 1
    resource: ClassVar[Any] = "cpu"
    consumes: ClassVar[tuple[type[Artifact], ...]] = ()
    produces: ClassVar[type[Artifact]] = PairSet
    reads: ClassVar[tuple[str, ...]] = ("dataset",)

    def __init__(self, die_at: int | None = None) -> None:
        self.die_at = die_at
        self.computed: list[int] = []

    def run(self, ctx: StageContext, inputs: Inputs) -> Draft | Absent:
        for unit in range(4):
            if ctx.work.has(f"{unit}.json"):
                continue
            if unit == self.die_at:
                raise RuntimeError("killed")
            with ctx.work.publish(f"{unit}.json") as path:
                path.write_text(json.dumps(unit * ctx.spec.dataset.min_pairs))
            self.computed.append(unit)
            ctx.progress(unit + 1, 4, "units")
        return Draft({"n": 4})


class Total:
    """Adds up what `Numbers` wrote."""

    name: ClassVar[str] = "total"
    version: ClassVar[int] = 1
    resource: ClassVar[Any] = "gpu"
    consumes: ClassVar[tuple[type[Artifact], ...]] = (PairSet,)
    produces: ClassVar[type[Artifact]] = Activations
    reads: ClassVar[tuple[str, ...]] = ("sae",)

    def run(self, ctx: StageContext, inputs: Inputs) -> Draft | Absent:
        pairs = inputs.get(PairSet)
        return Draft({"total": sum(pairs.json(name) for name in pairs.names("")), "seed": ctx.seed("a")})


class Nothing:
    """Switched off."""

    name: ClassVar[str] = "nothing"
    version: ClassVar[int] = 1
    resource: ClassVar[Any] = "cpu"
    consumes: ClassVar[tuple[type[Artifact], ...]] = (Activations,)
    produces: ClassVar[type[Artifact]] = CausalEffects
    reads: ClassVar[tuple[str, ...]] = ()

    def run(self, ctx: StageContext, inputs: Inputs) -> Draft | Absent:
        return Absent("switched off")


class Watcher(NullObserver):
    def __init__(self) -> None:
        self.outcomes: list[tuple[str, str]] = []
        self.notes: list[str] = []
        self.stop = False

    def stage_finished(self, stage: str, outcome: str, seconds: float) -> None:
        self.outcomes.append((stage, outcome))

    def note(self, stage: str, message: str) -> None:
        self.notes.append(message)

    def cancelled(self) -> bool:
        return self.stop


def rows() -> Iterator[dict[str, Any]]:
    return iter([])


def request(digest: str = "d1", model_path: str = "/m", **sections: Any) -> AuditRequest:
    base = {"model": model_path, "dataset": {"source": {"kind": "local", "path": f"/{digest}"}, "min_pairs": 2}}
    spec = build_spec([Layer("test", {**base, **sections})]).spec
    sources = ResolvedInputs(ResolvedModel(Path(model_path), "model", model_path), ResolvedDataset(digest, digest, rows))
    return AuditRequest(spec, sources)


@pytest.fixture
def store(tmp_path: Path) -> LocalArtifactStore:
    return LocalArtifactStore(tmp_path)


def stages(**options: Any) -> tuple[Any, ...]:
    return (Numbers(**options), Total(), Nothing())


def test_a_second_run_skips_every_stage_and_finds_the_same(store: LocalArtifactStore) -> None:
    first, second = Watcher(), Watcher()
    found = run(request(), store, first, stages=stages())
    assert isinstance(found[Activations], Artifact)
    assert found[Activations].meta["total"] == (0 + 1 + 2 + 3) * 2
    assert found[CausalEffects].reason == "switched off"  # type: ignore[union-attr]
    again = run(request(), store, second, stages=stages())
    assert first.outcomes == [("numbers", "computed"), ("total", "computed"), ("nothing", "absent")]
    assert second.outcomes == [("numbers", "cached"), ("total", "cached"), ("nothing", "cached")]
    assert again[Activations].stored.manifest == found[Activations].stored.manifest  # type: ignore[union-attr]


def test_results_are_told_as_they_come(store: LocalArtifactStore) -> None:
    seen: list[tuple[str, int]] = []
    run(request(), store, on_artifact=lambda stage, found: seen.append((stage.name, len(found))), stages=stages())
    assert seen == [("numbers", 1), ("total", 2), ("nothing", 3)]


def test_a_killed_stage_goes_on_from_its_last_unit(store: LocalArtifactStore) -> None:
    dying, living = Numbers(die_at=2), Numbers()
    with pytest.raises(RuntimeError, match="killed"):
        run(request(), store, stages=(dying, Total()))
    assert dying.computed == [0, 1]
    found = run(request(), store, stages=(living, Total()))
    assert living.computed == [2, 3]
    assert found[Activations].meta["total"] == 12  # type: ignore[union-attr]


def test_keys_hold_what_changes_results_and_nothing_else(store: LocalArtifactStore) -> None:
    def key(made: AuditRequest, stage: Any = None, project: str = "p") -> str:
        return cache_key(stage or Numbers(), made.spec, made.sources, {}, project)

    base = key(request())
    assert key(request(runtime={"batch_tokens": 64, "device": "cpu"})) == base
    assert key(request(sae={"k": 4})) == base, "numbers does not read sae"
    assert key(request(model_path="/elsewhere")) == base
    assert key(request(digest="d2")) != base
    assert key(request(seed=1)) != base
    assert key(request(), project="q") != base
    bumped = Numbers()
    bumped.version = 2  # type: ignore[misc]
    assert key(request(), bumped) != base
    total = key(request(), Total())
    assert key(request(sae={"k": 4}), Total()) != total


def test_a_section_that_was_not_declared_cannot_be_read(store: LocalArtifactStore) -> None:
    class Sneaky(Numbers):
        def run(self, ctx: StageContext, inputs: Inputs) -> Draft | Absent:
            return Draft({"k": ctx.spec.sae.k})

    with pytest.raises(AttributeError, match="'sae' is not in this stage's `reads`"):
        run(request(), store, stages=(Sneaky(),))


def test_an_absent_input_is_an_error_only_for_who_needs_it(store: LocalArtifactStore) -> None:
    class Needs(Total):
        name = "needs"
        consumes: ClassVar[tuple[type[Artifact], ...]] = (CausalEffects,)

        def run(self, ctx: StageContext, inputs: Inputs) -> Draft | Absent:
            maybe = inputs.maybe(CausalEffects)
            assert isinstance(maybe, Absent)
            with pytest.raises(ArtifactError, match="not among"):
                inputs.get(PairSet)
            inputs.get(CausalEffects)
            return Draft()

    with pytest.raises(ArtifactError, match="CausalEffects is absent: switched off"):
        run(request(), store, stages=(*stages(), Needs()))


def test_the_observer_can_stop_a_run_and_it_goes_on_later(store: LocalArtifactStore) -> None:
    watcher = Watcher()
    watcher.stop = True
    with pytest.raises(Interrupted):
        run(request(), store, watcher, stages=stages())
    assert watcher.outcomes == [("numbers", "stopped")]
    resumed = Numbers()
    run(request(), store, stages=(resumed,))
    assert resumed.computed == [1, 2, 3]


def test_plan_says_what_is_cached_and_what_is_not_known_yet(store: LocalArtifactStore) -> None:
    before = plan(request(), store, stages())
    assert [(p.state, p.key is None) for p in before] == [("compute", False), ("compute", True), ("compute", True)]
    run(request(), store, stages=stages())
    assert [p.state for p in plan(request(), store, stages())] == ["cached"] * 3
    assert [p.state for p in plan(request(sae={"k": 3}), store, stages())] == ["cached", "compute", "compute"]


def test_two_runs_of_one_key_compute_it_once(store: LocalArtifactStore) -> None:
    made, watcher, slow = request(), Watcher(), Numbers()
    key = cache_key(slow, made.spec, made.sources, {}, store.project)
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        other = LocalArtifactStore(store.root)
        with other.open_work("numbers", key):
            held.set()
            release.wait(20)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(20)
    threading.Timer(0.2, release.set).start()
    stored = run_stage(slow, made, store, {}, watcher)
    holder.join()
    assert stored.manifest.meta == {"n": 4}
    assert watcher.notes == ["another process is computing stage numbers; waiting for it"]
    watcher.stop = True
    with store.open_work("other", key), pytest.raises(Interrupted):
        other = Numbers()
        other.name = "other"  # type: ignore[misc]
        monkey = cache_key(other, made.spec, made.sources, {}, store.project)
        with store.open_work("other", monkey):
            run_stage(other, made, store, {}, watcher)


def test_costs_and_provenance_are_recorded(store: LocalArtifactStore) -> None:
    manifest = run(request(), store, stages=stages())[PairSet].stored.manifest  # type: ignore[union-attr]
    assert manifest.cost.seconds >= 0
    assert manifest.cost.peak_memory_bytes is not None
    assert manifest.cost.peak_memory_bytes > 1_000_000
    assert manifest.provenance["versions"]["safer-audit"]


def blob_of(store: LocalArtifactStore, stage: str, name: str) -> Path:
    (manifest,) = (store.root / "manifests" / "default" / stage).glob("*.json")
    return store.blob(store.read(stage, manifest.stem).manifest.files[name])


def flip(path: Path) -> None:
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def damaged_manifest(path: Path) -> None:
    (manifest,) = (path.parents[2] / "manifests" / "default" / "numbers").glob("*.json")
    manifest.write_text('{"manifest_version": 0}')


@pytest.mark.parametrize("spoil", [flip, Path.unlink, damaged_manifest, lambda path: path.write_bytes(b"")])
def test_a_damaged_artifact_is_named_and_computed_anew(store: LocalArtifactStore, spoil: Callable[[Path], None]) -> None:
    first = run(request(), store, stages=stages())
    later = request(sae={"k": 8})  # `total` is to be computed, and reads what is damaged
    spoil(blob_of(store, "numbers", "3.json"))
    watcher, anew, fresh = Watcher(), Numbers(), LocalArtifactStore(store.root)
    found = run(later, fresh, watcher, stages=(anew, Total(), Nothing()))
    assert anew.computed == [0, 1, 2, 3]
    assert found[Activations].meta == first[Activations].meta  # type: ignore[union-attr]
    (said,) = watcher.notes
    assert "stage numbers is damaged" in said
    assert said.endswith("it is computed anew")
    assert "http" not in said
    again = Watcher()
    run(later, LocalArtifactStore(store.root), again, stages=stages())
    assert {outcome for _, outcome in again.outcomes} == {"cached"}
    assert again.notes == []


def test_damage_that_nobody_reads_is_found_by_its_size_and_planned(store: LocalArtifactStore) -> None:
    run(request(), store, stages=stages())
    blob_of(store, "numbers", "0.json").unlink()
    assert [stage.state for stage in plan(request(), store, stages())] == ["compute"] * 3
    watcher = Watcher()
    run(request(), store, watcher, stages=stages())
    assert watcher.outcomes == [("numbers", "computed"), ("total", "cached"), ("nothing", "cached")]


def test_an_artifact_that_is_damaged_again_and_again_is_an_error(store: LocalArtifactStore) -> None:
    def spoil_always(stage: Any, _found: Any) -> None:
        if stage.name == "numbers":
            flip(blob_of(store, "numbers", "1.json"))
            store._verified.clear()

    with pytest.raises(DamagedArtifact, match="stage numbers"):
        run(request(), store, on_artifact=spoil_always, stages=stages())


def test_the_cost_counts_attempts_that_were_broken_off(store: LocalArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("safer_engine.machine.time.perf_counter", lambda: clock[0])

    class Slow(Numbers):
        def run(self, ctx: StageContext, inputs: Inputs) -> Draft | Absent:
            clock[0] += 100.0
            return super().run(ctx, inputs)

    for die_at in (1, 2):
        with pytest.raises(RuntimeError, match="killed"):
            run(request(), store, stages=(Slow(die_at=die_at),))
    found = run(request(), store, stages=(Slow(),))
    assert found[PairSet].stored.manifest.cost.seconds == 300.0  # type: ignore[union-attr]
    assert set(found[PairSet].stored.manifest.files) == {f"{n}.json" for n in range(4)}  # type: ignore[union-attr]


def test_the_cost_counts_parts_that_were_computed_apart(store: LocalArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("safer_engine.machine.time.perf_counter", lambda: clock[0])

    class Shared(Numbers):
        def parts(self, runtime: RuntimeSpec, inputs: Inputs) -> tuple[str, ...]:
            return ("0-1", "2-3")

        def run_part(self, ctx: StageContext, inputs: Inputs, part: str) -> None:
            clock[0] += 100.0

        def run(self, ctx: StageContext, inputs: Inputs) -> Draft | Absent:
            clock[0] += 1.0
            return super().run(ctx, inputs)

    for part in ("0-1", "2-3", "2-3"):  # the last one a second time: its first attempt counts too
        run_part(Shared(), part, request(), store, {}, NullObserver())
    with pytest.raises(RuntimeError, match="killed"):
        run(request(), store, stages=(Shared(die_at=1),))
    found = run(request(), store, stages=(Shared(),))
    assert found[PairSet].stored.manifest.cost.seconds == 302.0  # type: ignore[union-attr]


def test_progress_keeps_what_a_kill_would_lose(store: LocalArtifactStore) -> None:
    with store.open_work("numbers", "k") as work, measured() as measurement:
        Attempt(work, measurement, NullObserver(), every_seconds=60.0).progress("numbers", 1, 2, "units")
        assert not list(work.scratch.iterdir())
        killed = Attempt(work, measurement, NullObserver(), every_seconds=0.0)
        killed.progress("numbers", 1, 2, "units")
        earlier = Attempt(work, measurement, NullObserver()).before
        assert earlier.cpu_seconds >= 0
        assert earlier.peak_memory_bytes is not None
        (work.scratch / "attempts.json").write_text("{torn")
        assert Attempt(work, measurement, NullObserver()).before == Cost()


def test_costs_add_up_and_peaks_do_not() -> None:
    one, other = Cost(seconds=1, cpu_seconds=2, peak_memory_bytes=5), Cost(seconds=3, cpu_seconds=4, peak_gpu_bytes=7)
    assert added(one, other) == Cost(seconds=4, cpu_seconds=6, peak_memory_bytes=5, peak_gpu_bytes=7)


def test_the_real_pipeline_is_in_order_and_each_type_has_one_producer() -> None:
    produced: set[type[Artifact]] = set()
    for stage in STAGES:
        assert set(stage.consumes) <= produced, stage.name
        assert stage.produces not in produced
        produced.add(stage.produces)
        assert "runtime" not in stage.reads
        assert all(section.partition(".")[0] in pipeline.AuditSpec.model_fields for section in stage.reads)


def test_seeds_differ_by_stage_unit_and_spec(store: LocalArtifactStore) -> None:
    seeds = [
        run(request(seed=seed), store, stages=stages())[Activations].meta["seed"]  # type: ignore[union-attr]
        for seed in (0, 1)
    ]
    assert seeds[0] != seeds[1]
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_held_out_groups_are_a_fixed_share_by_hash() -> None:
    names = [f"g{i}" for i in range(5000)]
    kept = held_out_groups(names, 0.1, seed=3)
    assert 0.085 < len(kept) / len(names) < 0.115
    assert kept == held_out_groups([*names[::-1], *names[:9]], 0.1, seed=3)
    assert kept != held_out_groups(names, 0.1, seed=4)
    assert kept & set(names[:2000]) == held_out_groups(names[:2000], 0.1, seed=3)  # more data move no group


@pytest.mark.parametrize(("n", "least"), [(1, 0), (2, 1), (3, 1), (4, 2), (20, 2)])
def test_small_data_have_groups_on_both_sides(n: int, least: int) -> None:
    names = [f"g{i}" for i in range(n)]
    sizes = {len(held_out_groups(names, share, seed)) for share in (0.05, 0.45) for seed in range(60)}
    assert min(sizes) == least
    assert max(sizes) <= n // 2


def test_every_error_has_its_own_code() -> None:
    def tree(kind: type[SaferError]) -> list[type[SaferError]]:
        return [kind, *(k for sub in kind.__subclasses__() for k in tree(sub))]

    kinds = [k for k in tree(SaferError) if k.__module__ == "safer_engine.errors"]
    assert len({k.code for k in kinds}) == len(kinds)
    assert str(SaferError("what", "do this")) == "what (do this)"
    assert str(SaferError("what")) == "what"
