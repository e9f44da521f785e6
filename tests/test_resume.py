"""Runs that are stopped anywhere, also in the middle of an epoch, and gone on with, end as if they had not been."""

import os
import random
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_methods import VARIANTS, Crash, assert_same, known_to, recipe_of, train
from tiny import make_model, tiny_store

from deepcluster import checkpoint, log, stages
from deepcluster.checkpoint import Saver
from deepcluster.plan import resolve
from deepcluster.sentinel import Sentinel
from deepcluster.settings import Settings
from deepcluster.trainer import Training, start

ALWAYS = 1e-9  # checkpoint_every, in seconds: after each step
TRAINING = Training(epochs=3, batch_size=32, lr=0.01)  # three steps an epoch; AdamW, which has the most to remember
TENSORS = ("predicted", "head_losses", "seen", "losses")


def doing(what, at):
    """A progress that calls ``what`` when the step of this number, counted over all epochs, is about to be made."""
    number = iter(range(10**9))

    def progress(batches):
        for batch in batches:
            torch.rand(3)  # the caller's generators are nobody's business
            np.random.rand(3)  # noqa: NPY002
            if next(number) == at:
                what()
            yield batch

    return progress


def at_step(monkeypatch, at, what):
    """Call ``what`` in the run that follows, in this step of it."""
    monkeypatch.setattr(stages.Bar, "__call__", lambda self, batches: progress(batches))
    progress = doing(what, at)


def crash():
    raise Crash


def disturb(seed):
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)


def noted(found):
    """A hook that keeps the rows of metrics.jsonl without their clocks."""
    clocks = ("seconds", "images_per_second")
    return lambda report: found.append({k: v for k, v in log.row(report).items() if k not in clocks})


def same_state(one, other):
    assert_same(one.network.state_dict(), other.network.state_dict())
    for p, q in zip(one.network.parameters(), other.network.parameters(), strict=True):
        assert (p in one.optimizer.state) == (q in other.optimizer.state)
        for key, value in one.optimizer.state[p].items() if p in one.optimizer.state else ():
            assert torch.equal(value, other.optimizer.state[q][key]), key
    for name in TENSORS:
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert torch.equal(one.targets.labels, other.targets.labels)
    assert torch.equal(one.targets.partners, other.targets.partners)
    assert (one.flat_loss, one.unhealthy, one.step) == (other.flat_loss, other.unhealthy, other.step)


# --- in the middle of an epoch ---


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=lambda x: str(x))
def test_crashes_in_the_middle_of_epochs_change_nothing(name, options, tmp_path):
    recipe, expected, found = recipe_of(name, **options), [], []
    straight = train(recipe, TRAINING, hooks=[noted(expected)])
    saving, saved = replace(TRAINING, out=tmp_path, checkpoint_every=ALWAYS), None
    for at, epoch, step in ((1, 0, 1), (4, 1, 2)):  # the second is counted from the first
        disturb(at)
        model, progress = make_model(recipe, at if saved else 0), doing(crash, at)
        with pytest.raises(Crash):
            train(recipe, saving, model=model, hooks=[noted(found)], progress=progress, resume=saved)
        saved = checkpoint.read(tmp_path / "last.pt")
        assert (saved["epoch"], saved["step"]) == (epoch, step)
    disturb(9)
    resumed = train(recipe, TRAINING, model=make_model(recipe, 9), hooks=[noted(found)], resume=saved)
    same_state(straight, resumed)
    assert repr(found) == repr(expected)


def test_a_checkpoint_within_an_epoch_holds_what_was_seen_so_far(tmp_path):
    recipe = recipe_of("iic")
    with pytest.raises(Crash):
        train(recipe, replace(TRAINING, out=tmp_path, checkpoint_every=ALWAYS), progress=doing(crash, 2))
    saved = checkpoint.read(tmp_path / "last.pt")
    assert ((saved["seen"] >= 0).sum(1) == 64).all()
    assert (saved["predicted"] == -1).all()
    assert (saved["losses"] != 0).all()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_waits_for_the_end_of_the_step_and_saves(number, tmp_path):
    recipe, before = recipe_of("iic"), signal.getsignal(number)
    straight = train(recipe, TRAINING)
    ask = doing(lambda: os.kill(os.getpid(), number), 4)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, replace(TRAINING, out=tmp_path), progress=ask)
    assert signal.getsignal(number) is before
    saved = checkpoint.read(tmp_path / "last.pt")
    assert (saved["epoch"], saved["step"]) == (1, 2)
    same_state(straight, train(recipe, TRAINING, model=make_model(recipe, 9), resume=saved))


def test_a_second_ctrl_c_does_not_wait(tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    recipe, before = recipe_of("iic"), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, replace(TRAINING, out=tmp_path), progress=doing(twice, 4))
    assert signal.getsignal(signal.SIGINT) is before
    saved = checkpoint.read(tmp_path / "last.pt")
    assert (saved["epoch"], saved["step"]) == (1, 0)


def test_a_signal_while_an_epoch_is_reported_ends_it(tmp_path):
    def hook(report):
        if report.clock.epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    recipe = recipe_of("iic")
    with pytest.raises(KeyboardInterrupt):
        train(recipe, replace(TRAINING, out=tmp_path), hooks=[hook])
    saved = checkpoint.read(tmp_path / "last.pt")
    assert (saved["epoch"], saved["step"]) == (2, 0)


def test_an_ignored_signal_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a job that a shell runs in the background
    try:
        with Saver(tmp_path):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_without_a_run_directory_signals_are_left_alone():
    recipe, seen = recipe_of("iic"), []
    train(recipe, TRAINING, hooks=[lambda report: seen.append(signal.getsignal(signal.SIGTERM))])
    assert seen[0] is signal.getsignal(signal.SIGTERM)


# --- runs that are rescued ---

EPOCHS = 6  # of three steps
REPORTED = [0, 1, 2, 3, 4, 2, 3, 4, 5, 3, 4, 5]  # with two rescues


def collapsing(report):
    """Planted: from the third epoch on, after a rescue from the fourth on, then no more."""
    first = (2, 3, EPOCHS)[len(report.state.rescues)]
    report.state.unhealthy = max(0, report.clock.epoch - first + 1)
    report.health.update({"active": 1, "largest_share": 1.0} if report.state.unhealthy else {})


def rescued(folder, every, resume=None):
    """The state at the end, and the epochs that were reported on the way."""
    settings = Settings(method="sela", n_clusters=3, epochs=EPOCHS, batch_size=32, lr=0.01, on_collapse="rescue",
                        checkpoint_every=every)  # fmt: skip
    plan, epochs = resolve(settings, 96, (1, 8, 8), torch.device("cpu")), []
    hooks = [collapsing, lambda report: epochs.append(report.clock.epoch), Sentinel("rescue")]
    return stages.run(plan, tiny_store(), folder, hooks, resume, quiet=True)[2], epochs


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    state, epochs = rescued(tmp_path_factory.mktemp("straight"), "10m")
    assert epochs == REPORTED
    assert state.rescues == ["seed", "seed"]
    return state


def test_what_a_rescue_goes_back_to_does_not_depend_on_the_clock(straight, tmp_path):
    same_state(straight, rescued(tmp_path, "0.000001s")[0])


@pytest.mark.parametrize("at", [4, 10, 16, 25, 31])
def test_a_rescued_run_that_crashed_within_an_epoch_ends_the_same(straight, tmp_path, monkeypatch, at):
    with monkeypatch.context() as patch:
        at_step(patch, at, crash)
        with pytest.raises(Crash):
            rescued(tmp_path, "0.000001s")
    saved = checkpoint.read(tmp_path / "last.pt")
    assert saved["step"]
    state, epochs = rescued(tmp_path, "10m", saved)
    same_state(straight, state)
    assert epochs == REPORTED[at // 3 :]  # no rescue is made twice


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_crash_before_a_healthy_epoch_is_kept_changes_nothing(straight, tmp_path, monkeypatch, call):
    keep, left = checkpoint.keep, iter(range(call - 1))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "keep", lambda last: crash() if next(left, None) is None else keep(last))
        with pytest.raises(Crash):
            rescued(tmp_path, "10m")
    same_state(straight, rescued(tmp_path, "10m", checkpoint.read(tmp_path / "last.pt"))[0])


# --- when it is saved ---


class Disk:
    """A disk that takes 0.3 s to write a checkpoint, and the clock that shows it."""

    def __init__(self, monkeypatch, seconds=0.3):
        self.now, self.spent, self.epochs, real = 0.0, 0.0, [], checkpoint.save

        def save(path, state):
            real(path, state)
            self.now, self.spent = self.now + seconds, self.spent + seconds
            self.epochs.append(state.epoch)

        monkeypatch.setattr(checkpoint, "save", save)
        monkeypatch.setattr(checkpoint.time, "monotonic", lambda: self.now)


def a_state():
    recipe = recipe_of("iic")
    return start(make_model(recipe), tiny_store(), recipe, TRAINING, known_to(recipe))


def test_saving_takes_two_percent_of_the_time_and_the_last_epoch_is_saved(tmp_path, monkeypatch):
    disk, state = Disk(monkeypatch), a_state()
    with Saver(tmp_path) as saver:
        for epoch in range(1, 201):  # of a second
            disk.now, state.epoch = disk.now + 1, epoch
            saver.epoch(state, epoch == 200)
    assert disk.epochs[:3] == [1, 17, 33]  # the first, to learn what it costs, then when 15 s have passed
    assert disk.epochs[-1] == checkpoint.read(tmp_path / "last.pt")["epoch"] == 200
    assert disk.spent < 0.025 * disk.now


def test_what_is_saved_quickly_is_saved_each_epoch(tmp_path, monkeypatch):
    disk, state = Disk(monkeypatch, 0.01), a_state()
    with Saver(tmp_path) as saver:
        for epoch in range(1, 6):
            disk.now, state.epoch = disk.now + 0.1, epoch
            saver.epoch(state, False)
    assert disk.epochs == [1, 2, 3, 4, 5]


def test_within_an_epoch_it_is_saved_as_often_as_asked(tmp_path, monkeypatch):
    disk, state, steps = Disk(monkeypatch), a_state(), []
    with Saver(tmp_path, every=10) as saver:
        for step in saver.during(range(60), state):
            disk.now, state.step = disk.now + 1, step + 1
            steps.append(len(disk.epochs))
    assert [i for i in range(1, 60) if steps[i] > steps[i - 1]] == [10, 20, 30, 40, 50]


def test_a_loss_that_is_no_number_is_not_saved(tmp_path, monkeypatch):
    disk, state = Disk(monkeypatch), a_state()
    with Saver(tmp_path, every=10) as saver:
        for step in saver.during(range(60), state):
            disk.now, state.step = disk.now + 1, step + 1
            state.losses[0] = float("nan") if step >= 35 else 0.0
    assert len(disk.epochs) == 3


def test_the_last_healthy_epoch_is_kept_whatever_the_clock_says(tmp_path, monkeypatch):
    disk, state = Disk(monkeypatch), a_state()
    with Saver(tmp_path, healthy=True) as saver:
        for epoch, unhealthy in enumerate((0, 0, 1, 2), 1):
            disk.now, state.epoch, state.unhealthy = disk.now + 1, epoch, unhealthy
            saver.epoch(state, epoch == 4)
    assert disk.epochs == [1, 2, 4]
    assert checkpoint.read(tmp_path / "last.pt")["epoch"] == 4
    assert checkpoint.read(tmp_path / "healthy.pt")["epoch"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["healthy.pt", "last.pt"]
    (tmp_path / "healthy.tmp").hardlink_to(tmp_path / "last.pt")  # it was killed here
    checkpoint.keep(tmp_path / "last.pt")
    checkpoint.keep(tmp_path / "last.pt")  # two names of one file
    assert checkpoint.read(tmp_path / "healthy.pt")["epoch"] == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["healthy.pt", "last.pt"]
