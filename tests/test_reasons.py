"""What is out of place is told why, and nothing else is remarked on."""

from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F
from tiny import store_of
from torch import nn

from deepcluster import oddities
from deepcluster.classifier import Classifier, Spec


def reasons(store, found, classifier=None):
    return oddities.reasons(oddities.looks(store), found, classifier)


def photos(n, side=32):
    """(n, 3, side, side) uint8: random shapes."""
    shapes = torch.randn(n, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    return (128 + 45 * F.interpolate(shapes, (side, side), mode="bicubic")).clamp(0, 255).byte()


class Two(nn.Module):
    """A backbone that is not used: features are given."""


def judge():
    """Three clusters at right angles, of which the last has no images."""
    self = Classifier(Spec("convnet", (3, 32, 32), "Linear", 3, "0"), Two(), Two(), 2)
    self.centroids.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.9], [0.0, 0.0]]))
    self.reach.copy_(torch.tensor([0.1, 0.1, torch.inf]))
    return self


def seen(vectors, cluster, outliers):
    unit = F.normalize(torch.tensor(vectors), dim=1)
    distance = 1 - (unit * torch.eye(2)[cluster]).sum(1)
    said = np.isin(np.arange(len(unit)), outliers)
    return {
        "features": 5 * unit.numpy(),
        "cluster": np.array(cluster),
        "distance": distance.numpy(),
        "is_outlier": said,
    }


def test_reasons_by_place():
    found = seen([[1.0, 0.2], [0.2, 1.0], [-1.0, -0.1], [0.8, 0.6], [0.6, 0.8]], [0, 0, 0, 1, 1], [1, 2, 3, 4])
    expected = ["", "nearer to cluster 1", "far from every cluster", "far from every cluster", "far from every cluster"]
    store, classifier = store_of(photos(5)), judge()
    assert reasons(store, found, classifier) == expected
    classifier.reach[0] = 0.3
    assert reasons(store, found, classifier)[3:] == ["nearer to cluster 0", "far from every cluster"]
    classifier.reach[0] = 0.5
    assert reasons(store, found, classifier)[3:] == ["nearer to cluster 0", "far from its own cluster"]
    assert reasons(store, found) == ["", *["far from its own cluster"] * 4]


def test_reasons_by_look():
    images = photos(500)
    images[3], images[4] = images[3] // 8, 255 - images[4] // 8
    images[5] = torch.tensor([200, 30, 90])[:, None, None]
    images[6] = images[6] // 8
    store, outliers = store_of(images), [3, 4, 7]
    found = seen([[1.0, 0.1]] * 500, [0] * 500, outliers)
    expected = {
        3: "among the darkest 1 %",
        4: "among the brightest 1 %",
        5: "almost blank",
        7: "far from every cluster",
    }
    classifier = judge()
    classifier.reach[:] = 0.001
    looks, said = oddities.looks(store), reasons(store, found, classifier)
    assert {i: reason for i, reason in enumerate(said) if reason} == expected
    found["is_outlier"][[4, 5, 6]] = [False, True, True]
    assert {4, 6} & {i for i, reason in enumerate(oddities.reasons(looks, found, classifier)) if reason} == {6}
    assert oddities.reasons(looks, found, classifier)[3] == expected[3]
    assert oddities.reasons(looks, found, classifier)[5:8] == [expected[5], expected[3], "far from every cluster"]
    classifier.reach[:] = torch.inf
    assert oddities.reasons(looks, found, classifier)[5:8] == [expected[5], expected[3], "far from its own cluster"]
    found["is_outlier"][:] = True
    counts = Counter(reasons(store, found, classifier))
    assert counts["almost blank"] == 1
    assert 3 <= counts["among the darkest 1 %"] <= 5
    assert 3 <= counts["among the brightest 1 %"] <= 5
    assert sum(counts.values()) == 500


def test_every_outlier_has_a_reason_whatever_the_batch(monkeypatch):
    rng = np.random.default_rng(0)
    found = seen(rng.normal(size=(90, 2)).astype(np.float32).tolist(), [0] * 90, range(0, 90, 2))
    said = reasons(store_of(photos(90)), found, judge())
    assert [bool(reason) for reason in said] == found["is_outlier"].tolist()
    monkeypatch.setattr(oddities, "BLOCK", 7)
    assert reasons(store_of(photos(90)), found, judge()) == said


def test_a_store_of_faint_images_is_not_blank():
    images = (photos(50, side=16) // 64) + 100
    images[9] = 100
    said = reasons(store_of(images), seen([[1.0, 0.0]] * 50, [0] * 50, []))
    assert [i for i, reason in enumerate(said) if reason] == [9]
    same = store_of(torch.full((50, 1, 16, 16), 9).byte())
    assert reasons(same, seen([[1.0, 0.0]] * 50, [0] * 50, [])) == [""] * 50


def test_vectors_have_no_looks():
    store = store_of(torch.zeros(2, 2))
    assert reasons(store, seen([[1.0, 0.0], [-1.0, 0.0]], [0, 0], [1])) == ["", "far from its own cluster"]
