"""Assigners: features in, targets out; and what happens to the heads."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from deepcluster import transport
from deepcluster.assign import Aligned, KMeans, centroid_heads, whiten
from deepcluster.model import Projector, Prototypes
from deepcluster.recipe import Targets, keep_heads, keep_targets, reset_heads


def normal(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def blobs(n, k, d, seed=0, noise=0.01):
    return torch.eye(d)[torch.arange(n) % k] + normal(n, d, seed) * noise


def targets_of(*labels):
    labels = torch.tensor(labels, dtype=torch.int32)
    return replace(Targets.unlabelled(*labels.shape), labels=labels)


@dataclass(frozen=True)
class Fixed:
    """An assigner that always says the same."""

    labels: torch.Tensor

    def __call__(self, features, heads, previous, seed):
        return replace(previous, labels=self.labels)


# --- whitening ---


def test_whitened_features_have_unit_covariance_before_they_are_scaled(monkeypatch):
    x = normal(2000, 6) @ normal(6, 6, seed=1) + 5
    monkeypatch.setattr("deepcluster.assign.F.normalize", lambda x, dim: x)
    y = whiten(x, 6)
    torch.testing.assert_close(y.mean(0), torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(y.T @ y / len(y), torch.eye(6), atol=1e-3, rtol=0)


def test_whitened_rows_have_unit_length_in_the_largest_directions():
    x = normal(500, 6) * torch.tensor([1e-2, 5, 1, 1e-2, 9, 1e-2])
    y = whiten(x, 3)
    assert y.shape == (500, 3)
    torch.testing.assert_close(y.norm(dim=1), torch.ones(500))
    # each kept direction is one of the three large ones: nothing is left of y once they are taken out
    kept = torch.linalg.lstsq(x[:, [1, 2, 4]], whiten(x[:, [1, 2, 4]], 3)).solution
    assert (torch.linalg.svdvals(y.T @ torch.nn.functional.normalize(x[:, [1, 2, 4]] @ kept, dim=1)) > 100).all()


def test_whitening_drops_the_directions_that_do_not_exist():
    low = normal(300, 3)
    dead = torch.cat([low, low @ normal(3, 4, seed=1), torch.zeros(300, 5), torch.ones(300, 1)], 1)
    y = whiten(dead, 13)
    assert y.shape == (300, 3)
    assert y.isfinite().all()
    assert whiten(normal(5, 40), 40).shape == (5, 4)  # fewer images than features


def test_whitening_survives_rows_that_are_zero_or_all_equal():
    y = whiten(torch.zeros(8, 4), 3)
    assert y.shape == (8, 1)
    assert (y == 0).all()
    assert (whiten(torch.full((8, 4), 0.1), 3) == 0).all()
    centred = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1], [0, 0]])  # the last is the mean
    y = whiten(centred, 2)
    assert y[4].tolist() == [0, 0]
    torch.testing.assert_close(y[:4].norm(dim=1), torch.ones(4))


def test_whitening_says_that_features_are_not_finite():
    x = normal(20, 3)
    x[3, 1] = float("nan")
    with pytest.raises(FloatingPointError, match="features are not finite; lower lr"):
        whiten(x, 3)


def test_offsets_far_from_zero_do_not_disturb_whitening():
    x = normal(500, 4)
    near, far = whiten(x, 4), whiten(x + 1000, 4)  # float32 squares of 1000 would leave 2 digits of the variance
    agree = torch.linalg.svdvals(near.T @ far) / 125
    torch.testing.assert_close(agree, torch.ones(4), atol=0.1, rtol=0)
    assert (near @ near.T - far @ far.T).abs().max() < 0.01


# --- KMeans ---


def test_kmeans_finds_the_blobs_for_every_head():
    x = blobs(60, 4, 8)
    heads = [nn.Linear(8, 4), nn.Linear(8, 12)]
    targets = KMeans(pca_dim=3)(x, heads, Targets.unlabelled(2, 60), seed=0)
    assert targets.labels.shape == (2, 60)
    assert targets.labels.dtype == torch.int32
    first, second = targets.labels.long()
    assert len(first[:4].unique()) == 4
    assert torch.equal(first, first[:4].repeat(15))
    pairs = {(int(a), int(b)) for a, b in zip(second, first, strict=True)}
    assert len(second.unique()) == len(pairs) == 12  # every small cluster lies within one blob


def test_kmeans_of_two_heads_of_one_width_start_differently():
    targets = KMeans()(normal(200, 8), [nn.Linear(8, 5)] * 2, Targets.unlabelled(2, 200), seed=0)
    assert not torch.equal(targets.labels[0], targets.labels[1])


def test_warm_kmeans_keeps_the_ids_of_clusters_and_cold_does_not():
    x, head = blobs(120, 6, 8), [nn.Linear(8, 6)]
    names = torch.tensor([4, 2, 0, 5, 1, 3], dtype=torch.int32)
    previous = targets_of(names.repeat(20).tolist())
    moved = x + normal(120, 8, seed=2) * 0.01
    assert torch.equal(KMeans()(moved, head, previous, seed=1).labels, previous.labels)
    kept = [torch.equal(KMeans(warm=False)(moved, head, previous, seed=s).labels, previous.labels) for s in range(5)]
    assert not any(kept)


def test_warm_kmeans_draws_an_empty_cluster_anew():
    x = blobs(120, 6, 8)
    previous = targets_of([label if label < 5 else 0 for label in range(6)] * 20)
    labels = KMeans()(x, [nn.Linear(8, 6)], previous, seed=0).labels[0]
    assert len(labels.unique()) == 6


def test_assigners_keep_the_partners():
    previous = replace(Targets.unlabelled(1, 60), partners=torch.arange(60).flip(0)[:, None])
    targets = KMeans()(blobs(60, 4, 8), [nn.Linear(8, 4)], previous, seed=0)
    assert torch.equal(targets.partners, previous.partners)
    assert keep_targets(torch.zeros(60, 1), [], previous, 0) is previous


# --- Aligned ---


def test_aligned_gives_a_renamed_clustering_its_old_names_back():
    old = torch.tensor([[0, 0, 1, 1, 2, 2]], dtype=torch.int32)
    renamed = torch.tensor([2, 0, 1], dtype=torch.int32)[old.long()]
    targets = Aligned(Fixed(renamed))(torch.zeros(6, 2), [nn.Linear(2, 3)], targets_of(*old.tolist()), seed=0)
    assert targets.labels.tolist() == old.tolist()
    assert targets.labels.dtype == torch.int32


def test_aligned_maximises_the_whole_overlap_and_keeps_the_clustering():
    previous = targets_of([0, 0, 0, 1, 1, 1, 2, 2])
    new = torch.tensor([[1, 1, 1, 1, 0, 0, 2, 2]], dtype=torch.int32)
    labels = Aligned(Fixed(new))(torch.zeros(8, 2), [nn.Linear(2, 3)], previous, seed=0).labels
    assert labels.tolist() == [[0, 0, 0, 0, 1, 1, 2, 2]]


def test_aligned_names_each_head_by_itself_and_copes_with_the_unlabelled():
    previous = targets_of([0, 0, 1, 1, -1], [-1] * 5)
    new = torch.tensor([[1, 1, 0, 0, -1], [2, 2, 0, 0, 1]], dtype=torch.int32)
    heads = [nn.Linear(2, 2), nn.Linear(2, 3)]
    labels = Aligned(Fixed(new))(torch.zeros(5, 2), heads, previous, seed=0).labels
    assert labels.tolist() == [[0, 0, 1, 1, -1], [2, 2, 0, 0, 1]]
    mostly = targets_of([0, -1, -1, -1, -1, 0])  # what was unlabelled overlaps with nothing
    new = torch.tensor([[0, 1, 1, 1, 1, 0]], dtype=torch.int32)
    assert Aligned(Fixed(new))(torch.zeros(6, 2), heads[:1], mostly, seed=0).labels.tolist() == new.tolist()


def test_very_many_clusters_are_named_as_few_are(monkeypatch):
    old = torch.randint(-1, 40, (300,), generator=torch.Generator().manual_seed(0))
    new = torch.where(torch.rand(300, generator=torch.Generator().manual_seed(1)) < 0.7, 37 - old, old).clamp(-1, 39)
    few = transport.renamed(new, old, 40)
    monkeypatch.setattr(transport, "DENSE", 0)
    many = transport.renamed(new, old, 40)
    assert (few == old)[old >= 0].sum() == (many == old)[old >= 0].sum() > 150
    assert len({(int(a), int(b)) for a, b in zip(new, many, strict=True)}) == len(new.unique()) == len(many.unique())
    lost = torch.where(new == 3, -1, old)  # cluster 3 overlaps with nothing: it gets the name that is left
    assert len(transport.renamed(new, lost, 40).unique()) == len(new.unique())
    names = transport.renamed(torch.arange(10_000), torch.arange(10_000).flip(0), 10_000)
    assert torch.equal(names.long(), torch.arange(10_000).flip(0))


# --- heads ---


def test_linear_heads_become_nearest_centroid_classifiers():
    x = blobs(80, 4, 6, noise=0.1) * (torch.arange(80) % 4 + 1)[:, None] + 2  # means of unequal length
    targets = targets_of((torch.arange(80) % 4).tolist())
    head = nn.Linear(6, 5)
    kept = head.weight[4].clone(), head.bias[4].clone()
    centroid_heads([head], torch.optim.SGD(head.parameters(), 0.1), x, targets)
    means = torch.stack([x[i::4].mean(0) for i in range(4)])
    torch.testing.assert_close(head.weight[:4], means)
    nearest = torch.cdist(x, means).argmin(1)
    assert torch.equal(head(x)[:, :4].argmax(1), nearest)
    assert torch.equal(head.weight[4], kept[0])  # an empty cluster keeps its own
    assert torch.equal(head.bias[4], kept[1])


def test_prototypes_become_mean_directions():
    x = torch.tensor([[100.0, 0, 0], [1, 1, 0], [0, 0, 2], [0, 0, 3]])  # a long vector counts no more than a short
    head = Prototypes(3, 2)
    centroid_heads([head], torch.optim.SGD(head.parameters(), 0.1), x, targets_of([0, 0, 1, 1]))
    mean = (torch.tensor([1.0, 0, 0]) + torch.tensor([1.0, 1, 0]) / 2**0.5) / 2
    torch.testing.assert_close(head.weight, torch.stack([mean, torch.tensor([0.0, 0, 1])]))


def test_centroids_are_refused_by_heads_that_have_no_weight():
    head = Projector(3, 2)
    with pytest.raises(ValueError, match="only be set to centroids if they are linear; got Projector"):
        centroid_heads([head], torch.optim.SGD(head.parameters(), 0.1), normal(4, 3), targets_of([0, 0, 1, 1]))


@pytest.mark.parametrize("policy", [reset_heads, centroid_heads])
def test_new_heads_forget_weights_and_momentum_but_not_the_backbone(policy):
    backbone, heads = nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 3)])
    optimizer = torch.optim.SGD([*backbone.parameters(), *heads.parameters()], lr=0.1, momentum=0.9)
    heads[0](backbone(torch.ones(1, 2))).sum().backward()
    optimizer.step()
    before, trunk = heads[0].weight.clone(), backbone.weight.clone()
    policy(heads, optimizer, normal(6, 2), targets_of([0, 1, 2] * 2))
    assert not (heads[0].weight == before).any()
    assert torch.equal(backbone.weight, trunk)
    assert set(optimizer.state) == set(backbone.parameters())


def test_kept_heads_keep_weights_and_momentum():
    head = nn.Linear(2, 3)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    head(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    before = head.weight.clone()
    keep_heads([head], optimizer, normal(6, 2), targets_of([0, 1, 2] * 2))
    assert torch.equal(head.weight, before)
    assert set(optimizer.state) == set(head.parameters())


def test_reset_heads_reaches_the_parts_of_a_head():
    head = Projector(4, 3)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    before = [p.clone() for p in (head.hidden.weight, head.out.weight)]
    head.norm.running_mean.fill_(7)
    reset_heads([head], optimizer, normal(6, 4), targets_of([0] * 6))
    assert not torch.equal(head.hidden.weight, before[0])
    assert not torch.equal(head.out.weight, before[1])
    assert (head.norm.running_mean == 0).all()
