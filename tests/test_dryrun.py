"""What ``--dry-run`` says of memory, disk and time. Its figures on real runs are in docs/results.md."""

import itertools
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from deepcluster import choosing, doctor, dryrun, trust
from deepcluster.__main__ import main
from deepcluster.plan import Stage
from deepcluster.recipe import Clock

NETWORK = """
import torch
from torch import nn


def make(channels=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(channels, 12, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""
TINY = ("--backbone", "tiny_dry:make", "--image-size", "16", "--n-clusters", "4", "--epochs", "4", "--batch-size", "20")


@pytest.fixture
def images(tmp_path, monkeypatch):
    """160 images in images.npy of the current directory, beside a tiny backbone."""
    (tmp_path / "tiny_dry.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trust, "_given", set())
    np.save("images.npy", np.random.default_rng(0).integers(0, 256, (160, 16, 16, 3), dtype=np.uint8))
    yield tmp_path
    sys.modules.pop("tiny_dry", None)


def stage(method="sela", epochs=10, batch_size=10, **params):
    return Stage(method, {"n_clusters": 5, **params}, epochs, batch_size, 1e-3)


def test_labels_are_counted_as_often_as_they_are_made():
    made = stage("deepcluster", epochs=10)  # labels every epoch
    # of 100 images: 10 steps in 1 s, labels in 2 s, the first ones in 5 s
    assert dryrun._stage(made, [6.0, 1.0, 3.0], 100, 100) == pytest.approx(10 * 1 + 5 + 9 * 2)
    assert dryrun._stage(made, [6.0, 1.0, 3.0], 1000, 100) == pytest.approx(10 * (10 * 1 + 5 + 9 * 2))


def test_a_method_without_labels_takes_its_steps():
    made = stage("iic", epochs=7, batch_size=30)
    assert dryrun._stage(made, [9.0, 2.0, 1.0], 95, 60) == pytest.approx(7 * 3 * 0.5)  # the quicker epoch, of 2 steps


def test_steps_are_whole_batches():
    made = stage("iic", epochs=7, batch_size=30)
    assert dryrun._stage(made, [9.0, 2.0, 1.0], 95, 80) == pytest.approx(7 * 3 * 0.5)  # 3 steps; 2 were tried


@pytest.mark.parametrize("method", ["sela", "deepcluster", "scan"])
def test_labels_are_those_of_the_whole_stage_and_not_of_three_epochs(method):
    made = stage(method, epochs=40)
    refresh = made.recipe().refresh
    times = sum(refresh.due(Clock(epoch, 40)) for epoch in range(40))
    assert dryrun._stage(made, [1.0, 1.0, 2.0], 100, 100) == pytest.approx(40 + times)
    tried = dryrun._Tried(**vars(made)).recipe().refresh
    assert [tried.due(Clock(epoch, 3)) for epoch in range(3)] == [True, False, True]


def test_images_that_make_no_labels_faster_never_count_below_zero():
    assert dryrun._stage(stage("deepcluster", epochs=3), [1.0, 2.0, 1.0], 100, 100) == pytest.approx(3 * 2.0)


@pytest.mark.parametrize("method", ["sela", "byol+sela"])
def test_the_disk_it_names_is_what_the_run_takes(tmp_path, monkeypatch, capsys, method):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dryrun, "_mb", lambda n: f"{n / 1e3:.0f} kB")
    rng = np.random.default_rng(0)
    np.save("images.npy", rng.integers(0, 256, (400, 16, 16), dtype=np.uint8))
    plan = ["--method", method, "--epochs", "2", "--batch-size", "64", "--n-clusters", "4", "--quiet"]
    assert main(["fit", "images.npy", "--dry-run", *plan]) == 0
    shown = capsys.readouterr().out
    said, checkpoint = (float(re.search(rf"(\d+) kB {what}", shown)[1]) for what in ("run", "its checkpoint"))
    assert main(["fit", "images.npy", "--out", "run", *plan]) == 0
    files = {str(f.relative_to("run")): f.stat().st_size / 1e3 for f in Path("run").rglob("*") if f.is_file()}
    assert said == pytest.approx(sum(files.values()), rel=0.02)
    assert checkpoint == pytest.approx(files["checkpoints/last.pt"], rel=0.02)
    large = ("last.pt", "features.npy", ".safetensors", ".html")
    rest = sum(size for name, size in files.items() if not name.endswith(large))
    assert pytest.approx(rest, rel=0.3) == dryrun.FILES * 400 / 1e3
    for word in (*method.split("+"), "results", "together", "nothing was written"):
        assert word in shown


@pytest.mark.parametrize("command", [["fit"], ["fit", "--method", "sela"], ["cluster"]])
def test_nothing_is_written(images, capsys, command):
    before, cache = sorted(images.rglob("*")), os.environ["DEEPCLUSTER_CACHE"]
    assert main([*command, "images.npy", "--out", "run", *TINY, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "nothing was written" in shown
    assert "unless they are in the cache" in shown
    assert (f"for {len(choosing.TRIED)} methods" in shown) == (command == ["cluster"])
    assert [path for path in sorted(images.rglob("*")) if "__pycache__" not in path.parts] == before
    assert os.environ["DEEPCLUSTER_CACHE"] == cache
    assert list(doctor.cache_dir().rglob("*")) == []


def test_the_cache_of_who_names_none_is_named_none_again(monkeypatch):
    monkeypatch.delenv("DEEPCLUSTER_CACHE")
    with dryrun._apart() as folder:
        assert doctor.cache_dir().is_relative_to(folder)
    assert "DEEPCLUSTER_CACHE" not in os.environ
    assert not folder.exists()


def test_the_lines_are_the_arithmetic_of_what_was_tried(images, monkeypatch, capsys):
    tried = {}

    def one(plan, sample, job):
        tried["n"] = len(sample)
        return dryrun._Found(2.0, {0: [3.0, 1.0, 1.5]}, (5.0, 1.0), (1000, 100), 7, 12)

    def figures(*command):
        assert main([*command, "images.npy", *TINY, "--dry-run", "--quiet"]) == 0
        shown = capsys.readouterr().out
        return shown, {line.split()[0]: [float(x) for x in re.findall(r"<(.*?)>", line)] for line in shown.splitlines()}

    for name, value in (("MOST", 1), ("MAP", 100), ("_try", one), *((f, lambda x: f"<{x}>") for f in ("_mb", "_time"))):
        monkeypatch.setattr(dryrun, name, value)
    ticks = itertools.count()
    monkeypatch.setattr(dryrun, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    monkeypatch.setattr(doctor, "peak_memory", lambda: 5000)
    monkeypatch.setattr(doctor, "free_memory", lambda: 10**7)
    shown, said = figures("fit", "--method", "iic")
    n, m, held = 160, tried["n"], 3 * 16 * 16
    assert m == 40, "twice a batch"
    assert said["images"] == [n * held]
    assert said["memory"] == [5000 + (n - m) * (dryrun.WORDS + held), 10**7]
    assert said["disk"][:3] == [n * (held + 2 * 12), 1100 + n * (4 * 7 + dryrun.FILES), 1000]
    assert said["decoding"] == [1.0 * n / m]
    assert said["features"] == [2.0 * n / m]
    assert said["iic"] == [4 * 8 * 1.0 / 2]
    assert said["results"] == [(5.0 - 1.0) * n / m + 1.0 * 100 / m]
    parts = ("decoding", "features", "iic", "results")
    assert said["together"] == [pytest.approx(sum(said[part][0] for part in parts))]
    assert "to be cached" in shown

    monkeypatch.setattr(doctor, "free_memory", lambda: 10**5)
    assert figures("fit")[1]["memory"] == [5000 + (n - m) * dryrun.WORDS, 10**5], "images are read from disk"
    chosen = lambda settings, store, progress: (replace(settings, method="sela"), [])
    monkeypatch.setattr(choosing, "choose", chosen)
    _, said = figures("cluster")
    assert said["trying"] == [pytest.approx((n / m) ** (2 / 3))]
    parts = ("decoding", "features", "trying", "sela", "results")
    assert said["together"] == [pytest.approx(sum(said[part][0] for part in parts))]
    assert main(["fit", "images.npy", "--out", "run", "--method", "kmeans", *TINY, "--quiet"]) == 0
    shown, said = figures("fit", "--method", "iic")
    assert "in the cache already" in shown
    assert said["disk"][0] == n * 2 * 12
    assert said["decoding"] == [0]
    assert said["together"] == [said["features"][0] + said["iic"][0] + said["results"][0]]
