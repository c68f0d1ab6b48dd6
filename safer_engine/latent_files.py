"""Files of the latents stage: activation shards in, one fragment a shard (the unit of resume), the payload out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safer_engine.artifacts import Activations
from safer_engine.errors import ArtifactError
from safer_engine.payload_files import TensorPieces, map_tensors, write_tensors
from safer_engine.spec import HookSpec, SalienceSpec
from safer_engine.stage import StageContext

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from safer_engine.science.contexts import Span, TopContexts
    from safer_engine.science.held_out import PoolActs
    from safer_engine.science.latent_acts import LatentTotals, ResponseActs, ShardActs, ShardRows
    from safer_engine.science.sae import Sae, SparseActs

_SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Fragment:
    """What is kept of one shard.

    Attributes:
        path: its file, with each side's indices and sums.
        first_pair, n_pairs: the consecutive pairs it covers.
    """

    path: Path
    first_pair: int
    n_pairs: int

    @property
    def totals(self) -> LatentTotals:
        """Sums over its counted positions."""
        from safer_engine.science.latent_acts import LatentTotals

        found = map_tensors(self.path)
        return LatentTotals(found["firings"], found["responses"], found["energy"], int(found["n_positions"].sum()))

    @property
    def contexts(self) -> TopContexts:
        """Its strongest contexts."""
        return _contexts_in(self.path, "context")

    @property
    def sample(self) -> TopContexts:
        """Contexts drawn from it, of which some are held out."""
        return _contexts_in(self.path, "sample")


@dataclass(frozen=True)
class ShardJob:
    """Passes over the activation shards of one stage run; `groups_P` is the group of each pair, as integers."""

    ctx: StageContext
    activations: Activations
    sae: Sae
    groups_P: NDArray[np.int64]

    def fragments(self) -> list[Fragment]:
        """A fragment of every shard, in order; those of an earlier, interrupted run are taken as they are."""
        from safer_engine.science.contexts import peaks_of, sample_contexts, shard_contexts
        from safer_engine.science.latent_acts import summarise_shard

        names, spec = self.activations.names("shard-"), self.ctx.spec.contexts
        found = []
        for done, name in enumerate(names):
            self.ctx.progress(done, len(names), "shards")
            path = self.ctx.work.scratch / name
            if not path.is_file():
                acts = summarise_shard(self._rows(name), self._encode, self.sae.shape.d_sae)
                contexts = shard_contexts(acts, spec.per_latent, self.groups_P)
                drawn = spec.per_latent + spec.held_out if spec.held_out else 0
                sample = sample_contexts([peaks_of(acts)], drawn, self.groups_P, self.ctx.seed("held out"))
                with self.ctx.work.publish(name, scratch=True) as temporary:
                    save_fragment(temporary, acts, contexts, sample)
            found.append(open_fragment(path))
        return found

    def windows(self, fragments: Sequence[Fragment], contexts: TopContexts, spans: Sequence[Span]) -> list[Any]:
        """Activations at each context's tokens (see `window_activations`), shard by shard."""
        import numpy as np

        from safer_engine.science.contexts import window_activations

        windows: list[Any] = [None] * len(spans)
        for fragment in fragments:
            first, last = 2 * fragment.first_pair, 2 * (fragment.first_pair + fragment.n_pairs)
            here = np.flatnonzero((contexts.responses_N >= first) & (contexts.responses_N < last))
            if len(here) == 0:
                continue
            self.ctx.progress(fragment.first_pair, fragments[-1].first_pair + fragments[-1].n_pairs, "pairs read for contexts")
            rows = self._rows(fragment.path.name)
            found = window_activations(rows, self._encode, contexts.take(here), [spans[int(at)] for at in here])
            for at, window in zip(here.tolist(), found, strict=True):
                windows[at] = window
        return windows

    def pool(self, fragments: Sequence[Fragment], responses: NDArray[np.int64], latents: NDArray[np.int64]) -> PoolActs:
        """Where latents fire in some responses (ascending), shard by shard."""
        from safer_engine.science.held_out import join_pools, pool_acts

        parts = []
        for fragment in fragments:
            first, last = 2 * fragment.first_pair, 2 * (fragment.first_pair + fragment.n_pairs)
            here = responses[(responses >= first) & (responses < last)]
            if len(here):
                self.ctx.progress(fragment.first_pair, fragments[-1].first_pair + fragments[-1].n_pairs, "pairs read for checks")
                parts.append(pool_acts(self._rows(fragment.path.name), self._encode, here, latents))
        return join_pools(parts)

    def _rows(self, name: str) -> ShardRows:
        return read_shard(self.activations.path(name), self.ctx.spec.hook, self.ctx.spec.salience)

    def _encode(self, x_BD: Tensor) -> SparseActs:
        return self.sae.encode(x_BD.to(self.sae.W_enc_DS.device))


def read_shard(path: Path, hook: HookSpec, salience: SalienceSpec) -> ShardRows:
    """An activation shard, with the positions that count marked."""
    import numpy as np
    from safetensors.torch import load_file

    from safer_engine.science.latent_acts import FlagBits, ShardRows, counted_positions

    found = load_file(path)
    bits = FlagBits(Activations.FLAG_SPECIAL, Activations.FLAG_HIGH_NORM, Activations.FLAG_HEAD, Activations.FLAG_SENTENCE_END)
    response_B = 2 * found["pair"].numpy().astype(np.int64) + found["side"].numpy()
    counted_B = counted_positions(found["flags"].numpy(), bits, salience.estimator, hook.positions)
    return ShardRows(found["x"], response_B, found["position"].numpy(), counted_B)


def save_fragment(path: Path, shard: ShardActs, contexts: TopContexts, sample: TopContexts) -> None:
    """Write what is kept of a shard."""
    import numpy as np
    from safetensors.numpy import save_file

    from safer_engine.science.latent_acts import one_side

    tensors: dict[str, Any] = {
        "firings": shard.totals.firings_S,
        "responses": shard.totals.responses_S,
        "energy": shard.totals.energy_S,
        "first_pair": np.asarray([shard.first_pair], dtype=np.int64),
        "n_positions": shard.positions_R.reshape(-1, 2),
    }
    for name, found in (("context", contexts), ("sample", sample)):
        tensors |= {f"{name}_latents": found.latents_N, f"{name}_activations": found.activations_N}
        tensors |= {f"{name}_responses": found.responses_N, f"{name}_positions": found.positions_N}
    for side, name in enumerate(_SIDES):
        acts = one_side(shard, side)
        tensors |= {f"{name}_counts": np.diff(acts.indptr), f"{name}_indices": acts.indices, f"{name}_sums": acts.sums}
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, path)


def _contexts_in(path: Path, name: str) -> TopContexts:
    from safer_engine.science.contexts import TopContexts

    found = map_tensors(path)
    return TopContexts(*(found[f"{name}_{part}"] for part in ("latents", "activations", "responses", "positions")))


def open_fragment(path: Path) -> Fragment:
    """A fragment's extent."""
    found = map_tensors(path)
    return Fragment(path, int(found["first_pair"][0]), len(found["n_positions"]))


def write_acts(path: Path, fragments: Sequence[Fragment], n_pairs: int) -> None:
    """Join fragments, in order, into `acts.safetensors`; memory is bounded by the largest fragment.

    Raises:
        ArtifactError: the fragments do not cover pairs 0 … n_pairs − 1 one after another.
    """
    import numpy as np

    expected = 0
    for fragment in fragments:
        if fragment.first_pair != expected:
            raise ArtifactError(f"{fragment.path.name} begins at pair {fragment.first_pair}, not {expected}")
        expected += fragment.n_pairs
    if expected != n_pairs:
        raise ArtifactError(f"activations cover {expected} of {n_pairs} pairs")
    tensors = {}
    for side in _SIDES:
        counts = np.concatenate(list(_pieces(fragments, f"{side}_counts")))
        indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        nonzero = (int(indptr[-1]),)
        tensors[f"{side}_indptr"] = TensorPieces("I64", indptr.shape, [indptr])
        tensors[f"{side}_indices"] = TensorPieces("I32", nonzero, _pieces(fragments, f"{side}_indices"))
        tensors[f"{side}_sums"] = TensorPieces("F32", nonzero, _pieces(fragments, f"{side}_sums"))
    tensors["n_positions"] = TensorPieces("I32", (n_pairs, 2), _pieces(fragments, "n_positions"))
    write_tensors(path, dict(sorted(tensors.items(), key=lambda item: item[1].dtype != "I64")))


def open_acts(path: Path, d_sae: int) -> ResponseActs:
    """`acts.safetensors`, memory-mapped."""
    from safer_engine.science.latent_acts import ResponseActs, SideActs

    found = map_tensors(path)
    chosen, rejected = (SideActs(*(found[f"{side}_{part}"] for part in ("indptr", "indices", "sums"))) for side in _SIDES)
    return ResponseActs(chosen, rejected, found["n_positions"], d_sae)


def _pieces(fragments: Sequence[Fragment], name: str) -> Iterator[Any]:
    for fragment in fragments:
        yield map_tensors(fragment.path)[name]
