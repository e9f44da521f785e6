"""deepcluster merge, split, name, junk, reduce-outliers, undo: what they print, what they leave on disk, what obeys."""

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deepcluster import atomic, load, results
from deepcluster.__main__ import main

TABLES = ("assignments.parquet", "clusters.parquet", "model/names.json")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on noise with more and less bright images."""
    where = tmp_path_factory.mktemp("edits")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 60, (120, 8, 8)) + 60 * (np.arange(120) % 4)[:, None, None]
    np.save(where / "x.npy", images.astype(np.uint8))
    argv = ["fit", "x.npy", "--n-clusters", "4", "--method", "iic", "--epochs", "4", "--batch-size", "16",
            "--image-size", "8", "--precision", "fp32", "--quiet", "--out", "run"]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(where)
        patch.setenv("DEEPCLUSTER_CACHE", str(where / "cache"))
        assert main(argv) == 0
    return where


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    shutil.copytree(trained / "run", tmp_path / "run")
    shutil.copy(trained / "x.npy", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEEPCLUSTER_CACHE", str(trained / "cache"))
    assert len(sizes()) >= 3, "too few clusters to edit"
    return Path("run")


def do(*argv):
    assert main([*map(str, argv), "--quiet"]) == 0


def sizes():
    return {row["id"]: row["size"] for row in pq.read_table("run/clusters.parquet").to_pylist()}


def tables():
    return {name: Path("run", name).read_bytes() for name in TABLES}


def cluster():
    return pq.read_table("run/assignments.parquet")["cluster"].to_numpy()


def test_merge_then_everything_obeys(run, capsys):
    before = sizes()
    a, b, *_ = sorted(before)
    do("merge", run, b, a)
    assert f"{len(before) - 1} clusters; edits that can be undone: 1" in capsys.readouterr().out
    assert sizes()[a] == before[a] + before[b]
    assert b not in sizes()
    do("predict", run, "x.npy", "--out", "new.parquet")
    assert np.array_equal(pq.read_table("new.parquet")["cluster"].to_numpy(), cluster())
    assert np.array_equal(load(run).predict(np.load("x.npy")), cluster())
    do("report", run)
    assert "report.html" in capsys.readouterr().out


def test_name_and_undo(run, capsys):
    before = tables()
    do("name", run, 1, "red vans")
    table = pq.read_table("run/assignments.parquet")
    assert set(table.filter(table["cluster"].to_numpy() == 1)["name"].to_pylist()) == {"red vans"}
    assert json.loads(Path("run/model/names.json").read_text())[1] == "red vans"
    do("predict", run, "x.npy", "--out", "new.parquet")
    assert "red vans" in pq.read_table("new.parquet")["name"].to_pylist()
    do("undo", run)
    assert tables() == before
    assert load(run).classifier_.steps == []
    capsys.readouterr()
    assert main(["undo", "run"]) == 2
    assert "there is no edit to undo" in capsys.readouterr().err


def test_split(run):
    before, old = sizes(), cluster()
    do("split", run, 0, "--into", 3)
    assert set(cluster()[old == 0]) == {0, 4, 5}
    assert np.array_equal(cluster()[old != 0], old[old != 0])
    assert sizes()[0] + sizes()[4] + sizes()[5] == before[0]
    do("undo", run)
    assert sizes() == before


def test_junk(run):
    do("junk", run, 0, 1)
    table = pq.read_table("run/assignments.parquet")
    assert np.array_equal(table["is_junk"].to_numpy(), np.isin(cluster(), [0, 1]))
    do("junk", run, 1, "--off")
    rows = pq.read_table("run/clusters.parquet").to_pylist()
    assert [row["id"] for row in rows if row["is_junk"]] == [0]
    do("predict", run, "x.npy", "--out", "new.parquet")
    assert np.array_equal(pq.read_table("new.parquet")["is_junk"].to_numpy(), cluster() == 0)


def test_reduce_outliers(run):
    table = pq.read_table("run/assignments.parquet")
    inside = ~table["is_outlier"].to_numpy()
    old = cluster()
    do("reduce-outliers", run)
    assert np.array_equal(cluster()[inside], old[inside])
    assert len(load(run).classifier_.steps) == 1


def test_decisions_in_one_step(run, capsys):
    before = tables()
    Path("decisions.json").write_text(json.dumps({"format": 1, "names": {"0": "=1+1"}, "merge": [[0, 2]], "junk": [1]}))
    do("merge", "--from", "decisions.json", run)
    assert 2 not in sizes()
    assert load(run).classifier_.names[0] == "=1+1"
    assert load(run).classifier_.junk == {1}
    do("undo", run)
    assert tables() == before


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["merge", "run", "3", "99"], "there is no cluster 99; there are 0-3"),
        (["merge", "run", "3"], "two different clusters or more; got [3]"),
        (["merge", "run"], "merge takes clusters, as in: merge RUN 3 17, or --from"),
        (["merge", "run", "1", "2", "--from", "d.json"], "merge takes clusters"),
        (["merge", "run", "--from", "d.json"], "cannot read d.json: no such file"),
        (["name", "run", "99", "x"], "there is no cluster 99"),
        (["junk", "run", "0", "99"], "there is no cluster 99"),
        (["split", "run", "99"], "there is no cluster 99"),
        (["split", "run", "0", "--into", "1"], "split it into 2 to"),
        (["undo", "run"], "there is no edit to undo"),
        (["undo", "elsewhere"], "elsewhere is not a run directory"),
    ],
)
def test_wrong_edits_change_nothing(run, capsys, argv, said):
    before = tables()
    assert main([*argv, "--quiet"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert tables() == before


class Killed(BaseException):
    """As if the power failed: nothing is cleaned up on the way."""


@pytest.mark.parametrize("command", [["merge", "run", "0", "1"], ["undo", "run"]])
@pytest.mark.parametrize("renames", range(5))
def test_an_edit_killed_at_any_rename_was_made_or_not(run, monkeypatch, command, renames):
    do("split", run, 2)
    do("name", run, 0, "first")
    before, real, count = load(run).predict_proba(np.load("x.npy")), Path.replace, [0]

    def replace(self, target):
        if count[0] == renames:
            raise Killed
        count[0] += 1
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(Killed) if renames < 4 else contextlib.nullcontext():
            do(*command)
    model = load(run)
    was_made = len(model.classifier_.steps) != 2
    assert was_made == (renames > 0), "the edits are the first to be renamed"
    assert np.array_equal(model.labels_, model.predict(np.load("x.npy")))
    assert np.array_equal(model.labels_, cluster()), "the tables were not mended"
    assert set(sizes()) == set(cluster())
    assert model.classifier_.names[0] == ("" if was_made and command[0] == "undo" else "first")
    if was_made and command[0] == "merge":
        do("undo", run)
    if command[0] == "merge":
        assert np.array_equal(load(run).predict_proba(np.load("x.npy")), before)


@pytest.mark.parametrize("command", [["merge", "run", "0", "1"], ["undo", "run"]])
def test_an_edit_that_finds_the_disk_full_changes_nothing(run, monkeypatch, capsys, command):
    do("name", run, 0, "first")
    before = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    real = atomic.os.fsync

    def full(number):
        if "edits.safetensors" in str(Path(f"/proc/self/fd/{number}").readlink()):
            raise OSError(28, "No space left on device")
        real(number)

    monkeypatch.setattr(atomic.os, "fsync", full)
    assert main([*command, "--quiet"]) == 2
    assert "no space left on device" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()} == before


def test_in_memory_too_a_failed_edit_changes_nothing(run, monkeypatch):
    model = load(run)
    x, labels = np.load("x.npy"), model.labels_.copy()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(results, "rewrite", full)
        with pytest.raises(OSError, match="No space"):
            model.merge_clusters([[0, 1]])
    assert model.classifier_.steps == []
    assert np.array_equal(model.predict(x), labels)
    assert np.array_equal(model.labels_, labels)
    with pytest.raises(ValueError, match="cannot be written as UTF-8"):
        model.set_cluster_names({0: "\ud800"})
    assert model.classifier_.names[0] == ""
    model.merge_clusters([[0, 1]])
    assert np.array_equal(load(run).labels_, model.labels_)


def test_two_who_edit_at_once(run):
    one, two = load(run), load(run)
    one.merge_clusters([[0, 1]])
    with pytest.raises(ValueError, match="were edited meanwhile; look at them"):
        two.set_cluster_names({2: "x"})
    assert two.classifier_.names[2] == ""
    assert len(load(run).classifier_.steps) == 1
    one.set_cluster_names({2: "x"})
    assert len(load(run).classifier_.steps) == 2


def test_undo_brings_the_reasons_back(run):
    table = pq.read_table("run/assignments.parquet")
    assert any(table["is_outlier"].to_pylist())
    dark = pa.array(np.where(table["is_outlier"], "among the darkest 1 %", ""))
    for name in ("look", "reason"):
        table = table.set_column(table.column_names.index(name), name, dark)
    results.write_table(run / "assignments.parquet", table)
    do("reduce-outliers", run)
    do("split", run, 0)
    do("undo", run)
    do("undo", run)
    assert pq.read_table("run/assignments.parquet")["reason"].equals(table["reason"])
    assert pq.read_table("run/assignments.parquet")["look"].equals(table["look"])


def labels():
    names = pq.read_table("run/assignments.parquet")["path"].to_pylist()
    Path("labels.csv").write_text("path,label\n" + "".join(f"{name},{i % 4}\n" for i, name in enumerate(names)))
    return "labels.csv"


def test_a_finished_run_that_is_resumed_keeps_its_edits(run):
    do("merge", run, 0, 2)
    do("name", run, 0, "both")
    do("split", run, 1)
    before = tables()
    do("fit", "--resume", run)
    assert tables() == before
    do("undo", run)
    assert load(run).classifier_.names[0] == "both"


def test_evaluate_follows_the_edits(run, capsys):
    file = labels()
    do("evaluate", run, "--labels", file)
    before = json.loads(capsys.readouterr().out)
    a, b, *_ = sorted(sizes())
    do("merge", run, a, b)
    capsys.readouterr()
    do("evaluate", run, "--labels", file)
    after = json.loads(capsys.readouterr().out)
    assert after["n_found"] == before["n_found"] - 1
    assert (before["n_clusters"], after["n_clusters"]) == (4, 3)
    assert after["purity"] <= before["purity"]
    do("recut", run, "--k", 5)
    capsys.readouterr()
    do("evaluate", run, "--labels", file)
    assert json.loads(capsys.readouterr().out)["n_clusters"] == 5


def test_evaluate_with_probes(run, capsys):
    do("evaluate", run, "--labels", labels(), "--probe", "linear,knn")
    found = json.loads(capsys.readouterr().out)["probe"]
    assert {"linear", "knn"} <= set(found)
    do("evaluate", run, "x.npy", "--labels", "labels.csv", "--probe", "knn")
    assert json.loads(capsys.readouterr().out)["probe"]["knn"] == found["knn"]
    assert main(["evaluate", "run", "--labels", "labels.csv", "--probe", "lineer"]) == 2
    assert "linear" in capsys.readouterr().err


def test_decisions_belong_to_a_run_and_its_edits(run, capsys):
    of = results.identity(load(run).image_info())
    Path("decisions.json").write_text(json.dumps({"format": 1, "of": of, "names": {"0": "cats"}}))
    do("merge", run, "--from", "decisions.json")
    assert main(["merge", "run", "--from", "decisions.json"]) == 2
    assert "before the last edit; write the report anew" in capsys.readouterr().err
    do("undo", run)
    do("merge", run, "--from", "decisions.json")


def test_predictions_replace_only_predictions(run, capsys):
    do("predict", run, "x.npy", "--out", "new.parquet")
    do("predict", run, "x.npy", "--out", "new.parquet")
    for name, table in {"shard.parquet": pa.table({"image": [b""]}), "export.parquet": None}.items():
        if table is None:
            do("export", run, "--format", "parquet", "--out", name)
        else:
            pq.write_table(table, name)
        before = Path(name).read_bytes()
        capsys.readouterr()
        assert main(["predict", "run", "x.npy", "--out", name]) == 2
        assert "holds no predictions, so it is kept" in capsys.readouterr().err
        assert Path(name).read_bytes() == before


@pytest.mark.parametrize("changed", [10, 120])
def test_a_source_that_changed_under_the_same_names(run, capsys, caplog, changed):
    x = np.load("x.npy")
    np.save("x.npy", x)  # another time, the same content
    file = labels()
    do("evaluate", run, "--labels", file)
    np.save("x.npy", np.concatenate([x[:changed][::-1], x[changed:]]))
    capsys.readouterr()
    assert main(["evaluate", "run", "--labels", file]) == 2
    assert "has other images than when the run was made" in capsys.readouterr().err
    do("report", run)
    assert f"{changed} of 120 images are not there any more, or others now" in caplog.text
    do("export", run, "--format", "parquet", "--out", "a.parquet")
    assert [image["bytes"] for image in pq.read_table("a.parquet")["image"].to_pylist()].count(None) == changed
    assert "cannot be read any more or are others now" in caplog.text
