"""IMSAT: what the network says of an adversary's step, and the objective."""

import math
from dataclasses import replace

import pytest
import torch
from tiny import make_model, tiny_store
from torch import nn

from deepcluster.losses import conditional_entropy, divergence, marginal_entropy
from deepcluster.methods.imsat import Information
from deepcluster.model import Model
from deepcluster.networks import Adversary
from deepcluster.recipe import PAPER, Clock, Recipe, make_recipe
from deepcluster.trainer import Training, fit

ONE_HOT = torch.eye(10).repeat(3, 1) * 1e4
FLAT = torch.zeros(30, 10)
NOW = Clock(3, 10)
ENTROPIES = Information(vat=0.0, rpt=0.0)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def entropies(logits):
    return ENTROPIES(logits[None], torch.zeros(len(logits)), NOW).item()


# --- entropies and divergence ---


def test_the_objective_at_its_limits():
    assert entropies(ONE_HOT) == pytest.approx(-0.921034, abs=1e-6)
    assert entropies(FLAT) == pytest.approx(-0.690776, abs=1e-6)
    assert entropies(ONE_HOT[:1].repeat(30, 1)) == pytest.approx(0, abs=1e-6)


def test_entropies_match_sums_over_images_in_float64():
    logits = normal(20, 5) * 3
    p = logits.double().softmax(1)
    own = -sum(q * q.log() for row in p for q in row) / 20
    mean = p.mean(0)
    assert conditional_entropy(logits).item() == pytest.approx(own.item(), abs=1e-6)
    assert marginal_entropy(logits).item() == pytest.approx(-(mean * mean.log()).sum().item(), abs=1e-6)
    assert conditional_entropy(logits) < marginal_entropy(logits) < math.log(5)
    several = logits.view(2, 10, 5)  # views count as images
    torch.testing.assert_close(conditional_entropy(several), conditional_entropy(logits))
    torch.testing.assert_close(marginal_entropy(several), marginal_entropy(logits))


def test_divergence_is_the_mean_over_images_and_zero_between_equals():
    a, b = normal(20, 5), normal(20, 5, seed=1)
    p, q = a.double().softmax(1), b.double().softmax(1)
    naive = sum((p[i] * (p[i] / q[i]).log()).sum() for i in range(20)) / 20
    assert divergence(a, b).item() == pytest.approx(naive.item(), abs=1e-6)
    assert divergence(a, b) != divergence(b, a)
    assert divergence(a, a) == 0


@pytest.mark.parametrize("logits", [ONE_HOT, FLAT, ONE_HOT[:1].repeat(30, 1)], ids=["sure", "flat", "collapsed"])
def test_limits_give_finite_numbers(logits):
    views = torch.stack([logits, logits.roll(1, 1), logits.roll(1, 0)]).requires_grad_()
    loss = Information()(views, torch.zeros(30), NOW)
    loss.backward()
    assert loss.isfinite()
    assert views.grad.isfinite().all()


def test_the_objective_pulls_views_to_the_image_and_not_the_image_to_them():
    logits = normal(3, 20, 5).requires_grad_()
    image, view, moved = logits
    both = Information(vat=2.0, rpt=3.0, strength=0.0)(logits, torch.zeros(20), NOW)
    torch.testing.assert_close(both, 2 * divergence(image, moved) + 3 * divergence(image, view))
    both.backward()
    assert (logits.grad[0] == 0).all()
    assert (logits.grad[1:] != 0).all()
    plain = Information(vat=0.0, rpt=3.0, strength=0.0)(logits[:2], torch.zeros(20), NOW)
    torch.testing.assert_close(plain, 3 * divergence(image, view))


def test_autocast_does_not_reach_the_objective():
    logits = normal(3, 20, 5)
    with torch.autocast("cpu", torch.bfloat16):
        inside = Information()(logits, torch.zeros(20), NOW)
    assert inside.dtype == torch.float32
    assert inside.item() == pytest.approx(Information()(logits, torch.zeros(20), NOW).item(), abs=1e-6)


# --- the adversary ---


class Linear(nn.Module):
    """A backbone whose features are the values themselves."""

    def forward(self, images):
        return images.flatten(1)


def linear(dim=16, k=2):
    torch.manual_seed(0)
    return Model(Linear(), dim, (k,), nn.Linear)


def recipe():
    return Recipe((3, 4), lambda z, y, clock: z.square().mean(), views=("clean",))


def test_the_step_of_a_linear_classifier_is_along_the_difference_of_its_weights():
    model = linear()
    images = torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    step = Adversary(model, radius=0.3).step(images, [model([images])[0][0].detach()])
    difference = model.heads[0].weight[0] - model.heads[0].weight[1]
    cosine = torch.cosine_similarity(step.flatten(1), difference[None]).abs()
    torch.testing.assert_close(cosine, torch.ones(40), atol=1e-4, rtol=0)
    rms = step.square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(rms, torch.full((40,), 0.3 * images.std(correction=0).item()))


def test_a_step_is_measured_in_deviations_of_each_channel_or_feature():
    contrast = torch.tensor([1.0, 0.01])[:, None, None]
    images = torch.rand(40, 2, 4, 4, generator=torch.Generator().manual_seed(0)) * contrast
    model = linear(32)
    step = Adversary(model, radius=0.2).step(images, [model([images])[0][0].detach()])
    assert step[:, 0].abs().mean() > 20 * step[:, 1].abs().mean()
    vectors = normal(40, 16) * torch.tensor([100.0, 0.0] * 8)
    model = linear()
    step = Adversary(model, radius=0.2).step(vectors, [model([vectors])[0][0].detach()])
    assert (step[:, 1::2] == 0).all()  # nothing varies there
    assert 5 < step[:, ::2].square().mean().sqrt() < 30


def test_the_step_changes_more_than_a_random_one_of_the_same_length():
    model = make_model(recipe()).train()
    images = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    clean, found = Adversary(model, radius=0.3)([images])[0]
    length = (0.3 * images.std(correction=0)).item()
    random = model([images + normal(64, 1, 8, 8) * length])[0][0]
    assert divergence(clean, found) > 3 * divergence(clean, random) > 0


def test_a_network_that_always_says_the_same_is_not_moved():
    model = linear()
    nn.init.zeros_(model.heads[0].weight)
    images = torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    (logits,) = Adversary(model).train()([images])
    assert (Adversary(model).step(images, [logits[0].detach()]) == 0).all()
    assert divergence(logits[0], logits[1]) == 0
    still = torch.full((8, 1, 4, 4), 0.5)  # images that are all alike have no deviation either
    assert Adversary(linear()).train()([still])[0].isfinite().all()


def test_one_row_more_in_training_and_none_in_evaluation():
    network = Adversary(make_model(recipe()))
    views = [torch.rand(16, 1, 8, 8), torch.rand(16, 1, 8, 8)]
    assert [tuple(z.shape) for z in network.train()(views)] == [(3, 16, 3), (3, 16, 4)]
    assert [tuple(z.shape) for z in network.eval()(views)] == [(2, 16, 3), (2, 16, 4)]
    model = make_model(recipe()).train()
    torch.testing.assert_close(Adversary(model)(views)[0][:2], model(views)[0])


def test_running_statistics_are_those_of_the_views_alone():
    views = [torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))]
    watched, quiet = make_model(recipe()).train(), make_model(recipe()).train()
    Adversary(watched)(views)
    quiet(views)
    for key, value in quiet.state_dict().items():
        assert torch.equal(watched.state_dict()[key], value), key
    assert watched.backbone[1].num_batches_tracked == 1
    assert watched.backbone[1].track_running_stats


def test_the_adversary_drops_nothing_and_puts_dropout_back():
    seen, model = [], linear()
    drop = nn.Dropout(0.5)
    model.backbone = nn.Sequential(Linear(), drop)
    drop.register_forward_hook(lambda module, given, out: seen.append((out == 0).any().item()))
    Adversary(model).train()([torch.rand(16, 1, 4, 4) + 0.1])
    assert seen == [True, False, False]
    assert drop.training


def test_the_search_leaves_no_gradient_and_the_moved_row_has_one():
    model = make_model(recipe()).train()
    (logits, _) = Adversary(model)([torch.rand(16, 1, 8, 8)])
    assert all(p.grad is None for p in model.parameters())
    logits[1].square().sum().backward()
    assert (model.backbone[0].weight.grad != 0).any()


@pytest.mark.parametrize("wrong", [{"vat": 0.0, "rpt": 0.0}])
def test_without_any_consistency_there_is_nothing_to_learn(wrong):
    with pytest.raises(ValueError, match="imsat: set vat or rpt above 0"):
        make_recipe("imsat", **wrong)


@pytest.mark.parametrize("options", [{"rpt": 0.0}, {"vat": 0.0}, {"rpt": 1.0}], ids=str)
def test_every_mixture_trains(options):
    mixture = make_recipe("imsat", n_clusters=3, **options)
    state = fit(make_model(mixture), tiny_store(), mixture, replace(Training(), epochs=1, batch_size=32))
    assert state.head_losses.isfinite().all()


def test_the_paper_preset_is_vat_alone():
    params = {key: value for key, value in PAPER["imsat"].items() if key not in ("lr", "batch_size", "weight_decay")}
    paper = make_recipe("imsat", **params)
    assert paper.heads == (10,)
    assert paper.views == ("clean",)
    assert paper.objectives[0] == Information(vat=1.0, rpt=0.0, strength=0.1, mu=4.0)
