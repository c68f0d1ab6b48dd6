"""The values that flow between stages: typed views on committed payload files.

Each class documents the payload of its artifact: that is the contract between the stage that writes it and the
stages that read it. Tables are Arrow IPC files, read memory-mapped, so a view costs no memory until it is used.
Rows of `Activations`, `Latents` and `PairScores` refer to `PairSet.pairs` by `pair`, its row index, and carry
`pair_id` where they leave the engine; nothing is joined by order.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safer_engine import position_flags
from safer_engine.store import StoredArtifact

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Absent:
    """A stage that was switched off or could not run, and why.

    Attributes:
        digest: content digest of the committed absence; empty until it is committed.
    """

    reason: str
    digest: str = ""


class Artifact:
    """Base view of a committed artifact."""

    def __init__(self, stored: StoredArtifact) -> None:
        self.stored = stored

    @property
    def meta(self) -> dict[str, Any]:
        """Small facts, as JSON values."""
        return self.stored.manifest.meta

    def has(self, name: str) -> bool:
        """Whether the payload has a file of this name."""
        return name in self.stored.manifest.files

    def path(self, name: str) -> Path:
        """A verified payload file."""
        return self.stored.path(name)

    def table(self, name: str) -> pa.Table:
        """An Arrow IPC payload file, memory-mapped."""
        import pyarrow as pa

        with pa.memory_map(str(self.path(name))) as source:
            return pa.ipc.open_file(source).read_all()

    def json(self, name: str) -> Any:
        """A JSON payload file."""
        return json.loads(self.path(name).read_bytes())

    def names(self, prefix: str) -> list[str]:
        """Payload files whose name begins with `prefix`, sorted."""
        return sorted(name for name in self.stored.manifest.files if name.startswith(prefix))


class PairSet(Artifact):
    """Canonical, tokenised preference pairs.

    `pairs.arrow`, one row per usable pair (its row index is `pair` elsewhere):
        pair_id string; row int64 (index of the input row, from 0); content_digest, group, axis, subset string;
        style string?; item string? (best-of-N item: rows of one item share the chosen response);
        strength float64? (size of the preference); annotators list<int8>? (individual preferences, + chosen);
        both_orders bool (the same two texts also occur the other way round);
        prompt, chosen, rejected string: what a person reads (prompt as role-marked text);
        and for each side s in (chosen, rejected): s_text string (the exact text the RM reads), s_ids list<int32>,
        s_offsets list<int32> (start, end characters in s_text of each token, flattened), s_special list<bool>?,
        s_start, s_end int32 (response tokens: ids[s_start:s_end], the end-of-turn token included).
    `rows.arrow`: every input row in order: row, pair_id, content_digest, group, axis, subset, status (scored |
        not_scored), reason string?.
    `prompts.arrow`: key binary(16), sorted: what stands for each prompt of the input in comparisons
        (`science.pairs.prompt_keys`), pairs that were not sampled or not usable included.
    `health.json`: {dataset: {n_in, n_kept, dropped: {reason: n}, …}}.
    meta: n_pairs, n_groups, tokens, axes {axis: n}, subsets {subset: n}, layout (of the rows), template (chat | plain),
        max_length (tokens, as it was applied).
    """

    @cached_property
    def pairs(self) -> pa.Table:
        """Usable pairs."""
        return self.table("pairs.arrow")

    @cached_property
    def prompt_keys(self) -> frozenset[bytes]:
        """Keys of all prompts of the input: evaluation pairs with one of them are left out."""
        return frozenset(self.table("prompts.arrow")["key"].to_pylist())

    @cached_property
    def rows(self) -> pa.Table:
        """Every input row with its status."""
        return self.table("rows.arrow")

    @cached_property
    def health(self) -> dict[str, Any]:
        """Counts of what was read, kept and dropped."""
        return dict(self.json("health.json"))


class Activations(Artifact):
    """Rewards, and the residual stream at the hook.

    `rewards.arrow`: pair int32, pair_id string, reward_chosen, reward_rejected float64.
    `head.safetensors`: chosen, rejected [P, D] float32: the vector the head reads, after the last block and norm.
    `shard-NNNNN.safetensors`, pairs in order, within a pair chosen before rejected, positions ascending:
        x [B, D] (resolved dtype), pair [B] int32, side [B] uint8 (0 chosen, 1 rejected), position [B] int32 (token
        index), flags [B] uint8 (sum of `FLAG_*`).
    `residual-NNNNN.safetensors` for the `causal.pairs` pairs: h [ΣT, D] all tokens of each sequence one after
        another, pair [n] int32, side [n] uint8, length [n] int32, covered [ΣT] uint8 (1: the position is in a shard).
    meta: d_in, n_blocks, hook_layer, hook_name, dtype, attention, n_positions, flags {name: n}, norm_median,
        reward_model {…}, invariance {…} (how rewards move with batching), partial_forward_drift (where residuals are kept:
        largest change of a reward when only the upper blocks are run on them). Held-out groups: see `held_out_groups`.
    """

    FLAG_SPECIAL = position_flags.SPECIAL
    FLAG_HIGH_NORM = position_flags.HIGH_NORM
    FLAG_HEAD = position_flags.HEAD
    FLAG_SENTENCE_END = position_flags.SENTENCE_END

    @cached_property
    def rewards(self) -> pa.Table:
        """Rewards of the pairs."""
        return self.table("rewards.arrow")


class EvaluationSet(Artifact):
    """Pairs that only measure, tokenised as the audited ones are, and their rewards. Absent without a usable pair.

    `eval.arrow`: the columns of `PairSet`'s `pairs.arrow`; pairs whose prompt is in the dataset under audit are left out.
    `eval_rewards.arrow`: pair int32 (row index in `eval.arrow`), pair_id string, reward_chosen, reward_rejected float64.
    `health.json`: {n_in, n_kept, dropped: {reason: n}, …}.
    meta: n_pairs, n_groups, tokens, axes {axis: n}, subsets {subset: n}, layout, min_pairs (the least that were asked
        for), too_few bool (there are fewer).
    """

    @cached_property
    def pairs(self) -> pa.Table:
        """Usable evaluation pairs."""
        return self.table("eval.arrow")

    @cached_property
    def rewards(self) -> pa.Table:
        """Their rewards."""
        return self.table("eval_rewards.arrow")

    @cached_property
    def health(self) -> dict[str, Any]:
        """Counts of what was read, kept and dropped."""
        return dict(self.json("health.json"))


class SparseAutoencoder(Artifact):
    """A trained SAE.

    `sae.safetensors`: W_enc [D, S], b_enc [S], W_dec [S, D], b_dec [D] float32, threshold [] (batch_topk only).
    `sae.json`: kind, d_in, d_sae, k, relu, normalisation {kind, scale, eps}.
    `metrics.json`: fvu, nmse, l0, dead_share, n_positions (held out), density [S] list, recovered {covered, all}
        or null with `recovered_reason`, interpretable bool.
    `curve.arrow`: step, positions, loss, aux_loss, dead_share, lr.
    meta: the scalars of metrics.json.
    """


class SecondAutoencoder(SparseAutoencoder):
    """An SAE of the same activations from another seed: files and meta of `SparseAutoencoder`, without `recovered`."""


class Stability(Artifact):
    """What of the first SAE the second has too.

    `stability.arrow`, discoveries and candidates: latent_id, match_id int32 (the second SAE's latent of nearest decoder
        direction), match_cosine, found_again bool? (the cosine is at least `min_cosine`, and the match a discovery of the same
        axis and sign; null where the latent is no discovery).
    meta: min_cosine, n_discoveries, n_matched, n_found_again, found_again_share?, by_chance_share? (were matches drawn at
        random among tested latents), mean_cosine? (discoveries), mean_cosine_tested?, random_mean_cosine, random_matched_share
        (random directions, spread as the second SAE's), n_second_discoveries, second_sae {fvu, l0, dead_share}.
    """

    @cached_property
    def matches(self) -> pa.Table:
        """Discoveries and candidates."""
        return self.table("stability.arrow")


class Latents(Artifact):
    """Activations of all latents, their salience and the candidates' contexts.

    `acts.safetensors`: for each side s: s_indptr int64 [P+1], s_indices int32 [nnz] (ascending within a row), s_sums
        float32 [nnz] (sum of positive activations over the response's counted positions); n_positions int32 [P, 2]
        (counted positions: those covered, less outliers; see `science.latent_acts.counted_positions`).
    `latents.arrow`, one row per latent: latent_id, firing_rate, responses (n with any firing), energy (Σ z²), a_chosen,
        a_rejected, salience, salience_lo, salience_hi, t, salience_paper, axis string? (the axis the salience is of;
        null: all pairs), candidate bool, rank int32? (from 1: discoveries of an axis first, then by absolute salience in the half
        of the groups that chooses; null: not ranked). lo, hi, t null where not to be estimated. Tests, within that half and axis,
        null where not tested: salience_selection (in that half), p, q, q_by, p_max_t, n_active int32 (its groups whose sides
        differ), discovery bool?, replicated bool? (discoveries only). The other figures are of the other half; `paper`: of all
        pairs, not tested. Candidates: salience_equal_length, equal_length_lo, _hi, _t, length_bound, p_mixed, mixed.
    `axes.arrow`, `subsets.arrow`, `clusters.arrow`: latent_id, axis, (subset or cluster int32,) n_groups, salience,
        salience_lo, salience_hi, t: for the candidates (by cluster of prompts: within their own axis).
    `contexts.arrow`, each from another group: latent_id, rank (from 1), pair_id, side string, position, activation, tokens
        list<string> (joined they are the exact text), activations list<float32?> (of each token; null where it is not
        counted), focus int32 (index of the focus in tokens).
    `background.arrow`: pair_id, side, position, tokens, focus: windows at random positions, to compare contexts with.
    `checks.arrow`: latent_id, match int32, activation?, pair_id, side, position, tokens, focus: held-out windows of the
        candidates, two for each match: one in which the latent fires, and one, activation null, of the same subset and side
        in which it does not.
    meta: estimator, n_latents, n_never_fired, n_ranked, n_candidates, n_groups, n_pairs_left_out, totals, tests {fdr,
        n_tests, n_tested, n_draws, smallest_p, n_discoveries, n_discoveries_by, n_discoveries_max_t, n_replicated,
        replicated_share} or null, clusters [{cluster, n_groups, terms}].
    """

    @cached_property
    def latents(self) -> pa.Table:
        """All latents."""
        return self.table("latents.arrow")


class Labels(Artifact):
    """What the candidates are about.

    `labels.arrow`, one row per candidate: latent_id, status (labelled | unverified | unparsed | too_few_contexts | error |
        skipped), rating int8? (1–5), explanation string, direction string?, terms list<string>, labeller string,
        safety_feature bool, rank int32? (from 1, among safety features), detection? with detection_lo, detection_hi,
        detection_recall, detection_specificity, detection_n (windows judged) and detection_problem? (why there is none, or why
        some were not judged), rating_again?, status_again? (of a second reading), corrected_by string?.
    meta: rubric, labeller, counts {status: n}, ratings {rating: n}, calls, cost (in the currency of the prices given), spent
        {labels | detection | repeats: {calls, cost}}, n_safety_features, min_rating (least rating of a safety feature),
        detection_floor?, agreement? {kappa, lo, hi, same, n}, no_agreement? (why not), n_again, n_again_unrated, n_corrected,
        n_corrections_of_others, n_corrections_not_candidates.
    """

    @cached_property
    def labels(self) -> pa.Table:
        """Labels of the candidates."""
        return self.table("labels.arrow")


class CausalEffects(Artifact):
    """Change of reward and margin when a latent is ablated, over the pairs whose residual streams were kept.

    `effects.arrow`, one row per ablated latent and axis: latent_id, role (safety | salience | attribution | control), axis
        string? (null: all pairs), n_pairs, n_groups, n_fired, n_groups_fired (pairs, groups in which it fires on a side), and
        for each m in (margin, chosen, rejected): m, m_lo, m_hi (mean change under zero-ablation); mean_margin, mean_margin_lo,
        mean_margin_hi, n_mean (mean-ablation, over the pairs it was run on); attribution (mean first-order change of the
        margin, all pairs); p, p_adjusted (against controls, all pairs); verified (yes | no | not measured); intervals and p
        null where none.
    `attribution.arrow`, one row per latent: latent_id, attribution, rank (from 1, by size).
    `sets.arrow`: set (safety | control-N), n_latents, axis string?, subset string?, n_pairs, n_groups, accuracy, ablated
        (pair accuracy), change, change_lo, change_hi, margin, margin_lo, margin_hi (its mean change).
    meta: n_pairs, n_features, n_controls, runs, margin {mean, sd} (of the kept pairs, as they are), agreement {rho, slope, n},
        null {pooled, distinct, reason}, correlation (of absolute salience with absolute effect; {rho, lo, hi, n} or null),
        verified {status: n}.
    """

    @cached_property
    def effects(self) -> pa.Table:
        """Effects of the ablated latents."""
        return self.table("effects.arrow")


class RetrainedMargins(Artifact):
    """Margins of reward models that were trained without the pair and its group.

    `retrained.arrow`, one row per pair: pair int32, pair_id string, fold int32, margin float64? (r(chosen) − r(rejected) by the
        model that did not see its fold; null: that model cannot read the pair).
    meta: folds, n_pairs, n_unread (pairs without a margin), steps and tokens (of all trainings together), accuracy, accuracy_lo,
        accuracy_hi (share of margins above 0, with its interval over groups), base {architecture, n_parameters, fresh_head}.
    """

    @cached_property
    def margins(self) -> pa.Table:
        """Margins of all pairs."""
        return self.table("retrained.arrow")


class PairScores(Artifact):
    """Evidence about each pair.

    `pair_scores.arrow`, one row per pair: pair int32, pair_id, group, axis, subset, reward_margin, pair_score (the paper's),
        suspicion (0–1, higher = more doubtful), suspicion_kind (of its axis), suspicion_base float64? (share of wrong labels
        that a probability starts from), status (suspicious | contested | null), disputed_by list<string> (why the label is open
        to dispute, suspicious or not: `science.contested`), signal_<name> float64 per fused signal (higher = more doubtful),
        evidence list<struct<latent_id int32, contribution float64>> (positive = speaks for the label).
    meta: estimator, signals {name: {weight, used}}, left_out {signal or signal@axis: reason}, folds {axis: n}, n_pairs,
        n_without_suspicion, doubts {axis: {kind, reason, share, lo, hi, reach, cells {subset: {share, slope, n_pairs}}}}
        (`science.suspicion.AxisDoubt`), decisions {n, n_open, n_unknown, axes {axis: `science.recalibration.AxisDecisions`}},
        standing {axis: {suspicious, contested, reasons {reason: n}}}.
    """

    @cached_property
    def scores(self) -> pa.Table:
        """Scores of all pairs."""
        return self.table("pair_scores.arrow")


class Edits(Artifact):
    """What is recommended for every input row.

    `edits.jsonl`: one line per input row, in order (fields in docs/formats.md).
    meta: n_rows, actions {action: n}, statuses {status: n}, axes {axis: {action: n}}; budget, allow_flip.
    """


class Verification(Artifact):
    """Retraining arms and their effects.

    `arms.arrow`, a row for each arm, seed and evaluation pair: arm, seed int32, pair_id, chosen, rejected (rewards).
    `measured.arrow`, one row per evaluation pair: pair_id, group, axis, subset.
    meta: outcome, harmed [axis/subset], level, p_benefit {reference: p}, p_harm {axis/subset: p}, decided (`science.outcomes`),
        seeds, planned, edited_axes, edits {drop, flip}, steps (of each training), pairs {arm: n}, tokens, base, n_evaluated,
        accuracy [{arm, axis?, subset?, accuracy, by_seed}], effects [{arm, reference, axis?, subset?,
        `science.crossed.Difference`}].
    """


class Report(Artifact):
    """`report.json`, `report.html`, `report.md`, `evaluation.jsonl`, `features.parquet`, `pair_scores.parquet`."""


ABSENT = "Absent"
"""Artifact type name in the manifest of a stage that yielded `Absent`; its meta is {"reason": …}."""


def view(kind: type[Artifact], stored: StoredArtifact) -> Artifact | Absent:
    """A committed artifact as its type, or as Absent."""
    if stored.manifest.artifact == ABSENT:
        return Absent(str(stored.manifest.meta["reason"]), stored.manifest.content_digest)
    return kind(stored)
