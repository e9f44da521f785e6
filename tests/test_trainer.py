"""The promises of trainer.fit. Those that every method has to keep are in test_methods.py."""

import math
import random
import re
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from tiny import make_model, tiny_store
from torch import nn

import deepcluster.methods  # noqa: F401
from deepcluster import checkpoint, dist
from deepcluster.batches import train_batches
from deepcluster.losses import pseudo_label
from deepcluster.model import Projector, Standardised
from deepcluster.recipe import Clock, Every, Recipe, Targets, make_recipe, once
from deepcluster.trainer import Training, fit, start

TRAINING = Training(epochs=2, batch_size=32, lr=0.05, momentum=0.9, weight_decay=0)  # no gradient, no move


class Crash(Exception): ...


def recipe_of(name, **options):
    return make_recipe(name, n_clusters=3, **options)


def snapshot(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def crash_after(epoch):
    def hook(report):
        if report.clock.epoch == epoch:
            raise Crash

    return hook


# --- hooks ---


@pytest.mark.parametrize(("name", "options"), [("iic", {}), ("sela", {}), ("deepcluster", {"heads": "reset"})])
def test_hooks_cannot_change_training(name, options):
    recipe, store = recipe_of(name, **options), tiny_store()
    quiet, watched = make_model(recipe), make_model(recipe)

    def meddle(report):
        torch.rand(100)
        torch.manual_seed(epoch := report.clock.epoch)
        np.random.seed(epoch)  # noqa: NPY002
        random.seed(epoch)
        report.state.model.eval()

    fit(quiet, store, recipe, TRAINING)
    fit(watched, store, recipe, TRAINING, [meddle])
    assert_same(snapshot(quiet), snapshot(watched))


def test_progress_sees_every_batch_and_changes_nothing():
    recipe, store, seen = recipe_of("iic"), tiny_store(), []

    def progress(batches):
        for batch in batches:
            seen.append(len(batch.ids))
            yield batch

    quiet, watched = make_model(recipe), make_model(recipe)
    fit(quiet, store, recipe, TRAINING)
    fit(watched, store, recipe, TRAINING, progress=progress)
    assert seen == [32] * 6
    assert_same(snapshot(quiet), snapshot(watched))


def test_a_report_tells_what_happened():
    recipe, seen = replace(recipe_of("deepcluster"), refresh=Every(2)), []

    def look(report):
        now = report.state.predicted.clone()
        seen.append((report.refreshed, report.clock.epoch, report.before.clone(), now, report.seconds, report.recipe))

    state = fit(make_model(recipe), tiny_store(), recipe, replace(TRAINING, epochs=3), [look])
    assert [s[:2] for s in seen] == [(True, 0), (False, 1), (True, 2)]
    assert (seen[0][2] == -1).all()
    for earlier, later in pairwise(seen):
        assert torch.equal(later[2], earlier[3])
        assert not torch.equal(later[2], later[3])
    assert all(s[4] > 0 and s[5] is recipe for s in seen)
    assert torch.equal(seen[-1][3], state.predicted)


def test_predictions_are_those_of_the_first_view_while_training():
    recipe = Recipe((3,), lambda z, y, clock: z.square().mean(), views=("clean", "strong"))
    store = tiny_store(64)
    state = fit(make_model(recipe), store, recipe, replace(TRAINING, epochs=1, lr=0.0))
    assert state.predicted.shape == (1, 64)
    assert state.predicted.dtype == torch.int32
    model, expected = make_model(recipe).train(), torch.empty(64, dtype=torch.int32)
    seed = dist.epoch_seed(0, 0)
    for batch in train_batches(store, Targets.unlabelled(1, 64), recipe, 32, seed):
        expected[batch.ids] = model(batch.views)[0][0].argmax(1).int()
    assert torch.equal(state.predicted[0], expected)


def test_an_image_left_out_of_an_epoch_keeps_its_last_prediction():
    recipe = Recipe((3,), lambda z, y, clock: z.square().mean(), views=("clean",))
    seen = []
    training = replace(TRAINING, epochs=3)
    fit(make_model(recipe), tiny_store(50), recipe, training, [lambda r: seen.append(r.state.predicted[0] >= 0)])
    assert seen[0].sum() == 32  # of 50, the rest is no whole batch
    assert (seen[1] >= seen[0]).all()
    assert 32 < seen[1].sum() <= seen[2].sum()


# --- labels ---


@dataclass(frozen=True)
class Fixed:
    """An assigner that always says the same."""

    labels: torch.Tensor

    def __call__(self, features, heads, previous, seed):
        return replace(previous, labels=self.labels)


def test_images_are_drawn_uniformly_over_the_pseudo_classes_of_the_last_head():
    labels = torch.zeros(2, 200, dtype=torch.int32)
    labels[1, 100:] = 1
    labels[1, 190:] = 2
    seen = []

    def objective(logits, labels, clock):
        if torch.is_grad_enabled():  # not when it is asked what the loss of a collapsed network is
            seen.append(labels.long())
        return pseudo_label(logits, labels)

    recipe = Recipe((3, 3), objective, assigner=Fixed(labels), refresh=once, balanced=True)
    training = Training(epochs=3, batch_size=50)
    fit(make_model(recipe), tiny_store(200), recipe, training)
    shares = torch.bincount(torch.cat(seen[1::2])) / (3 * 200)
    torch.testing.assert_close(shares, torch.full((3,), 1 / 3), atol=0.01, rtol=0)
    seen.clear()
    fit(make_model(recipe), tiny_store(200), replace(recipe, balanced=False), training)
    shares = torch.bincount(torch.cat(seen[1::2])) / (3 * 200)
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.45, 0.05]), atol=1e-6, rtol=0)


def test_the_objective_gets_each_heads_own_labels_of_the_images_seen():
    store = tiny_store(64)
    store.data[:] = torch.arange(64, dtype=torch.uint8).view(-1, 1, 1, 1) * 3
    labels = torch.stack([torch.arange(64), 63 - torch.arange(64)]).int()
    pairs = []

    class Bright(nn.Module):
        def forward(self, x):
            return x.mean((1, 2, 3))[:, None]

    def objective(logits, labels, clock):
        if torch.is_grad_enabled():
            pairs.append((logits[0, :, 0], labels))
        return logits.square().mean()

    recipe = Recipe((1, 1), objective, views=("clean",), assigner=Fixed(labels), refresh=once)
    model = make_model(recipe)
    model.backbone = Bright()
    for head in model.heads:
        head.weight = nn.Parameter(torch.ones(1, 1))
        head.bias = nn.Parameter(torch.zeros(1))
    fit(model, store, recipe, Training(epochs=1, batch_size=32, lr=0.0, weight_decay=0))
    for n, (score, label) in enumerate(pairs):
        image = (score * 255 / 3).round().int()
        assert torch.equal(label, image if n % 2 == 0 else 63 - image)
    assert len(pairs) == 4


def test_the_assigner_sees_features_of_the_label_views_and_the_policy_the_new_labels():
    seen = {}

    def assigner(features, heads, previous, seed):
        seen["features"] = features.clone()
        seen["grad"] = torch.is_grad_enabled()
        return replace(previous, labels=torch.ones_like(previous.labels))

    def policy(heads, optimizer, features, targets):
        seen["labels"] = targets.labels
        seen["heads"] = [head.out_features for head in heads]

    views = ("clean", "clean")  # their mean is one of them
    recipe = Recipe((3, 5), pseudo_label, assigner=assigner, refresh=once, label_views=views, reassign=policy)
    model, store = make_model(recipe), tiny_store()
    with torch.no_grad():
        expected = model.eval().embed(store.take(torch.arange(96)).float() / 255)
    fit(model, store, recipe, replace(TRAINING, epochs=1))
    torch.testing.assert_close(seen["features"], expected)
    assert not seen["grad"]
    assert (seen["labels"] == 1).all()
    assert seen["heads"] == [3, 5]


# --- what goes wrong ---


def nan_in(epoch):
    def objective(logits, labels, clock):
        return logits.square().mean() * (math.nan if clock.epoch == epoch and clock.step == 1 else 1)

    return objective


def test_a_loss_that_is_not_finite_stops_training_before_it_is_saved(tmp_path):
    recipe, seen = Recipe((3,), nan_in(1)), []
    training = replace(TRAINING, epochs=4, out=tmp_path)
    message = "the loss became nan in epoch 2; lower --lr (now 0.05) or set --precision fp32"
    with pytest.raises(FloatingPointError, match=re.escape(message)):
        fit(make_model(recipe), tiny_store(), recipe, training, [lambda r: seen.append(r.clock.epoch)])
    assert seen == [0]
    saved = checkpoint.read(tmp_path / "last.pt")
    assert saved["epoch"] == 1
    assert all(v.isfinite().all() for v in saved["network"].values())


def test_a_loss_that_is_not_finite_in_the_first_epoch_leaves_no_file(tmp_path):
    recipe = Recipe((3, 3), nan_in(0))
    with pytest.raises(FloatingPointError, match="epoch 1"):
        fit(make_model(recipe), tiny_store(), recipe, replace(TRAINING, out=tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_last_step_that_blows_the_weights_up_is_not_saved(tmp_path):
    """The loss of that step is still finite, so only the weights tell."""
    recipe = Recipe((3,), lambda logits, labels, clock: logits.square().mean())
    model = make_model(recipe)

    def spoil(batches):
        yield from batches
        with torch.no_grad():  # what a last optimizer step does when its gradient overflowed
            next(iter(model.parameters()))[0] = math.inf

    with pytest.raises(FloatingPointError, match="a weight became infinite in epoch 1"):
        fit(model, tiny_store(), recipe, replace(TRAINING, out=tmp_path), progress=spoil)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["deepcluster", "sela"])
def test_a_step_that_blows_the_weights_up_is_reported_at_the_next_labelling(name):
    recipe = replace(recipe_of(name), refresh=Every(1))
    model = make_model(recipe)
    with torch.no_grad():
        model.backbone[0].weight[0] = math.inf
    with pytest.raises(FloatingPointError, match="not finite; lower lr"):
        fit(model, tiny_store(), recipe, TRAINING)


def test_a_batch_larger_than_the_data_says_what_is_allowed():
    recipe = recipe_of("iic")
    with pytest.raises(ValueError, match="batch_size must be between 2 and the 96 training images; got 200"):
        fit(make_model(recipe), tiny_store(), recipe, replace(TRAINING, batch_size=200))


# --- the state ---


def test_the_stage_is_kept_in_the_checkpoint(tmp_path):
    recipe, training = recipe_of("iic"), replace(TRAINING, stage=2, out=tmp_path)
    assert fit(make_model(recipe), tiny_store(), recipe, training).stage == 2
    saved = checkpoint.read(tmp_path / "last.pt")
    assert (saved["stage"], saved["epoch"]) == (2, 2)
    assert fit(make_model(recipe), tiny_store(), recipe, replace(training, stage=0), resume=saved).stage == 2


def test_nothing_is_written_unless_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = recipe_of("iic")
    fit(make_model(recipe), tiny_store(), recipe, TRAINING)
    assert not list(tmp_path.iterdir())


def test_resuming_a_finished_run_trains_no_more(tmp_path):
    recipe, calls = recipe_of("iic"), []
    done = fit(make_model(recipe), tiny_store(), recipe, replace(TRAINING, out=tmp_path))
    saved = checkpoint.read(tmp_path / "last.pt")
    again = fit(make_model(recipe, 5), tiny_store(), recipe, TRAINING, [calls.append], resume=saved)
    assert not calls
    assert_same(done.model.state_dict(), again.model.state_dict())


class Teacher(nn.Module):
    """A network around the model with a buffer and a parameter of its own, and one that is not trained."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.scale = nn.Parameter(torch.ones(()))
        self.fixed = nn.Parameter(torch.ones(()), requires_grad=False)
        self.register_buffer("batches", torch.zeros(()))

    def forward(self, views):
        self.batches += self.training
        return [torch.cat([z, z * self.scale * self.fixed * self.batches]) for z in self.model(views)]


def twice(logits, labels, clock):
    assert len(logits) == 2
    return (logits[0] - 1).square().mean() + logits[1].square().mean()


def test_a_network_with_state_is_trained_and_resumed(tmp_path):
    store, training = tiny_store(), replace(TRAINING, epochs=3, lr=0.01)
    recipe = Recipe((3,), twice, network=Teacher)
    straight = fit(make_model(recipe), store, recipe, training)
    with pytest.raises(Crash):
        fit(make_model(recipe), store, recipe, replace(training, out=tmp_path), [crash_after(1)])
    resumed = fit(make_model(recipe, 5), store, recipe, training, resume=checkpoint.read(tmp_path / "last.pt"))
    assert resumed.network.batches == 9
    assert resumed.network.model is resumed.model
    assert resumed.network.scale != 1
    assert resumed.network.fixed == 1
    assert_same(straight.network.state_dict(), resumed.network.state_dict())


def test_each_head_may_have_a_loss_and_a_kind_of_its_own():
    seen = {}

    def first(logits, labels, clock):
        seen["first"] = logits.shape
        return logits.square().mean()

    def second(logits, labels, clock):
        seen["second"] = logits.shape
        return 10 + logits.square().mean()

    recipe = Recipe((3, 3, 5), (first, second, first), head=(nn.Linear, nn.Linear, Projector), views=("clean",) * 2)
    state = fit(make_model(recipe), tiny_store(), recipe, replace(TRAINING, epochs=1))
    assert seen == {"first": (2, 32, 5), "second": (2, 32, 3)}
    assert isinstance(state.model.heads[2], Projector)
    assert state.head_losses[1] > 10 > state.head_losses[0]
    assert recipe.rivals == [0]
    assert Recipe((3, 3, 5), first).rivals == [0, 1]


@pytest.mark.parametrize("wrong", [{"objective": (pseudo_label,)}, {"head": (nn.Linear,) * 3}])
def test_as_many_losses_and_kinds_as_heads(wrong):
    with pytest.raises(ValueError, match="2 heads need as many"):
        Recipe(**{"heads": (3, 3), "objective": pseudo_label} | wrong)


def test_the_start_knows_nothing_of_the_images():
    recipe = recipe_of("iic")
    state = start(make_model(recipe), tiny_store(), recipe, TRAINING)
    heads = len(recipe.heads)
    assert (state.targets.labels == -1).all()
    assert state.targets.labels.shape == state.predicted.shape == (heads, 96)
    assert (state.predicted == -1).all()
    assert state.head_losses.shape == (heads,)
    assert (state.stage, state.epoch) == (0, 0)


# --- the learning rate ---


def test_the_learning_rate_rises_and_then_falls_to_nothing():
    training = Training(epochs=10, lr=0.1, warmup=0.2)
    rates = [training.lr_at(Clock(e, 10, s, 4)) for e in range(10) for s in range(4)]
    top = rates.index(max(rates))
    assert top == 8
    assert rates[0] < 0.001
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[20] == pytest.approx(0.05)
    assert rates[-1] < 0.001
    assert Training(lr=0.1, warmup=0.0).lr_at(Clock(0, 10)) == pytest.approx(0.1)


def test_every_step_uses_its_own_learning_rate():
    rates, training = [], replace(TRAINING, epochs=2)
    recipe = Recipe((3,), lambda z, y, clock: z.square().mean())
    model = make_model(recipe)
    original = torch.optim.SGD.step

    class Recorded(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return original(self, closure)

    class Recording(Training):
        def optimizer(self, model):
            return Recorded(model.parameters(), self.lr)

    fit(model, tiny_store(), recipe, Recording(**vars(training)))
    assert rates == [training.lr_at(Clock(e, 2, s, 3)) for e in range(2) for s in range(3)]


def test_momentum_chooses_the_optimizer():
    model = nn.Linear(2, 2)
    adam = Training(lr=0.3, weight_decay=0.7).optimizer(model)
    sgd = Training(lr=0.3, momentum=0.8, weight_decay=0.7).optimizer(model)
    assert type(adam) is torch.optim.AdamW
    assert type(sgd) is torch.optim.SGD
    assert sgd.defaults["momentum"] == 0.8
    assert all(o.defaults["lr"] == 0.3 and o.defaults["weight_decay"] == 0.7 for o in (adam, sgd))


def test_labelling_sees_the_heads_in_eval_mode_and_leaves_their_statistics():
    modes = []

    def spy(features, heads, previous, seed):
        modes.append((heads[0].training, heads[0].norm.num_batches_tracked.item()))
        heads[0](features)
        modes.append(heads[0].norm.num_batches_tracked.item())
        return replace(previous, labels=torch.zeros(1, 96, dtype=torch.int32))

    recipe = Recipe((3,), pseudo_label, assigner=spy, refresh=Every(1), head=Standardised)
    fit(make_model(recipe), tiny_store(), recipe, TRAINING)
    (training, before), after = modes[:2]
    assert not training
    assert before == after
