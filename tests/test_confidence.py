"""Confidence: what it is made of, that new images, edits and files keep it, and what its errors are measured by."""

import json
import xml.etree.ElementTree as ET

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from deepcluster import DeepCluster, confidence, load
from deepcluster.__main__ import main
from deepcluster.reliability import curve, reliability


def groups(n=600, k=4, dim=8, spread=0.15, seed=0):
    """Features (n, dim) around k directions, and which."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, k, n)
    return (np.eye(k, dim)[kind] + spread * rng.normal(size=(n, dim))).astype(np.float32), kind


def judged(features, cluster):
    """Confidence of each row, with the means of the clusters as they are."""
    cluster, unit = torch.as_tensor(cluster), torch.nn.functional.normalize(torch.as_tensor(features), dim=1)
    means = torch.stack([unit[cluster == c].mean(0) for c in range(int(cluster.max()) + 1)])
    return confidence.of(unit, cluster, means, confidence.measure(features, cluster, means)).numpy()


def test_silhouettes_by_hand():
    rng = np.random.default_rng(0)
    unit = rng.normal(size=(50, 5))
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    means, cluster = rng.normal(size=(4, 5)), rng.integers(0, 3, 50)
    means[3] = 0  # without images
    expected = []
    for row, c in zip(unit, cluster, strict=True):
        far = [1 - row @ mean / np.linalg.norm(mean) for mean in means[:3]]
        own = far.pop(c)
        expected.append(max(0.0, (min(far) - own) / max(min(far), own)))
    found = confidence.silhouettes(*map(torch.from_numpy, (unit, cluster, means)))
    assert np.allclose(found, expected)
    assert 0 < np.count_nonzero(expected) < 50
    assert not confidence.silhouettes(torch.from_numpy(unit), torch.zeros(50).long(), torch.ones(1, 5).double()).any()


def test_clear_groups_are_trusted_and_noise_is_not():
    features, kind = groups()
    assert judged(features, kind).mean() > 0.9
    noise = np.random.default_rng(0).normal(size=(600, 8)).astype(np.float32)
    assert judged(noise, noise[:, :4].argmax(1)).mean() < 0.6  # cut somehow
    assert judged(noise, np.random.default_rng(1).integers(0, 4, 600)).mean() < 0.35


def test_a_cluster_of_two_kinds_is_trusted_less():
    features, kind = groups(k=5)
    found = judged(features, np.minimum(kind, 3))  # kinds 3 and 4 are one cluster
    assert found[kind >= 3].mean() < found[kind < 3].mean() - 0.1


def test_within_a_cluster_the_more_typical_the_surer():
    features, kind = groups(spread=0.3)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    means = torch.from_numpy(np.stack([unit[kind == c].mean(0) for c in range(4)]))
    cluster, unit = torch.from_numpy(kind), torch.from_numpy(unit)
    silhouette = confidence.silhouettes(unit, cluster, means)
    found = confidence.of(unit, cluster, means, confidence.measure(features, cluster, means))
    assert ((found >= 0) & (found <= 1)).all()
    for c in range(4):
        order = silhouette[cluster == c].argsort()
        assert (found[cluster == c][order].diff() >= 0).all()


def test_the_same_again_and_without_a_mark_on_other_draws():
    features, kind = groups()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = judged(features, kind)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(4)
    assert np.array_equal(first, judged(features, kind))
    assert np.allclose(first, judged(7 * features, kind), atol=1e-5)


def test_a_sample_is_enough(monkeypatch):
    features, kind = groups(2000)
    whole = judged(features, kind)
    monkeypatch.setattr(confidence, "SAMPLE", 400)
    assert np.abs(judged(features, kind) - whole).max() < 0.05


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_few_images(n):
    features = np.eye(8, dtype=np.float32)[:n]
    found = judged(features, np.minimum(np.arange(n), 2))
    assert np.isfinite(found).all()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on features, trained for a moment; its images, and their kinds."""
    features, kind = groups(240, spread=0.35)
    out = tmp_path_factory.mktemp("run") / "run"
    np.save(out.parent / "x.npy", features)
    DeepCluster(4, method="deepcluster", epochs=3, out=str(out)).fit(str(out.parent / "x.npy"))
    return out, features, kind


def test_new_images_have_the_same_as_old_ones(run, tmp_path):
    out, features, _ = run
    model = load(out)
    told = model.image_info()["confidence"].to_numpy()
    assert told.dtype == np.float32
    assert 0 <= told.min() < told.max() <= 1
    features_, cluster = np.array(model.embedding_), torch.from_numpy(model.labels_.copy())
    offset = confidence.measure(features_, cluster, model.classifier_.centroids)
    assert torch.allclose(offset, model.classifier_.certainty, atol=1e-3)
    again = DeepCluster.from_pretrained(out / "model")
    for least in (0.0, float(np.median(told)), 1.0):
        expected = np.where(told < least, -1, model.labels_)
        assert (again.predict(features, abstain=least) != expected).mean() < 0.01  # those at the limit itself
    assert np.array_equal(again.predict(features), model.labels_)
    file = tmp_path / "p.parquet"
    assert main(["predict", str(out), str(out.parent / "x.npy"), "--out", str(file), "--abstain", "0.7"]) in (0, None)
    table = pq.read_table(file).to_pydict()
    assert np.allclose(table["confidence"], told, atol=1e-5)
    unsure = np.array(table["confidence"]) < 0.7
    assert 0 < unsure.sum() < 240
    assert np.array_equal(np.array(table["cluster"]) < 0, unsure)


def test_who_abstains_has_no_name(run, tmp_path):
    out, _, _ = run
    model = load(out)
    model.classifier_.first_names = ["red"] * 4
    model.classifier_._count()
    from deepcluster.results import images

    found = {name: model.image_info()[name].to_numpy() for name in model._found()}
    table = images(found, model.names_, model.names_, model.classifier_, 0.7)
    assert {(c < 0, n) for c, n in zip(*(table[x].to_pylist() for x in ("cluster", "name")), strict=True)} == {
        (True, ""),
        (False, "red"),
    }


@pytest.mark.parametrize("wrong", [1.5, -0.1, "much", float("nan"), None, True])
def test_what_abstain_may_be(run, wrong):
    out, features, _ = run
    with pytest.raises(ValueError, match="abstain must be a confidence between 0 and 1"):
        load(out).predict(features, abstain=wrong)


def test_it_follows_edits_and_their_undoing(run):
    out, _, _ = run
    model = load(out)
    before = model.image_info()["confidence"].to_numpy()
    model.merge_clusters([[0, 1]])
    try:
        merged = model.image_info()["confidence"].to_numpy()
        assert not np.allclose(merged[model.labels_ == 0], before[model.labels_ == 0], atol=0.01)
        again = load(out)
        assert np.array_equal(again.image_info()["confidence"].to_numpy(), merged)
        sure = again.classifier_.describe(again.embedding_)["confidence"]
        assert np.allclose(sure, merged, atol=1e-5)
        part = load(out).split_cluster(0)
        assert len(part.classifier_.certainty) == part.classifier_.n_clusters == 5
        part.undo()
    finally:
        load(out).undo()
    assert np.array_equal(load(out).image_info()["confidence"].to_numpy(), before)


def test_models_of_before_there_was_any(run, tmp_path):
    out, features, _ = run
    model = load(out)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["certainty"]
    save_file(weights, tmp_path / "model.safetensors")
    old = DeepCluster.from_pretrained(tmp_path)
    assert np.array_equal(old.predict(features), model.labels_)
    assert np.isfinite(old.classifier_.describe(model.embedding_)["confidence"]).all()


def test_calibration_error_by_hand():
    confidence_ = np.array([0.9, 0.9, 0.9, 0.9, 0.5, 0.5, 0.99, 0.2])
    cluster = np.array([0, 0, 0, 0, 1, 1, -1, 0])
    true = np.array([5, 5, 5, 7, 7, 7, 5, -1])
    found = reliability(confidence_, cluster, true)
    assert found["ece"] == pytest.approx((4 * abs(0.9 - 0.75) + 2 * abs(0.5 - 1)) / 6, abs=1e-6)
    assert found["reliability"] == [
        {"n": 2, "confidence": 0.5, "accuracy": 1.0},
        {"n": 4, "confidence": 0.9, "accuracy": 0.75},
    ]
    drawn = ET.fromstring(curve(found))
    assert len(drawn.findall(".//{*}circle")) == 2
    assert reliability(confidence_, cluster, np.full(8, -1)) == {}


def test_one_kind_has_one_cluster():
    """Of two clusters of one kind, the smaller has the wrong name: as in the accuracy."""
    found = reliability(np.ones(6), np.array([0, 0, 0, 0, 1, 1]), np.zeros(6, int))
    assert found["ece"] == pytest.approx(2 / 6, abs=1e-6)


def test_evaluate_draws_it(run, tmp_path, capsys):
    out, _, kind = run
    labels = tmp_path / "labels.csv"
    names = load(out).names_
    labels.write_text("path,label\n" + "\n".join(f"{name},{k}" for name, k in zip(names, kind, strict=True)))
    for more in ([], [str(out.parent / "x.npy")]):
        main(["evaluate", str(out), *more, "--labels", str(labels)])
        told = json.loads(capsys.readouterr().out)
        assert 0 <= told["ece"] <= 1
        assert sum(one["n"] for one in told["reliability"]) == 240
    assert "expected calibration error" in (out / "reliability.svg").read_text()
