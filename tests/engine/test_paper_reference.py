"""The engine's `paper` path against the second implementation in tests/helpers/paper_numpy.py."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from safer_engine.artifacts import Activations, Labels, Latents
from safer_engine.science.pair_scoring import paper_pair_scores
from safer_engine.science.positions import SideTokens, sentence_end_mask
from safer_engine.science.sae import Sae
from safer_engine.signal_inputs import paper_features, read_latent_sums
from safer_engine.stages.labels import LabelsStage
from safer_engine.stages.latents import LatentsStage
from tests.helpers import paper_numpy as paper
from tests.helpers.latent_world import LatentWorld, Side, draw_sae, draw_world

N_CANDIDATES, KEEP = 24, 6
PAPER = {
    "preset": "paper",
    "salience": {"candidates": N_CANDIDATES},
    "labels": {"min_rating": 1, "keep": KEEP},
    "contexts": {"minimum": 1},
}


def dictionary(sae: Sae) -> paper.Dictionary:
    W_enc, b_enc, W_dec, b_pre = (w.double().numpy() for w in (sae.W_enc_DS, sae.b_enc_S, sae.W_dec_SD, sae.b_dec_D))
    return paper.Dictionary(W_enc, b_enc, W_dec, b_pre, sae.shape.k)


def at_sentence_ends(side: Side) -> Side:
    """What the activations stage stores under the preset: sentence ends of the whole text, and the head's position."""
    mask = sentence_end_mask(SideTokens(side.text, side.offsets, 0, len(side.tokens)), (0, len(side.tokens)), 5)
    flags = np.where(mask, side.flags | Activations.FLAG_SENTENCE_END, side.flags & ~np.uint8(Activations.FLAG_SENTENCE_END))
    covered = mask.copy()
    covered[-1] = True
    return replace(side, covered=covered, flags=flags.astype(np.uint8))


@pytest.fixture(scope="module", params=[0, 1, 2])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LatentWorld:
    drawn = draw_world(tmp_path_factory.mktemp("world"), seed=request.param, k=20)
    sides = [(at_sentence_ends(chosen), at_sentence_ends(rejected)) for chosen, rejected in drawn.sides]
    folder: Path = tmp_path_factory.mktemp("paper")
    return LatentWorld(folder, sides, drawn.sae, drawn.groups, drawn.axes, drawn.subsets, spec_sections=PAPER)


@pytest.fixture(scope="module")
def latents(world: LatentWorld) -> Latents:
    found = world.run(LatentsStage())
    assert isinstance(found, Latents)
    return found


@pytest.fixture(scope="module")
def z(world: LatentWorld) -> list[tuple[np.ndarray, np.ndarray]]:
    """Activations at the sentence ends of both texts of each pair, by the second implementation."""

    def encoded(side: Side) -> np.ndarray:
        h = side.h[paper.sentence_ends(side.tokens)].astype(np.float64)
        return paper.encode(paper.layer_norm(h), dictionary(world.sae))

    return [(encoded(chosen), encoded(rejected)) for chosen, rejected in world.sides]


def test_sentence_ends_are_the_same(world: LatentWorld) -> None:
    for pair in world.sides:
        for side in pair:
            found = np.flatnonzero(side.flags & Activations.FLAG_SENTENCE_END)
            assert found.tolist() == paper.sentence_ends(side.tokens)


def test_encoding_and_reconstruction_are_the_same(world: LatentWorld) -> None:
    h = np.concatenate([side.h for pair in world.sides[:5] for side in pair])
    x = paper.layer_norm(h.astype(np.float64))
    z, scaled = paper.encode(x, dictionary(world.sae)), world.sae.normalise(torch.from_numpy(h))
    acts = world.sae.encode(torch.from_numpy(h))
    np.testing.assert_allclose(scaled.x_BD.numpy(), x, atol=1e-6)
    np.testing.assert_allclose(acts.dense(world.sae.shape.d_sae).numpy(), z, atol=2e-6)
    assert (z < 0).any()  # negative values are kept in the reconstruction
    x_hat = paper.decode(z, dictionary(world.sae))
    np.testing.assert_allclose(world.sae.decode(acts).numpy(), x_hat, atol=5e-6)
    error = float(((scaled.x_BD - world.sae.decode(acts)).square().sum(1) / scaled.x_BD.square().sum(1)).mean())
    assert error == pytest.approx(paper.nmse(x, x_hat), abs=1e-6)


def test_salience_is_the_same_to_a_millionth(latents: Latents, z: list[tuple[np.ndarray, np.ndarray]]) -> None:
    expected = paper.salience([pair[0] for pair in z], [pair[1] for pair in z])
    table = latents.latents
    np.testing.assert_allclose(table["a_chosen"].to_numpy(), expected.a_chosen, rtol=1e-6)
    np.testing.assert_allclose(table["a_rejected"].to_numpy(), expected.a_rejected, rtol=1e-6)
    for column in ("salience", "salience_paper"):
        np.testing.assert_allclose(table[column].to_numpy(), expected.s, atol=1e-6)


def test_the_same_latents_go_on(latents: Latents, z: list[tuple[np.ndarray, np.ndarray]]) -> None:
    expected = paper.salience([pair[0] for pair in z], [pair[1] for pair in z]).s
    frame = latents.latents.to_pandas()
    ranked = frame[frame.candidate].sort_values("rank").latent_id.tolist()
    assert ranked == paper.most_salient(expected, N_CANDIDATES)


def test_pair_scores_are_the_same_to_a_millionth(
    world: LatentWorld, latents: Latents, z: list[tuple[np.ndarray, np.ndarray]]
) -> None:
    labels = world.run(LabelsStage())
    assert isinstance(labels, Labels)
    s = paper.salience([pair[0] for pair in z], [pair[1] for pair in z]).s
    ratings = dict.fromkeys(paper.most_salient(s, N_CANDIDATES), 5)
    kept = paper.kept_latents(s, ratings, keep=KEEP)
    features = paper_features(latents, labels)
    assert features is not None
    assert sorted(features.latent_ids.tolist()) == sorted(kept)
    found = paper_pair_scores(read_latent_sums(latents), features)
    expected = [paper.pair_score(chosen, rejected, s, kept) for chosen, rejected in z]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.std(expected) > 0.01


def test_length_of_a_response_moves_the_paper_contrast(world: LatentWorld) -> None:
    """A known weakness of sums, shown rather than assumed: the second implementation has it too."""
    sae = dictionary(draw_sae(np.random.default_rng(0), 16, 40, 5))
    h = np.random.default_rng(1).normal(size=(10, 16))
    z = paper.encode(paper.layer_norm(h), sae)
    assert np.abs(paper.salience([np.concatenate([z] * 4)], [z]).s).max() > 0.4
    assert np.abs(paper.salience([z], [z]).s).max() == 0
