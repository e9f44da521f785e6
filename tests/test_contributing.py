"""The method in CONTRIBUTING.md is complete: it registers, trains, labels and resists collapse as it says."""

import math
import re
from pathlib import Path

import pytest
import torch
from tiny import make_model, noise, store_of

from deepcluster import plan as planning
from deepcluster.model import Standardised
from deepcluster.recipe import METHODS, Targets, make_recipe
from deepcluster.settings import Settings
from deepcluster.trainer import Training, fit

TEXT = (Path(__file__).resolve().parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
CODE = re.findall(r"^```python\n(.*?)^```$", TEXT, re.M | re.S)


@pytest.fixture
def example(monkeypatch):
    """What the code block defines; its method is forgotten afterwards."""
    for name in list(METHODS):
        monkeypatch.setitem(METHODS, name, METHODS[name])
    before = set(METHODS)
    defined = {"__name__": "example"}
    exec(compile(CODE[0], "CONTRIBUTING.md", "exec"), defined)
    yield defined
    for name in set(METHODS) - before:
        del METHODS[name]


def test_there_is_one_example_of_at_most_forty_lines():
    assert len(CODE) == 1
    assert 10 < len(CODE[0].splitlines()) <= 40


def test_it_registers_itself_under_the_name_the_text_uses(example):
    assert METHODS["uic_balanced"] is example["uic_balanced"]
    assert make_recipe("uic_balanced", n_clusters=4, sub_heads=2).heads == (4, 4)
    assert 'method="uic_balanced"' in TEXT


def test_it_is_forgotten_again():
    assert "uic_balanced" not in METHODS


@pytest.mark.parametrize("method", ["uic_balanced", "simclr+uic_balanced"])
def test_it_trains_through_a_plan(example, method):
    store = store_of(noise(96, 1, 8))
    settings = Settings(method=method, n_clusters=4, epochs=1, batch_size=32, image_size=8, precision="fp32")
    plan = planning.resolve(settings, len(store), store.shape, torch.device("cpu"))
    rows = []
    _, recipe, state = planning.run(plan, store, hooks=[rows.append], quiet=True)
    assert recipe.heads == (4, 4, 4)
    assert len(rows) == len(plan.stages)
    assert all(math.isfinite(row.loss) for row in rows)
    assert rows[-1].refreshed
    assert state.targets.labels.shape == (3, 96)
    assert state.targets.labels.min() >= 0


def test_it_trains_every_parameter(example):
    recipe = make_recipe("uic_balanced", n_clusters=3)
    model = make_model(recipe)
    before = {name: p.clone() for name, p in model.named_parameters()}
    fit(model, store_of(noise(64, 1, 8)), recipe, Training(epochs=1, batch_size=32))
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())


def test_a_cluster_that_wins_everything_is_held_back(example):
    head = Standardised(5, 4).eval()
    features = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        head.norm.bias[1] = 1e3
        assert set(head(features).argmax(1).tolist()) == {1}
        targets = example["own_argmax"](features, [head], Targets.unlabelled(1, 200), 0)
    assert targets.labels.shape == (1, 200)
    assert torch.bincount(targets.labels[0]).min() > 20
