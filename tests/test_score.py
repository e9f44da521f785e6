"""DeepCluster.score: larger is better, with labels and without."""

import numpy as np
import pytest
from sklearn.datasets import make_blobs
from sklearn.metrics import adjusted_rand_score
from sklearn.model_selection import GridSearchCV

from deepcluster import DeepCluster

QUICK = {"n_clusters": 3, "method": "iic", "epochs": 1, "batch_size": 8, "precision": "fp32"}
N, D = 24, 5
X = np.random.default_rng(0).normal(size=(N, D))


def naive(model, x):
    """Mean simplified silhouette, image by image, in float64."""
    unit = lambda v: v / np.linalg.norm(v)
    means = {c: unit(m.double().numpy()) for c, m in enumerate(model.classifier_.centroids) if m.any()}
    each = []
    for feature, c in zip(model.transform(x).astype(float), model.predict(x), strict=True):
        far = {k: 1 - unit(feature) @ mean for k, mean in means.items()}
        a, b = far.pop(c), min(far.values())
        each.append((b - a) / max(a, b))
    return np.mean(each)


@pytest.mark.parametrize("edit", [lambda m: m, lambda m: m.merge_clusters([[0, 1]]), lambda m: m.split_cluster(0, 3)])
def test_score_without_labels_is_the_simplified_silhouette(edit):
    model = edit(DeepCluster(**QUICK).fit(X))
    assert model.score(X) == pytest.approx(naive(model, X), abs=1e-5)
    held_out = np.random.default_rng(1).normal(size=(7, D))
    assert model.score(held_out) == pytest.approx(naive(model, held_out), abs=1e-5)


def test_score_without_labels_of_clear_clusters_is_near_one():
    x, y = make_blobs(200, centers=3, n_features=8, cluster_std=0.1, random_state=0)
    model = DeepCluster(3, method="sela", epochs=10).fit(x[:150])
    assert adjusted_rand_score(y[150:], model.predict(x[150:])) == 1
    assert model.score(x[150:]) > 0.95
    noise = np.random.default_rng(0).normal(size=(150, 8))
    assert DeepCluster(3, method="sela", epochs=10).fit(noise).score(noise) < 0.6


def test_grid_search_finds_the_number_of_clusters():
    x, _ = make_blobs(80, centers=4, n_features=8, random_state=1)
    search = GridSearchCV(DeepCluster(method="iic", epochs=8), {"n_clusters": [1, 2, 4, 6]}, cv=2).fit(x)
    assert search.best_params_ == {"n_clusters": 4}
    assert search.best_score_ > 0.9
    assert search.predict(x).max() == 3


@pytest.mark.parametrize("y", [np.zeros(N - 1), np.zeros((N, 2)), 3])
def test_score_wants_a_class_for_each_image(y):
    with pytest.raises(ValueError, match=f"a class for each of the {N} images"):
        DeepCluster(**QUICK).fit(X).score(X, y)
