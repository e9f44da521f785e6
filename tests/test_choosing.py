"""``deepcluster cluster``: which method, judged without labels, and the run that follows."""

import io
import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import cohen_kappa_score

from deepcluster import DeepCluster, choosing, foreign, load, metrics
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
    said = f"<dt>Method chosen</dt><dd><bdi>{chosen[0]['method']}, whose clusters agree"
    assert said in Path("run/report.html").read_text()
    model = load("run")
    assert metrics.accuracy(model.labels_, np.arange(160) % 4) == 1
    assert np.array_equal(model.predict(images), model.labels_)
    assert "report.html" in capsys.readouterr().out


class Screen(io.StringIO):
    def isatty(self):
        return True


def test_one_bar_over_the_whole_run(images, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Screen())
    assert main(["cluster", "images.npy", "--out", "run", *TINY[:-1]]) == 0
    said = sys.stderr.getvalue()
    drawn = re.findall(r"(\w+)( \w+)? +(\d+)%\|", said)
    shares = [int(share) for _, _, share in drawn]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0, 100)
    parts = [part for part, _ in itertools.groupby(drawn, lambda one: one[0])]
    assert parts == ["opening", "decoding", "features", "trying", "training", "results", "report", "done"]
    tried = [one for one, _ in itertools.groupby(name.strip() for part, name, _ in drawn if part == "trying")]
    assert tried[: len(choosing.TRIED)] == list(choosing.TRIED)
    assert "/s" not in said, "there is another bar"
    for line in ("160 images, about", "chosen: ", "plan: ", "160 images in"):
        assert f"\r{line}" in said, "a line stands behind the bar"


def test_no_bar_where_nobody_looks(images, monkeypatch, capsys):
    assert main(["cluster", "images.npy", "--out", "run", *TINY[:-1]]) == 0
    assert "%|" not in capsys.readouterr().err
    monkeypatch.setattr(sys, "stderr", Screen())
    assert main(["cluster", "images.npy", "--out", "other", *TINY]) == 0
    assert "%|" not in sys.stderr.getvalue()


def test_a_run_of_one_method_keeps_its_bars(images, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Screen())
    assert main(["fit", "images.npy", "--out", "run", "--method", "kmeans", *TINY[:-1]]) == 0
    said = sys.stderr.getvalue()
    assert all(
        re.search(rf"{name}: +100%\|.*{unit}/s", said) for name, unit in (("features", "image"), ("kmeans", "step"))
    )


def test_the_same_seed_chooses_the_same(images):
    given = {"method": "best", "backbone": "tiny_choices:make", "image_size": 16, "epochs": 3}
    one, other = (DeepCluster(4, **given).fit(images) for _ in range(2))
    assert one.plan_ == other.plan_
    assert np.array_equal(one.labels_, other.labels_)
    scores = [[(c["method"], c["score"]) for c in model._data["chosen"]] for model in (one, other)]
    assert scores[0] == scores[1]


@pytest.fixture
def threads():
    """Two of them; as few as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield 2
    torch.set_num_threads(before)


def test_a_method_that_fails_is_named_and_the_others_go_on(images, monkeypatch, threads):
    seen, real = set(), choosing._labels

    def labels(settings, *more):
        seen.add(torch.get_num_threads())
        if settings.method == "temi":
            raise FloatingPointError("the loss is nan")
        return real(settings, *more)

    monkeypatch.setattr(choosing, "_labels", labels)
    assert main(["cluster", "images.npy", "--out", "run", *TINY]) == 0
    assert "not to be chosen: temi: the loss is nan" in Path("run/train.log").read_text()
    chosen = json.loads(Path("run/config.json").read_text())["data"]["chosen"]
    assert {one["method"] for one in chosen} == set(choosing.TRIED) - {"temi"}
    assert seen == {1}


def test_one_thread_is_for_a_while(threads):
    with choosing.one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == threads


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
    monkeypatch.setattr(foreign, "LITE_FROM", ("no-such-package",))
    assert main(["cluster", "images.npy", "--out", "run"]) == 2
    said = capsys.readouterr().err
    assert "none is at hand: give --backbone NAME --weights FILE" in said
    assert len(said.splitlines()) == 1
