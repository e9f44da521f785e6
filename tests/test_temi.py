"""Recipes for fixed features: TEMI, spectral clustering and k-means."""

import math

import numpy as np
import pytest
import torch

from deepcluster.methods.kmeans import Tightest
from deepcluster.methods.spectral import Spectral, placed
from deepcluster.methods.temi import PairInformation, pair_information
from deepcluster.model import Prototypes
from deepcluster.recipe import Clock, Targets, make_recipe

CLOCK = Clock(0, 1)


def logits(*rows):
    return torch.tensor(rows).log()


# --- TEMI ---


def test_pair_information_by_hand():
    p, q, m = logits([0.8, 0.2]), logits([0.6, 0.4]), torch.tensor([0.5, 0.5])
    expected = math.log(0.8 * 0.6 / 0.5 + 0.2 * 0.4 / 0.5)  # ln 1.12
    assert pair_information(p, q, m).item() == pytest.approx(expected, abs=1e-6)
    half = math.log((0.8 * 0.6) ** 0.5 / 0.5 + (0.2 * 0.4) ** 0.5 / 0.5)
    assert pair_information(p, q, m, 0.5).item() == pytest.approx(half, abs=1e-6)


def test_pair_information_of_the_sure_is_what_their_cluster_is_worth():
    sure = torch.tensor([[60.0, 0, 0]])
    assert pair_information(sure, sure, torch.tensor([0.25, 0.5, 0.25])).item() == pytest.approx(math.log(4), abs=1e-5)
    other = torch.tensor([[0, 60.0, 0]])
    assert pair_information(sure, other, torch.full((3,), 1 / 3)).item() < -50


def test_the_loss_by_hand():
    one, other = [[0.9, 0.1], [0.2, 0.8]], [[0.7, 0.3], [0.4, 0.6]]
    taught, taught_other = [[0.8, 0.2], [0.1, 0.9]], [[0.6, 0.4], [0.3, 0.7]]
    m = [(0.8 + 0.1 + 0.6 + 0.3) / 4, (0.2 + 0.9 + 0.4 + 0.7) / 4]
    beta, total = 0.8, 0.0
    for a, b, t, u in zip(one, other, taught, taught_other, strict=True):
        for s, v in ((a, u), (b, t)):
            shared = sum((x * y) ** beta / c for x, y, c in zip(s, v, m, strict=True))
            total -= sum(x * y for x, y in zip(t, u, strict=True)) * math.log(shared) / 2
    given = torch.stack([logits(*rows) for rows in (one, other, taught, taught_other)])
    assert PairInformation(beta)(given, torch.zeros(2), CLOCK).item() == pytest.approx(total / 2, abs=1e-6)


def test_the_teacher_gets_no_gradient():
    given = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    PairInformation()(given, torch.zeros(6), CLOCK).backward()
    assert bool((given.grad[2:] == 0).all())
    assert bool((given.grad[:2] != 0).any())


def test_balanced_and_sure_is_better_than_all_in_one_or_unsure():
    sure = 20 * torch.eye(3).repeat(4, 1)
    alone, unsure = 20 * torch.eye(3)[[0] * 12], torch.zeros(12, 3)
    best, one, none = (PairInformation()(z.expand(4, 12, 3), torch.zeros(12), CLOCK) for z in (sure, alone, unsure))
    assert best < one
    assert best < none


def test_heads_compete_and_share_partners():
    recipe = make_recipe("temi", n_clusters=4, n_heads=3)
    assert recipe.heads == (4, 4, 4)
    assert recipe.rivals == [0, 1, 2]
    assert recipe == make_recipe("temi", n_clusters=4, n_heads=3)


# --- spectral clustering ---


def rings(n=60):
    """Two rings of n, one in the other, which no k-means can tell apart; (2 n, 2)."""
    angle = np.linspace(0, 2 * np.pi, n, endpoint=False)
    circle = np.stack([np.cos(angle), np.sin(angle)], 1)
    return np.concatenate([circle, 3 * circle]).astype(np.float32)


def test_groups_without_a_join_are_placed_at_right_angles():
    near = np.array([[1, 2], [0, 2], [0, 1], [4, 5], [3, 5], [3, 4]])
    found = placed(near, 2, 0)
    cosines = found @ found.T
    expected = np.kron(np.eye(2), np.ones((3, 3)))
    assert np.allclose(cosines, expected, atol=1e-5)


def test_placing_is_that_of_the_full_matrix():
    rng = np.random.default_rng(0)
    near = np.array([rng.choice([j for j in range(40) if j != i], 6, replace=False) for i in range(40)])
    joined = np.zeros((40, 40))
    joined[np.arange(40)[:, None], near] = 1
    joined = (joined + joined.T) / 2
    degree = joined.sum(1)
    vectors = np.linalg.eigh(joined / np.sqrt(degree[:, None] * degree))[1][:, -3:]
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert np.allclose(placed(near, 3, 0) @ placed(near, 3, 0).T, unit @ unit.T, atol=1e-4)


def test_spectral_finds_what_is_joined():
    x = rings()
    lifted = torch.from_numpy(np.concatenate([x, 3 * (x**2).sum(1, keepdims=True) / 9], 1).astype(np.float32))
    head = Prototypes(3, 2)
    found = Spectral(4)(lifted, [head], Targets.unlabelled(1, 120), 0).labels[0].numpy()
    assert len(set(found[:60])) == len(set(found[60:])) == 1
    assert found[0] != found[-1]


def test_fewer_images_than_eigenvectors_is_no_error():
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    labels = Spectral(10)(x, [Prototypes(3, 8)], Targets.unlabelled(1, 5), 0).labels
    assert labels.shape == (1, 5)


# --- k-means ---


def test_kmeans_takes_the_tightest_and_ignores_length():
    rng = torch.Generator().manual_seed(0)
    directions = torch.eye(4)[torch.arange(80) % 4] + 0.05 * torch.randn(80, 4, generator=rng)
    x = directions * (1 + 50 * torch.rand(80, 1, generator=rng))
    labels = Tightest(5)(x, [Prototypes(4, 4)], Targets.unlabelled(1, 80), 0).labels[0]
    assert all(len(labels[i::4].unique()) == 1 for i in range(4))
    assert len(labels.unique()) == 4
