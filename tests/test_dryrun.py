"""What ``--dry-run`` says of memory, disk and time. Its figures on real runs are in docs/results.md."""

import re

import numpy as np
import pytest

from deepcluster import dryrun
from deepcluster.__main__ import main
from deepcluster.plan import Stage


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


def test_images_that_make_no_labels_faster_never_count_below_zero():
    assert dryrun._stage(stage("deepcluster", epochs=3), [1.0, 2.0, 1.0], 100, 100) == pytest.approx(3 * 2.0)


@pytest.mark.parametrize("method", ["sela", "byol+sela"])
def test_the_disk_it_names_is_what_the_run_takes(tmp_path, monkeypatch, capsys, method):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    np.save("images.npy", rng.integers(0, 256, (400, 16, 16), dtype=np.uint8))
    plan = ["--method", method, "--epochs", "2", "--batch-size", "64", "--n-clusters", "4", "--quiet"]
    assert main(["fit", "images.npy", "--dry-run", *plan]) == 0
    shown = capsys.readouterr().out
    said = float(re.search(r"\+ (\d+) MB run", shown)[1])
    assert main(["fit", "images.npy", "--out", "run", *plan]) == 0
    taken = sum(f.stat().st_size for f in (tmp_path / "run").rglob("*") if f.is_file()) / 1e6
    assert said == pytest.approx(taken, rel=0.25, abs=1.5)
    for word in (*method.split("+"), "results", "together", "nothing was written"):
        assert word in shown
