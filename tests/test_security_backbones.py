"""Attacks by a run, a model or a weight file that names code as its backbone. See test_security.py."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from attack import change, refused, stranger
from safetensors.torch import load_file, save_file
from tiny import onnx_with_weights_elsewhere

from deepcluster import DeepCluster, load, pretrained, trust
from deepcluster.__main__ import main
from deepcluster.backbones import make_backbone
from deepcluster.doctor import cache_dir

CPU = torch.device("cpu")
BAIT = "import os\nos.mkdir({!r})\nfrom torch import nn\ndef net():\n    return nn.Conv2d(3, 4, 1)\n"
CODE = ["bait:net", "bait.part:net", "hub:./net", "hub:repository/net", "os:mkdir"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A stranger's run; beside it code that makes a folder when it is imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trust, "_given", set())
    monkeypatch.delenv("DEEPCLUSTER_TRUST", raising=False)
    for name in ("bait", "bait.part", "hubconf"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    bait = BAIT.format(str(tmp_path / "victim"))
    Path("repository").mkdir()
    Path("bait.py").write_text(bait)
    Path("hubconf.py").write_text(bait)
    Path("repository/hubconf.py").write_text(bait)
    return stranger()


def safe():
    return not Path("victim").exists()


@pytest.mark.parametrize("name", CODE)
def test_a_model_that_names_code_runs_none(run, name):
    change(run / "model/config.json", backbone=name)
    with refused("is code, which is not run because a file names it: look at it, then set DEEPCLUSTER_TRUST="):
        DeepCluster.from_pretrained(run / "model")
    assert safe()


@pytest.mark.parametrize("name", CODE)
@pytest.mark.parametrize("command", ["report", "evaluate", "predict", "export", "resume"])
def test_no_command_runs_the_code_of_a_run(run, capsys, command, name):
    change(run / "config.json", plan__backbone=name)
    change(run / "model/config.json", backbone=name)
    more = {
        "predict": ["predict", "run", "photos", "--out", "p.parquet"],
        "export": ["export", "run", "--format", "onnx", "--out", "x.onnx"],
        "resume": ["fit", "--resume", "run"],
        "evaluate": ["evaluate", "run", "--labels", "none.csv"],
    }
    main([*more.get(command, [command, "run"]), "--quiet"])
    assert safe()


def test_going_on_with_a_run_whose_model_is_honest(run):
    change(run / "config.json", plan__backbone="bait:net")
    with refused("is code, which is not run"):  # its model is a convnet, but fit would build what the plan says
        load(run).set_params(out=None).fit("photos")
    assert safe()


def test_starting_from_a_stranger(run):
    change(run / "model/config.json", backbone="bait:net")
    with refused("is code, which is not run"):
        DeepCluster(2, init_from=str(run)).fit("photos")
    assert safe()


@pytest.mark.parametrize("name", [*CODE, "bait.safetensors", "other.safetensors", "bait.onnx"])
def test_a_weight_file_whose_neighbour_names_code(run, name):
    save_file({"a": torch.zeros(1)}, "w.safetensors")
    save_file({"a": torch.zeros(1)}, "other.safetensors")
    Path("config.json").write_text(json.dumps({"backbone": name, "shape": [3, 8, 8]}))
    with pytest.raises(ValueError, match=r"is code, which is not run|unknown backbone|no (ONNX )?file|nothing beside"):
        DeepCluster(2, backbone="w.safetensors").fit("photos")
    assert safe()


def test_what_the_user_names_is_run_and_then_known_again(run, monkeypatch):
    pretrained.given("bait:net")
    assert safe()  # naming it imports nothing
    assert make_backbone("bait:net", (3, 8, 8))[1] == 4
    monkeypatch.setattr(trust, "_given", set())  # another process, which only finds it in a file
    trust.check("bait:net")
    Path("elsewhere").mkdir()
    Path("elsewhere/bait.py").write_text("")
    monkeypatch.chdir("elsewhere")  # where another module has that name
    monkeypatch.delitem(sys.modules, "bait")
    with refused("is code, which is not run"):
        trust.check("bait:net")


def test_a_note_of_trust_that_others_could_have_written_counts_for_nothing(run, monkeypatch):
    trust.trust("bait:net")
    monkeypatch.setattr(trust, "_given", set())
    trust.check("bait:net")
    notes = cache_dir() / "trusted"
    assert notes.stat().st_mode & 0o077 == 0
    notes.chmod(0o666)
    with refused("is code, which is not run"):
        trust.check("bait:net")
    notes.chmod(0o600)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with refused("is code, which is not run"):
        trust.check("bait:net")


@pytest.mark.parametrize(("listed", "ok"), [("bait", True), ("a, bait:net", True), ("bai", False), ("net", False)])
def test_the_variable_lists_what_is_trusted(run, monkeypatch, listed, ok):
    monkeypatch.setenv("DEEPCLUSTER_TRUST", listed)
    if ok:
        trust.check("bait:net")
    else:
        with refused("is code, which is not run"):
            trust.check("bait:net")


def test_a_model_of_onnx_with_weights_in_other_files(run):
    pytest.importorskip("onnx")
    tensors = load_file(run / "model/model.safetensors")
    model = torch.frombuffer(bytearray(onnx_with_weights_elsewhere()), dtype=torch.uint8)
    kept = {k: v for k, v in tensors.items() if not k.startswith("backbone.1.")}
    dim = tensors["centroids"].shape[1]
    save_file({**kept, "backbone.1.model": model}, run / "model/model.safetensors")
    change(run / "model/config.json", backbone=f"onnx:{dim}")
    made = DeepCluster.from_pretrained(run / "model")
    with refused("its weights lie in other files"):
        made.predict("photos")


@pytest.mark.parametrize("name", ["onnx:0", "onnx:-1", "onnx:9999999999", "onnx:x", "onnx:"])
def test_a_model_of_onnx_with_a_width_that_cannot_be(run, name):
    change(run / "model/config.json", backbone=name)
    with refused("cannot read the model in", megabytes=400):
        DeepCluster.from_pretrained(run / "model")
