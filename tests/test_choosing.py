"""``deepcluster cluster``: which method, judged without labels, and the run that follows."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from deepcluster import DeepCluster, choosing, load, metrics
from deepcluster.__main__ import main

NETWORK = """
import torch
from torch import nn


def make(channels=3):
    torch.manual_seed(0)
    first = nn.Conv2d(channels, 12, 3)
    return nn.Sequential(first, nn.BatchNorm2d(12), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""
TINY = ("--backbone", "tiny_choices:make", "--image-size", "16", "--n-clusters", "4", "--epochs", "4", "--quiet")


@pytest.fixture
def images(tmp_path, monkeypatch):
    """(160, 3, 16, 16) uint8 in four colours, in images.npy of the current directory."""
    (tmp_path / "tiny_choices.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEEPCLUSTER_CACHE", str(tmp_path / "cache"))
    colour = np.array([[220, 40, 40], [40, 220, 40], [40, 40, 220], [200, 200, 30]])
    noise = np.random.default_rng(0).normal(0, 30, (160, 3, 16, 16))
    made = np.clip(colour[np.arange(160) % 4][:, :, None, None] + noise, 0, 255).astype(np.uint8)
    np.save("images.npy", made)
    yield made
    sys.modules.pop("tiny_choices", None)


def test_consistency_is_1_where_neighbours_agree_and_0_as_by_chance():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 3000)
    same = np.stack([rng.choice(np.flatnonzero(labels == own), 4) for own in labels])
    assert choosing.consistency(labels, same) == 1
    assert abs(choosing.consistency(labels, rng.integers(0, 3000, (3000, 4)))) < 0.03
    assert choosing.consistency(np.zeros(50, int), rng.integers(0, 50, (50, 4))) == 0


def test_consistency_of_one_neighbour_each_is_cohens_kappa_where_sizes_are_alike():
    labels = np.array([0, 0, 1, 1, 2, 2])
    near = np.array([1, 0, 3, 4, 2, 5])
    assert choosing.consistency(labels, near[:, None]) == pytest.approx(cohen_kappa_score(labels, labels[near]))


def test_the_command_makes_a_whole_run_and_says_why(images, capsys):
    assert main(["cluster", "images.npy", "--out", "run", *TINY]) == 0
    config = json.loads(Path("run/config.json").read_text())
    chosen = config["data"]["chosen"]
    assert {one["method"] for one in chosen} <= set(choosing.TRIED)
    assert config["plan"]["stages"][0]["method"] == chosen[0]["method"]
    assert config["plan"]["frozen"] is True
    assert chosen[0]["score"] == max(one["score"] for one in chosen if one["stability"] is not None)
    assert all(one["score"] <= chosen[0]["score"] for one in chosen if one["stability"] is None)
    assert f"chosen: {chosen[0]['method']}, whose clusters agree" in Path("run/train.log").read_text()
    model = load("run")
    assert metrics.accuracy(model.labels_, np.arange(160) % 4) == 1
    assert np.array_equal(model.predict(images), model.labels_)
    assert "report.html" in capsys.readouterr().out


def test_the_same_seed_chooses_the_same(images):
    given = {"method": "best", "backbone": "tiny_choices:make", "image_size": 16, "epochs": 3}
    one, other = (DeepCluster(4, **given).fit(images) for _ in range(2))
    assert one.plan_ == other.plan_
    assert np.array_equal(one.labels_, other.labels_)
    scores = [[(c["method"], c["score"]) for c in model._data["chosen"]] for model in (one, other)]
    assert scores[0] == scores[1]


def test_a_chosen_run_can_be_gone_on_with(images):
    assert main(["cluster", "images.npy", "--out", "run", *TINY]) == 0
    labels = load("run").labels_
    assert main(["cluster", "--resume", "run", "--quiet"]) == 0
    assert np.array_equal(load("run").labels_, labels)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--no-frozen"], "methods are compared on the features of a pretrained backbone"),
        (["--tune-last", "1"], "methods are compared on the features of a pretrained backbone"),
        (["--set", "restarts=3"], "leave --set out"),
    ],
)
def test_what_cannot_be_chosen_among(images, capsys, args, says):
    assert main(["cluster", "images.npy", "--out", "run", *TINY, *args]) == 2
    assert says in capsys.readouterr().err


def test_no_backbone_at_hand_is_one_clear_line(images, monkeypatch, capsys):
    monkeypatch.setattr(choosing, "LITE", ("no_such_package",))
    assert main(["cluster", "images.npy", "--out", "run"]) == 2
    said = capsys.readouterr().err
    assert "none is at hand: give --backbone NAME --weights FILE" in said
    assert len(said.splitlines()) == 1
