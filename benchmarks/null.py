"""Whether discoveries survive a null: labels permuted by group, features planted, and how long the tests take.

    python -m benchmarks.null [--runs 40] [--store STORE] [--groups 1500] [--latents 1024] [--draws 8192]
    python -m benchmarks.null --scale [--pairs 100000] [--latents 16384] [--axes 2]

The latents are those of an audit's store where one is given (its newest `latents` artifact with its pairs), else generated: rare
and frequent ones, heavy tails, groups of several pairs, and factors that blocks of 16 latents share. In every run the labels of
whole groups are swapped by a coin, and the latents stage's own tests are made on its own half of the groups.

Null: runs with any discovery, with the exact one-sided binomial test against 5 % (rejected at 0.01: a failure, exit code 1);
P(p ≤ α) over all tests, with its standard error over runs (above α + 2 SE: a failure).
Planted: the chosen side of 5 % of the latents is multiplied, of single ones and, in generated latents, of whole blocks that fire
together; power is the share of them found, with its sign from the other half.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy import sparse
from scipy.stats import binomtest

from benchmarks.machine_line import machine_line
from safer_engine.latent_files import open_acts
from safer_engine.latent_tests import Halved, halve, selection_half
from safer_engine.science.latent_acts import ResponseActs, SideActs
from safer_engine.science.salience import eligible_latents
from safer_engine.science.sign_flips import FlipSettings
from safer_engine.spec import SalienceSpec

CLOCK = time.perf_counter
ALPHAS = (0.01, 0.05, 0.1)
PLANTED_SHARE = 0.05
FACTORS = (1.5, 2.0, 3.0, 5.0)
BLOCK = 16

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Data:
    """Latents of pairs, the groups and axes of these, and which latents may be tested."""

    acts: ResponseActs
    groups_P: Ints
    axes_P: NDArray[Any]
    eligible_S: NDArray[np.bool_]


def generated(groups: int, d_sae: int, seed: int) -> Data:
    """Sums over responses of 1 to 60 positions: gamma amplitudes where a latent fires, firing in bursts that a block shares."""
    rng = np.random.default_rng(seed)
    groups_P = np.repeat(np.arange(groups), rng.integers(1, 4, groups))
    n_pairs = len(groups_P)
    positions = rng.integers(1, 61, (n_pairs, 2))
    rates = 10 ** rng.uniform(-2.5, -0.3, d_sae)
    prompts = rng.gamma(0.5, 2.0, (groups, -(-d_sae // BLOCK)))
    sides = []
    for side in range(2):
        shared = rng.gamma(0.5, 2.0, (n_pairs, prompts.shape[1])) * prompts[groups_P]
        fires = rng.random((n_pairs, d_sae)) < np.clip(rates * np.repeat(shared, BLOCK, axis=1)[:, :d_sae], 0, 0.95)
        values = rng.lognormal(0, 1, fires.sum()) * np.repeat(positions[:, side] * 0.3, fires.sum(axis=1))
        rows = np.concatenate([[0], np.cumsum(fires.sum(axis=1))]).astype(np.int64)
        sides.append(SideActs(rows, np.nonzero(fires)[1].astype(np.int32), values.astype(np.float32)))
    acts = ResponseActs(sides[0], sides[1], positions.astype(np.int32), d_sae)
    axes_P = np.where(groups_P % 3 == 0, "chat", "safety")
    return Data(acts, groups_P, axes_P, np.ones(d_sae, dtype=np.bool_))


def stored(root: Path) -> Data:
    """The newest latents of an audit's store, and the pairs they are of."""
    latents = _newest(root, "latents")
    acts = _blob(root, latents, "acts.safetensors")
    table, pairs = _arrow(_blob(root, latents, "latents.arrow")), _arrow(_blob(root, _newest(root, "pairs"), "pairs.arrow"))
    opened = open_acts(acts, table.num_rows)
    groups = np.unique(np.asarray(pairs["group"].to_pylist(), dtype=np.str_), return_inverse=True)[1].astype(np.int64)
    spec, positions = SalienceSpec(), int(np.asarray(opened.n_positions_P2).sum())
    firings = np.round(table["firing_rate"].to_numpy() * positions).astype(np.int64)
    eligible = eligible_latents(firings, positions, spec.min_rate, spec.max_rate)
    return Data(opened, groups, np.asarray(pairs["axis"].to_pylist(), dtype=np.str_), eligible)


def _newest(root: Path, stage: str) -> dict[str, Any]:
    found = sorted((root / "manifests").glob(f"*/{stage}/*"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise SystemExit(f"{root} holds no {stage}")
    manifest: dict[str, Any] = json.loads(found[-1].read_bytes())
    return manifest


def _blob(root: Path, manifest: dict[str, Any], name: str) -> Path:
    digest = str(manifest["files"][name]["digest"]).removeprefix("sha256:")
    return root / "blobs" / digest[:2] / digest


def _arrow(path: Path) -> Any:
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all()


def swapped(data: Data, rng: np.random.Generator, factor_S: NDArray[np.float64] | None = None) -> Data:
    """Labels of whole groups swapped by a coin; then the chosen side of each latent multiplied by its factor."""
    acts, n = data.acts, len(data.groups_P)
    swap_P = (rng.random(int(data.groups_P.max()) + 1) < 0.5)[data.groups_P]
    both = sparse.vstack([sparse.csr_array((s.sums, s.indices, s.indptr), shape=(n, acts.d_sae)) for s in sides_of(acts)], "csr")
    rows = [np.arange(n) + n * swap_P, np.arange(n) + n * ~swap_P]
    chosen, rejected = both[rows[0]], both[rows[1]]
    if factor_S is not None:
        chosen.data = (chosen.data * factor_S[chosen.indices]).astype(np.float32)
    positions = np.where(swap_P[:, None], acts.n_positions_P2[:, ::-1], acts.n_positions_P2)
    parts = [SideActs(one.indptr.astype(np.int64), one.indices, one.data) for one in (chosen, rejected)]
    return Data(ResponseActs(parts[0], parts[1], positions, acts.d_sae), data.groups_P, data.axes_P, data.eligible_S)


def sides_of(acts: ResponseActs) -> tuple[SideActs, SideActs]:
    return acts.chosen, acts.rejected


def tested(data: Data, seed: int, draws: int) -> Halved:
    """The stage's tests; what the seed changes is the halves and the flips."""
    half_P = selection_half([str(group) for group in data.groups_P.tolist()], seed)
    found = halve(data.acts, data.groups_P, data.axes_P, half_P, data.eligible_S, FlipSettings(0.05, draws, seed))
    if found is None:
        raise SystemExit("too few pairs to test anything")
    return found


def null_rows(data: Data, runs: int, draws: int, console: Console) -> bool:
    """Calibration under permuted labels; whether it holds."""
    shares, discoveries, any_max_t, any_by, sparse_shares = [], [], [], [], []
    for run in range(runs):
        scopes = tested(swapped(data, np.random.default_rng([run, 1])), run, draws).tests.scopes
        p = np.concatenate([one.p_S[one.tested_S] for one in scopes])
        few = np.concatenate([one.n_active_S[one.tested_S] for one in scopes]) < 30
        shares.append([(p <= alpha).mean() for alpha in ALPHAS])
        sparse_shares.append([(p[few] <= alpha).mean() if few.any() else np.nan for alpha in ALPHAS])
        discoveries.append(any((one.q_S <= 0.05).any() for one in scopes))
        any_by.append(any((one.q_by_S <= 0.05).any() for one in scopes))
        any_max_t.append(any((one.p_max_t_S <= 0.05).any() for one in scopes))
    table = Table("null", "value", "SE over runs", "holds", title=f"{runs} runs, {len(p)} tests each, labels permuted by group")
    holds = True
    for name, found, required in (("all", shares, True), ("< 30 active groups", sparse_shares, False)):
        for column, alpha in enumerate(ALPHAS):
            values = np.asarray(found)[:, column]
            mean, se = float(values.mean()), float(values.std(ddof=1) / np.sqrt(runs))
            good = mean <= alpha + 2 * se
            holds &= good or not required
            table.add_row(f"P(p ≤ {alpha}), {name}", f"{mean:.4f}", f"{se:.4f}", "yes" if good else "no")
    for name, hits, required in (("BH", discoveries, True), ("BY", any_by, False), ("max-T", any_max_t, False)):
        n = int(sum(hits))
        p_value = float(binomtest(n, runs, 0.05, "greater").pvalue)
        holds &= p_value > 0.01 or not required
        table.add_row(
            f"runs with any discovery, {name}", f"{n} of {runs}", f"p = {p_value:.3f}", "yes" if p_value > 0.01 else "no"
        )
    console.print(table)
    return holds


def planted_latents(d_sae: int, rng: np.random.Generator, *, blocks: bool) -> NDArray[np.bool_]:
    """Which latents are multiplied: each by itself, or whole blocks that fire together (see `generated`), one at least."""
    if not blocks:
        return rng.random(d_sae) < PLANTED_SHARE
    n = -(-d_sae // BLOCK)
    chosen_B = np.isin(np.arange(n), rng.choice(n, max(1, round(n * PLANTED_SHARE)), replace=False))
    return np.repeat(chosen_B, BLOCK)[:d_sae]


def power_rows(data: Data, runs: int, draws: int, console: Console, *, blocks: bool) -> None:
    """Planted features: power, sign, and the share of false discoveries."""
    title = "planted in whole correlated blocks" if blocks else "planted one by one"
    table = Table("chosen side ×", "planted and tested", "found", "sign right", "found by max-T", "false share", title=title)
    for factor in FACTORS:
        planted = found = right = by_max_t = 0
        false: list[float] = []
        powers: list[float] = []
        for run in range(runs):
            rng = np.random.default_rng([run, 2])
            chosen_S = planted_latents(data.acts.d_sae, rng, blocks=blocks)
            halved = tested(swapped(data, rng, np.where(chosen_S, factor, 1.0)), run, draws)
            n_false = n_found = 0
            found_before, planted_before = found, planted
            for one, shown in zip(halved.tests.scopes, halved.estimated, strict=True):
                hits = one.q_S <= 0.05
                planted += int((one.tested_S & chosen_S).sum())
                found += int((hits & chosen_S).sum())
                right += int((hits & chosen_S & (shown.salience.salience_S > 0)).sum())
                by_max_t += int(((one.p_max_t_S <= 0.05) & chosen_S).sum())
                n_false, n_found = n_false + int((hits & ~chosen_S).sum()), n_found + int(hits.sum())
            powers.append((found - found_before) / max(1, planted - planted_before))
            false.append(n_false / max(1, n_found))
        sign = f"{right / found:.3f}" if found else "–"
        table.add_row(
            str(factor), str(planted), f"{found / planted:.3f} ± {_se(powers):.3f}", sign, f"{by_max_t / planted:.3f}",
            f"{np.mean(false):.4f} ± {_se(false):.4f}",
        )  # fmt: skip
    console.print(table)


def _se(values: list[float]) -> float:
    """Standard error of a mean over runs; 0 of one run."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def scale(n_pairs: int, d_sae: int, axes: int, draws: int, console: Console) -> None:
    """Seconds and peak memory of the tests on generated latents, about 200 of which fire in a response."""
    rng = np.random.default_rng(0)
    rates = rng.pareto(1.2, d_sae) + 0.05
    cumulative = np.cumsum(rates / rates.sum())
    sides = []
    for _ in range(2):
        rows = []
        for start in range(0, n_pairs, 4096):
            n = min(4096, n_pairs - start)
            drawn = np.searchsorted(cumulative, rng.random((n, 260)))
            rows.append([np.unique(row) for row in np.minimum(drawn, d_sae - 1)])
        flat = [one for part in rows for one in part]
        indptr = np.concatenate([[0], np.cumsum([len(one) for one in flat])]).astype(np.int64)
        indices = np.concatenate(flat).astype(np.int32)
        sides.append(SideActs(indptr, indices, rng.gamma(2, 3, len(indices)).astype(np.float32)))
    acts = ResponseActs(sides[0], sides[1], rng.integers(20, 200, (n_pairs, 2)).astype(np.int32), d_sae)
    axes_P = np.array([f"axis-{i}" for i in range(axes)], dtype=np.str_)[np.arange(n_pairs) % axes]
    data = Data(acts, np.arange(n_pairs), axes_P, np.ones(d_sae, dtype=np.bool_))
    before, begun, cpu_begun = _peak(), CLOCK(), time.process_time()
    found = tested(data, 0, draws)
    seconds, cpu = CLOCK() - begun, time.process_time() - cpu_begun
    table = Table(
        "pairs", "latents", "non-zero sums", "tests", "flips", "smallest p", "CPU time", "time", "memory, data", "memory, peak"
    )
    nnz = len(sides[0].indices) + len(sides[1].indices)
    t = found.tests
    table.add_row(f"{n_pairs:,}", f"{d_sae:,}", f"{nnz:,}", f"{t.n_tests:,}", str(t.n_draws), f"{t.smallest_p:.1e}",
                  f"{cpu:.0f} s", f"{seconds:.0f} s", f"{before / 1e9:.2f} GB", f"{_peak() / 1e9:.2f} GB")  # fmt: skip
    console.print(table)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(arguments: list[str] | None = None) -> int:
    """The benchmark's command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--power-runs", type=int, default=5)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--groups", type=int, default=1500)
    parser.add_argument("--latents", type=int)
    parser.add_argument("--draws", type=int, default=8192)
    parser.add_argument("--scale", action="store_true")
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--axes", type=int, default=2)
    given = parser.parse_args(arguments)
    console = Console(width=130)
    console.print(machine_line())
    if given.scale:
        scale(given.pairs, given.latents or 16_384, given.axes, given.draws, console)
        return 0
    data = stored(given.store) if given.store else generated(given.groups, given.latents or 1024, 0)
    holds = null_rows(data, given.runs, given.draws, console)
    if given.power_runs:
        power_rows(data, given.power_runs, given.draws, console, blocks=False)
        if not given.store:
            power_rows(data, given.power_runs, given.draws, console, blocks=True)
    console.print("calibrated" if holds else "NOT calibrated")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
