"""The drill: how much harm would poisoned preferences do, and would our own detector notice?

For each rule, budget and seed a reward model is trained on poisoned data and audited on them; a clean arm of the same seed starts
from the same weights, takes the same number of steps and sees the same pairs in the same order. The published attack chooses
poison by the pair score (arXiv 2507.00665), and a detector that shares this score would be judged by itself: so poison chosen by
other rules stands beside it. Off unless `SAFER_ENABLE_REDTEAM=1`; every use is logged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safer_engine.drill_arms import STAGE, Arm, ArmObserver, Bench
from safer_engine.drill_document import document_of
from safer_engine.drill_spec import DrillSpec
from safer_engine.errors import DatasetRefused, Interrupted, SaferError, SpecError, WorkBusy
from safer_engine.events import NullObserver, Observer
from safer_engine.holding import hold
from safer_engine.publishing import publishing, require_writable
from safer_engine.redteam import log_use, require_enabled
from safer_engine.report.drill_page import render_drill
from safer_engine.report.model_drill import DrillDocument
from safer_engine.sources.datasets import resolve_dataset
from safer_engine.sources.models import resolve_base
from safer_engine.sources.resolved import ResolvedDataset
from safer_engine.spec_layers import Layer, build_spec
from safer_engine.store import canonical_json, digest_bytes

JSON, PAGE = "drill.json", "drill.html"
_KEY = "drill.key"
_VERSION = 1


def run_drill(spec: DrillSpec, out: Path, log: Path, observer: Observer | None = None, who: str | None = None) -> DrillDocument:
    """Run a drill, and write drill.json and drill.html; what an earlier call of the same drill finished is not computed again.

    A later call may have other rules, budgets and more seeds: arms that are there are used.

    Args:
        out: folder for results and, while an arm is worked on, for its poisoned data, model and audit. One of another drill, or
            with other things in it, is refused.
        log: folder of the log of uses.
        who: asks for it, in the log; None: the user of this process.
        observer: is told of finished arms; when it asks to stop, the same call goes on later.

    Raises:
        SpecError: red-team functions are not switched on (nothing was read then), or a folder cannot be used.
        SaferError: see training and audit; nothing that was finished is lost.
    """
    require_enabled()
    _check_audit(spec)
    watcher = observer or NullObserver()
    require_writable(out, "the drill's folder")
    base = resolve_base(spec.base, spec.runtime, None)
    dataset, apart = resolve_dataset(spec.dataset), resolve_dataset(spec.evaluation)
    inputs = {"base": base.digest, "dataset": dataset.digest, "evaluation": apart.digest}
    key = drill_key(spec, inputs)
    log_use(log, "drill.start", key, who, rules=",".join(spec.rules), budgets=",".join(f"{b:g}" for b in spec.budgets))
    try:
        with _held(out, key):
            require_axis(spec, dataset, apart)
            found = _run(spec, Bench(spec, key, out, dataset), inputs, watcher)
    except BaseException as error:
        log_use(log, "drill.stopped", key, who, error=error.code if isinstance(error, SaferError) else type(error).__name__)
        raise
    log_use(log, "drill.finished", key, who, arms=found.done)
    return found


def drill_key(spec: DrillSpec, inputs: dict[str, str]) -> str:
    """sha256 over what must be the same for arms to be comparable: not which rules, budgets and seeds, nor where inputs lie."""
    dumped = spec.model_dump(
        mode="json",
        exclude={
            "base": True, "rules": True, "budgets": True, "seeds": True, "keep_poison": True, "runtime": True,
            "dataset": {"source"}, "evaluation": {"source"},
        },
    )  # fmt: skip
    return digest_bytes(canonical_json({"version": _VERSION, "spec": dumped, "inputs": inputs}))


def _check_audit(spec: DrillSpec) -> None:
    """Refuse sections of the audit spec that are wrong before anything is trained. Raises SpecError."""
    source = {"source": spec.dataset.source.model_dump(mode="json")}
    build_spec([Layer("section audit of the drill", {**spec.audit, "model": {"path": spec.base}, "dataset": source})])


def require_axis(spec: DrillSpec, dataset: ResolvedDataset, apart: ResolvedDataset) -> None:
    """Refuse data without pairs of the axis before anything is trained. Raises DatasetRefused."""
    from safer_engine.evaluation_pairs import survey_evaluation
    from safer_engine.pair_tables import survey
    from safer_engine.science.pairs import prompt_keys

    ours = survey(dataset, spec.dataset, 0)
    theirs = survey_evaluation(apart, spec.evaluation, 0, prompt_keys(ours.candidates))
    for what, found in (("pair of the dataset", ours), ("evaluation pair", theirs)):
        axes = {entry.axis for entry in found.entries if entry.reason is None}
        if spec.axis not in axes:
            raise DatasetRefused(
                f"no {what} is of axis {spec.axis!r}",
                f"name one of theirs with --axis: {', '.join(sorted(axes))}" if axes else "give other pairs",
            )


def arms_of(spec: DrillSpec) -> list[Arm]:
    """Poisoned arms, seed by seed, so that whole curves are there early."""
    return [arm for seed in range(spec.seeds) for arm in arms_of_seed(spec, seed) if arm.rule is not None]


def arms_of_seed(spec: DrillSpec, seed: int) -> list[Arm]:
    """The clean arm of a seed, which the others start from, and its poisoned ones."""
    return [Arm(seed), *(Arm(seed, rule, budget) for rule in spec.rules for budget in spec.budgets)]


def watched(observer: Observer, arm: Arm, done: int, total: int) -> Observer:
    """Tells an observer of arms how far one of them is."""
    return ArmObserver(observer, arm, done, total)


def _run(spec: DrillSpec, bench: Bench, inputs: dict[str, str], observer: Observer) -> DrillDocument:
    wanted = arms_of(spec)
    every = [arm for seed in range(spec.seeds) for arm in arms_of_seed(spec, seed)]
    observer.stage_started(STAGE, bench.key)
    for done, arm in enumerate(every):
        if observer.cancelled():
            raise Interrupted("stopped on request", "run the same command again to go on")
        observer.progress(STAGE, done, len(every), "arms")
        bench.run(arm, ArmObserver(observer, arm, done, len(every)))
        if arm.rule is not None and (arm == wanted[-1] or every[done + 1].seed != arm.seed):
            found = document_of(spec, bench, inputs, wanted)
            _write(bench.work, found)
    observer.progress(STAGE, len(every), len(every), "arms")
    return found


def _write(out: Path, found: DrillDocument) -> None:
    with publishing(out / JSON) as path:
        path.write_text(found.model_dump_json(indent=1) + "\n", encoding="utf-8")
    with publishing(out / PAGE) as path:
        path.write_text(render_drill(found), encoding="utf-8")


@contextmanager
def _held(out: Path, key: str) -> Iterator[None]:
    """The folder of this drill, for this process alone. Raises SpecError, WorkBusy."""
    path = out / _KEY
    if not path.exists() and any(out.iterdir()):
        raise SpecError(f"{out} holds other things than a drill", "choose another --out, or an empty folder")
    with path.open("a+", encoding="utf-8") as lock:
        if not hold(lock):
            raise WorkBusy(f"another process works on the drill in {out}", "wait for it, or choose another --out")
        lock.seek(0)
        found = lock.read().strip()
        if found and found != key:
            raise SpecError(
                f"{out} holds another drill: of other data, or trained or audited in another way", "choose another --out"
            )
        if not found:
            lock.write(key + "\n")
            lock.flush()
        yield
