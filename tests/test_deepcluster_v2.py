"""DeepCluster-v2: k-means on the sphere, heads that are its centroids and are not trained."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from tiny import make_model, tiny_store
from torch import nn

from deepcluster.assign import centroid_heads
from deepcluster.kmeans import nearest
from deepcluster.methods.deepcluster_v2 import SphericalKMeans
from deepcluster.model import Centroids
from deepcluster.recipe import Targets, make_recipe
from deepcluster.trainer import Training, fit

X = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-1.0, 0.0]])
C = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heads(dim, *widths):
    torch.manual_seed(0)
    return [Centroids(dim, k) for k in widths]


def test_one_step_by_hand():
    head = Centroids(2, 3)
    with torch.no_grad():
        head.weight.copy_(C)
    labels = nearest(X, C)[0]
    assert labels.tolist() == head(X).argmax(1).tolist() == [0, 0, 1, 1]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)
    centroid_heads([head], optimizer, X * 5, Targets(labels[None].int(), torch.arange(4)[:, None]))
    expected = torch.tensor([[0.948683, 0.316228], [-0.707107, 0.707107], [0.0, -1.0]])
    torch.testing.assert_close(F.normalize(head.weight, dim=1), expected, atol=1e-6, rtol=0)


def test_more_iterations_bring_images_nearer_to_their_centroids():
    x, objective = random(300, 5), []
    for iterations in range(1, 8):
        labels = SphericalKMeans(iterations)(x, heads(5, 4), Targets.unlabelled(1, 300), 0).labels[0].long()
        unit = F.normalize(x, dim=1)
        objective.append(sum(unit[labels == k].sum(0).norm().item() for k in range(4)))
    assert all(later >= earlier - 1e-4 for earlier, later in pairwise(objective))
    assert objective[-1] > objective[0] + 0.1


def test_every_head_and_every_refresh_has_its_own_start():
    x, none = random(300, 5), Targets.unlabelled(2, 300)
    found = SphericalKMeans()(x, heads(5, 8, 8), none, 0).labels
    again = SphericalKMeans()(x, heads(5, 8, 8), none, 0).labels
    later = SphericalKMeans()(x, heads(5, 8, 8), none, 100).labels
    assert torch.equal(found, again)
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[0], later[0])


def test_the_length_of_a_feature_has_no_say():
    x, none = random(300, 5), Targets.unlabelled(1, 300)
    scaled = x * torch.arange(1, 301)[:, None]
    found = [SphericalKMeans()(z, heads(5, 4), none, 0).labels for z in (x, scaled)]
    assert (found[0] == found[1]).float().mean() > 0.99  # rounding may move a row that lies between two


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(FloatingPointError, match="not finite; lower lr"):
        SphericalKMeans()(torch.full((6, 2), torch.inf), heads(2, 3), Targets.unlabelled(1, 6), 0)


def test_heads_are_the_centroids_of_the_labels_and_are_not_trained():
    recipe, seen = make_recipe("deepcluster_v2", n_clusters=3, every=2, n_heads=2), []

    def look(report):
        seen.append([head.weight.clone() for head in report.state.model.heads])

    model = make_model(recipe)
    state = fit(model, tiny_store(), recipe, Training(epochs=4, batch_size=32, lr=0.05), [look])
    assert not any(p.requires_grad for p in model.heads.parameters())
    for h in range(4):
        assert torch.equal(seen[0][h], seen[1][h])
        assert not torch.equal(seen[1][h], seen[2][h])
    assert state.targets.labels.shape == (4, 96)
    assert (state.targets.labels >= 0).all()
    assert all(len(found.unique()) == k for found, k in zip(state.targets.labels, recipe.heads, strict=True))


def test_the_recipe():
    recipe = make_recipe("deepcluster_v2", n_clusters=7, n_heads=2, overcluster=3, crops=4, temperature=0.2)
    assert recipe.heads == (7, 7, 21, 21)
    assert recipe.rivals == [0, 1]
    assert recipe.views == ("strong", "strong", "small", "small")
    model = make_model(recipe)
    x = random(5, 32)
    naive = torch.stack([F.cosine_similarity(x, w[None], dim=1) for w in model.heads[0].weight], 1) / 0.2
    torch.testing.assert_close(model.heads[0](x), naive)
    with pytest.raises(ValueError, match="crops must be at least 2; got 1"):
        make_recipe("deepcluster_v2", crops=1)
