"""The ONNX model says what the classifier says, for any batch size, edits included; and nothing disturbs the user."""

import builtins
import contextlib
import io
import json
import logging
import warnings

import numpy as np
import pytest
import torch
from finished import CPU, edit, finished
from tiny import noise

from deepcluster import edits
from deepcluster.classifier import Classifier
from deepcluster.export import export, network

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def run_of(folder, backbone="convnet", channels=1, n=48, size=8):
    np.save(folder / "x.npy", noise(n, channels, size).permute(0, 2, 3, 1).numpy())
    return finished(folder / "run", str(folder / "x.npy"), 4, size, channels, backbone)


def agrees(run, file, shape, sizes=(1, 7, 64)):
    """Both give the same for several batch sizes; returns the clusters of the last batch."""
    classifier = Classifier.load(run / "model", CPU).eval()
    session = onnxruntime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"])
    for size in sizes:
        images = torch.rand(size, *shape, generator=torch.Generator().manual_seed(size))
        features, p, cluster = session.run(["features", "probabilities", "cluster"], {"images": images.numpy()})
        with torch.no_grad():
            expected = classifier(images)
        assert np.abs(features - expected[0].numpy()).max() <= 1e-4
        assert np.abs(p - expected[1].numpy()).max() <= 1e-4
        assert (features.dtype, p.dtype, cluster.dtype) == (np.float32, np.float32, np.int64)
        assert p.shape == (size, classifier.n_clusters)
        close = expected[1].topk(2).values  # a tie within rounding may fall either way
        clear = (close[:, 0] - close[:, 1] > 1e-4).numpy()
        assert np.array_equal(cluster[clear], expected[2].numpy()[clear])
        assert clear.mean() > 0.9
    return set(cluster.tolist())


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A run with every kind of edit, its ONNX file, and what was said meanwhile."""
    folder, said = tmp_path_factory.mktemp("edited"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPCLUSTER_CACHE", str(tmp_path_factory.mktemp("cache")))
        run = run_of(folder)
    classifier = edit(run, edits.Merge((0, 2)), edits.Name(1, "red vans"), edits.Junk(3))
    classifier = edit(run, classifier.split(np.load(run / "features.npy"), 0, 2))
    edit(run, classifier.nearest())
    handler = logging.StreamHandler(said)
    logging.root.addHandler(handler)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("error")
            export(run, "onnx", folder / "out.onnx")
    finally:
        logging.root.removeHandler(handler)
    return run, folder / "out.onnx", said.getvalue()


def test_it_says_what_the_classifier_says(exported):
    run, file, _ = exported
    steps = Classifier.load(run / "model", CPU).steps
    assert [type(one).__name__ for step in steps for one in step.edits] == ["Merge", "Name", "Junk", "Split", "Nearest"]
    found = agrees(run, file, (1, 8, 8))
    assert 2 not in found
    assert len(found) > 1


def test_nothing_is_said(exported):
    assert exported[2] == ""


def test_one_file_with_names_and_shapes(exported):
    made = onnx.load(exported[1])
    facts = {entry.key: entry.value for entry in made.metadata_props}
    assert json.loads(facts["names"]) == ["", "red vans", "", "", ""]
    assert json.loads(facts["junk"]) == [3]
    assert json.loads(facts["shape"]) == [1, 8, 8]
    assert facts["version"]
    (images,) = made.graph.input
    first, *others = images.type.tensor_type.shape.dim
    assert images.name == "images"
    assert first.dim_param
    assert [dim.dim_value for dim in others] == [1, 8, 8]
    assert [output.name for output in made.graph.output] == list(network.OUTPUTS)
    assert not [tensor for tensor in made.graph.initializer if tensor.external_data]
    assert {path.name for path in exported[1].parent.iterdir()} == {"x.npy", "run", "out.onnx"}


@pytest.mark.slow
def test_vectors(tmp_path):
    np.save(tmp_path / "f.npy", np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32))
    run = finished(tmp_path / "run", str(tmp_path / "f.npy"))
    export(run, "onnx", tmp_path / "out.onnx")
    agrees(run, tmp_path / "out.onnx", (6,))


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["resnet18", "torchvision:mobilenet_v3_small"])
def test_networks_of_torchvision(tmp_path, backbone):
    run = run_of(tmp_path, backbone, channels=3, size=32)
    export(run, "onnx", tmp_path / "out.onnx")
    agrees(run, tmp_path / "out.onnx", (3, 32, 32))


def test_without_the_extra(tmp_path, monkeypatch):
    run, real = run_of(tmp_path), builtins.__import__

    def without(name, *args, **kwargs):
        if name == "onnxscript":
            raise ModuleNotFoundError("No module named 'onnxscript'", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"onnxscript is not installed; pip install 'deepcluster\[onnx\]'"):
        export(run, "onnx", tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_a_model_that_one_file_cannot_hold(tmp_path, monkeypatch):
    run = run_of(tmp_path)
    monkeypatch.setattr(network, "LARGEST", 1000)
    with pytest.raises(ValueError, match="use --format model"):
        export(run, "onnx", tmp_path / "out.onnx")


def test_a_fixed_batch_size_is_noticed(tmp_path, monkeypatch):
    run = run_of(tmp_path)
    monkeypatch.setattr(Classifier, "forward", lambda self, images: (images.flatten(1)[: len(images)],) * 3)
    with pytest.raises(RuntimeError, match="batch size"):
        export(run, "onnx", tmp_path / "out.onnx")
