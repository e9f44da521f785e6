"""IIC's options: how batches are limited, and heads that take turns as in the paper."""

from dataclasses import replace

import pytest
import torch
from tiny import make_model, tiny_store
from torch import nn

from deepcluster.losses import mutual_information
from deepcluster.methods.iic import MutualInformation
from deepcluster.model import Standardised
from deepcluster.recipe import PAPER, Clock, make_recipe
from deepcluster.trainer import Training, fit


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("k", "overcluster", "least"), [(10, 5, 125), (20, 7, 980), (10, 1, 5), (2, 1, 2), (3, 5, 12)])
def test_a_batch_grows_with_the_square_of_the_clusters(k, overcluster, least):
    assert make_recipe("iic", n_clusters=k, overcluster=overcluster).least_batch == least


def test_independent_random_labels_share_little_information_in_the_least_batch():
    found = {}
    for k, images in ((50, 125), (10, 700), (70, 700)):
        p, q = (torch.eye(k)[torch.randint(k, (images,), generator=torch.Generator().manual_seed(s))] for s in (0, 1))
        found[k] = -mutual_information(p, q).item()
    assert found[10] == pytest.approx(0.03, abs=0.03)
    assert found[70] == pytest.approx(1.39, abs=0.1)
    assert found[50] > 1  # a limit, not a comfort


def test_a_head_whose_turn_it_is_not_has_a_value_and_a_gradient_of_zero():
    values = []
    for turn, epoch in ((None, 3), (1, 3), (0, 3), (0, 4)):
        logits = normal(3, 20, 5).requires_grad_()
        loss = MutualInformation(turn=turn)(logits, torch.zeros(20), Clock(epoch, 10))
        loss.backward()
        values.append(loss.item())
        assert (logits.grad == 0).all() == ((turn, epoch) == (0, 3))
    assert len(set(values)) == 1


def test_heads_take_turns():
    recipe = make_recipe("iic", n_clusters=3, overcluster=2, sub_heads=2, alternate=True)
    assert [o.turn for o in recipe.objectives] == [1, 1, 0, 0]
    assert recipe.rivals == [0, 1]
    model, weights = make_model(recipe), []

    def look(report):
        weights.append([head.weight.detach().clone() for head in model.heads])

    training = Training(epochs=2, batch_size=32, lr=0.01, momentum=0.0, weight_decay=0.0)
    start = [head.weight.detach().clone() for head in model.heads]
    fit(model, tiny_store(), recipe, training, [look])
    for h, (before, first, second) in enumerate(zip(start, *weights, strict=True)):
        assert torch.equal(before, first) == (h < 2)
        assert torch.equal(first, second) == (h >= 2)
    together = make_recipe("iic", n_clusters=3, overcluster=2)
    assert {o.turn for o in together.objectives} == {None}
    alone = make_recipe("iic", n_clusters=3, overcluster=1, alternate=True)
    assert {o.turn for o in alone.objectives} == {None}  # nobody to take turns with


def test_the_paper_preset_has_linear_heads_of_seventy_and_ten():
    params = {key: value for key, value in PAPER["iic"].items() if key not in ("lr", "batch_size", "weight_decay")}
    recipe = make_recipe("iic", **params)
    assert recipe.heads == (10,) * 5 + (70,) * 5
    assert recipe.head is nn.Linear
    assert len(recipe.views) == 6
    assert recipe.least_batch <= PAPER["iic"]["batch_size"]
    assert make_recipe("iic").head is Standardised
    small = make_recipe("iic", **params | {"n_clusters": 3})
    state = fit(make_model(small), tiny_store(), small, replace(Training(), epochs=2, batch_size=32))
    assert state.head_losses.isfinite().all()
    assert (state.head_losses < 0).all()  # also of those that rested


def test_iic_plus_is_one_wide_head():
    recipe = make_recipe("iic", n_clusters=140, overcluster=1, sub_heads=1)
    assert recipe.heads == (140,)
    assert recipe.least_batch == 980
