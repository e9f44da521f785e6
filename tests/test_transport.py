"""Optimal transport against the dense textbook algorithms in float64, and where those break."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from deepcluster.assign import Balanced
from deepcluster.recipe import Targets
from deepcluster.transport import log_scales, sinkhorn

S = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.5]])
P = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.5, 0.4, 0.1]])


def normal(n, k, seed=0, scale=1.0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * scale


def naive_sinkhorn(scores, epsilon, iterations):
    """float64, no logs, unsafe for small epsilon."""
    q = (scores.double() / epsilon).exp()
    for _ in range(iterations):
        q = q / q.sum(0, keepdim=True) * len(q) / q.shape[1]
        q = q / q.sum(1, keepdim=True)
    return q.float()


def naive_sela(z, strength, tolerance=1e-9):
    """The paper's dense algorithm on M = softmax(z) ** strength: float64, an (N, K) array, row and column scalings."""
    m = z.double().softmax(1) ** strength
    n, k = m.shape
    r, c = torch.full((k, 1), 1 / k, dtype=torch.float64), torch.full((n, 1), 1 / n, dtype=torch.float64)
    for _ in range(20_000):
        r = (1 / k) / (m.T @ c)
        new = (1 / n) / (m @ r)
        moved, c = (c / new - 1).abs().max(), new
        if moved < tolerance:
            break
    plan = m * r.T * c
    return plan * n, r[:, 0].log() - r.log().mean()


def scales(z, strength, **options):
    options = {"tolerance": 1e-5, "iterations": 2000} | options
    return log_scales(lambda: [z], strength, torch.zeros(z.shape[1]), **options)


def plan_of(z, strength, scale):
    return (strength * z.double() + scale).softmax(1)


# --- Sinkhorn on a batch (SwAV) ---


def test_sinkhorn_matches_the_textbook_version():
    scores = normal(50, 7)
    torch.testing.assert_close(sinkhorn(scores, epsilon=0.5, iterations=4), naive_sinkhorn(scores, 0.5, 4))


@pytest.mark.parametrize(
    ("iterations", "first", "total"),
    [
        (3, [0.99916, 0.95636, 0.28641, 0.00099], [2.2429, 1.7571]),
        (100, [0.99755, 0.88185, 0.12026, 0.00034], [2.0, 2.0]),
    ],
)
def test_sinkhorn_of_four_images(iterations, first, total):
    q = sinkhorn(S, epsilon=0.05, iterations=iterations)
    torch.testing.assert_close(q[:, 0], torch.tensor(first), atol=1e-5, rtol=0)
    torch.testing.assert_close(q.sum(0), torch.tensor(total), atol=1e-4, rtol=0)
    torch.testing.assert_close(q.sum(1), torch.ones(4), atol=1e-6, rtol=0)


def test_identical_rows_are_shared_equally():
    q = sinkhorn(torch.tensor([[3.0, -1.0, 0.5]]).repeat(6, 1))
    torch.testing.assert_close(q, torch.full((6, 3), 1 / 3), atol=1e-6, rtol=0)


def test_a_constant_added_to_a_row_changes_nothing():
    scores, shift = normal(30, 4), normal(30, 1, seed=1)
    kept = sinkhorn(scores, epsilon=0.5, iterations=200)
    torch.testing.assert_close(sinkhorn(scores + shift, epsilon=0.5, iterations=200), kept, atol=1e-5, rtol=0)


def test_sinkhorn_survives_scores_that_overflow_exp():
    q = sinkhorn(torch.tensor([[100.0, 0.0], [100.0, 1.0]]), epsilon=0.01)
    assert q.argmax(1).tolist() == [0, 1]
    assert sinkhorn(normal(50, 7).half()).dtype == torch.float32


@pytest.mark.parametrize("epsilon", [0, -1.0, math.nan])
def test_epsilon_must_be_positive(epsilon):
    with pytest.raises(ValueError, match=r"epsilon must be > 0; got"):
        sinkhorn(S, epsilon=epsilon)


# --- streaming Sinkhorn on a data set (SeLa) ---


def test_three_images_by_hand():
    scale, _ = scales(P.log(), 2.0)
    plan = plan_of(P.log(), 2.0, scale)
    expected = [[0.476852, 0.158121, 0.365028], [0.327072, 0.332143, 0.340785], [0.196076, 0.509737, 0.294187]]
    torch.testing.assert_close(plan, torch.tensor(expected, dtype=torch.float64), atol=1e-5, rtol=0)
    ratio = (scale - scale[0]).exp().tolist()
    assert ratio == [1, pytest.approx(4.062, abs=1e-3), pytest.approx(37.509, abs=1e-2)]
    assert plan.argmax(1).tolist() == [0, 2, 1]


@pytest.mark.parametrize("strength", [2.0, 10.0, 50.0, 200.0])
def test_the_balanced_labels_of_three_images_do_not_depend_on_strength(strength):
    scale, entropy = scales(P.log(), strength, tolerance=1e-3)
    plan = plan_of(P.log(), strength, scale)
    assert plan.argmax(1).tolist() == [0, 2, 1]
    if strength == 200:  # decided
        assert plan.max(1).values.min() > 0.99
        assert entropy < 0.05


@pytest.mark.parametrize("strength", [1.0, 5.0, 25.0])
def test_labels_and_scales_equal_the_dense_algorithm(strength):
    z = normal(400, 8, scale=0.5)
    dense, log_r = naive_sela(z, strength)
    scale, _ = scales(z, strength)
    # the softmax denominators that the stream leaves out are a part of the row scalings: r is the same
    torch.testing.assert_close(scale, log_r, atol=1e-3, rtol=0)
    plan = plan_of(z, strength, scale)
    torch.testing.assert_close(plan, dense, atol=1e-4, rtol=0)
    assert torch.equal(plan.argmax(1), dense.argmax(1))
    assert (plan.mean(0) * 8 - 1).abs().max() < 1e-4


def test_the_entropy_is_that_of_the_plan():
    z = normal(200, 5)
    scale, entropy = scales(z, 2.0)
    plan = plan_of(z, 2.0, scale)
    assert entropy == pytest.approx(-(plan * plan.log()).sum(1).mean().item(), abs=1e-6)


@pytest.mark.parametrize("spread", [0.001, 0.05, 0.5])
def test_float32_decides_like_float64(spread):
    z = normal(1200, 120, scale=spread)
    scale, _ = scales(z, 25.0, tolerance=0.0, iterations=30)
    plan = plan_of(z, 25.0, scale)  # in float64; one plan only has these masses
    assert (plan.mean(0) * 120 - 1).abs().max() < 1e-4
    same = (25 * z + scale.float()).argmax(1) == plan.argmax(1)
    assert same.float().mean() > 0.999  # ties of float32 aside


def test_three_thousand_clusters_of_a_fresh_network_stay_finite():
    z = normal(500, 3000, scale=0.001)  # softmax ** 25 underflows in float32: the dense code labels everything 0
    assert (z.softmax(1) ** 25).max() == 0
    scale, entropy = scales(z, 25.0, tolerance=0.01, iterations=20)
    assert scale.isfinite().all()
    assert 0 < entropy <= math.log(3000) + 1e-6
    assert len((25 * z + scale.float()).argmax(1).unique()) > 100


def test_the_size_of_the_chunks_does_not_matter():
    z = normal(301, 6)
    whole, _ = scales(z, 5.0, iterations=50, tolerance=0)
    parts, _ = log_scales(lambda: iter(z.split(7)), 5.0, torch.zeros(6), tolerance=0, iterations=50)
    torch.testing.assert_close(whole, parts, atol=1e-5, rtol=0)


def test_shifting_a_row_or_a_column_of_the_logits_changes_no_label():
    z = normal(200, 5)
    labels = plan_of(z, 3.0, scales(z, 3.0)[0]).argmax(1)
    for shifted in (z + normal(200, 1, seed=1), z + normal(1, 5, seed=2)):
        assert torch.equal(plan_of(shifted, 3.0, scales(shifted, 3.0)[0]).argmax(1), labels)


def test_a_prior_gives_clusters_unequal_shares():
    z, prior = normal(600, 3), torch.tensor([0.6, 0.3, 0.1])
    scale, _ = scales(z, 2.0, prior=prior)
    torch.testing.assert_close(plan_of(z, 2.0, scale).mean(0), prior.double(), atol=1e-5, rtol=0)


def test_scales_have_mean_zero_and_a_warm_start_is_done_at_once():
    z, passes = normal(200, 5), []
    scale, _ = scales(z, 3.0)
    assert scale.mean().item() == pytest.approx(0, abs=1e-9)

    def chunks():
        passes.append(1)
        return [z]

    log_scales(chunks, 3.0, scale, tolerance=0.01)
    assert len(passes) == 1


def test_logits_that_are_not_finite_are_reported():
    z = normal(20, 3)
    z[4, 1] = math.nan
    with pytest.raises(FloatingPointError, match="logits are not finite; lower lr"):
        scales(z, 2.0)


# --- a balanced plan is not enough: the labels have to be balanced ---


def flat_head(k, scale, seed=0):
    head = nn.Linear(16, k)
    with torch.no_grad():
        head.weight.copy_(normal(k, 16, seed) * scale)
        head.bias.copy_(normal(k, 1, seed + 1)[:, 0] * scale)
    return head


def previous(n, labelled, heads=1):
    """Heads that have had labels are asked; those that have not start from k-means."""
    return replace(Targets.unlabelled(heads, n), labels=torch.full((heads, n), 0 if labelled else -1).int())


def sizes(assigner, head, n, labelled=True):
    targets = assigner(normal(n, 16, seed=5), [head], previous(n, labelled), seed=0)
    assert targets.labels.shape == (1, n)
    assert targets.labels.dtype == torch.int32
    return torch.bincount(targets.labels[0], minlength=head.out_features)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("scale", [0.001, 0.1, 3.0])
@pytest.mark.parametrize("k", [4, 50])
def test_sizes_of_balanced_labels_are_within_a_factor_of_two(scale, k, labelled):
    counts = sizes(Balanced(), flat_head(k, scale), 1000, labelled)
    assert counts.max() <= 2 * 1000 / k
    assert counts.min() >= 1000 / k / 2


def test_the_strength_of_the_paper_does_not_balance_the_labels_of_a_flat_head():
    counts = sizes(Balanced(strength=25), flat_head(20, 0.001), 1000)
    assert counts.min() < 25 or counts.max() > 100  # why Balanced looks for a strength


def test_a_head_that_has_had_labels_keeps_to_its_own_predictions():
    head, x = flat_head(4, 3.0), normal(400, 16, seed=5)
    labels = Balanced()(x, [head], previous(400, labelled=True), seed=0).labels[0]
    assert (labels == head(x).argmax(1)).float().mean() > 0.7  # the rest is moved for balance
    anew = Balanced()(x, [head], previous(400, labelled=False), seed=0).labels[0]
    assert (anew == head(x).argmax(1)).float().mean() < 0.5


def test_heads_without_labels_start_from_different_clusterings():
    heads, x = [flat_head(4, 0.1), flat_head(4, 0.1)], normal(400, 16, seed=5)
    first, second = Balanced()(x, heads, previous(400, labelled=False, heads=2), seed=0).labels
    assert not torch.equal(first, second)


@pytest.mark.parametrize("labelled", [False, True])
def test_logits_computed_in_chunks_give_the_same_labels(monkeypatch, labelled):
    head, x = flat_head(4, 0.1), normal(300, 16)
    whole = Balanced()(x, [head], previous(300, labelled), seed=0)
    monkeypatch.setattr("deepcluster.assign.CHUNK", 4 * 17)
    parts = Balanced()(x, [head], previous(300, labelled), seed=0)
    assert (whole.labels == parts.labels).float().mean() > 0.99
