"""The figures of an epoch that need no label: what they are, and what they say."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import join, leave, make_model, noise, store_of, tiny_store, two_ranks

from deepcluster import health, metrics, trainer
from deepcluster.recipe import METHODS, Clock, make_recipe
from deepcluster.sentinel import Collapse, Sentinel
from deepcluster.trainer import Training, fit

TRAINING = Training(epochs=5, batch_size=32, lr=0.01)


def test_the_effective_rank():
    rng = torch.Generator().manual_seed(0)
    wide = torch.randn(256, 64, generator=rng)
    assert health.effective_rank(torch.ones(20, 8)) == 0
    assert health.effective_rank(torch.zeros(20, 8)) == 0
    line = torch.arange(20.0)[:, None] * torch.ones(1, 8)
    assert health.effective_rank(line) == pytest.approx(1)
    assert 45 < health.effective_rank(wide) < 64
    assert health.effective_rank(wide + 1000) == pytest.approx(health.effective_rank(wide), rel=1e-3)
    assert health.effective_rank(wide.T.contiguous()) < 64
    assert health.effective_rank(torch.full((4, 3), float("nan"))) == 0


FLAT = {"sela": np.log(3), "rotnet": np.log(4), "simclr": np.log(63), "iic": 0.0, "byol": 2.0, "swav": None}


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"selflabel"}))
def test_the_loss_of_a_collapsed_network_is_known_for_every_method(method):
    recipe, seen = make_recipe(method, n_clusters=3), []
    if "overcluster" in METHODS[method].__code__.co_varnames:
        recipe = make_recipe(method, n_clusters=3, overcluster=1)
    known = torch.arange(96) % 3 if recipe.supervised else None
    channels = 3 if method in ("jigsaw", "context") else 1
    store = tiny_store(size=24) if channels == 1 else store_of(noise(96, 3, 24))
    fit(make_model(recipe, channels=channels), store, recipe, replace(TRAINING, epochs=1), [seen.append], known=known)
    flat_loss = seen[0].health["flat_loss"]
    assert np.isfinite(flat_loss)
    if FLAT.get(method) is not None:
        assert flat_loss == pytest.approx(FLAT[method], abs=1e-4)


def test_looking_changes_nothing(monkeypatch):
    recipe = make_recipe("sela", n_clusters=3)
    watched, blind = make_model(recipe), make_model(recipe)
    fit(watched, tiny_store(), recipe, TRAINING)
    monkeypatch.setattr(trainer, "examine", lambda *_: {})
    monkeypatch.setattr(trainer, "flat_loss", lambda *_: None)
    fit(blind, tiny_store(), recipe, TRAINING)
    for key, value in watched.state_dict().items():
        assert torch.equal(value, blind.state_dict()[key]), key


def test_the_first_half_of_a_stage_may_have_the_loss_of_a_flat_network():
    fine = {"rank": 5.0, "flat_loss": 2.3, "active": 6, "largest_share": 0.3}
    at = lambda epoch, steps=100: Clock(epoch, 10, steps - 1, steps)
    assert health.symptom(fine, 2.29, 6, 600, at(3)) is None
    assert health.symptom(fine, 2.29, 6, 600, at(4)).change == "lr"
    assert health.symptom(fine, 2.29, 6, 600, at(9, steps=9)) is None  # hardly begun
    assert health.symptom(fine, 2.1, 6, 600, at(9)) is None
    assert health.symptom(fine | {"flat_loss": 0.0}, 0.0, 6, 600, at(9)) is None  # IIC's, DAC's


def test_many_clusters_may_come_late_and_not_all_of_few_images():
    found = {"rank": 5.0, "flat_loss": 0.0, "active": 75, "largest_share": 0.1}
    assert health.symptom(found, 1.0, 300, 10_000, Clock(3, 10)) is None
    assert health.symptom(found, 1.0, 300, 10_000, Clock(4, 10)).what == "only 75 of 300 clusters hold images"
    assert health.symptom(found, 1.0, 300, 1_500, Clock(9, 10)) is None  # 5 images a cluster were asked for
    assert health.symptom(found, 1.0, 300, 1_501, Clock(9, 10)) is not None


def test_agreement_without_a_table_is_that_of_the_table():
    rng = np.random.default_rng(0)
    for k, n in ((2, 50), (7, 500), (40, 300)):
        one, other = rng.integers(0, k, n), rng.integers(0, k, n)
        mixed = np.where(rng.random(n) < 0.7, one, other)
        for new, old in (
            (one, other),
            (mixed, one),
            (one, one),
            ((one + 1) % k, one),
            (one * 0, one),
            (one * 0, one * 0),
        ):
            nmi, ari = metrics.stability(new, old, k)
            assert nmi == pytest.approx(metrics.nmi(new, old), abs=1e-12)
            assert ari == pytest.approx(metrics.ari(new, old), abs=1e-12)
    assert metrics.stability(np.arange(1000), np.arange(1000) // 2, 10**6)[0] > 0.9  # no table of 10**12


@pytest.mark.slow
@pytest.mark.ddp
def test_ranks_that_would_measure_differently_agree(tmp_path):
    for held in two_ranks(disagree, tmp_path):
        assert held["symptom"] == "all images have the same features"
        assert held["epochs"] == 3


def disagree(rank, port, folder):
    join(rank, port)
    measured = health.effective_rank
    health.effective_rank = lambda features: 0.0 if rank == 0 else measured(features)
    recipe, seen, said = make_recipe("sela", n_clusters=3), [], ""
    try:
        fit(make_model(recipe), tiny_store(), recipe, TRAINING, [seen.append, Sentinel("stop")])
    except Collapse as stopped:
        said = stopped.symptom.what
    torch.save({"symptom": said, "epochs": len(seen)}, folder / f"{rank}.pt")
    leave()
