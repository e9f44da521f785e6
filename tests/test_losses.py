"""Losses at their limits, and against numbers computed by hand."""

import math

import pytest
import torch

from deepcluster.losses import (
    balanced_pseudo_label,
    contrastive,
    mutual_information,
    neighbour_consistency,
    pseudo_label,
    swapped_prediction,
)

ONE_HOT = torch.eye(4).repeat(8, 1)
UNIFORM = torch.full((32, 4), 0.25)
P = torch.tensor([[0.8, 0.2], [0.3, 0.7]])
Q = torch.tensor([[0.6, 0.4], [0.1, 0.9]])


def assignments(n, k, seed):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)).softmax(1)


def units(n, d, seed):
    return torch.nn.functional.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


# --- mutual information ---


@pytest.mark.parametrize("k", [2, 3, 10])
def test_mutual_information_of_a_perfect_balanced_clustering_is_log_k(k):
    p = torch.eye(k).repeat(4, 1)
    assert mutual_information(p, p).item() == pytest.approx(-math.log(k), abs=1e-6)


@pytest.mark.parametrize("p", [UNIFORM, torch.eye(4)[:1].repeat(32, 1)], ids=["uniform", "all in one cluster"])
def test_mutual_information_of_a_constant_clustering_is_zero(p):
    assert mutual_information(p, p).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("weight", "loss"), [(1.0, -0.0226162), (1.5, -0.7107550)])
def test_mutual_information_of_two_images_by_hand(weight, loss):
    assert mutual_information(P, Q, marginal_weight=weight).item() == pytest.approx(loss, abs=1e-6)


def test_the_marginal_weight_multiplies_both_entropies():
    p = torch.eye(3).repeat(2, 1)
    assert mutual_information(p, p, marginal_weight=1.5).item() == pytest.approx(math.log(3) * (1 - 3), abs=1e-6)


def test_symmetrising_forgives_a_swap_but_not_a_cycle():
    two, three = torch.eye(2).repeat(3, 1), torch.eye(3).repeat(3, 1)
    assert mutual_information(two, two[:, [1, 0]]).item() == pytest.approx(-math.log(2), abs=1e-6)
    assert mutual_information(three, three[:, [1, 2, 0]]).item() == pytest.approx(-math.log(1.5), abs=1e-6)


def test_mutual_information_ignores_names_of_clusters_views_and_the_order_of_images():
    p, q = assignments(40, 5, seed=0), assignments(40, 5, seed=1)
    loss, names, order = mutual_information(p, q), [3, 1, 4, 0, 2], torch.arange(40).flip(0)
    assert -math.log(5) <= loss <= 0
    torch.testing.assert_close(mutual_information(q, p), loss)
    torch.testing.assert_close(mutual_information(p[:, names], q[:, names]), loss)
    torch.testing.assert_close(mutual_information(p[order], q[order]), loss)


def test_mutual_information_matches_the_sum_over_images_in_float64():
    p, q = assignments(40, 5, seed=0), assignments(40, 5, seed=1)
    joint = sum(torch.outer(a, b) for a, b in zip(p.double(), q.double(), strict=True)) / 40
    joint = (joint + joint.T) / 2
    naive = -sum(
        joint[i, j] * (joint[i, j].log() - joint[i].sum().log() - joint[:, j].sum().log())
        for i in range(5)
        for j in range(5)
    )
    assert mutual_information(p, q).item() == pytest.approx(naive.item(), abs=1e-6)


def test_mutual_information_has_a_finite_gradient_at_a_one_hot_corner():
    p = ONE_HOT.clone().requires_grad_()
    mutual_information(p, ONE_HOT).backward()
    assert p.grad.isfinite().all()
    assert p.grad.abs().max() > 0


# --- every loss in float32 ---


@pytest.mark.parametrize(
    "loss",
    [
        lambda: mutual_information(assignments(64, 5, 0), assignments(64, 5, 1)),
        lambda: contrastive(units(16, 8, 0), units(16, 8, 1)),
        lambda: pseudo_label(assignments(32, 5, 0)[None], torch.arange(32) % 5),
    ],
    ids=["mutual_information", "contrastive", "pseudo_label"],
)
def test_autocast_does_not_reach_the_losses(loss):
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss()
    assert inside.dtype == torch.float32
    assert inside.item() == pytest.approx(loss().item(), abs=1e-6)  # bfloat16 would be off by 1e-3


def test_losses_take_bfloat16_logits():
    p = ONE_HOT.bfloat16()
    assert mutual_information(p, p).item() == pytest.approx(-math.log(4), abs=1e-6)
    exact = pseudo_label(ONE_HOT[None], torch.arange(32) % 4)
    assert pseudo_label(p[None], torch.arange(32) % 4).item() == pytest.approx(exact.item(), abs=1e-6)


# --- pseudo-labels ---


def test_pseudo_label_is_the_mean_cross_entropy_over_views_and_images():
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([4, 0, 2], dtype=torch.int32)
    naive = sum(-logits[v, b].log_softmax(0)[labels[b]] for v in range(2) for b in range(3)) / 6
    torch.testing.assert_close(pseudo_label(logits, labels), naive)


def test_pseudo_label_of_flat_logits_is_log_k():
    assert pseudo_label(torch.zeros(2, 3, 7), torch.tensor([0, 3, 6])).item() == pytest.approx(math.log(7), abs=1e-6)


def test_pseudo_label_ignores_the_unlabelled():
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labelled = pseudo_label(logits[:, :2], torch.tensor([4, 0]))
    torch.testing.assert_close(pseudo_label(logits, torch.tensor([4, 0, -1])), labelled)
    nothing = pseudo_label(logits, torch.full((3,), -1))
    nothing.backward()
    assert nothing == 0
    assert (logits.grad == 0).all()


# --- contrastive ---


def test_contrastive_of_equal_vectors_is_the_log_of_the_number_of_candidates():
    one = torch.tensor([[1.0, 0.0]]).repeat(4, 1)
    assert contrastive(one, one, temperature=0.1).item() == pytest.approx(math.log(7), abs=1e-6)


def test_contrastive_of_orthonormal_pairs():
    basis = torch.eye(4)
    # ln(1 + 6 exp(-10)) in float32: terms near 1e-4 beside 10 keep three digits
    assert contrastive(basis, basis, temperature=0.1).item() == pytest.approx(math.log1p(6 * math.exp(-10)), abs=2e-6)


def test_contrastive_matches_a_double_loop():
    u, v = units(5, 3, 0), units(5, 3, 1)
    z, losses = torch.cat([u, v]).double(), []
    for i in range(10):
        partner = (i + 5) % 10
        others = torch.stack([z[i] @ z[j] / 0.2 for j in range(10) if j != i])
        losses.append(others.logsumexp(0) - z[i] @ z[partner] / 0.2)
    assert contrastive(u, v, temperature=0.2).item() == pytest.approx(sum(losses).item() / 10, abs=1e-6)


# --- swapped prediction, neighbours, self-labels ---


def test_swapped_prediction_matches_a_double_loop():
    z, q = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0)) * 3, assignments(12, 5, 1).view(2, 6, 5)
    pairs = [(a, v) for a in range(2) for v in range(4) if v != a]
    naive = [-q[a, b].double() @ z[v, b].double().log_softmax(0) for a, v in pairs for b in range(6)]
    assert swapped_prediction(z, q).item() == pytest.approx(sum(naive).item() / 36, abs=1e-6)
    assert swapped_prediction(torch.zeros(4, 6, 5), q).item() == pytest.approx(math.log(5), abs=1e-6)


ANCHORS, NEAR = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0]])


@pytest.mark.parametrize(("weight", "loss"), [(0.0, 0.367651), (1.0, 0.367651 - 0.681894), (5.0, -3.041820)])
def test_neighbour_consistency_by_hand(weight, loss):
    assert neighbour_consistency(ANCHORS, NEAR, entropy_weight=weight).item() == pytest.approx(loss, abs=2e-6)


@pytest.mark.parametrize(
    ("z", "loss"),
    [
        (torch.eye(4).repeat(3, 1) * 100, -6.931472),
        (torch.zeros(8, 4), -5.545177),
        (ONE_HOT[:1].repeat(8, 1) * 100, 0.0),
    ],
    ids=["perfect and balanced", "uniform", "all in one cluster"],
)
def test_neighbour_consistency_at_its_limits(z, loss):
    z = z.clone().requires_grad_()
    found = neighbour_consistency(z, z.detach())
    found.backward()
    assert found.item() == pytest.approx(loss, abs=1e-5)
    assert z.grad.isfinite().all()


def test_neighbour_consistency_is_binary_cross_entropy_where_that_is_finite():
    a, b = torch.randn(2, 16, 5, generator=torch.Generator().manual_seed(0)).unbind()
    together = (a.softmax(1) * b.softmax(1)).sum(1).double()
    naive = -together.log().mean().item()
    assert neighbour_consistency(a, b, entropy_weight=0.0).item() == pytest.approx(naive, abs=1e-6)
    swapped = torch.tensor([[100.0, 0.0]]), torch.tensor([[0.0, 100.0]])
    assert neighbour_consistency(*swapped, entropy_weight=0.0).item() == pytest.approx(100 - math.log(2), abs=1e-4)


def test_self_labels_weigh_every_pseudo_class_alike():
    labels, weight = torch.tensor([0, 0, 0, 1]), torch.tensor([4 / 3, 4.0])  # n / count
    z = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        balanced_pseudo_label(z, labels), torch.nn.functional.cross_entropy(z, labels, weight=weight)
    )
    each = -z.log_softmax(1)[range(4), labels]
    torch.testing.assert_close(balanced_pseudo_label(z, labels), (each[:3].mean() + each[3]) / 2)


def test_self_labels_ignore_the_unlabelled():
    z = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.tensor([2, -1, 0, -1, 2], dtype=torch.int32)
    torch.testing.assert_close(balanced_pseudo_label(z, labels), balanced_pseudo_label(z[[0, 2, 4]], labels[[0, 2, 4]]))
    nothing = balanced_pseudo_label(z, torch.full((5,), -1))
    nothing.backward()
    assert nothing == 0
    assert (z.grad == 0).all()
