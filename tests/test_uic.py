"""UIC: labels are the heads' own predictions, and no cluster stays empty."""

import pytest
import torch
from torch import nn

import deepcluster.methods  # noqa: F401  (registers them)
from deepcluster.assign import Argmax, KMeans, split_empty
from deepcluster.model import Standardised
from deepcluster.recipe import PAPER, Targets, make_recipe


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def labels_of(sizes):
    """Labels with so many images of each cluster, in random order."""
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return labels[torch.randperm(len(labels), generator=rng(7))]


def sizes_of(labels, k):
    return torch.bincount(labels, minlength=k).tolist()


def naive(labels, k, seed):
    """As written in the paper's loop: the sizes only, as who goes is random."""
    sizes = sizes_of(labels, k)
    for empty in range(k):
        if sizes[empty] == 0 and max(sizes) > 1:
            largest = sizes.index(max(sizes))
            sizes[empty] = sizes[largest] - sizes[largest] // 2
            sizes[largest] //= 2
    return sizes


# --- empty clusters ---


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([8, 0, 0, 4], [2, 4, 2, 4]),
        ([5, 0], [2, 3]),
        ([100, 0, 0, 0], [25, 25, 25, 25]),
        ([3, 2, 1], [3, 2, 1]),
        ([0, 3, 3], [2, 1, 3]),
    ],
)
def test_sizes_after_splitting(before, after):
    assert sizes_of(split_empty(labels_of(before), len(before), rng()), len(before)) == after


def test_fewer_images_than_clusters_leave_one_empty():
    assert sizes_of(split_empty(labels_of([2, 0, 0]), 3, rng()), 3) == [1, 1, 0]  # nobody leaves a cluster of one
    assert sizes_of(split_empty(labels_of([0, 1, 0]), 3, rng()), 3) == [0, 1, 0]


@pytest.mark.parametrize("seed", range(5))
def test_splitting_does_what_the_loop_over_clusters_does(seed):
    k = 40
    labels = torch.randint(k, (300,), generator=rng(seed)) ** 2 % (k - seed)
    found = split_empty(labels, k, rng(seed))
    assert sizes_of(labels, k).count(0) > 3
    assert sizes_of(found, k) == naive(labels, k, seed)
    assert 0 not in sizes_of(found, k)
    full = torch.bincount(labels, minlength=k) > 0
    moved = found != labels
    assert not full[found[moved]].any()  # nobody moves to a cluster that had images
    stayed = torch.bincount(found[~moved], minlength=k)
    assert (stayed[full] > 0).all()


def test_who_moves_is_random_a_function_of_the_seed_and_in_place_of_nothing():
    labels = torch.zeros(200, dtype=torch.int64)
    found = [split_empty(labels, 2, rng(seed)) for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert (labels == 0).all()
    assert 30 < found[0][:100].sum() < 70
    thirds = split_empty(labels, 3, rng())
    assert 15 < (thirds[:100] == 2).sum() < 35


def test_a_million_images_in_a_thousand_clusters_of_which_one_is_used_are_quick():
    found = split_empty(torch.full((1_000_000,), 7), 1000, rng())
    assert min(sizes_of(found, 1000)) >= 900


# --- the assigner ---


def head_of(k, seed=0):
    head = nn.Linear(6, k)
    head.weight.data = torch.randn(k, 6, generator=rng(seed))
    head.bias.data.zero_()
    return head


def known(heads, n):
    return Targets(torch.zeros(heads, n, dtype=torch.int32), torch.arange(n).flip(0)[:, None])


def test_labels_are_the_argmax_of_each_head():
    x, heads = torch.randn(500, 6, generator=rng(3)), [head_of(4), head_of(9, 1)]
    targets = Argmax()(x, heads, known(2, 500), seed=0)
    assert targets.labels.dtype == torch.int32
    for labels, head in zip(targets.labels, heads, strict=True):
        assert torch.equal(labels.long(), head(x).argmax(1))
    assert torch.equal(targets.partners, known(2, 500).partners)
    assert not targets.labels.requires_grad


def test_labels_are_made_in_chunks(monkeypatch):
    x, heads = torch.randn(500, 6, generator=rng(3)), [head_of(4)]
    whole = Argmax()(x, heads, known(1, 500), seed=0).labels
    monkeypatch.setattr("deepcluster.assign.CHUNK", 64)
    rows = []
    heads[0].register_forward_hook(lambda module, given, out: rows.append(len(out)))
    assert torch.equal(Argmax()(x, heads, known(1, 500), seed=0).labels, whole)
    assert max(rows) == 16


def test_standardised_scores_are_compared_over_all_images(monkeypatch):
    x, head = torch.randn(500, 6, generator=rng(3)) + 1, head_of(4)
    head.bias.data = torch.tensor([50.0, 0.0, 0.0, -7.0])
    z = head(x).detach().double()
    expected = ((z - z.mean(0)) / z.std(0, correction=0)).argmax(1)
    assigner = Argmax(standardised=True)
    assert torch.equal(assigner(x, [head], known(1, 500), seed=0).labels[0].long(), expected)
    assert min(sizes_of(expected, 4)) > 50 > 0 == sizes_of(z.argmax(1), 4)[3]
    monkeypatch.setattr("deepcluster.assign.CHUNK", 64)
    assert torch.equal(assigner(x, [head], known(1, 500), seed=0).labels[0].long(), expected)
    head.weight.data[2] = 0  # a cluster that says the same of all is as good as the average, not better than any
    others = ((z - z.mean(0)) / z.std(0, correction=0)).index_fill(1, torch.tensor(2), 0)
    assert torch.equal(assigner(x, [head], known(1, 500), seed=0).labels[0].long(), others.argmax(1))
    flat = nn.Linear(6, 4)
    nn.init.zeros_(flat.weight)
    assert min(sizes_of(assigner(x, [flat], known(1, 500), seed=0).labels[0].long(), 4)) == 125


def test_a_collapsed_head_gets_all_its_clusters_back():
    head = nn.Linear(6, 5)
    nn.init.zeros_(head.weight)
    labels = Argmax()(torch.ones(100, 6), [head], known(1, 100), seed=0).labels
    assert min(sizes_of(labels[0].long(), 5)) >= 12


def test_the_first_labels_are_balanced_noise_or_those_of_another_assigner():
    x = torch.eye(6).repeat(20, 1) + torch.randn(120, 6, generator=rng(3)) * 0.01
    heads, unknown = [head_of(6), head_of(6, 1)], Targets.unlabelled(2, 120)
    noise = Argmax()(x, heads, unknown, seed=0).labels
    assert [sizes_of(labels.long(), 6) for labels in noise] == [[20] * 6] * 2
    assert not torch.equal(noise[0], noise[1])
    assert torch.equal(noise, Argmax()(x, heads, unknown, seed=0).labels)
    assert not torch.equal(noise, Argmax()(x, heads, unknown, seed=1).labels)
    found = Argmax(KMeans(5))(x, heads, unknown, seed=0).labels
    assert torch.equal(found[0], found[0][:6].repeat(20))
    assert len(found[0].unique()) == 6
    y = torch.randn(500, 6, generator=rng(3))
    later = [assigner(y, heads, known(2, 500), 0).labels for assigner in (Argmax(KMeans(5)), Argmax())]
    assert torch.equal(*later)


# --- the recipe ---


def test_heads_of_one_width_compete_and_standardise():
    recipe = make_recipe("uic", n_clusters=7, sub_heads=2)
    assert recipe.heads[:2] == (7, 7)
    assert recipe.rivals == [0, 1]
    assert recipe.head is Standardised
    assert recipe.balanced
    assert not recipe.pretext


def test_where_labels_start_is_checked_and_random_in_the_papers_preset():
    with pytest.raises(ValueError, match="uic: unknown start 'kmean'; did you mean 'kmeans'"):
        make_recipe("uic", start="kmean")
    params = {key: value for key, value in PAPER["uic"].items() if key in ("sub_heads", "start", "standardised")}
    assert make_recipe("uic", **params).assigner == Argmax()
    assert make_recipe("uic", **params).heads == (10,)
    ours = make_recipe("uic").assigner
    assert isinstance(ours.first, KMeans)
    assert ours.standardised
