"""After training: processes share the features, rank 0 keeps them in a file, and all return the same."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import noise, store_of, two_ranks

from deepcluster import DeepCluster, dist, ending, evaluate, outputs, results
from deepcluster.backbones import make_backbone
from deepcluster.classifier import Classifier, Spec
from deepcluster.edits import Merge, Name, Split, Step
from deepcluster.model import Model

N, K, D = 1100, 4, 512  # three batches, the last one smaller
SPEC = Spec("convnet", (1, 8, 8), "Linear", K, "0")
QUICK = {"n_clusters": 3, "method": "iic", "epochs": 1, "batch_size": 64, "precision": "fp32"}


def given(seed=0):
    """A model, its images with a copy among them, labels of some, and edits."""
    data = noise(N, 1, 8)
    data[1050] = data[20]
    torch.manual_seed(seed)
    model = Model(*make_backbone("convnet", (1, 8, 8)), (K,), torch.nn.Linear)
    with torch.no_grad():
        model.heads[0].bias -= model.eval()([data[:500] / 255])[0][0].mean(0) + torch.linspace(0, 0.02, K)
    known = evaluate.Known(np.where(np.arange(N) % 7, -1, np.arange(N) % 4), ["a", "b", "c", "d"])
    centroids = torch.rand(2, model.dim, generator=torch.Generator().manual_seed(1))
    return (
        model,
        store_of(data),
        known,
        [Step((Split(0, centroids), Merge((1, 2))), "x"), Step((Name(3, "cars"),), "y")],
    )


def finish(out=None, seed=0):
    model, store, known, steps = given(seed)
    return ending.finish(model, 0, SPEC, store, out, known, steps)


def said(classifier, table, features):
    """All of a result, to be saved and compared."""
    state = {**classifier.state_dict(), **{f"trained {k}": v for k, v in classifier.trained.items()}}
    words = [classifier.names, sorted(classifier.junk), classifier.n_clusters, table.column_names, str(table.schema)]
    words += [str(table.schema.metadata), str([step.words() for step in classifier.steps]), str(table.to_pydict())]
    return {"state": state, "words": words, "features": torch.from_numpy(np.array(features))}


def same(one, other):
    assert one["words"] == other["words"]
    assert one["state"].keys() == other["state"].keys()
    assert [name for name, value in one["state"].items() if not torch.equal(value, other["state"][name])] == []


def test_what_is_written_is_what_one_pass_finds(tmp_path):
    model, store, known, steps = given()
    classifier, table, features = ending.finish(model, 0, SPEC, store, tmp_path, known, steps)
    expected = Classifier(SPEC, model.backbone, model.heads[0], model.dim)
    looks = ending._looks(expected, store)
    found = expected.sort(expected.predict(store, ("features",))["features"], known.names, steps, looks)
    assert features.shape == (0, D)
    assert np.array_equal(outputs.read_features(tmp_path), found["features"])
    np.save(tmp_path / "x.npy", found["features"])
    assert (tmp_path / "features.npy").read_bytes() == (tmp_path / "x.npy").read_bytes()
    for name in ("cluster", "probability", "second", "margin", "distance", "is_outlier", "confidence"):
        assert np.array_equal(table[name], found[name]), name
    assert outputs.read_assignments(tmp_path).equals(table)
    assert table["duplicate_of"][1050].as_py() == store.names[20]
    assert table["given"].to_numpy().tolist() == known.given.tolist()
    again = Classifier.load(tmp_path / "model", torch.device("cpu"))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in expected.state_dict().items())
    assert again.names == classifier.names == expected.names
    same(said(*finish()), said(classifier, table, found["features"]))
    assert np.array_equal(finish()[2], found["features"])


def test_features_that_do_not_fit_on_the_disk_leave_the_old_ones(tmp_path):
    finish(tmp_path)
    old = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, limits[1]))  # a row has 1,024 bytes: the second block fails
    try:
        with pytest.raises(OSError, match="File too large"):
            finish(tmp_path, seed=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == old


def test_blocks_of_features_are_one_file(tmp_path):
    x = np.arange(12.0).reshape(6, 2)  # float64, and columns that do not lie together
    results.write_features(tmp_path, (x[rows] for rows in (slice(0, 3), slice(3, 3), slice(3, 6))), (6, 2))
    found = outputs.read_features(tmp_path)
    assert found.dtype == np.float32
    assert np.array_equal(found, x)
    results.write_features(tmp_path, [x.T], (2, 6))
    assert np.array_equal(outputs.read_features(tmp_path), x.T)


def work(rank, port, folder):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["DEEPCLUSTER_CACHE"] = str(folder / "cache")
    torch.set_num_threads(1)
    dist.setup("cpu")
    (folder / "own0").mkdir(exist_ok=True)
    ending.PIECE = 1000  # many pieces
    with_run = said(*finish(folder / f"own{rank}", seed=rank))  # rank 0's model is taken
    without = said(*finish(seed=rank))
    x = np.random.default_rng(0).integers(0, 256, (200, 8, 8), dtype=np.uint8)
    model = DeepCluster(**QUICK, image_size=8, out=folder / f"fit{rank}").fit(x)
    fitted = said(model.classifier_, model.image_info(), np.empty(0)) | {"labels": torch.from_numpy(model.labels_)}
    fitted["predicted"] = torch.from_numpy(model.predict(x))
    torch.save({"with": with_run, "without": without, "fitted": fitted}, folder / f"{rank}.pt")
    dist.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.ddp
def test_two_processes_return_what_one_does_and_one_of_them_writes(tmp_path):
    first, second = two_ranks(work, tmp_path)
    (tmp_path / "alone").mkdir()
    alone = said(*finish(tmp_path / "alone"))
    for found in (first, second):
        same(found["with"], alone)
        same(found["without"], alone)
        assert found["with"]["features"].shape == (0, D)
        assert np.array_equal(found["without"]["features"], outputs.read_features(tmp_path / "alone"))
    written = {path.relative_to(tmp_path / "alone") for path in (tmp_path / "alone").rglob("*") if path.is_file()}
    for path in written:
        assert (tmp_path / "own0" / path).read_bytes() == (tmp_path / "alone" / path).read_bytes(), path
    assert not (tmp_path / "own1").exists()
    assert not (tmp_path / "fit1").exists()
    same(first["fitted"], second["fitted"])
    assert torch.equal(first["fitted"]["labels"], second["fitted"]["predicted"])
    assert outputs.read_assignments(tmp_path / "fit0")["cluster"].to_pylist() == first["fitted"]["labels"].tolist()


MEASURE = """
import re, resource, sys, threading, time
from pathlib import Path
import numpy as np, torch
from deepcluster import ending, evaluate
from deepcluster.backbones import make_backbone
from deepcluster.classifier import Spec
from deepcluster.model import Model
from deepcluster.store import Store

def anonymous():  # bytes that are no cached pages of files
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

n, out, peak = int(sys.argv[1]), Path(sys.argv[2]), [0]
torch.set_num_threads(1)
data = torch.randn(n, 16, generator=torch.Generator().manual_seed(0))
store = Store(data, np.arange(n), [str(i) for i in range(n)], [f"{i:040d}" for i in range(n)], [],
              torch.device("cpu"), "memory")
model = Model(*make_backbone("mlp", (16,)), (4,), torch.nn.Linear).eval()
ending.finish(model, 0, Spec("mlp", (16,), "Linear", 4, "0"), Store(data[:1000], np.arange(1000), store.names[:1000],
              store.sha1[:1000], [], store.device, "memory"), out)  # all is loaded
before = anonymous()

def watch():
    while peak is not None:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)

threading.Thread(target=watch, daemon=True).start()
ending.finish(model, 0, Spec("mlp", (16,), "Linear", 4, "0"), store, out)
print(peak[0] - before, (out / "features.npy").stat().st_size)
"""


def measured(n, folder):
    """Bytes at the peak, and of the features."""
    done = subprocess.run([sys.executable, "-c", MEASURE, str(n), str(folder)], capture_output=True, text=True,
                          check=True)  # fmt: skip
    return map(int, done.stdout.split())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_is_that_of_some_vectors_and_not_of_the_features(tmp_path):
    (tmp_path / "run").mkdir()
    peak, features = measured(200_000, tmp_path / "run")
    assert features > 200e6
    assert peak < 0.5 * features, f"{peak / 1e6:.0f} MB"
