"""Confidence: what it is made of, that new images, edits and files keep it, and what its errors are measured by."""

import json
import xml.etree.ElementTree as ET

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from deepcluster import DeepCluster, confidence, ending, load
from deepcluster.__main__ import main
from deepcluster.reliability import curve, reliability
from deepcluster.sources import open_source
from deepcluster.store import open_store


def groups(n=600, k=4, dim=8, spread=0.15, seed=0):
    """Features (n, dim) around k directions, and which."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, k, n)
    return (np.eye(k, dim)[kind] + spread * rng.normal(size=(n, dim))).astype(np.float32), kind


def head(features, temperature=0.1):
    """A head with the first axes as its directions: features -> probabilities of 4 clusters, ids."""
    p = (torch.nn.functional.normalize(features, dim=1)[:, :4] / temperature).softmax(1)
    return p, p.argmax(1)


def judged(features, judge=head, looks=None, trust=None):
    """Confidence of each row, as measured on all."""
    features = np.asarray(features, np.float32)
    trust = confidence.measure(judge, features, confidence.unknown() if trust is None else trust, looks)
    return confidence.of(*judge(torch.from_numpy(features)), trust).numpy()


def test_the_mean_is_the_agreement_of_two_views():
    """Of clear groups the other clusterings are the same, so what is left is how often the views have one cluster."""
    features, kind = groups(spread=0.02)
    rng = np.random.default_rng(1)
    looks = np.stack([features, features])
    moved = rng.permutation(600)[:120]
    looks[1, moved] = np.eye(4, 8)[(kind[moved] + 1) % 4]  # the second view of each fifth image looks like another kind
    found = judged(features, looks=torch.from_numpy(looks))
    assert found.mean() == pytest.approx(0.8, abs=0.005)
    assert judged(features).mean() > 0.999


@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
def test_however_sure_the_network_is(temperature):
    features, _ = groups(spread=0.35)
    looks = torch.from_numpy(np.stack([features, groups(spread=0.35)[0]]))
    found = [judged(features, lambda x, t=t: head(x, t), looks) for t in (temperature, 0.3)]
    assert np.allclose(*found, atol=1e-3)


def test_by_hand():
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.0, 0.9], [1.0, 0.0, 0.0]])
    for a in (0.5, 1.0, 3.0):
        expected = [0.3**a / (0.5**a + 0.3**a + 0.2**a), 0.9**a / (0.1**a + 0.9**a), 1.0]
        assert np.allclose(confidence.of(p, torch.tensor([1, 2, 0]), torch.tensor([a, 0.3])), expected)
    assert np.allclose(confidence.of(p, p.argmax(1), confidence.unknown()), p.amax(1))


def test_clear_groups_are_trusted_and_noise_is_not():
    features, _ = groups()
    assert judged(features).mean() > 0.99
    noise = np.random.default_rng(0).normal(size=(600, 8)).astype(np.float32)
    assert judged(noise).mean() < 0.7  # cut somehow
    by_chance = torch.from_numpy(np.random.default_rng(1).permutation(600) % 4)

    def blind(x):
        return torch.full((len(x), 4), 0.25) + 0.1 * torch.eye(4)[by_chance[: len(x)]], by_chance[: len(x)]

    assert judged(noise, blind).mean() < 0.4


def test_clusters_are_not_doubted_because_k_means_went_astray(monkeypatch):
    """Many groups of uneven size: k-means finds them from where they are, and hardly ever from elsewhere."""
    rng = np.random.default_rng(0)
    kind = rng.choice(16, 1000, p=(w := 1 / np.arange(3, 19)) / w.sum())
    features = (np.eye(16)[kind] + 0.05 * rng.normal(size=(1000, 16))).astype(np.float32)

    def judge(x):
        p = (10 * x).softmax(1)
        return p, p.argmax(1)

    monkeypatch.setattr(confidence, "STARTS", 2)
    assert judged(features, judge).mean() > 0.99


def test_where_the_features_can_be_cut_better_it_shows():
    """Two kinds in one cluster, another in two: other clusterings find the kinds."""
    features, kind = groups(k=5, spread=0.05)

    def crossed(x):
        which = x[:, :5].argmax(1)
        which = torch.where(which == 4, 3, torch.where((which == 0) & (x[:, 5] > 0), 4, which))
        return (5 * torch.eye(5)[which]).softmax(1), which

    part = features[kind == 0, 5] > 0
    wrong = min((kind == 3).sum(), (kind == 4).sum()) + min(part.sum(), (~part).sum())
    assert judged(features, crossed).mean() == pytest.approx(1 - wrong / 600, abs=0.02)


def test_without_views_the_share_that_was_found_with_them_is_kept():
    features, kind = groups(spread=0.02)
    looks = np.stack([features, features])
    looks[1, :150] = np.eye(4, 8)[(kind[:150] + 1) % 4]
    trust = confidence.measure(head, features, confidence.unknown(), torch.from_numpy(looks))
    assert trust[1].item() == pytest.approx(0.75, abs=0.005)
    again = confidence.measure(head, features, trust)
    assert again[1] == trust[1]
    assert torch.allclose(again, trust, rtol=1e-4)


def test_the_same_again_and_without_a_mark_on_other_draws():
    features, _ = groups(spread=0.3)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = judged(features)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(4)
    assert np.array_equal(first, judged(features))
    assert np.allclose(first, judged(7 * features), atol=1e-3)


def test_a_sample_is_enough(monkeypatch):
    features, _ = groups(2000, spread=0.3)
    whole = judged(features)
    monkeypatch.setattr(confidence, "SAMPLE", 400)
    assert np.abs(judged(features) - whole).mean() < 0.03


def test_an_image_is_not_its_own_neighbour():
    unit = torch.nn.functional.normalize(torch.from_numpy(groups(700)[0]), dim=1)
    far = torch.cdist(unit, unit).fill_diagonal_(9)
    assert torch.equal(confidence._neighbour(unit), far.argmin(1))


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_few_images(n):
    features = np.eye(8, dtype=np.float32)[:n]
    assert np.isfinite(judged(features)).all()
    assert np.isfinite(judged(features, looks=torch.from_numpy(np.stack([features, features])))).all()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on features, trained for a moment; its images, and their kinds."""
    features, kind = groups(240, spread=0.35)
    out = tmp_path_factory.mktemp("run") / "run"
    np.save(out.parent / "x.npy", features)
    DeepCluster(4, method="deepcluster", epochs=3, out=str(out)).fit(str(out.parent / "x.npy"))
    return out, features, kind


def test_new_images_have_the_same_as_old_ones(run, tmp_path, capsys):
    out, features, _ = run
    model = load(out)
    told = model.image_info()["confidence"].to_numpy()
    assert told.dtype == np.float32
    assert 0 <= told.min() < told.max() <= 1
    judge, trust = model.classifier_.judge, model.classifier_.trust
    looks = ending._looks(model.classifier_, open_store(open_source(features), size=0, channels=0))
    assert looks.shape == (2, 240, model.classifier_.dim)
    assert (looks[0] != looks[1]).any(1).all()
    assert torch.allclose(confidence.measure(judge, model.embedding_, confidence.unknown(), looks), trust, atol=1e-3)
    one, two = (judge(look)[1] for look in looks)
    assert told.mean() == pytest.approx((one == two).float().mean().item(), abs=0.1)
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
    assert f"240 images, {unsure.sum()} of them in no cluster (confidence below 0.7): {file}" in capsys.readouterr().out
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
        assert part.classifier_.trust[1] == model.classifier_.trust[1] < 1
        assert part.classifier_.n_clusters == 5
        part.undo()
    finally:
        load(out).undo()
    assert np.array_equal(load(out).image_info()["confidence"].to_numpy(), before)


def test_models_of_before_there_was_any(run, tmp_path):
    out, features, _ = run
    model = load(out)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["trust"]
    weights["certainty"] = torch.zeros(4)
    save_file(weights, tmp_path / "model.safetensors")
    old = DeepCluster.from_pretrained(tmp_path)
    assert np.array_equal(old.predict(features), model.labels_)
    found = old.classifier_.describe(model.embedding_)
    assert np.allclose(found["confidence"], found["probability"], atol=1e-5)


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
