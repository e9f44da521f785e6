"""Vectors that are features already: clustered as they are, by the backbone ``identity``."""

import json

import numpy as np
import pytest
import torch

from deepcluster import DeepCluster, choosing, load, metrics
from deepcluster.__main__ import main
from deepcluster.backbones import make_backbone


def groups(n=240, k=4, d=12, seed=0):
    """(n, d) float32 in k groups, far from 0 and small, and which group."""
    rng = np.random.default_rng(seed)
    which = np.arange(n) % k
    return (0.01 * (rng.normal(size=(k, d)) * 4 + 50)[which] + 0.01 * rng.normal(size=(n, d))).astype(np.float32), which


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEEPCLUSTER_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_vectors_keep_their_distances_and_get_one_number_more():
    x = torch.from_numpy(groups(50)[0])
    net, dim = make_backbone("identity", (12,), x.mean(0), x.std(0, correction=0))
    found = net(x)
    assert (dim, found.shape) == (13, (50, 13))
    ratio = torch.pdist(found) / torch.pdist(x)
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-3, atol=0)
    assert found[:, :12].square().mean().item() == pytest.approx(1, rel=1e-4)
    assert (found[:, 12] == 12**0.5).all()


def test_columns_that_are_constant_do_not_set_the_scale():
    x = torch.from_numpy(groups(50)[0])
    mean, std = x.mean(0), x.std(0, correction=0)
    mean, std = torch.cat([mean, torch.zeros(9)]), torch.cat([std, torch.ones(9)])  # as Store.statistics says it
    found = make_backbone("identity", (21,), mean, std)[0](torch.cat([x, torch.zeros(50, 9)], 1))
    assert found[:, :12].square().mean().item() == pytest.approx(1, rel=1e-4)
    constant = make_backbone("identity", (3,), torch.zeros(3), torch.ones(3))[0]
    assert torch.equal(constant(torch.ones(2, 3))[:, :3], torch.ones(2, 3))


def test_images_are_no_vectors():
    with pytest.raises(ValueError, match=r"identity takes vectors; the data has shape \(3, 8, 8\)"):
        make_backbone("identity", (3, 8, 8))
    with pytest.raises(ValueError, match=r"convnet takes images; the data has shape \(8,\)"):
        make_backbone("convnet", (8,))


def test_cluster_takes_vectors_and_needs_no_network(here, monkeypatch, capsys):
    x, which = groups()
    np.save("x.npy", x)
    monkeypatch.setattr(choosing, "at_hand", lambda: pytest.fail("no network is wanted"))
    assert main(["cluster", "x.npy", "--n-clusters", "4", "--out", "run", "--quiet"]) == 0
    model = load("run")
    config = json.loads((here / "run/config.json").read_text())
    assert {one["method"] for one in config["data"]["chosen"]} >= {"kmeans", "spectral", "temi"}
    assert model.plan_.backbone == "identity"
    assert metrics.accuracy(model.labels_, which) == 1
    assert np.array_equal(model.predict(x), model.labels_)
    assert main(["cluster", "x.npy", "--n-clusters", "4", "--method", "temi", "--out", "run2", "--quiet"]) == 0
    assert [stage.method for stage in load("run2").plan_.stages] == ["temi"]


def test_best_and_auto_are_at_home_with_vectors(here):
    x, which = groups()
    model = DeepCluster(4, method="best").fit(x)
    assert model.plan_.backbone == "identity"
    assert metrics.accuracy(model.labels_, which) == 1
    assert [stage.method for stage in DeepCluster(4, backbone="identity", epochs=1).fit(x).plan_.stages] == ["spectral"]


def test_vectors_go_on_exactly_where_they_stopped(here):
    class Crash(Exception): ...

    def crash(report):
        if report.clock.epoch == 2:
            raise Crash

    np.save("x.npy", groups()[0])
    given = {"backbone": "identity", "method": "sela", "epochs": 4}
    whole = DeepCluster(4, **given, out="whole").fit("x.npy")
    stopped = DeepCluster(4, **given, out="stopped")
    with pytest.raises(Crash):
        stopped.fit("x.npy", hooks=[crash])
    stopped._resume()
    assert np.array_equal(stopped.labels_, whole.labels_)
    assert np.array_equal(stopped.predict_proba(groups()[0]), whole.predict_proba(groups()[0]))


@pytest.mark.parametrize("what", [["--frozen"], ["--tune-last", "1"]])
def test_there_is_nothing_to_keep_or_tune(here, capsys, what):
    np.save("x.npy", groups()[0])
    assert main(["cluster", "x.npy", *what, "--out", "run"]) == 2
    assert f"{' '.join(what)} is for images; the source holds vectors" in capsys.readouterr().err


@pytest.mark.parametrize("what", [["--backbone", "mlp"], ["--init-from", "before"]])
def test_methods_are_compared_on_vectors_as_they_are(here, capsys, what):
    np.save("x.npy", groups()[0])
    DeepCluster(4, method="sela", epochs=1, out="before").fit("x.npy")
    assert main(["cluster", "x.npy", *what, "--out", "run"]) == 2
    assert "on vectors as they are: leave --backbone, --weights and --init-from out" in capsys.readouterr().err


def test_groups_that_differ_in_length_alone_are_told_apart(here):
    which = np.arange(200) % 4
    np.save("x.npy", ((10 + 10 * which)[:, None] + np.random.default_rng(0).normal(size=(200, 3))).astype(np.float32))
    assert main(["cluster", "x.npy", "--n-clusters", "4", "--out", "run", "--quiet"]) == 0
    chosen = json.loads((here / "run/config.json").read_text())["data"]["chosen"]
    assert chosen[0]["consistency"] > 0.99
    assert metrics.accuracy(load("run").labels_, which) == 1
