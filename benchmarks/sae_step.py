"""How fast a training step of the SAE is: positions per second against a plain dense step and the floor, in one run.

    python -m benchmarks.sae_step [--device cpu|cuda] [--threads N] [--rounds 7] [--shapes small,large]

Rows, interleaved round by round: (ours) the step that trains an audit's SAE; (dense) the same step in dense autograd, with
the same clipping, parallel-gradient removal and renormed decoder; (floor) the encoder product alone. AuxK is off: nothing
is dead at the start. The loss curves of ours and dense from equal weights over the same 50 batches (8 for the large shape on
a CPU) are compared, and beside that dense with itself where the rows of each batch are reversed: a near tie in top-k that
rounding decides sets curves apart.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.machine_line import machine_line
from safer_engine.science.sae import Normalisation, scalar_scale
from safer_engine.science.sae_training import TrainingParams, TrainingState, initial_state, plan_training, train
from safer_engine.spec import BatchTopKSpec, TopKSpec

CLOCK = time.perf_counter
WAYS = ("ours", "dense", "floor")


@dataclass(frozen=True)
class Shape:
    d_in: int
    d_sae: int
    k: int
    batch: int
    curve_steps: int


def shapes(device: str) -> dict[str, Shape]:
    """The two shapes; the large one is made shorter on a CPU."""
    large = (4096, 50) if device.startswith("cuda") else (2048, 8)
    return {"small": Shape(384, 3072, 32, 4096, 50), "large": Shape(2048, 16384, 64, *large)}


def activations(shape: Shape, n: int, device: str) -> Tensor:
    """Correlated activations: Gaussian with a power-law spectrum in a random basis, and a mean."""
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(shape.d_in, shape.d_in, generator=generator))
    scales = torch.arange(1, shape.d_in + 1) ** -0.5
    x = torch.randn(n, shape.d_in, generator=generator) * scales @ basis + 0.1 * torch.randn(shape.d_in, generator=generator)
    return torch.as_tensor(x, device=device)


def plan(shape: Shape, x: Tensor, matmul: str, kind: str) -> TrainingParams:
    spec_type = BatchTopKSpec if kind == "batch_topk" else TopKSpec
    spec = spec_type(d_sae=shape.d_sae, k=shape.k, batch=shape.batch, min_steps=0, dtype=matmul)
    normalisation = Normalisation("scalar", scalar_scale(float(x.double().square().sum()), len(x), shape.d_in))
    params = plan_training(spec, normalisation, shape.d_in, 10_000 * shape.batch, str(x.device))
    return replace(params, batch=shape.batch, lr=1e-3, warmup_steps=0)


def copy_of(state: TrainingState) -> TrainingState:
    return TrainingState.restore({name: tensor.clone() for name, tensor in state.tensors().items()}, state.facts())


class Dense:
    """The textbook step: dense latents, dense decode, automatic differentiation, Adam."""

    def __init__(self, params: TrainingParams, state: TrainingState) -> None:
        self.params = params
        self.weights = [nn.Parameter(weight.clone()) for weight in state.weights]
        self.adam = torch.optim.Adam(self.weights, lr=params.lr, fused=True)

    def step(self, raw: Tensor) -> float:
        x = raw * self.params.shape.normalisation.scale
        W_enc, b_enc, W_dec, b_dec = self.weights
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.params.matmul == "bfloat16"):
            pre = (x - b_dec) @ W_enc.T + b_enc
            values, columns = self._largest(pre)
            acts = torch.zeros_like(pre).scatter(-1, columns, values.relu())
            x_hat = acts.view(len(x), -1) @ W_dec + b_dec
        loss = (x_hat - x).square().sum() / (x - x.mean(0)).square().sum()
        torch.autograd.backward(loss)
        with torch.no_grad():
            assert W_dec.grad is not None
            W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
            nn.utils.clip_grad_norm_(self.weights, 1.0)
            self.adam.step()
            self.adam.zero_grad()
            W_dec.div_(W_dec.norm(dim=1, keepdim=True))
        return float(loss.detach())

    def _largest(self, pre: Tensor) -> tuple[Tensor, Tensor]:
        found = pre.topk(self.params.shape.k, dim=-1)
        return found.values, found.indices


def same_batch(x: Tensor) -> Callable[[int], Iterator[Tensor]]:
    return lambda first: itertools.repeat(x)


def timed(work: Callable[[], object], device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    start = CLOCK()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return CLOCK() - start


def peak_rate(dtype: torch.dtype, device: str) -> float:
    """Best measured rate of a square product, in flop/s."""
    size = 8192 if device.startswith("cuda") else 1536
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(timed(lambda: a @ b, device) for _ in range(8))


def measure(shape: Shape, matmul: str, kind: str, device: str, rounds: int) -> tuple[dict[str, list[float]], tuple[float, float]]:
    """Seconds per step of each way, round by round, and how far the loss curves are apart."""
    x = activations(shape, shape.batch, device)
    params = plan(shape, x, matmul, kind)
    state = initial_state(params, x, torch.Generator().manual_seed(0))
    difference = curves_apart(shape, params, state, x) if kind == "topk" else (float("nan"), float("nan"))
    dense, steps = Dense(params, state), train(params, state, same_batch(x))
    weight, dtype = state.weights.W_enc_SD, getattr(torch, matmul)
    ways: dict[str, Callable[[], object]] = {
        "ours": lambda: next(steps),
        "dense": lambda: dense.step(x),
        "floor": lambda: x.to(dtype) @ weight.to(dtype).T,
    }
    if kind != "topk":
        del ways["dense"]
    for work in ways.values():
        work()
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, work in ways.items():
            seconds[way].append(timed(work, device))
    return seconds, difference


def curves_apart(shape: Shape, params: TrainingParams, state: TrainingState, x: Tensor) -> tuple[float, float]:
    """Largest relative difference of the losses over some steps on different batches: ours and dense; dense, and dense with the
    rows of each batch in reverse, which differ by rounding alone."""
    n = max(256, len(x) // 8)
    rows = [
        torch.randint(len(x), (n,), generator=torch.Generator().manual_seed(step)).to(x.device)
        for step in range(shape.curve_steps)
    ]
    params = replace(params, batch=n, steps=shape.curve_steps, decay_steps=0)
    dense = Dense(params, state)
    ours = [progress.loss for progress in train(params, copy_of(state), lambda first: (x[row] for row in rows[first:]))]
    theirs = [dense.step(x[row]) for row in rows]
    again = Dense(params, state)
    reversed_rows = [again.step(x[row.flip(0)]) for row in rows]
    return _apart(ours, theirs), _apart(reversed_rows, theirs)


def _apart(some: list[float], others: list[float]) -> float:
    return max(abs(a - b) / b for a, b in zip(some, others, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shapes", default="small,large")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--kinds", default="topk,batch_topk")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    console = Console(width=150)
    console.print(f"{machine_line()}; device {arguments.device}, {torch.get_num_threads()} threads")
    for name in arguments.shapes.split(","):
        shape = shapes(arguments.device)[name]
        table = Table(title=f"SAE training step, {shape.d_in} → {shape.d_sae}, k {shape.k}, {shape.batch} positions")
        for column in ("dtype", "kind", "way", "ms (min – max)", "positions/s", "× dense", "of floor", "peak share"):
            table.add_column(column, justify="left" if column in ("dtype", "kind", "way") else "right", no_wrap=True)
        table.add_column("curve from dense (rounding alone)", justify="right")
        for matmul, kind in itertools.product(arguments.dtypes.split(","), arguments.kinds.split(",")):
            seconds, difference = measure(shape, matmul, kind, arguments.device, arguments.rounds)
            add_rows(table, shape, (matmul, kind, difference), seconds, peak_rate(getattr(torch, matmul), arguments.device))
        console.print(table)


def add_rows(
    table: Table, shape: Shape, case: tuple[str, str, tuple[float, float]], seconds: dict[str, list[float]], peak: float
) -> None:
    matmul, kind, difference = case
    median = {way: statistics.median(found) for way, found in seconds.items()}
    for way, found in seconds.items():
        table.add_row(
            matmul,
            kind,
            way,
            f"{1e3 * median[way]:.1f} ({1e3 * min(found):.1f} – {1e3 * max(found):.1f})",
            f"{shape.batch / median[way]:,.0f}",
            f"{median['dense'] / median[way]:.2f}" if "dense" in median else "",
            f"{median[way] / median['floor']:.2f}",
            f"{2 * shape.batch * shape.d_in * shape.d_sae / median[way] / peak:.0%}",
            f"{difference[0]:.0e} ({difference[1]:.0e})" if way == "ours" and kind == "topk" else "",
        )


if __name__ == "__main__":
    main()
