"""An SAE of another audit, used as it is: two reward models of one architecture are then read with the same latents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safer_engine import sae_files
from safer_engine.errors import ArtifactError, SpecError
from safer_engine.stage import Draft
from safer_engine.store import digest_bytes, digest_file

if TYPE_CHECKING:
    from safer_engine.sae_run import SaeRun
    from safer_engine.science.reward_recovered import Rewards
    from safer_engine.science.sae import Sae
    from safer_engine.spec import AuditSpec

WEIGHTS, FACTS = "sae.safetensors", "sae.json"
_MAX_FACTS = 1 << 16
_HINT = "sae.given names the folder `sae` beside the report.json of a finished audit"


def given_digest(spec: AuditSpec) -> dict[str, str]:
    """The digest of the given SAE's files by the spec section that names it, for `ResolvedInputs.extra`; empty without one.

    Raises:
        SpecError: its files are not there, or pre-training is asked for too.
    """
    if spec.sae.given is None:
        return {}
    if spec.sae.pretrain is not None:
        raise SpecError("both sae.given and sae.pretrain are there", "leave one out: a given SAE is not trained")
    return {"sae": _digest(spec.sae.given)}


def load_given(given: str, content: str | None, d_in: int) -> Sae:
    """The SAE of a folder.

    Args:
        content: what `given_digest` found when the audit was prepared.
        d_in: width of the activations it is to read.

    Raises:
        SpecError: the files have changed since, hold no SAE of ours, or one of another width.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from safer_engine.science.sae import Sae

    if _digest(given) != content:
        raise SpecError(f"the SAE {given} has changed since the audit was prepared", "run again")
    folder = _folder(given)
    try:
        sae = Sae.restore(load_file(folder / WEIGHTS), json.loads((folder / FACTS).read_bytes()))
    except (SafetensorError, ArtifactError, OSError, ValueError, TypeError) as error:
        raise SpecError(f"{given} holds no SAE that can be used: {error}", _HINT) from error
    if sae.shape.d_in != d_in:
        raise SpecError(
            f"the SAE {given} reads vectors of {sae.shape.d_in} numbers; this reward model's have {d_in}",
            "give an SAE of a reward model of the same architecture, or leave sae.given out",
        )
    return sae


def publish_given(run: SaeRun, rewards: Rewards) -> Draft:
    """The given SAE as the stage's artifact, with its measures on these activations. Raises SpecError, NumericalError."""
    ctx, d_in = run.ctx, int(run.activations.meta["d_in"])
    sae = load_given(ctx.spec.sae.given, ctx.sources.digest("sae"), d_in).to(run.device)
    metrics: dict[str, Any] = run.measure(sae)
    metrics |= {"dead_share": metrics["silent_share"], "dead_window": metrics["n_positions"]}  # nothing was trained to count
    metrics |= run.recovered(sae, rewards)
    skipped = {"status": "skipped", "reason": "the SAE is given (sae.given)"}
    metrics |= {"training": {"status": "given", "steps": 0}, "pretraining": skipped}
    sae_files.publish_sae(ctx.work, sae)
    sae_files.publish_json(ctx.work, "metrics.json", metrics)
    return Draft({name: value for name, value in metrics.items() if name != "density"})


def _digest(given: str) -> str:
    folder = _folder(given)
    return digest_bytes(f"{digest_file(folder / WEIGHTS)} {digest_file(folder / FACTS)}".encode())


def _folder(given: str) -> Path:
    folder = Path(given).expanduser()
    if missing := [name for name in (WEIGHTS, FACTS) if not (folder / name).is_file()]:
        raise SpecError(f"{given} has no {' and no '.join(missing)}", _HINT)
    if (folder / FACTS).stat().st_size > _MAX_FACTS:
        raise SpecError(f"{folder / FACTS} is larger than {_MAX_FACTS} bytes", _HINT)
    return folder
