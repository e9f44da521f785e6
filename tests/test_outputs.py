"""Every small kind of source leaves the complete run directory, and its files agree with one another."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from deepcluster import DeepCluster, __version__, load, outputs
from deepcluster.__main__ import main

QUICK = [
    "--method",
    "iic",
    "--n-clusters",
    "3",
    "--epochs",
    "1",
    "--image-size",
    "8",
    "--batch-size",
    "8",
    "--precision",
    "fp32",
    "--quiet",
]
FILES = {"config.json", "env.json", "metrics.jsonl", "train.log", "checkpoints/last.pt", "model/model.safetensors",
         "model/config.json", "model/names.json", "assignments.parquet", "features.npy", "clusters.parquet",
         "skipped.csv", "report.html", "map.npz", "factors.parquet", ".lock"}  # fmt: skip
COLUMNS = ["path", "sha1", "cluster", "name", "probability", "confidence", "second", "margin", "distance", "is_outlier",
           "is_representative", "is_junk", "look", "reason", "duplicate_of"]  # fmt: skip
N = 24


def pixels(colour=True):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 80, (N, 8, 8, 3) if colour else (N, 8, 8))
    return (noise.T + 80 * (np.arange(N) % 3)).T.astype(np.uint8)


def png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return file.getvalue()


def flat_folder(root):
    (root / "in").mkdir()
    for i, image in enumerate(pixels()):
        (root / f"in/{i:02d}.png").write_bytes(png(image))
    return "in"


def as_glob(root):
    return flat_folder(root) + "/*.png"


def text_list(root):
    flat_folder(root)
    (root / "list.txt").write_text("".join(f"in/{i:02d}.png\n" for i in reversed(range(N))))
    return "list.txt"


def csv_list(root):
    flat_folder(root)
    rows = "".join(f"in/{i:02d}.png,{i % 3}\n" for i in range(N))
    (root / "list.csv").write_text("path,label\n" + rows)
    return "list.csv"


def images_npy(root):
    np.save(root / "x.npy", pixels(colour=False))
    return "x.npy"


def channels_first_npz(root):
    np.savez(root / "x.npz", images=pixels().transpose(0, 3, 1, 2), labels=np.arange(N) % 3)
    return "x.npz"


def features_npy(root):
    np.save(root / "f.npy", np.random.default_rng(0).normal(size=(N, 6)).astype(np.float32))
    return "f.npy"


def parquet(root):
    structs = [{"bytes": png(image), "path": None} for image in pixels()]
    pq.write_table(pa.table({"image": structs, "label": [i % 3 for i in range(N)]}), root / "t.parquet")
    return "t.parquet"


def tars(root):
    for part in range(2):
        with tarfile.open(root / f"s-{part:06d}.tar", "w") as tar:
            for i, image in enumerate(pixels()[part::2]):
                for suffix, data in ((".png", png(image)), (".cls", str(i % 3).encode())):
                    member = tarfile.TarInfo(f"{i:04d}{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return "s-{000000..000001}.tar"


def digits(root):
    return "digits"


KINDS = (flat_folder, as_glob, text_list, csv_list, images_npy, channels_first_npz, features_npy, parquet, tars, digits)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_run_is_complete_and_agrees_with_itself(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = kind(tmp_path)
    assert main(["fit", source, "--out", "run", *QUICK]) == 0
    run = tmp_path / "run"
    assert {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()} == FILES
    table, features = pq.read_table(run / "assignments.parquet"), np.load(run / "features.npy")
    cluster, n = table["cluster"].to_numpy(), len(table)
    assert table.column_names == COLUMNS
    assert n == (1797 if source == "digits" else N)
    assert features.shape[0] == n
    assert features.dtype == np.float32
    if kind is text_list:
        assert table["path"].to_pylist() == (tmp_path / "list.txt").read_text().split()
    sizes = np.bincount(cluster, minlength=3)
    assert list(sizes) == sorted(sizes, reverse=True)
    clusters = pq.read_table(run / "clusters.parquet").to_pylist()
    assert [c["id"] for c in clusters] == np.flatnonzero(sizes).tolist()
    assert [c["size"] for c in clusters] == sizes[sizes > 0].tolist()
    shown = {path for c in clusters for path in c["representatives"]}
    assert shown == {
        path for path, yes in zip(table["path"].to_pylist(), table["is_representative"].to_pylist(), strict=True) if yes
    }
    (row,) = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert {"stage", "epoch", "loss", "seconds", "images_per_second", "health"} <= row.keys()
    assert {"active", "largest_share", "entropy", "nmi_previous"} <= row["health"].keys()
    assert ("acc" in row) == (kind in (csv_list, channels_first_npz, parquet, tars, digits))
    assert (run / "skipped.csv").read_text() == "path,reason\n"
    log = (run / "train.log").read_text()
    assert "plan: iic for 1 epochs" in log
    assert "iic epoch 1/1 loss" in log
    assert f"{n} images in" in log

    for model in (load("run"), DeepCluster.from_pretrained("run/model")):
        again = model.predict(source)
        assert again.dtype == np.int64
        assert np.array_equal(again, cluster)
    assert np.array_equal(load("run").labels_, cluster)
    assert np.allclose(load("run").transform(source), features, atol=1e-5), "features.npy is not in the order of rows"


def test_overwriting_leaves_nothing_of_the_earlier_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("x.npz", images=np.concatenate([pixels()] * 3), labels=np.arange(3 * N) % 3)
    assert main(["fit", "x.npz", "--out", "run", *QUICK, "--on-collapse", "rescue"]) == 0
    for more in (["evaluate", "run"], ["k", "run"], ["merge", "run", "0", "1"], ["report", "run"]):
        assert main([*more, "--quiet"]) == 0
    outputs.prepare(Path("run"))
    assert [str(p.relative_to("run")) for p in Path("run").rglob("*") if p.is_file()] == [".lock"]


def test_config_and_env_say_everything(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", flat_folder(tmp_path), "--out", "run", *QUICK, "--seed", "3"]) == 0
    config = json.loads(Path("run/config.json").read_text())
    assert config["version"] == __version__
    assert "git" in config
    (stage,) = config["plan"]["stages"]
    assert stage["params"].keys() >= {"n_clusters", "overcluster", "view"}, "defaults of the method are not written out"
    assert (config["plan"]["seed"], config["data"]["n_images"], config["data"]["labels"]) == (3, N, "auto")
    assert '"auto"' not in json.dumps(config["plan"]), "something was not resolved"
    env = json.loads(Path("run/env.json").read_text())
    assert env["packages"]["torch"]
    assert env["devices"]
    assert env["command"]


def test_ids_follow_sizes_also_where_all_images_tie(tmp_path, monkeypatch):
    """Identical images: every probability ties or nearly so, and labels_ must still be what predict says."""
    monkeypatch.chdir(tmp_path)
    x = np.full((N, 8, 8), 7, np.uint8)
    model = DeepCluster(4, method="iic", epochs=1, image_size=8, batch_size=8).fit(x)
    assert np.array_equal(model.labels_, model.predict(x))
    assert set(model.labels_) == {0}


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", "\tx"])
def test_no_cell_is_a_formula(tmp_path, text):
    outputs.write_skipped(tmp_path / "skipped.csv", [(text, "damaged")])
    assert (tmp_path / "skipped.csv").read_text().splitlines()[1].lstrip('"').startswith("'")


def test_a_run_of_a_newer_version(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text('{"format": 2, "data": {}, "plan": {}}')
    for argv in (["predict", "run", "digits", "--out", "new.parquet"], ["undo", "run"], ["fit", "--resume", "run"]):
        assert main(argv) == 2
        assert "it has format 2, this version reads 1; upgrade deepcluster" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["config.json", "run"]
