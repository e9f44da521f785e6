"""The probes give known answers, and the test part chooses nothing."""

import json

import numpy as np
import pytest

from deepcluster import probe
from deepcluster.probe import probes


def blobs(n=300, k=3, dim=8, spread=0.1, seed=0):
    """(n, dim) features around k corners, and (n,) which."""
    rng = np.random.default_rng(seed)
    true = rng.permutation(np.arange(n) % k)
    return (np.eye(k, dim)[true] + spread * rng.normal(size=(n, dim))).astype(np.float32), true


def test_separable_features_are_worth_all():
    found = probes(*blobs())
    assert found["linear"]["accuracy"] == found["knn"]["accuracy"] == 1.0
    assert (found["n_train"], found["n_test"], found["n_classes"], found["n_left_out"]) == (240, 60, 3, 0)
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("shuffled", ["features", "labels"])
def test_what_tells_nothing_is_worth_chance(shuffled):
    x, true = blobs(1500, dim=60)
    rng = np.random.default_rng(1)
    x, true = (rng.normal(size=x.shape), true) if shuffled == "features" else (x, rng.permutation(true))
    found = probes(x, true)
    deviation = (1 / 3 * 2 / 3 / 300) ** 0.5
    for kind in ("linear", "knn"):
        assert found[kind]["accuracy"] == pytest.approx(1 / 3, abs=4 * deviation)


def test_only_the_neighbours_see_a_ring():
    rng = np.random.default_rng(0)
    angle, true = rng.uniform(0, 2 * np.pi, 1200), np.arange(1200) % 2
    height = np.where(true == 1, np.sign(rng.normal(size=1200)), 0) + 0.05 * rng.normal(size=1200)
    found = probes(np.stack([np.cos(angle), np.sin(angle), height], 1), true)
    assert found["knn"]["accuracy"] > 0.98
    assert found["linear"]["accuracy"] < 0.65


def test_only_the_linear_probe_sees_a_faint_direction():
    x, true = blobs(1000, k=2, dim=40, spread=1.0)
    x[:, :2] = 0.01 * np.eye(2)[true] + 0.001 * x[:, :2]
    found = probes(x, true)
    assert found["linear"]["accuracy"] > 0.98
    assert found["knn"]["accuracy"] < 0.7


def test_the_same_split_for_the_same_seed():
    x, true = blobs(spread=0.6)
    found = probes(x, true)
    assert found == probes(x, true)
    assert 0.6 < found["knn"]["accuracy"] == round(found["knn"]["accuracy"], 6) < 1
    assert found["knn"] == probes(x, true, ["knn"])["knn"]
    assert found["linear"] == probes(x, true, ("linear",))["linear"]
    assert len({probes(x, true, ("knn",), seed)["knn"]["accuracy"] for seed in range(5)}) > 1


def test_scale_changes_nothing():
    x, true = blobs(spread=0.6)
    near = {kind: {**found, "accuracy": pytest.approx(found["accuracy"], abs=0.02)}
            for kind, found in probes(x, true).items() if kind in ("linear", "knn")}  # fmt: skip
    large = probes(1000 * x, true)
    assert {kind: large[kind] for kind in near} == near


def test_unknown_and_lonely_labels_are_left_out():
    x, true = blobs()
    more = np.concatenate([x, np.full((4, 8), 9.0, np.float32)])
    labels = np.concatenate([true, [-1, -1, 7, 5]])
    found = probes(more, labels)
    assert {**found, "n_left_out": 0} == probes(x, true)
    assert found["n_left_out"] == 2
    assert probes(more[:302], labels[:302]) == probes(x, true)


def test_the_split_has_a_fifth_of_every_class():
    true = np.repeat([0, 1, 4], [100, 10, 2])
    found = probes(np.eye(5, 6)[true], true)
    assert (found["n_train"], found["n_test"]) == (89, 23)
    assert found["linear"]["accuracy"] == 1.0


def test_every_class_is_split_alike():
    y = np.random.default_rng(0).permutation(np.repeat([0, 1, 4], [100, 10, 2]))
    train, test = probe._split(y, np.random.default_rng(0))
    assert np.bincount(y[test]).tolist() == [20, 2, 0, 0, 1]
    assert sorted([*train, *test]) == list(range(112))


def test_two_images_a_class_suffice():
    found = probes(np.eye(2)[[0, 0, 1, 1]], np.array([0, 0, 1, 1]))
    assert found["knn"] == {"accuracy": 1.0, "k": 2, "temperature": 0.07}
    assert found["linear"]["accuracy"] == 1.0


def test_the_penalty_fits_the_noise():
    clean, true = blobs(400, dim=30, spread=0.05)
    noisy = blobs(120, dim=200, spread=2.0, seed=1)
    assert probes(*noisy, ("linear",))["linear"]["C"] == 0.001
    flipped = true.copy()
    x = np.concatenate([clean * 1e-3, np.random.default_rng(0).normal(size=(400, 60))], 1)
    assert probes(x, flipped, ("linear",))["linear"]["accuracy"] > 0.95


def test_a_fit_that_takes_long_is_no_warning(monkeypatch):
    monkeypatch.setattr(probe, "STEPS", 1)
    assert probes(*blobs(), ["linear"])["linear"]["accuracy"] > 0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kinds": ["lineer"]}, "no probe is called 'lineer'; did you mean 'linear'"),
        ({"kinds": ["svm"]}, "choose from knn, linear"),
        ({"features": np.full((300, 2), np.nan)}, "not finite"),
        ({"features": np.zeros((299, 2))}, r"one row of features a label; got \(299, 2\) and \(300,\)"),
        ({"true": np.zeros(300, int)}, "two classes with two images each; got 1 of 1"),
        ({"true": np.full(300, -1)}, "two classes with two images each; got 0 of 0"),
        ({"true": np.array([0] * 299 + [1])}, "got 1 of 2"),
    ],
)
def test_what_cannot_be_probed(change, message):
    x, true = blobs()
    with pytest.raises(ValueError, match=message):
        probes(**{"features": x, "true": true, **change})
