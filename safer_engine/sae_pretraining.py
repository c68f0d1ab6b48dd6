"""Token-level pre-training of the SAE on a text corpus, before the preference texts.

The corpus is tokenised once into rows of equal length, without padding. Training goes over them window by window: the
reward model is run up to the hook on the rows of a window, and its positions are handed out in random order. Batch n
depends on the corpus, the seed and n alone, so an interrupted run goes on where it was.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from safer_engine.errors import DatasetRefused, SpecError
from safer_engine.sae_run import Loop, SaeRun
from safer_engine.sources.corpora import texts_of
from safer_engine.sources.resolved import ResolvedDataset
from safer_engine.spec import PretrainSpec
from safer_engine.store import WorkArea

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from safer_engine.science.reward_model import RewardModel
    from safer_engine.science.sae import Sae

_WINDOW_BYTES = 1 << 28
_LEAST_KEPT = 0.9
_HIGH_NORM = 10.0
_IDS, _FACTS = "corpus.i32", "corpus.json"


@dataclass(frozen=True)
class Pretrained:
    """The SAE after pre-training, and what was done."""

    sae: Sae
    facts: dict[str, Any]


def pretrain(run: SaeRun, rm: RewardModel) -> Pretrained | None:
    """Pre-train on the corpus the spec names; None where it names none.

    Raises:
        DatasetRefused: the corpus can't be read, or is too small for one batch.
        NumericalError, ResourceError, Interrupted: as for the training.
    """
    import torch

    from safer_engine.science.sae_training import initial_state, plan_training

    spec: PretrainSpec | None = run.ctx.spec.sae.pretrain
    if spec is None:
        return None
    source = run.ctx.sources.corpus
    if source is None:
        raise SpecError("sae.pretrain.corpus was not resolved", "prepare the audit with safer_engine.api.prepare")
    corpus = _packed(run.ctx.work, source, spec, rm)
    layer, d_in = int(run.activations.meta["hook_layer"]), int(run.activations.meta["d_in"])
    limit = _HIGH_NORM * float(run.activations.meta["norm_median"])
    settings = run.ctx.spec.sae.model_copy(update={"passes": 1.0, "min_steps": 0, "lr": spec.lr})
    positions = min(spec.tokens, corpus.size)
    params = plan_training(settings, run.normalisation(), d_in, positions, run.device)
    windows = _Windows(rm, layer, corpus, limit, params.batch, run.ctx.seed("corpus"), run.ctx.runtime.batch_tokens)
    params = replace(params, steps=min(params.steps, windows.n_batches))
    loop = Loop(run.ctx, "pretraining.safetensors", run.device)
    generator = torch.Generator().manual_seed(run.ctx.seed("weights"))
    trained = loop.run(params, lambda: initial_state(params, next(windows.batches(0)).to(run.device), generator), windows.batches)
    facts = {"status": "done", "positions": params.steps * params.batch, "loss": trained.curve[-1]["loss"], "lr": params.lr}
    named = {"origin": source.origin, "revision": source.revision, "digest": source.digest}
    return Pretrained(trained.sae, {**facts, "steps": params.steps, **asdict(corpus.facts), "corpus": named})


@dataclass(frozen=True)
class CorpusFacts:
    """What became of the texts: n_texts = used + too_short."""

    texts: int
    used: int
    too_short: int
    rows: int
    length: int


@dataclass(frozen=True)
class _Corpus:
    ids_NL: NDArray[np.int32]
    facts: CorpusFacts

    @property
    def size(self) -> int:
        """Tokens in all rows."""
        return int(self.ids_NL.size)


def _packed(work: WorkArea, source: ResolvedDataset, spec: PretrainSpec, rm: RewardModel) -> _Corpus:
    """The tokenised corpus in scratch, made where it is not there yet."""
    import numpy as np

    if not (work.scratch / _FACTS).is_file():
        _pack(work, source, spec, rm)
    facts = CorpusFacts(**json.loads((work.scratch / _FACTS).read_bytes()))
    if facts.rows == 0:
        raise DatasetRefused(f"the corpus has no {facts.length} tokens in a row", "name a larger sae.pretrain.corpus")
    ids_NL = np.memmap(work.scratch / _IDS, dtype=np.int32, mode="r", shape=(facts.rows, facts.length))
    return _Corpus(ids_NL, facts)


def _pack(work: WorkArea, source: ResolvedDataset, spec: PretrainSpec, rm: RewardModel) -> None:
    """Texts one after another, an end token between them, cut into rows that begin as the tokenizer begins a text."""
    import numpy as np

    tokenizer = rm.tokenizer
    first = next((token for token in (tokenizer.bos_token_id, tokenizer.cls_token_id) if token is not None), None)
    last = next((token for token in (tokenizer.eos_token_id, tokenizer.sep_token_id) if token is not None), None)
    head, tail = ([] if token is None else [token] for token in (first, last))
    length = spec.max_length
    room, wanted = length - len(head), math.ceil(spec.tokens / length)
    texts = used = rows = 0
    left: list[int] = []
    with work.publish(_IDS, scratch=True) as path, path.open("wb") as sink:
        for text in texts_of(source):
            texts += 1
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            used += bool(ids)
            left += [*ids, *tail] if ids else []
            while len(left) >= room and rows < wanted:
                sink.write(np.array([*head, *left[:room]], dtype=np.int32).tobytes())
                left, rows = left[room:], rows + 1
            if rows == wanted:
                break
    with work.publish(_FACTS, scratch=True) as path:
        path.write_text(json.dumps(asdict(CorpusFacts(texts, used, texts - used, rows, length))))


@dataclass(frozen=True)
class _Windows:
    """Batches of corpus activations, window by window.

    Attributes:
        limit: positions of a larger norm are left out, as are special tokens.
    """

    rm: RewardModel
    layer: int
    corpus: _Corpus
    limit: float
    batch: int
    seed: int
    batch_tokens: int

    @property
    def rows(self) -> int:
        """Rows of a window: about as many as fit the memory, at least one batch."""
        n_rows, length = len(self.corpus.ids_NL), self.corpus.facts.length
        fitting = _WINDOW_BYTES // (4 * self.rm.info.d_in * length)
        return min(max(fitting, math.ceil(self.batch / (_LEAST_KEPT * length)), 1), n_rows)

    @property
    def per_window(self) -> int:
        """Batches of a window: what is left when a tenth of the positions is left out."""
        return max(1, int(_LEAST_KEPT * self.rows * self.corpus.facts.length) // self.batch)

    @property
    def n_batches(self) -> int:
        """Batches of the corpus, each position being used once."""
        return len(self.corpus.ids_NL) // self.rows * self.per_window

    def batches(self, first: int) -> Iterator[Tensor]:
        """Batches [batch, d_in] from the `first`-th on."""
        window, skip = divmod(first, self.per_window)
        while True:
            x_BD = self._activations(window % (len(self.corpus.ids_NL) // self.rows))
            order_B = self._order(window, len(x_BD))
            for number in range(skip, self.per_window):
                # where more than a tenth was left out, the last batches begin the window again
                places = [place % len(order_B) for place in range(number * self.batch, (number + 1) * self.batch)]
                yield x_BD[order_B[places]]
            del x_BD
            window, skip = window + 1, 0

    def _order(self, window: int, n: int) -> Tensor:
        import hashlib

        import torch

        raw = hashlib.sha256(f"{self.seed}/{window}".encode()).digest()
        return torch.randperm(n, generator=torch.Generator().manual_seed(int.from_bytes(raw[:8], "big") >> 1))

    def _activations(self, window: int) -> Tensor:
        import torch

        from safer_engine.science.hooks import residual

        ids_NL = torch.from_numpy(self.corpus.ids_NL[window * self.rows : (window + 1) * self.rows].astype("int64"))
        special = torch.tensor(sorted(self.rm.tokenizer.all_special_ids))
        kept: list[torch.Tensor] = []
        with torch.no_grad():
            for ids_BT in torch.split(ids_NL, max(1, self.batch_tokens // ids_NL.shape[1])):
                h_ND = residual(self.rm, self.layer, ids_BT).flatten(0, 1)
                usable_N = (h_ND.float().norm(dim=1) <= self.limit).cpu() & ~torch.isin(ids_BT, special).flatten()
                kept.append(h_ND.cpu()[usable_N])
        found = torch.cat(kept)
        if len(found) == 0:
            raise DatasetRefused("no position of the corpus can be trained on", "name another sae.pretrain.corpus")
        return found
