"""Attacks by a run that a stranger made. See test_security.py.

Tested elsewhere: pickles in checkpoints (test_checkpoint.py) and maps (test_landscape.py), deeply nested decisions
(test_edits.py), hostile names of exported files (test_export_folders.py).
"""

import io
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from attack import Bait, change, refused, stranger
from report_run import a_run, plan_of
from tiny import make_model, tiny_store

from deepcluster import checkpoint, load, outputs
from deepcluster.__main__ import main
from deepcluster.export import export
from deepcluster.recipe import make_recipe
from deepcluster.results import EDITS
from deepcluster.runs import report
from deepcluster.trainer import Training, start


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return stranger()


# --- nothing is executed ---

FILES = ["config.json", "assignments.parquet", "clusters.parquet", "features.npy", "metrics.jsonl", "map.npz",
         "skipped.csv", "checkpoints/last.pt", "model/config.json", "model/model.safetensors", "model/names.json",
         "model/edits.safetensors"]  # fmt: skip


def packed(save, array):
    file = io.BytesIO()
    save(file, array, allow_pickle=True)
    return file.getvalue()


@pytest.mark.parametrize("name", FILES)
def test_no_file_of_a_run_executes_anything(run, name, capsys):
    (run / "checkpoints").mkdir()
    victim = Path("victim").absolute()
    array = np.array([Bait(victim)], object)
    for i, write in enumerate((
        lambda path: path.write_bytes(pickle.dumps(Bait(victim))),
        lambda path: torch.save({"order": Bait(victim)}, path),
        lambda path: path.write_bytes(packed(np.save, array)),
        lambda path: path.write_bytes(packed(np.savez, array)),
    )):  # fmt: skip
        write(run / name)
        words = [["fit", "--resume", "run"], ["report", "run"], ["evaluate", "run"], ["undo", "run"]]
        words += [
            ["predict", "run", "photos", "--out", "p.parquet"],
            ["fit", "photos", "--weights", f"run/{name}", "--n-clusters", "2", "--out", "new"],
        ]
        words += [["export", "run", "--format", "npy", "--out", f"{i}.npy"], ["fit", f"run/{name}", "--out", "new"]]
        for argv in words if i < 2 else words[1:]:
            assert main([*argv, "--quiet"]) in (0, 2)
            assert "internal error" not in capsys.readouterr().err
        assert not victim.exists()
    pickle.loads(pickle.dumps(Bait(victim)))  # the bait is real
    assert victim.exists()


# --- nothing is written elsewhere ---


def retable(run, file, /, **columns):
    table = pq.read_table(run / file)
    for column, values in columns.items():
        table = table.set_column(table.column_names.index(column), column, pa.array(values))
    pq.write_table(table, run / file)


def test_clusters_that_are_paths_leave_no_folder(run):
    before = {*Path.cwd().rglob("*")}
    retable(run, "assignments.parquet", cluster=["../../../../escaped"] * 9, name=[""] * 9)
    with refused("column 'cluster' is of type string"):
        export(run, "folders", Path("out"))
    assert {*Path.cwd().rglob("*")} == before


@pytest.mark.parametrize("name", ["report.html", "map.npz", "assignments.parquet", "model/names.json", "config.json"])
def test_links_laid_where_files_are_written_for_a_moment(run, name):
    Path("victim").write_text("mine")
    (run / f"{name}.tmp").symlink_to(Path("victim").absolute())
    report(run, load(run).image_info())
    load(run).set_cluster_names({0: "a"})
    load(run).save_pretrained(run / "model")
    assert Path("victim").read_text() == "mine"


def test_a_link_in_the_place_of_a_file_is_replaced(run):
    Path("victim").write_text("mine")
    (run / "report.html").symlink_to(Path("victim").absolute())
    report(run, load(run).image_info())
    assert Path("victim").read_text() == "mine"
    assert not (run / "report.html").is_symlink()


@pytest.mark.parametrize("name", ["model", "checkpoints", "train.log"])
def test_a_run_whose_parts_lie_elsewhere_is_refused(run, name, capsys):
    Path("victim").mkdir()
    if (run / name).exists():
        (run / name).rename("victim/model")
    (run / name).symlink_to(Path("victim/model" if name == "model" else "victim").absolute())
    before = sorted((path, path.stat().st_mtime_ns) for path in Path("victim").rglob("*"))
    for argv in (["report", "run"], ["fit", "--resume", "run"], ["name", "run", "0", "a"]):
        assert main(argv) == 2
        assert f"run/{name} is a link" in capsys.readouterr().err
    assert sorted((path, path.stat().st_mtime_ns) for path in Path("victim").rglob("*")) == before


def test_an_image_that_is_another_now_is_not_shown_or_copied(run):
    Path("secret").write_bytes(b"root:x:0:0")
    Path("photos/3.png").unlink()
    Path("photos/3.png").symlink_to(Path("secret").absolute())
    export(run, "folders", Path("out"), copy=True)
    assert len(list(Path("out").rglob("*.png"))) == 8
    assert b"root:x" not in b"".join(path.read_bytes() for path in Path("out").rglob("*") if path.is_file())


# --- no text where a number belongs ---


def test_numbers_of_clusters_that_are_html(tmp_path):
    run = a_run(tmp_path / "run", 27, 3)
    bad = '"><script>alert(1)</script>'
    for name, column in (("assignments.parquet", "cluster"), ("clusters.parquet", "id")):
        retable(run, name, **{column: [f"{bad}{c}" for c in pq.read_table(run / name)[column].to_pylist()]})
    with refused("column 'cluster' is of type string"):
        report(run, pq.read_table(run / "assignments.parquet"))
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("column", ["id", "name", "size", "cohesion", "separation"])
def test_columns_of_clusters_of_another_type(tmp_path, column):
    run = a_run(tmp_path / "run", 27, 3)
    wrong = [1.5] * 3 if column == "name" else ["<b>"] * 3
    retable(run, "clusters.parquet", **{column: wrong})
    with refused(f"cannot read .*clusters.parquet: its column '{column}' is of type"):
        outputs.read_run(run)


@pytest.mark.parametrize(
    ("columns", "said"),
    [({"cluster": [10**12] * 9}, "are no clusters"), ({"cluster": [-1] * 9}, "are no clusters"),
     ({"cluster": [7] * 9}, "clusters that the model in it does not have"), ({"path": [None] * 9}, "'path'"),
     ({"sha1": [None, *"abcdefgh"]}, "column 'sha1' lacks values"), ({"is_junk": ["x"] * 9}, "column 'is_junk'")],
)  # fmt: skip
def test_assignments_that_cannot_be(run, columns, said):
    retable(run, "assignments.parquet", **columns)
    with refused(said):
        load(run)


@pytest.mark.parametrize(
    "line",
    ['{"stage": 0, "epoch": "<b>"}', '{"stage": 0, "epoch": 1, "loss": "<b>"}', "[" * 200_000, "5",
     '{"stage": 0, "epoch": 1%s}' % ("0" * 400), '{"stage": 0, "epoch": 1, "health": {"active": "<b>"}}'],
)  # fmt: skip
def test_lines_of_metrics_that_cannot_be(tmp_path, line):
    run = a_run(tmp_path / "run", 27, 3)
    (run / "metrics.jsonl").write_text(line + "\n")
    with refused("cannot read .*metrics.jsonl"):
        outputs.read_run(run)


@pytest.mark.parametrize(
    "fields",
    [{"data__size": [10**6, 3]}, {"data__size": "8"}, {"data__size": [8, 1, 1]}, {"data__source": 5},
     {"data__labels": {}}, {"data__n_labelled": "<b>"}, {"plan__n_clusters": "<b>"}, {"plan__shape": [3, 10**6, 10**6]},
     {"plan__stages": [5]}, {"plan__stages": [{"method": "iic", "epochs": "<b>"}]}, {"plan__seed": 10**40},
     {"format": "2"}, {"data": []}, {"plan__weights": 3}],
    ids=str,
)  # fmt: skip
def test_configs_that_cannot_be(run, fields, capsys):
    change(run / "config.json", **fields)
    with refused("cannot read run/config.json"):
        load(run)
    for argv in (["report", "run"], ["fit", "--resume", "run"], ["evaluate", "run"]):
        assert main(argv) == 2
        assert "cannot read run/config.json" in capsys.readouterr().err


def test_json_without_end(run, capsys):
    deep = "[" * 200_000
    Path("deep.json").write_text(deep)
    assert main(["fit", "photos", "--out", "new", "--config", "deep.json"]) == 2
    assert "cannot read --config deep.json" in capsys.readouterr().err
    for name in ("model/names.json", "model/config.json", "config.json"):
        (run / name).write_text(deep)
        with refused("cannot read"):
            load(run)


def test_a_source_that_stands_for_too_much(run):
    change(run / "config.json", data__source="photos/{0..99999999999}.tar")
    with refused("stands for"):
        outputs.reopen(outputs.read_config(run)["data"])


# --- no more memory than the files ---


def test_features_larger_than_their_file(run):
    with (run / "features.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (10**12, 512)})
    with refused("cannot read run/features.npy"):
        outputs.read_features(run)


def test_assignments_of_more_rows_than_bytes(run):
    table = pq.read_table(run / "assignments.parquet")
    one = table.slice(0, 1)
    zeros = pa.array(np.zeros(2_000_000, np.int32))
    many = pa.table({name: one[name].combine_chunks().take(zeros) for name in ("path", "sha1", "cluster")})
    many = many.replace_schema_metadata({EDITS: table.schema.metadata[EDITS]})
    pq.write_table(many, run / "assignments.parquet", compression="zstd")
    del many
    with refused("2000000 rows in", megabytes=100):
        outputs.read_assignments(run)


# --- what was skipped ---


@pytest.mark.parametrize("text", ["x" * 200_000, 'path,reason\n"' + "x" * 200_000, "path,reason\nalone\n", "\xff"])
def test_a_list_of_skipped_images_that_is_damaged(run, text):
    (run / "skipped.csv").write_bytes(text.encode("latin-1"))
    with refused("cannot read run/skipped.csv"):
        load(run)


def test_plans_of_the_report_tests_are_such_as_are_read(tmp_path):
    run = a_run(tmp_path / "run", 27, 3, plan=plan_of(3, methods=("<b>",)))
    assert outputs.read_config(run)["plan"].stages[0].method == "<b>"  # a name, escaped where it is shown


def test_a_link_laid_where_a_checkpoint_is_written_for_a_moment(tmp_path):
    recipe = make_recipe("deepcluster", n_clusters=3)
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "last.tmp").symlink_to(tmp_path / "victim")
    checkpoint.save(tmp_path / "last.pt", start(make_model(recipe), tiny_store(20), recipe, Training()))
    assert (tmp_path / "victim").read_text() == "mine"
    assert "network" in checkpoint.read(tmp_path / "last.pt")
