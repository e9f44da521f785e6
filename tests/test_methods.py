"""The contract: what every registered method promises, whatever it does inside."""

import inspect
import math
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import make_model, tiny_store, two_ranks

import deepcluster.methods  # noqa: F401
from deepcluster import checkpoint, dist, stages
from deepcluster.batches import train_batches
from deepcluster.features import extract
from deepcluster.losses import contrastive
from deepcluster.plan import resolve
from deepcluster.recipe import METHODS, OPTIMISER, PAPER, Clock, Recipe, Targets, make_recipe
from deepcluster.settings import Settings
from deepcluster.store import Store
from deepcluster.trainer import Training, fit, start

NAMES = sorted(METHODS)
CLUSTERERS = [name for name in NAMES if not make_recipe(name).pretext]
every_method = pytest.mark.parametrize("name", NAMES)
TRAINING = Training(epochs=2, batch_size=32, lr=0.05, momentum=0.9, weight_decay=0)  # no gradient, no move
VARIANTS = [(name, {}) for name in NAMES] + [
    ("deepcluster", {"heads": "reset"}),  # draws from torch's global generator
    ("deepcluster", {"heads": "centroids"}),
    ("deepcluster", {"heads": "keep", "every": 2}),
]
KNOWN = torch.where(torch.arange(96) < 30, torch.arange(96) % 3, -1)  # labels a user gave


class Crash(Exception): ...


def recipe_of(name: str, **options: object) -> Recipe:
    return make_recipe(name, n_clusters=3, **options)


def known_to(recipe: Recipe) -> torch.Tensor | None:
    return KNOWN if recipe.supervised else None


def train(recipe: Recipe, training: Training = TRAINING, *, model=None, store: Store | None = None, **more):
    return fit(model or make_model(recipe), store or tiny_store(), recipe, training, known=known_to(recipe), **more)


def snapshot(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def easy_store() -> Store:
    """Three kinds of images that differ in brightness far more than by anything else."""
    store = tiny_store()
    store.data[:] = (torch.arange(96) % 3 * 100).to(torch.uint8).view(-1, 1, 1, 1) + store.data // 8
    return store


@every_method
@pytest.mark.parametrize("channels", [1, 3])
def test_trains_every_parameter(name, channels):
    recipe, reports = recipe_of(name), []
    model = make_model(recipe, channels=channels)
    before = snapshot(model)
    one = replace(TRAINING, epochs=1)
    state = train(recipe, one, model=model, store=tiny_store(channels=channels), hooks=[reports.append])
    moved = {key: not torch.equal(before[key], p) for key, p in model.named_parameters() if p.requires_grad}
    assert moved == dict.fromkeys(moved, True)
    trained = {id(p) for group in state.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in state.network.parameters() if p.requires_grad}
    assert {id(p) for p in model.backbone.parameters()} <= trained
    assert state.epoch == 1
    assert len(reports) == 1
    assert math.isfinite(reports[0].loss)
    assert state.head_losses.shape == (len(recipe.heads),)
    assert reports[0].loss == pytest.approx(state.head_losses.mean().item())


@every_method
def test_a_run_is_a_function_of_the_seed(name):
    recipe, found = recipe_of(name), []
    for seed, noise in ((0, 1), (0, 2), (5, 1)):
        model = make_model(recipe)
        torch.manual_seed(noise)
        state = train(recipe, replace(TRAINING, seed=seed), model=model)
        found.append((snapshot(state.network), state.targets.labels))
    assert_same(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert any(not torch.equal(found[0][0][key], found[2][0][key]) for key in found[0][0])


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=lambda x: str(x))
def test_resuming_after_a_crash_changes_nothing(name, options, tmp_path):
    def crash(report):
        if report.clock.epoch == 1:
            raise Crash

    recipe, epochs = recipe_of(name, **options), []
    training = Training(epochs=3, batch_size=32, lr=0.01)  # AdamW, which has the most to remember
    straight = train(recipe, training)
    with pytest.raises(Crash):
        train(recipe, replace(training, out=tmp_path), hooks=[crash])
    saved = checkpoint.read(tmp_path / "last.pt")
    assert saved["epoch"] == 1  # the epoch whose report was cut short is trained again
    note = [lambda r: epochs.append(r.clock.epoch)]
    resumed = train(recipe, training, model=make_model(recipe, seed=99), hooks=note, resume=saved)
    assert epochs == [1, 2]
    assert_same(straight.network.state_dict(), resumed.network.state_dict())
    assert torch.equal(straight.targets.labels, resumed.targets.labels)
    assert torch.equal(straight.targets.partners, resumed.targets.partners)
    assert torch.equal(straight.predicted, resumed.predicted)
    assert torch.equal(straight.head_losses, resumed.head_losses)
    for p, q in zip(straight.network.parameters(), resumed.network.parameters(), strict=True):
        for key, value in straight.optimizer.state[p].items() if p in straight.optimizer.state else ():
            assert torch.equal(value, resumed.optimizer.state[q][key])


@every_method
def test_bfloat16_survives(name):
    recipe = recipe_of(name)
    model, exact = make_model(recipe), make_model(recipe)
    state = train(recipe, replace(TRAINING, bf16=True), model=model)
    assert state.head_losses.isfinite().all()
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in state.network.parameters())
    train(recipe, model=exact)
    assert not torch.equal(model.backbone[0].weight, exact.backbone[0].weight)  # it was not float32 after all


@every_method
def test_training_lowers_the_loss_of_an_easy_problem(name):
    reports, options = [], {"weight": 0.0} if name == "pseudolabel" else {}  # a weight that rises raises the loss
    train(recipe_of(name, **options), replace(TRAINING, epochs=8), store=easy_store(), hooks=[reports.append])
    assert reports[-1].loss < reports[0].loss


# --- one batch ---


def one_batch(name: str, store: Store):
    """Logits of every head for the first batch, its labels, and the network in training."""
    recipe = recipe_of(name)
    state = start(make_model(recipe), store, recipe, TRAINING, known_to(recipe))
    labels = torch.arange(96).remainder(3).expand(len(recipe.heads), 96).int()
    state.targets = replace(state.targets, labels=labels if not recipe.supervised else state.targets.labels)
    batch = next(iter(train_batches(store, state.targets, recipe, 32, seed=0)))
    state.network.train()
    return recipe, state, [z.float() for z in state.network(batch.views)], state.targets.labels[:, batch.ids]


@every_method
def test_a_collapsed_batch_has_a_finite_loss_and_gradient(name):
    store = tiny_store()
    store.data[:] = 128  # every image is the same
    recipe, state, logits, labels = one_batch(name, store)
    for clock in (Clock(0, 10), Clock(9, 10, 2, 3)):
        losses = recipe.losses(logits, labels, clock)
        losses.mean().backward(retain_graph=True)
        assert losses.isfinite().all()
        assert all(p.grad is None or p.grad.isfinite().all() for p in state.network.parameters())
    for top in (0.0, 60.0, 1e4):  # undecided, and decided that all is one cluster
        flat = [torch.zeros_like(z) for z in logits]
        for z in flat:
            z[..., 0] = top
            z.requires_grad_()
        losses = recipe.losses(flat, labels, Clock(5, 10))
        losses.mean().backward()
        assert losses.isfinite().all(), top
        assert all(z.grad is None or z.grad.isfinite().all() for z in flat), top


@every_method
def test_the_order_of_a_batch_does_not_matter(name):
    recipe, _, logits, labels = one_batch(name, tiny_store())
    logits, order = [z.detach() for z in logits], torch.randperm(32)
    for clock in (Clock(0, 10), Clock(9, 10, 2, 3)):
        losses = recipe.losses(logits, labels, clock)
        other = recipe.losses([z[:, order] for z in logits], labels[:, order], clock)
        torch.testing.assert_close(other, losses, rtol=1e-4, atol=1e-5)


@every_method
def test_a_loss_does_not_change_what_it_is_given(name):
    recipe, _, logits, labels = one_batch(name, tiny_store())
    before = [z.detach().clone() for z in logits]
    recipe.losses(logits, labels, Clock(3, 10))
    assert all(torch.equal(a, b) for a, b in zip(before, logits, strict=True))


# --- two processes ---


def train_all(rank: int, port: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.setup("cpu")
    out = {}
    for name in NAMES:
        state = train(recipe_of(name), Training(epochs=2, batch_size=32, lr=0.01))
        found = {"labels": state.targets.labels, "predicted": state.predicted, "losses": state.head_losses}
        out[name] = state.network.state_dict() | found | {"partners": state.targets.partners}
    lo, hi = dist.shard(16)
    u, v = (x[lo:hi].clone().requires_grad_() for x in unit_pairs())
    contrastive(u, v).backward()
    out["contrastive"] = {"loss": contrastive(u, v).detach(), "slope": dist.all_cat(u.grad / dist.world())}
    torch.save(out, folder / f"{rank}.pt")


def unit_pairs() -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.nn.functional.normalize(torch.randn(16, 5, generator=rng), dim=1) for _ in range(2)]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What each of two processes that trained together holds in the end, by method."""
    folder = tmp_path_factory.mktemp("ranks")
    return two_ranks(train_all, folder)


@pytest.mark.ddp
@every_method
def test_two_processes_end_with_one_model_and_one_set_of_labels(name, two_processes):
    first, second = (held[name] for held in two_processes)
    assert_same(first, second)
    assert all(value.isfinite().all() for value in first.values())


@pytest.mark.ddp
def test_simclr_tells_images_apart_over_all_processes(two_processes):
    u, v = (x.requires_grad_() for x in unit_pairs())
    loss = contrastive(u, v)
    loss.backward()
    for held in two_processes:
        torch.testing.assert_close(held["contrastive"]["loss"], loss.detach())
        torch.testing.assert_close(held["contrastive"]["slope"], u.grad)


# --- clusters ---


# spectral labels what a network says once, before it learns: for features that are fixed; see test_frozen.py
@pytest.mark.parametrize("name", [name for name in CLUSTERERS if name != "spectral"])
def test_it_predicts_what_it_labelled(name):
    """On three plain kinds of images the head, on the images themselves, says what was learnt from augmented ones."""
    recipe, store = recipe_of(name), easy_store()
    state = train(recipe, Training(epochs=20, batch_size=32, lr=0.01), store=store)
    head = state.reported(recipe.rivals)
    state.model.eval()
    with torch.no_grad():
        said = state.model.heads[head](extract(state.model, store)).argmax(1)
    learnt = state.targets.labels[head] if (state.targets.labels[head] >= 0).all() else state.predicted[head]
    assert (said == learnt).float().mean() > 0.8


@pytest.mark.parametrize("name", CLUSTERERS)
def test_only_a_supervised_method_sees_the_labels_that_were_given(name):
    recipe = recipe_of(name)
    targets = start(make_model(recipe), tiny_store(), recipe, TRAINING, KNOWN).targets
    if recipe.supervised:
        assert torch.equal(targets.labels, KNOWN.expand(len(recipe.heads), 96).int())
        with pytest.raises(ValueError, match="--use-labels"):
            start(make_model(recipe), tiny_store(), recipe, TRAINING)
    else:
        assert torch.equal(targets.labels, Targets.unlabelled(len(recipe.heads), 96).labels)


# --- words ---


@every_method
def test_the_file_cites_the_paper_and_says_how_it_departs_from_it(name):
    text = sys.modules[METHODS[name].__module__].__doc__ or ""
    assert re.search(r"arXiv:\d{4}\.\d{4,5}|ICML|NeurIPS|NIPS|workshop", text)
    assert re.search(r"\b(19|20)\d\d\b", text)
    assert "Deviation" in text
    assert METHODS[name].__module__ == f"deepcluster.methods.{name}"
    assert METHODS[name].__doc__


@every_method
def test_every_parameter_has_a_default_and_the_first_is_the_number_of_clusters(name):
    parameters = list(inspect.signature(METHODS[name]).parameters.values())
    assert parameters[0].name == "n_clusters"
    assert all(p.default is not inspect.Parameter.empty for p in parameters)
    make_recipe(name, **{k: v for k, v in PAPER[name].items() if k not in OPTIMISER})


@every_method
@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 32, 32)])
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_a_plan_with_it_is_resolved(name, shape, preset):
    recipe = make_recipe(name)
    method = f"{name}+sela" if recipe.pretext else f"iic+{name}"
    made = resolve(
        Settings(method=method, preset=preset, use_labels=bool(recipe.supervised)), 1000, shape, torch.device("cpu")
    )
    assert name in [stage.method for stage in made.stages]
    assert all(stage.recipe().heads for stage in made.stages)


@every_method
def test_its_papers_preset_trains(name):
    recipe = make_recipe(name)
    method = f"{name}+iic" if recipe.pretext else f"sela+{name}" if recipe.continues else name
    asked = Settings(method=method, n_clusters=3, preset="paper", epochs=1, use_labels=bool(recipe.supervised))
    store, rows = tiny_store(size=16), []
    made = resolve(asked, len(store), store.shape, torch.device("cpu"))
    _, _, state = stages.run(made, store, hooks=[rows.append], quiet=True, known=known_to(recipe))
    paper = {key: value for key, value in PAPER[name].items() if key in ("lr", "momentum", "weight_decay")}
    assert {key: getattr(made.stages[-2 if recipe.pretext else -1], key) for key in paper} == paper
    assert all(math.isfinite(row.loss) for row in rows)
    assert state.epoch == 1
