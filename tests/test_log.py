"""metrics.jsonl and train.log."""

import io
import itertools
import json
import logging
import re
import sys

import numpy as np
import pytest
import torch
from tiny import make_model, tiny_store

from deepcluster import log
from deepcluster.log import Metrics, Recording, logger, row
from deepcluster.recipe import make_recipe
from deepcluster.trainer import Training, fit


@pytest.fixture
def reports():
    recipe, seen = make_recipe("iic", n_clusters=3), []
    fit(make_model(recipe), tiny_store(), recipe, Training(epochs=2, batch_size=40), [seen.append])
    return seen


def test_a_row(reports):
    one = row(reports[1])
    assert (one["stage"], one["epoch"]) == (0, 2)
    assert one["loss"] == pytest.approx(reports[1].loss, abs=1e-6)
    health = one["health"]
    assert 1 <= health["active"] <= 3
    assert 1 / 3 <= health["largest_share"] <= 1
    assert 0 <= health["nmi_previous"] <= 1
    assert row(reports[0])["health"]["nmi_previous"] is None


def test_scores_are_of_the_images_that_have_a_class(tmp_path, reports):
    report = reports[0]
    head = report.state.reported(report.recipe.rivals)
    true = report.state.predicted[head].numpy().astype(np.int64).copy()
    true[:10] = -1
    Metrics(tmp_path / "m.jsonl", true)(report)
    one = json.loads((tmp_path / "m.jsonl").read_text())
    assert one["acc"] == one["ari"] == 1
    assert one["health"] == row(report)["health"]
    Metrics(tmp_path / "n.jsonl")(report)
    assert "acc" not in json.loads((tmp_path / "n.jsonl").read_text())


def lines(*of):
    return "".join(json.dumps({"stage": stage, "epoch": epoch}) + "\n" for stage, epoch in of)


@pytest.mark.parametrize(
    ("there", "at", "kept"),
    [
        (lines((0, 1), (0, 2), (1, 1)), (0, 2), lines((0, 1), (0, 2))),
        (lines((0, 1), (0, 2), (1, 1)), (1, 1), lines((0, 1), (0, 2), (1, 1))),
        (lines((0, 1), (0, 2))[:-5], (0, 1), lines((0, 1))),
        (lines((0, 1), (0, 2))[:-1], (0, 2), lines((0, 1))),  # complete but for its end: being written
        ("\0\0\n" + lines((0, 1)), (0, 1), lines((0, 1))),
        (lines((0, 1)), (-1, 0), ""),
        (None, (0, 1), ""),
    ],
)
def test_rewind_keeps_what_the_checkpoint_knows(tmp_path, there, at, kept):
    path = tmp_path / "m.jsonl"
    if there is not None:
        path.write_text(there)
    Metrics(path).rewind(*at)
    assert path.read_text() == kept
    assert [p.name for p in tmp_path.iterdir()] == ["m.jsonl"]


def test_the_log_has_what_was_said_before_it_had_a_file(tmp_path):
    level = logger.level
    with Recording() as record:
        logger.info("first")
        record.into(tmp_path / "train.log")
        logger.debug("second \udcff")
        assert "second" in (tmp_path / "train.log").read_text(), "a killed run must leave its log"
    logger.warning("third")
    said = [line.split(maxsplit=2)[2] for line in (tmp_path / "train.log").read_text().splitlines()]
    assert said == ["first", "second \\udcff"]
    assert logger.level == level
    assert not [h for h in logger.handlers if isinstance(h, logging.handlers.MemoryHandler)]


def test_the_bar_over_a_whole_run_never_goes_back(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with log.whole(False):
        for part, share in (("trying", 0.5), ("features", 0.9), ("training", 2.0), ("results", 0.0)):
            log.at(part, share)
    done = 100 - log.PARTS["results"]
    drawn = [int(share) for share in re.findall(r"(\d+)%", sys.stderr.getvalue())]
    assert sum(log.PARTS.values()) == 100
    assert [share for share, _ in itertools.groupby(drawn)] == [0, 75, done, 100]
    log.at("trying", 0.5)  # no bar: nothing happens


def test_hooks_come_before_the_checkpoint(tmp_path):
    """So that no epoch which a checkpoint knows can be missing from metrics.jsonl, whenever the run is killed."""
    recipe, there = make_recipe("iic", n_clusters=3), []
    torch.manual_seed(0)
    training = Training(epochs=1, batch_size=40, out=tmp_path)
    fit(make_model(recipe), tiny_store(), recipe, training, [lambda _: there.append((tmp_path / "last.pt").exists())])
    assert there == [False]


def test_a_part_of_which_nothing_is_left_to_do_is_no_fault(capsys):
    with log.whole(hide=False):
        assert list(log.bar("features", of=range(0), total=0, desc="features")) == []
