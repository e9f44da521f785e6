"""Checkpoints: all or nothing on disk, and nothing in them is ever executed."""

import os
import pickle
from dataclasses import replace

import pytest
import torch
from tiny import make_model, tiny_store
from torch import nn

from deepcluster import checkpoint
from deepcluster.checkpoint import State
from deepcluster.recipe import make_recipe
from deepcluster.trainer import Training, start


class Queued(nn.Module):
    """A network that remembers something."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.register_buffer("queue", torch.zeros(3))


@pytest.fixture
def state():
    """The state of a run under way: every part of it differs from a fresh one."""
    recipe = make_recipe("deepcluster", n_clusters=3)
    state = start(make_model(recipe), tiny_store(20), replace(recipe, network=Queued), Training(stage=2))
    sum(z.square().sum() for z in state.model([torch.rand(4, 1, 8, 8)])).backward()
    state.optimizer.step()
    state.network.queue.copy_(torch.arange(3.0))
    heads = len(recipe.heads)
    labels = (torch.arange(heads * 20).view(heads, 20) % 3).int()
    state.targets = replace(state.targets, labels=labels, partners=torch.arange(40).view(20, 2) % 20)
    state.predicted, state.head_losses, state.epoch = labels.flip(0), torch.arange(heads) / 4 + 0.25, 7
    state.seen, state.losses, state.step = (labels + 1) % 3, torch.arange(heads).double() / 3, 5
    state.flat_loss, state.unhealthy, state.rescues = 1.25, 2, ["lr", "seed"]
    return state


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a == b


def fresh(seed):
    recipe = make_recipe("deepcluster", n_clusters=3)
    return start(make_model(recipe, seed), tiny_store(20), replace(recipe, network=Queued), Training())


def test_everything_comes_back(state, tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, state)
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]
    other = fresh(seed=5)
    checkpoint.restore(checkpoint.read(path), other, make_recipe("deepcluster", n_clusters=3).heads)
    for name in ("network", "optimizer"):
        assert same(getattr(other, name).state_dict(), getattr(state, name).state_dict()), name
    assert len(other.optimizer.state) == len(list(other.model.parameters()))
    assert torch.equal(other.targets.labels, state.targets.labels)
    assert torch.equal(other.targets.partners, state.targets.partners)
    for name in ("predicted", "head_losses", "seen", "losses"):
        assert torch.equal(getattr(other, name), getattr(state, name)), name
        assert getattr(other, name).dtype == getattr(fresh(0), name).dtype, name
    assert (other.stage, other.epoch, other.step, other.unhealthy) == (2, 7, 5, 2)
    assert (other.flat_loss, other.rescues) == (1.25, ["lr", "seed"])


def test_every_field_of_the_state_is_saved(state, tmp_path):
    checkpoint.save(tmp_path / "last.pt", state)
    saved = set(checkpoint.read(tmp_path / "last.pt"))
    assert saved == {*State.__dataclass_fields__} - {"targets", "model"} | {
        "labels",
        "partners",
    }  # the network holds the model


def test_the_reported_head_has_the_lowest_loss_of_those_as_wide_as_the_first(state):
    state.head_losses = torch.tensor([0.5, 0.4, 0.3, 0.1])
    assert state.reported([0, 1, 2]) == 2
    assert state.reported([0]) == 0


# --- a crash while writing ---


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64 vs 0")])
def test_a_full_disk_leaves_the_old_file_and_no_litter(state, tmp_path, monkeypatch, error):
    path = tmp_path / "last.pt"
    checkpoint.save(path, state)
    before = path.read_bytes()

    def half(saved, file):
        file.write(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", half)
    state.epoch = 8
    with pytest.raises(OSError, match=r"cannot write .*last.pt: .*; free some space and go on with --resume"):
        checkpoint.save(path, state)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_being_killed_while_writing_leaves_the_old_file(state, tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    checkpoint.save(path, state)
    before = path.read_bytes()

    def killed(saved, file):
        file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(path, state)
    assert path.read_bytes() == before
    monkeypatch.undo()
    state.epoch = 8
    checkpoint.save(path, state)  # what was left lying is no hindrance
    assert checkpoint.read(path)["epoch"] == 8


def test_the_name_is_changed_only_when_the_data_is_on_disk(state, tmp_path, monkeypatch):
    calls = []
    fsync, rename = os.fsync, type(tmp_path).replace
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append("fsync") or fsync(fd))
    monkeypatch.setattr(type(tmp_path), "replace", lambda a, b: calls.append("replace") or rename(a, b))
    checkpoint.save(tmp_path / "last.pt", state)
    assert calls == ["fsync", "replace"]


def test_only_the_first_process_writes(state, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.dist, "rank", lambda: 1)
    checkpoint.save(tmp_path / "last.pt", state)
    assert not list(tmp_path.iterdir())


# --- files that are no checkpoint ---


def one_line(path, message):
    with pytest.raises(ValueError, match=message) as caught:
        checkpoint.read(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_file_says_to_start_anew(tmp_path):
    one_line(tmp_path / "last.pt", "no checkpoint .*last.pt; the run did not finish its first epoch: start it anew")


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused_in_one_line(state, tmp_path, kept):
    path = tmp_path / "last.pt"
    checkpoint.save(path, state)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    one_line(path, "cannot read the checkpoint .*; start anew")


def test_flipped_bytes_are_refused_or_change_a_number_but_raise_nothing_else(state, tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, state)
    whole, refused = path.read_bytes(), 0
    for at in torch.randint(len(whole), (60,), generator=torch.Generator().manual_seed(0)).tolist():
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            checkpoint.read(path)
        except ValueError:
            refused += 1
    assert refused > 0


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"not a checkpoint", b"PK\x03\x04", b"\x80", b"\x80\x02.", b"\x80\x02}.", b"\x00" * 1000, b"\x1f\x8b"],
)
def test_damaged_bytes_are_refused_in_one_line(tmp_path, content):
    path = tmp_path / "last.pt"
    path.write_bytes(content)
    one_line(path, "cannot read the checkpoint .*; start anew")


@pytest.mark.parametrize("foreign", [{"model": {}}, [1, 2], torch.zeros(3), {"state_dict": {"a": torch.zeros(1)}}, 7])
def test_a_file_of_another_program_is_refused(tmp_path, foreign):
    path = tmp_path / "last.pt"
    torch.save(foreign, path)
    one_line(path, "it is not a checkpoint of this program; start anew")


def test_a_checkpoint_with_a_part_missing_is_refused(state, tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, state)
    saved = checkpoint.read(path)
    for key in saved:
        torch.save({k: v for k, v in saved.items() if k != key}, path)
        one_line(path, "it is not a checkpoint of this (version of this )?program; start anew")
    torch.save({k: saved[k] for k in ("network", "optimizer", "labels", "stage", "epoch")}, path)  # as versions before
    one_line(path, "it is not a checkpoint of this version of this program; start anew")


def test_errors_without_words_are_reported_too(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    path.write_bytes(b"x")

    def wordless(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(torch, "load", wordless)
    one_line(path, "cannot read the checkpoint .*AssertionError; start anew")


class Malice:
    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (str(self.victim),)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_pickle_in_a_checkpoint_is_never_executed(state, tmp_path, legacy):
    victim, path = tmp_path / "victim", tmp_path / "last.pt"
    checkpoint.save(path, state)
    evil = checkpoint.read(path) | {"head_losses": Malice(victim)}
    torch.save(evil, path, _use_new_zipfile_serialization=not legacy)
    one_line(path, "cannot read the checkpoint")
    assert not victim.exists()
    with path.open("rb") as file:  # the bait is real
        torch.load(file, weights_only=False)
    assert victim.exists()


def test_a_plain_pickle_is_never_executed(tmp_path):
    victim, path = tmp_path / "victim", tmp_path / "last.pt"
    path.write_bytes(pickle.dumps(Malice(victim)))
    one_line(path, "cannot read the checkpoint")
    assert not victim.exists()


def test_whole_modules_are_refused(tmp_path):
    path = tmp_path / "last.pt"
    torch.save(nn.Linear(2, 2), path)
    one_line(path, "cannot read the checkpoint")
