"""What `compare` compares: finished audits of this machine or of a service, or reward models that are audited first."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.gate_sources import baseline_of, is_path
from cli.options import build_from_flags
from cli.output import QuietObserver, TerminalObserver, console
from cli.profile import connect
from safer_engine.errors import SpecError
from safer_engine.gate.baselines import LABEL

if TYPE_CHECKING:
    from safer_engine.comparison.sides import Side
    from safer_engine.pipeline import AuditRequest
    from safer_engine.store import LocalArtifactStore

_AUDIT_FLAGS = ("dataset", "eval_dataset", "spec_file", "preset", "assignments", "sample", "stratify", "device", "seed")


def of_models(flags: dict[str, Any]) -> bool:
    """Whether the flags describe audits to be made, so that A and B are reward models. Raises SpecError for --model."""
    if flags["model"] is not None:
        raise SpecError("--model is given, and A and B are the models", "leave --model out")
    if flags["dataset"] is not None or flags["spec_file"] is not None:
        return True
    if given := [name for name in (*_AUDIT_FLAGS, "no_text", "trust_remote_code") if flags[name] not in (None, (), False)]:
        raise SpecError(
            f"{', '.join(given)} describe an audit, and no dataset is given",
            "give --dataset and two reward models, or two finished audits without these flags",
        )
    return False


def finished(text: str, letter: str, store: LocalArtifactStore) -> Side:
    """A finished audit: report.json, the folder that holds it, a job's id, or `label:NAME=VALUE`."""
    from safer_engine.comparison.sides import SCORES, Side, is_audit, load_side, read_scores

    path = Path(text).expanduser()
    if is_path(text):
        if path.is_dir() and not is_audit(path) and (path / "config.json").is_file():
            raise SpecError(f"{letter} {text} is a model, no finished audit", "give --dataset: both are then audited on it first")
        return load_side(path, letter, store)
    audit, scored = baseline_of(text, None), None
    if not text.startswith(LABEL):
        with connect() as client:
            names = {artifact.name: artifact for artifact in client.artifacts(text)}
            scored = read_scores(client.read(text, names[SCORES]), f"{SCORES} of job {text}") if SCORES in names else None
    return Side(text if text.startswith(LABEL) else f"job {text}", audit, scored)


def audited(
    models: tuple[str, str], flags: dict[str, Any], store: LocalArtifactStore, out: Path, *, shows: bool
) -> tuple[Side, Side]:
    """Audit A, then B with A's SAE where they share an architecture, into the folders `a` and `b` of `out`.

    Raises:
        SpecError: a finished audit stands where a model should.
    """
    from safer_engine import api
    from safer_engine.comparison.sides import is_audit, load_side

    for letter, model in zip("AB", models, strict=True):
        if is_audit(Path(model).expanduser()):
            raise SpecError(
                f"{letter} {model} is a finished audit, and flags describe one to be made",
                "give two finished audits and no flags of an audit, or two reward models",
            )
    requests = [api.prepare(build_from_flags(**{**flags, "model": model}).spec) for model in models]
    shared = same_architecture(*requests)
    _run(requests[0], store, out / "a", "A", shows=shows)
    if shared:
        chosen = (*flags["assignments"], f"sae.given={json.dumps(str((out / 'a' / 'sae').resolve()))}")
        requests[1] = api.prepare(build_from_flags(**{**flags, "model": models[1], "assignments": chosen}).spec)
    elif shows:
        console(err=True).print("A and B differ in architecture: rewards alone are compared", markup=False)
    _run(requests[1], store, out / "b", "B", shows=shows)
    a, b = (load_side(out / name, name.upper(), store) for name in ("a", "b"))
    return a, b


def same_architecture(a: AuditRequest, b: AuditRequest) -> bool:
    """Whether an SAE of one model reads the other's vectors: kind of model, number of blocks, width."""
    from safer_engine.planning import model_size

    sizes = [model_size(request.sources.model.path) for request in (a, b)]
    kinds = [_kind(request.sources.model.path) for request in (a, b)]
    if sizes[0] is None or sizes[1] is None or kinds[0] is None:
        return False
    return kinds[0] == kinds[1] and (sizes[0].d_in, sizes[0].n_blocks) == (sizes[1].d_in, sizes[1].n_blocks)


def _kind(folder: Path) -> str | None:
    with suppress(OSError, ValueError):
        found = json.loads((folder / "config.json").read_bytes())
        kind = found.get("model_type") if isinstance(found, dict) else None
        return kind if isinstance(kind, str) else None
    return None


def _run(request: AuditRequest, store: LocalArtifactStore, out: Path, letter: str, *, shows: bool) -> None:
    from safer_engine import api
    from safer_engine.planning import estimate
    from safer_engine.redteam import log_forced

    log_forced(store.root, "compare", request.spec)
    shown = console(err=True)
    observer = TerminalObserver(shown) if shows else QuietObserver()
    if shows:
        shown.print(f"{letter}: audit of {request.sources.model.origin} on {request.sources.dataset.origin}", markup=False)
    with observer.showing():
        api.run_request(request, store, out, observer, expected=estimate(request, store))
