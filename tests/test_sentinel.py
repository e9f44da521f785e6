"""Planted collapses are caught, healthy runs are left alone, and a rescue goes back and changes one thing."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from tiny import make_model, noise, store_of, tiny_store
from torch import nn

from deepcluster import DeepCluster, checkpoint, health, stages
from deepcluster.__main__ import main
from deepcluster.losses import pseudo_label
from deepcluster.plan import resolve
from deepcluster.recipe import METHODS, Recipe, make_recipe
from deepcluster.sentinel import Collapse, Sentinel
from deepcluster.settings import Settings, seconds
from deepcluster.trainer import Training, fit

TRAINING = Training(epochs=5, batch_size=32, lr=0.01)
DIGITS = (load_digits().images * 15.9).astype(np.uint8)


def quiet_head(bias):
    """A linear head that says the same of all images until it has learnt something."""

    def make(dim, k):
        head = nn.Linear(dim, k)
        with torch.no_grad():
            head.weight.zero_()
            head.bias.copy_(bias[:k])
        return head

    return make


def caught(recipe, training=TRAINING, store=None, model=None):
    """What the sentinel says of a run that should be stopped, and in which epoch."""
    seen = []
    with pytest.raises(Collapse) as stopped:
        fit(model or make_model(recipe), store or tiny_store(), recipe, training, [seen.append, Sentinel("stop")])
    assert seen[-1].health["symptom"] == stopped.value.symptom.what
    return stopped.value.symptom, len(seen)


def recipe_with(head, k=6):
    return Recipe((k,), lambda z, y, clock: z.square().mean(), head=head)


# --- planted failures ---


def test_one_cluster_takes_all_from_the_start():
    head = quiet_head(torch.tensor([100.0] + [0.0] * 5))
    symptom, epochs = caught(recipe_with(head), replace(TRAINING, lr=1e-6))
    assert symptom.what == "all images are in one cluster"
    assert epochs == 3  # one bad epoch is no collapse
    assert symptom.change == "seed"


def test_most_clusters_stay_empty():
    head = quiet_head(torch.tensor([5.0, 5.0, -50.0, -50.0, -50.0, -50.0]))

    def varied(dim, k):
        made = head(dim, k)
        with torch.no_grad():
            made.weight[:2].normal_()
        return made

    assert caught(recipe_with(varied), replace(TRAINING, lr=1e-6))[0].what == "only 2 of 6 clusters hold images"


def test_ninety_nine_to_one():
    images = noise(200, 1, 8)
    images[:198] = images[0] // 8
    images[198:] = 255

    class Bright(nn.Module):
        def forward(self, x):
            return x.mean((1, 2, 3))[:, None] - 0.5

    def by_brightness(dim, k):
        head = nn.Linear(dim, k)
        with torch.no_grad():
            head.weight.copy_(torch.tensor([[-1.0], [1.0]]))
            head.bias.zero_()
        return head

    recipe = replace(recipe_with(by_brightness, k=2), views=("clean",))
    model = make_model(recipe_with(nn.Linear, k=2))
    model.backbone, model.heads = Bright(), nn.ModuleList([by_brightness(1, 2)])
    symptom, _ = caught(recipe, replace(TRAINING, lr=1e-6, batch_size=100), store_of(images), model)
    assert symptom.what == "99% of the images are in one cluster"
    assert "unless they are all alike" in symptom.advice


@pytest.mark.parametrize("method", ["sela", "simclr", "iic"])
def test_dead_features(method):
    recipe = make_recipe(method, n_clusters=3)
    model = make_model(recipe)

    class Dead(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return torch.zeros(len(x), 32) * self.scale + 0.7

    model.backbone = Dead()
    symptom, _ = caught(recipe, model=model)
    assert symptom.what == "all images have the same features"
    assert symptom.change == "lr"


@pytest.mark.parametrize("method", ["sela", "deepcluster", "swav"])
def test_a_learning_rate_a_thousand_times_too_high(method):
    with pytest.raises((Collapse, FloatingPointError)):
        DeepCluster(10, method=method, lr=2.0, epochs=30, batch_size=50, on_collapse="stop").fit(DIGITS[:200])


def test_a_loss_that_stays_where_all_images_look_the_same():
    recipe = Recipe((6,), pseudo_label, assigner=RandomLabels(), refresh=make_recipe("sela").refresh)
    symptom, epochs = caught(recipe, replace(TRAINING, lr=1e-9, epochs=80))
    assert "nearly what it is when all images look the same (1.792)" in symptom.what
    assert epochs == 42  # the first half of training is left alone


class RandomLabels:
    """An assigner whose labels cannot be learnt: they are drawn anew each time."""

    def __call__(self, features, heads, previous, seed):
        rng = torch.Generator().manual_seed(seed)
        labels = torch.randint(0, heads[0].out_features, previous.labels.shape, generator=rng, dtype=torch.int32)
        return replace(previous, labels=labels)


def write_images(folder, images):
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03d}.png")


def flat(*levels):
    return [np.full((8, 8), level, np.uint8) for level in levels]


RNG = np.random.default_rng(0)
FIVE = list(RNG.integers(0, 256, (5, 8, 8), dtype=np.uint8))
PLANTED = {
    "identical": (FIVE[:1] * 30, "all 30 images are the same"),
    "five": (FIVE * 6, "there are only 5 different images for 10 clusters; use --n-clusters 5 or fewer"),
    "constant": (flat(*range(0, 240, 8)), "100% of the images have one colour and nothing else in them"),
    "black": (flat(*[0] * 30), "all 30 images are the same"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_images_that_cannot_be_clustered(name, tmp_path, capsys):
    images, said = PLANTED[name]
    write_images(tmp_path / "images", images)
    run = ["fit", str(tmp_path / "images"), "--epochs", "1", "--method", "sela", "--quiet", "--batch-size", "10"]
    assert main([*run, "--out", str(tmp_path / "stop"), "--on-collapse", "stop"]) == 3
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1
    assert main([*run, "--out", str(tmp_path / "warn")]) == 0
    assert said in capsys.readouterr().err
    assert (tmp_path / "warn/assignments.parquet").exists()


def test_an_image_with_nan_is_left_out_and_named():
    images = DIGITS[:40] / 255.0
    images[7, 2, 3] = np.nan
    model = DeepCluster(2, method="sela", epochs=1, on_collapse="stop").fit(images)
    assert len(model.labels_) == 39
    assert [reason for _, reason in model.skipped_] == ["not finite: has nan or infinite pixels"]


def test_nan_in_training_stops_with_exit_3(tmp_path, capsys, monkeypatch):
    write_images(tmp_path / "images", DIGITS[:40])
    monkeypatch.setattr(Training, "lr_at", lambda self, clock: float("nan"))
    run = ["fit", str(tmp_path / "images"), "--out", str(tmp_path / "run"), "--n-clusters", "3", "--epochs", "3"]
    assert main([*run, "--method", "sela", "--quiet"]) == 3
    assert "lower --lr" in capsys.readouterr().err


# --- what is no alarm ---


@pytest.mark.parametrize("k", [2, 3])
def test_good_images_are_no_symptom(k):
    assert health.of_images(tiny_store(), k) is None
    part_flat = store_of(torch.cat([noise(60, 1, 8), torch.zeros(40, 1, 8, 8, dtype=torch.uint8)]))
    assert health.of_images(part_flat, k) is None


def test_a_bad_epoch_is_no_collapse():
    heads = iter([True, True, False, True, True, False])  # never three in a row

    def look(report):
        bad = next(heads)
        report.health.update(active=1 if bad else 6, largest_share=1.0 if bad else 0.3)
        report.state.unhealthy = report.state.unhealthy + 1 if bad else 0

    recipe = recipe_with(nn.Linear)
    fit(make_model(recipe), tiny_store(), recipe, replace(TRAINING, epochs=6), [look, Sentinel("stop")])


HEALTHY = [(name, seed) for name in sorted(METHODS) for seed in (0, 1)]
BEFORE = {"scan": "simclr+", "selflabel": "simclr+scan+"}  # which do not work from nothing


@pytest.mark.slow
@pytest.mark.parametrize(("method", "seed"), HEALTHY)
def test_healthy_runs_raise_no_alarm(method, seed, caplog):
    few = make_recipe(method).supervised > 0
    plan = BEFORE.get(method, "") + method + ("+sela" if make_recipe(method).pretext else "")
    truth = load_digits().target[:600].copy()
    truth[100:] = -1
    model = DeepCluster(
        10, method=plan, epochs=8, batch_size=100, random_state=seed, on_collapse="stop", use_labels=few
    )
    with caplog.at_level(logging.WARNING, "deepcluster"):
        model.fit(DIGITS[:600], truth if few else None)
    assert "collapsed" not in caplog.text


# --- what is done about it ---


def test_a_warning_is_given_once_a_stage_and_training_goes_on(caplog):
    head = quiet_head(torch.tensor([100.0] + [0.0] * 5))
    recipe = recipe_with(head)
    with caplog.at_level(logging.WARNING, "deepcluster"):
        state = fit(make_model(recipe), tiny_store(), recipe, replace(TRAINING, lr=1e-6), [Sentinel("warn")])
    assert state.epoch == 5
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 1
    assert said[0].startswith("collapsed in epoch 3 of 5 of stage 1: all images are in one cluster; try another --seed")


def plan_of(**settings):
    given = {"method": "sela", "n_clusters": 6, "epochs": 5, "batch_size": 32, "lr": 0.01, "on_collapse": "rescue"}
    return resolve(Settings(**given | settings), 96, (1, 8, 8), torch.device("cpu"))


class Planted:
    """Hook: makes epochs look collapsed while ``when(training seed, lr, epoch)`` holds."""

    def __init__(self, when, **symptom):
        self.when, self.symptom, self.log = when, symptom, []

    def __call__(self, report):
        group = report.state.optimizer.param_groups[0]
        bad = self.when(report, list(report.state.rescues))
        self.log.append((report.state.stage, report.clock.epoch, list(report.state.rescues), group["lr"]))
        if bad:
            report.health.update(self.symptom)
        count = self.count + 1 if bad else 0
        report.state.unhealthy = self.count = count

    count = 0


ONE_CLUSTER = {"active": 1, "largest_share": 1.0}
DEAD = {"rank": 0.0}


@pytest.mark.parametrize(("symptom", "change"), [(ONE_CLUSTER, "seed"), (DEAD, "lr")])
def test_a_rescue_goes_back_to_the_last_healthy_epoch_and_changes_one_thing(tmp_path, caplog, symptom, change):
    planted = Planted(lambda report, rescues: report.clock.epoch >= 1 and not rescues, **symptom)
    with caplog.at_level(logging.WARNING, "deepcluster"):
        _, _, state = stages.run(plan_of(), tiny_store(), tmp_path, [planted, Sentinel("rescue")], quiet=True)
    assert [(epoch, rescues) for _, epoch, rescues, _ in planted.log] == [
        (0, []), (1, []), (2, []), (3, []), (1, [change]), (2, [change]), (3, [change]), (4, [change])
    ]  # fmt: skip
    assert state.rescues == [change]
    first, again = (next(lr for _, e, r, lr in planted.log if e == 1 and r == made) for made in ([], [change]))
    assert again == pytest.approx(first / 10 if change == "lr" else first)
    assert "rescue 1 of 3: collapsed in epoch 4 of 5" in caplog.text
    assert "back to epoch 1 of stage 1" in caplog.text


def test_a_rescue_before_the_first_healthy_epoch_starts_the_stage_anew(tmp_path):
    planted = Planted(lambda report, rescues: report.state.stage == 1 and len(rescues) < 2, **ONE_CLUSTER)
    plan = plan_of(method="simclr+sela")
    _, _, state = stages.run(plan, tiny_store(), tmp_path, [planted, Sentinel("rescue")], quiet=True)
    assert state.rescues == ["seed", "seed"]
    assert [entry[:3] for entry in planted.log if entry[1] == 0] == [
        (0, 0, []), (1, 0, []), (1, 0, ["seed"]), (1, 0, ["seed", "seed"])
    ]  # fmt: skip


def test_after_three_rescues_in_vain_the_run_stops(tmp_path):
    planted = Planted(lambda report, rescues: True, **ONE_CLUSTER)
    with pytest.raises(Collapse, match="all images are in one cluster"):
        stages.run(plan_of(), tiny_store(), tmp_path, [planted, Sentinel("rescue")], quiet=True)
    assert planted.log[-1][2] == ["seed"] * 3


def test_a_rescue_of_a_loss_that_is_no_number(tmp_path, monkeypatch):
    rate = Training.lr_at
    monkeypatch.setattr(Training, "lr_at", lambda self, clock: rate(self, clock) if self.rescues else float("nan"))
    _, _, state = stages.run(plan_of(), tiny_store(), tmp_path, [Sentinel("rescue")], quiet=True)
    assert state.rescues == ["lr"]


def test_a_rescued_run_that_is_killed_ends_as_if_it_had_not_been(tmp_path):
    def when(report, rescues):
        return report.clock.epoch >= 1 and not rescues

    def trained(folder, kill_at=None, resume=None):
        folder.mkdir(exist_ok=True)
        planted = Planted(when, **ONE_CLUSTER)

        def kill(report):
            if (report.clock.epoch, len(report.state.rescues)) == kill_at:
                raise KeyboardInterrupt

        hooks = [planted, Sentinel("rescue"), kill]
        return stages.run(plan_of(), tiny_store(), folder, hooks, resume, quiet=True)[2]

    straight = trained(tmp_path / "straight")
    for name, at in (("before", (2, 0)), ("after", (3, 1)), ("at once", (1, 1))):
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / name, at)
        again = trained(tmp_path / name, None, checkpoint.read(tmp_path / name / "last.pt"))
        assert again.rescues == straight.rescues == ["seed"]
        for key, value in straight.network.state_dict().items():
            assert torch.equal(value, again.network.state_dict()[key]), (name, key)
        assert torch.equal(straight.predicted, again.predicted)


def test_a_rescue_needs_a_place_to_go_back_to():
    with pytest.raises(ValueError, match="needs a run directory: give out="):
        DeepCluster(2, method="sela", epochs=1, on_collapse="rescue").fit(DIGITS[:40])


def test_metrics_have_each_epoch_once_after_a_rescue(tmp_path, monkeypatch):
    bad = health.symptom

    def planted(found, loss, k, n, clock):
        now = clock.epoch >= 1 and not changed
        return health.Symptom("planted", "x", "lr") if now else bad(found, loss, k, n, clock)

    changed: list[bool] = []
    start = stages.fit
    monkeypatch.setattr(
        stages, "fit", lambda m, s, r, t, *a, **k: changed.extend(t.rescues) or start(m, s, r, t, *a, **k)
    )
    monkeypatch.setattr(health, "symptom", planted)
    model = DeepCluster(3, method="sela", epochs=4, out=tmp_path / "run", on_collapse="rescue")
    model.fit(DIGITS[:60])
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert [row.get("rescues") for row in rows] == [None, ["lr"], ["lr"], ["lr"]]
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["plan"]["on_collapse"] == "rescue"


@pytest.mark.parametrize("wrong", ["maybe", 3, None])
def test_the_policy_is_checked(wrong):
    with pytest.raises(ValueError, match="on_collapse must be warn, stop or rescue; got"):
        Settings(on_collapse=wrong)


@pytest.mark.parametrize(("given", "length"), [("90s", 90), ("10m", 600), ("2h", 7200), ("45", 45), ("0.5s", 0.5)])
def test_durations(given, length):
    assert seconds(given) == length


@pytest.mark.parametrize("wrong", ["", "0", "0s", "-1m", "ten", "5d", "1e3", 10, None, "m"])
def test_wrong_durations(wrong):
    with pytest.raises(ValueError, match="checkpoint_every must be a time above 0, such as 90s, 10m or 2h; got"):
        Settings(checkpoint_every=wrong)
