"""A loaded reward model as a value: its blocks, its head, where the head reads, and how a reward follows from that.

Nothing is taken from a table of architectures. The blocks are the longest list of like modules; the head is the linear
layer whose output is the model's logits; the position it reads is the one whose residual stream moves the logits; a
model is causal when a later token leaves earlier positions unchanged. All of it is measured on one short input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from safer_engine.errors import ModelRefused

HeadReads = Literal["last", "first", "mean"]

_PROBE_TOKENS = 8
_UNTRAINED = "save the model with its trained head, or choose another model.reward_index"
_UNSUPPORTED = "only models with one stack of blocks and a linear reward head can be audited"


@dataclass(frozen=True)
class RewardModelInfo:
    """What is known of a reward model.

    Attributes:
        architecture: class name of the model.
        n_blocks: number of transformer blocks; blocks_name is their list in the model.
        d_in: width of the residual stream; d_head: width of the vector the head reads.
        n_outputs: outputs of the head; weights combine them into the reward (one weight each).
        head_name: name of the head's linear layer; head_source: name of its weights in the files (they may differ).
        head_reads: `last` token that is not padding, `first` token, or `mean` over all tokens.
        causal: positions do not depend on later ones; right padding then needs no mask.
        tuple_blocks: length of the tuple a block returns; 0 where it returns a tensor.
        rewired_after: blocks (1-based) whose output is not what the next block reads; no hook goes there.
        pad_id: token that fills batches; pad_origin says where it was found.
        head_pad_id: the pad token the library's own rule for `last` skips; None where the model has none.
        dtype, attention: of the forward pass. adapter: whether a PEFT adapter was merged in.
    """

    architecture: str
    n_blocks: int
    blocks_name: str
    d_in: int
    d_head: int
    n_outputs: int
    weights: tuple[float, ...]
    head_name: str
    head_source: str
    head_reads: HeadReads
    causal: bool
    tuple_blocks: int
    rewired_after: tuple[int, ...]
    pad_id: int
    pad_origin: str
    head_pad_id: int | None
    dtype: str
    attention: str
    n_parameters: int
    adapter: bool = False


@dataclass(frozen=True)
class LoadFacts:
    """What the loader knows and the model does not say: see the attributes of `RewardModelInfo`."""

    weights: tuple[float, ...]
    head_source: str
    pad_id: int
    pad_origin: str
    head_pad_id: int | None
    attention: str
    adapter: bool = False


@dataclass(frozen=True)
class RewardModel:
    """A reward model, ready to run: in eval mode, without gradients of its parameters.

    Attributes:
        model: the Transformers model; blocks and head are modules inside it.
        tokenizer: its fast tokenizer.
    """

    model: nn.Module
    tokenizer: Any
    blocks: tuple[nn.Module, ...]
    head: nn.Linear
    info: RewardModelInfo

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""
        embeddings: nn.Module = self.model.get_input_embeddings()  # type: ignore[operator]
        return next(embeddings.parameters()).device

    def head_position(self, ids: NDArray[np.integer[Any]]) -> int | None:
        """Index of the token whose final state the head reads in one unpadded sequence; None for `mean`.

        `last` follows the Transformers rule: the last token that is not the pad token, else the first one.
        """
        if self.info.head_reads == "mean":
            return None
        if self.info.head_reads == "first":
            return 0
        if self.info.head_pad_id is None:
            return len(ids) - 1
        real = np.flatnonzero(np.asarray(ids) != self.info.head_pad_id)
        return int(real[-1]) if real.size else 0

    def head_positions(self, ids_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
        """`head_position` for a padded batch: int64 [B], on the ids' device. Not for `mean`."""
        batch, length = ids_BT.shape
        if self.info.head_reads == "first":
            return torch.zeros(batch, dtype=torch.long, device=ids_BT.device)
        real_BT = torch.ones_like(ids_BT, dtype=torch.bool) if mask_BT is None else mask_BT.bool()
        if self.info.head_pad_id is not None:
            real_BT = real_BT & (ids_BT != self.info.head_pad_id)
        return (torch.arange(length, device=ids_BT.device) * real_BT).argmax(dim=-1)

    def rewards(self, head_BH: Tensor) -> Tensor:
        """Rewards of the vectors the head reads.

        Args:
            head_BH: [B, d_head], any dtype; the product is taken in float64, so that a bfloat16 model's rewards are not
                rounded to eight bits.

        Returns:
            float64 [B]: Σ_n weights_n · (W_n · head + b_n). Differentiable.
        """
        weight_NH = self.head.weight.to(head_BH.device, torch.float64)
        outputs_BN = head_BH.to(torch.float64) @ weight_NH.T
        if self.head.bias is not None:
            outputs_BN = outputs_BN + self.head.bias.to(head_BH.device, torch.float64)
        return outputs_BN @ torch.tensor(self.info.weights, dtype=torch.float64, device=head_BH.device)


def residual_of(output: Any) -> Tensor:
    """The residual stream in what a block returns (a tensor, or a tuple that begins with it)."""
    value = output[0] if isinstance(output, tuple) else output
    if not isinstance(value, Tensor) or value.ndim != 3:
        raise ModelRefused("a block of the model does not return a residual stream of shape [batch, tokens, width]", _UNSUPPORTED)
    return value


def residual_into(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The residual stream among the arguments of a block."""
    value = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(value, Tensor):
        raise ModelRefused("a block of the model is not given its hidden states first", _UNSUPPORTED)
    return value


def find_blocks(model: nn.Module) -> tuple[str, tuple[nn.Module, ...]]:
    """Name and members of the longest list of modules of one class that lies in no other such list.

    Raises:
        ModelRefused: the model has no such list.
    """
    lists: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        nested = any(name.startswith(f"{outer}.") for outer, _ in lists)
        if isinstance(module, nn.ModuleList) and not nested and len({type(block) for block in module}) == 1:
            lists.append((name, module))
    if not lists:
        raise ModelRefused("the model has no list of transformer blocks", _UNSUPPORTED)
    name, blocks = max(lists, key=lambda entry: len(entry[1]))
    return name, tuple(blocks)


def inspect(model: nn.Module, tokenizer: Any, facts: LoadFacts) -> RewardModel:
    """Find blocks and head of a loaded model by running it on one short input.

    Raises:
        ModelRefused: blocks or head are not of the kind that can be audited, or weights or output are not finite.
    """
    blocks_name, blocks = find_blocks(model)
    _refuse_unfit_weights(model)
    ids_1T = _probe_ids(model, facts)
    trace = _trace(model, blocks_name, blocks, ids_1T)
    outputs = [residual_of(output) for output in trace.block_outputs]
    head_name, head, head_input = _find_head(trace)
    _refuse_zero_head(head)
    info = RewardModelInfo(
        architecture=type(model).__name__,
        n_blocks=len(blocks),
        blocks_name=blocks_name,
        d_in=int(outputs[-1].shape[-1]),
        d_head=int(head_input.shape[-1]),
        n_outputs=head.out_features,
        weights=facts.weights,
        head_name=head_name,
        head_source=facts.head_source,
        head_reads=_where_head_reads(model, blocks, ids_1T),
        causal=_is_causal(model, blocks, ids_1T),
        tuple_blocks=len(trace.block_outputs[-1]) if isinstance(trace.block_outputs[-1], tuple) else 0,
        rewired_after=_rewired(trace, outputs),
        pad_id=facts.pad_id,
        pad_origin=facts.pad_origin,
        head_pad_id=facts.head_pad_id,
        dtype=str(head.weight.dtype).removeprefix("torch."),
        attention=facts.attention,
        n_parameters=sum(parameter.numel() for parameter in model.parameters()),
        adapter=facts.adapter,
    )
    if len(facts.weights) != head.out_features:
        raise ModelRefused(
            f"{len(facts.weights)} reward weights were given for a head with {head.out_features} outputs",
            "give one weight per output, or reward_index",
        )
    _refuse_zero_head(head, facts.weights)
    return RewardModel(model, tokenizer, blocks, head, info)


def _refuse_unfit_weights(model: nn.Module) -> None:
    bad = [
        name
        for name, weight in model.named_parameters()
        if weight.is_floating_point() and not weight.is_meta and not bool(torch.isfinite(weight).all())
    ]
    if bad:
        raise ModelRefused(
            f"{len(bad)} weights of the model hold NaN or infinity, first {bad[0]}", "save or download the model again"
        )


def _refuse_zero_head(head: nn.Linear, weights: tuple[float, ...] | None = None) -> None:
    """Refuse a head that gives every text the same reward; with `weights`, one whose combined outputs do."""
    if not bool(head.weight.any()):
        raise ModelRefused("the head's weights are all zero: every reward is the same", _UNTRAINED)
    if weights is not None:
        combined = torch.tensor(weights, dtype=torch.float64) @ head.weight.detach().double().cpu()
        if not bool(combined.any()):
            raise ModelRefused("the head's weights for the chosen reward are all zero: every reward is the same", _UNTRAINED)


@dataclass
class _Trace:
    """What one forward pass showed."""

    block_inputs: list[Tensor]
    block_outputs: list[Any]
    linears: list[tuple[str, nn.Linear, Tensor, Tensor]]
    logits_1N: Tensor


def _probe_ids(model: nn.Module, facts: LoadFacts) -> Tensor:
    """A few distinct ordinary token ids, [1, T]."""
    embeddings: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    weight = next(embeddings.parameters())
    avoid = {facts.pad_id, facts.head_pad_id}
    spread = (int(weight.shape[0] * (step + 0.5) / (2 * _PROBE_TOKENS)) for step in range(2 * _PROBE_TOKENS))
    ids = [token for token in dict.fromkeys(spread) if token not in avoid][:_PROBE_TOKENS]
    return torch.tensor([ids], device=weight.device)


def _trace(model: nn.Module, blocks_name: str, blocks: Sequence[nn.Module], ids_1T: Tensor) -> _Trace:
    trace = _Trace([], [], [], torch.empty(0))

    def see_block(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        trace.block_inputs.append(residual_into(args, kwargs))
        trace.block_outputs.append(output)

    def see_linear(name: str) -> Callable[..., None]:
        def see(module: nn.Linear, args: tuple[Any, ...], output: Tensor) -> None:
            trace.linears.append((name, module, args[0], output))

        return see

    with ExitStack() as stack, torch.no_grad():
        for block in blocks:
            stack.enter_context(_hooked(block.register_forward_hook(see_block, with_kwargs=True)))
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and not name.startswith(f"{blocks_name}."):
                stack.enter_context(_hooked(module.register_forward_hook(see_linear(name))))
        trace.logits_1N = _logits(model, ids_1T)
    if len(trace.block_outputs) != len(blocks):
        raise ModelRefused(
            f"the {len(blocks)} blocks {blocks_name} ran {len(trace.block_outputs)} times in one pass (shared blocks?)",
            _UNSUPPORTED,
        )
    return trace


def _find_head(trace: _Trace) -> tuple[str, nn.Linear, Tensor]:
    """The last linear layer outside the blocks whose output is the logits, and its input."""
    logits_N = trace.logits_1N[0]
    for name, module, seen, output in reversed(trace.linears):
        rows = output.reshape(-1, output.shape[-1])
        if rows.shape[-1] == logits_N.shape[-1] and any(_close(row, logits_N) for row in rows):
            return name, module, seen
    raise ModelRefused("no linear layer of the model gives its logits", _UNSUPPORTED)


def _where_head_reads(model: nn.Module, blocks: Sequence[nn.Module], ids_1T: Tensor) -> HeadReads:
    """The positions of the last block's output that the logits depend on, by their gradient."""
    leaf: list[Tensor] = []

    def cut(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        leaf.append(residual_of(output).detach().requires_grad_())
        return (leaf[0], *output[1:]) if isinstance(output, tuple) else leaf[0]

    with _hooked(blocks[-1].register_forward_hook(cut)), torch.enable_grad():
        logits_1N = _logits(model, ids_1T)
        mixed = (logits_1N.double() * torch.arange(1, logits_1N.shape[-1] + 1, device=logits_1N.device)).sum()
        (gradient,) = torch.autograd.grad(mixed, leaf)
    length = ids_1T.shape[1]
    moved = torch.nonzero(gradient[0].abs().sum(dim=-1)).flatten().tolist()
    places: dict[tuple[int, ...], HeadReads] = {(length - 1,): "last", (0,): "first", tuple(range(length)): "mean"}
    if tuple(moved) not in places:
        raise ModelRefused(f"the reward head reads tokens {moved} of {length}: neither the last, the first nor all", _UNSUPPORTED)
    return places[tuple(moved)]


def _is_causal(model: nn.Module, blocks: Sequence[nn.Module], ids_1T: Tensor) -> bool:
    """Whether changing the last token leaves the last block's output at all earlier positions as it was."""
    other_1T = ids_1T.clone()
    other_1T[0, -1] = ids_1T[0, 0]
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        seen.append(residual_of(output)[:, :-1].float())

    with _hooked(blocks[-1].register_forward_hook(keep)), torch.no_grad():
        _logits(model, ids_1T)
        _logits(model, other_1T)
    return bool((seen[0] - seen[1]).norm() <= 1e-3 * seen[0].norm())


def _rewired(trace: _Trace, outputs: Sequence[Tensor]) -> tuple[int, ...]:
    """1-based blocks whose output differs from the next block's input."""
    following = zip(outputs[:-1], trace.block_inputs[1:], strict=True)
    return tuple(
        index
        for index, (out, into) in enumerate(following, start=1)
        if out.shape != into.shape or not torch.equal(out, into.to(out.device))
    )


def _logits(model: nn.Module, ids_1T: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T)).logits
    if not torch.isfinite(logits).all():
        raise ModelRefused("the reward model's output is not finite on a short input", "check its weights and dtype")
    return logits


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a.double(), b.to(a.device).double(), rtol=1e-3, atol=1e-6)


@contextmanager
def _hooked(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
