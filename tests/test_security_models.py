"""Attacks by a model, weights or labels that a stranger made. See test_security.py.

Tested elsewhere: pickles in weights (test_model.py), damaged edits (test_edits.py).
"""

import pytest
import torch
from attack import change, limits, refused, stranger
from safetensors.torch import load_file, save_file

from deepcluster import DeepCluster
from deepcluster.backbones import load_weights, make_backbone
from deepcluster.classifier import Classifier
from deepcluster.edits import Split, Step, pack
from deepcluster.evaluate import read_labels

CPU = torch.device("cpu")


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return stranger()


# --- no more memory than the files ---


@pytest.mark.parametrize(
    "fields",
    [{"n_clusters": 10**12}, {"n_clusters": "3"}, {"n_clusters": True}, {"n_clusters": -3}, {"shape": [10**6, 8, 8]},
     {"shape": [1, 10**6, 10**6]}, {"shape": [1, 8]}, {"shape": [True, 8, 8]}, {"shape": "188"}, {"shape": [10**9]},
     {"shape": [10**9], "backbone": "mlp"}, {"backbone": "torchvision:vgg19"}, {"head": "__class__"},
     {"backbone": "vgg16", "shape": [3, 64, 64]}, {"format": "2"}, {"more": 1}],
    ids=str,
)  # fmt: skip
def test_models_that_claim_more_than_they_hold(run, fields):
    change(run / "model/config.json", **fields)
    said = "describes .* bytes of weights" if "backbone" in fields else ""
    with refused(f"cannot read the model in .*{said}", megabytes=400):
        DeepCluster.from_pretrained(run / "model")


def test_a_claim_of_many_clusters_in_both_files(run):
    tensors = load_file(run / "model/model.safetensors")
    save_file(tensors | {"order": torch.zeros(10**6, dtype=torch.int64)}, run / "model/model.safetensors")
    change(run / "model/config.json", n_clusters=10**6)
    with refused("cannot read the model in", megabytes=400):  # 2 GB of a head
        Classifier.load(run / "model", CPU)


@pytest.mark.parametrize("order", [[0, 1, 9], [0, 1, -9]])
def test_an_order_of_other_clusters(run, order):
    tensors = load_file(run / "model/model.safetensors")
    save_file(tensors | {"order": torch.tensor(order)}, run / "model/model.safetensors")
    with refused("cannot read the model in"):
        Classifier.load(run / "model", CPU)


def test_edits_of_another_width(run):
    made = Classifier.load(run / "model", CPU)
    step = Step((Split(0, torch.rand(2, 5)),))
    measured = {"centroids": torch.zeros(4, made.dim), "reach": torch.zeros(4)}
    (run / "model/edits.safetensors").write_bytes(pack([""] * 3, [step], measured))
    with refused("cannot read the model in"):
        Classifier.load(run / "model", CPU)


# --- weights, labels, what was skipped ---


def test_weights_that_are_no_tensors(tmp_path):
    backbone, _ = make_backbone("convnet", (1, 8, 8))
    torch.save(dict.fromkeys(backbone[-1].state_dict(), 3), tmp_path / "a.pth")
    with refused("does not fit this backbone"):
        load_weights(backbone, tmp_path / "a.pth")


def test_labels_with_a_field_without_end(tmp_path):
    (tmp_path / "a.csv").write_text("path,label\n" + "x" * 200_000 + ",1\n")
    with refused("a.csv is no readable table"):
        read_labels(str(tmp_path / "a.csv"), ["x.png"])


def test_labels_for_a_name_of_many_parts(tmp_path):
    (tmp_path / "a.csv").write_text("path,label\nb/x.png,1\n")
    with limits(megabytes=64):
        assert read_labels(str(tmp_path / "a.csv"), ["a/" * 30_000 + "b/x.png"])[0] == ["1"]
