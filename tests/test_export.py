"""Exports that other tools read: right, in the order of rows, refused in one line, and all there or not at all."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from finished import edit, finished
from PIL import Image
from safetensors import safe_open

from deepcluster import edits, options
from deepcluster import export as package
from deepcluster.classifier import Classifier
from deepcluster.export import FORMATS, MARKER, export, tables
from deepcluster.landscape import landscape_of
from deepcluster.sources import open_source

N = 24
ODD = 'in/new\nline "10".png'  # a name that only JSON and Parquet can hold


def draw(folder, n=N):
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(n):
        pixels = rng.integers(0, 80, (8, 8)) + 80 * (i % 3)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / (f"{i:02d}.png" if i != 10 else ODD[3:]))


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("DEEPCLUSTER_CACHE", str(tmp_path_factory.mktemp("cache")))
        draw(root / "in")
        finished(root / "run", "in")
    return root


@pytest.fixture
def run(made, tmp_path, monkeypatch):
    """A run of its own beside the images it was made of; the tests run there."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    change(Path("run"), cwd=str(tmp_path))
    return Path("run")


def change(run, **data):
    """Other facts in config.json."""
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    config["data"] |= data
    (run / "config.json").write_text(json.dumps(config), encoding="utf-8")


def out_of(kind):
    return Path(f"out{package.KINDS[kind][1]}")


def everything(folder):
    """Every file below, with its bytes or where it links to."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path)] = path.readlink()
        elif path.is_file():
            found[str(path)] = path.read_bytes()
    return found


def names_of(run):
    return pq.read_table(run / "assignments.parquet")["path"].to_pylist()


def test_the_command_line_knows_every_format():
    assert options.FORMATS == FORMATS


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind != "onnx"])
def test_it_says_what_it_wrote_and_leaves_nothing_else(run, kind):
    before = everything(Path())
    said = export(run, kind, out_of(kind))
    assert "\n" not in said
    assert said.endswith(f": {out_of(kind)}")
    new = set(everything(Path())) - set(before)
    assert all(path.startswith("out") or path == "run/map.npz" for path in new)
    assert everything(Path("in")).items() <= before.items()


def test_npy(run):
    assert "24 rows of 512" in export(run, "npy", Path("out.npy"))
    x = np.load("out.npy", allow_pickle=False)
    assert x.dtype == np.float32
    assert np.array_equal(x, np.load(run / "features.npy"))
    names = json.loads(Path("out.names.json").read_text(encoding="utf-8"))
    assert names == names_of(run)
    assert ODD in names


def test_half_precision_features_become_single(run):
    x = np.load(run / "features.npy").astype(np.float16)
    np.save(run / "features.npy", x)
    export(run, "npy", Path("out.npy"))
    assert np.array_equal(np.load("out.npy"), x.astype(np.float32))
    assert np.load("out.npy").dtype == np.float32


def test_safetensors(run):
    edit(run, edits.Name(0, 'red "vans"'))
    export(run, "safetensors", Path("out.safetensors"))
    table = pq.read_table(run / "assignments.parquet")
    with safe_open("out.safetensors", "numpy") as file:
        assert np.array_equal(file.get_tensor("features"), np.load(run / "features.npy"))
        assert np.array_equal(file.get_tensor("cluster"), table["cluster"].to_numpy())
        facts = file.metadata()
    assert int.from_bytes(Path("out.safetensors").read_bytes()[:8], "little") % 8 == 0, "tensors must be aligned"
    assert json.loads(facts["names"]) == table["path"].to_pylist()
    assert json.loads(facts["clusters"])["0"] == 'red "vans"'


def test_paths_too_many_for_safetensors(run, monkeypatch):
    monkeypatch.setattr(tables, "HEADER", 500)
    with pytest.raises(ValueError, match="use --format parquet"):
        export(run, "safetensors", Path("out.safetensors"))


def test_parquet(run):
    export(run, "parquet", Path("out.parquet"))
    table, known, found = pq.read_table("out.parquet"), pq.read_table(run / "assignments.parquet"), landscape_of(run)
    assert table.select(known.column_names).equals(known.replace_schema_metadata())
    assert table.column_names[len(known.column_names) :] == [
        "features", "projection_x", "projection_y", "neighbors", "image",
    ]  # fmt: skip
    assert np.array_equal(np.stack(table["features"].to_numpy()), np.load(run / "features.npy"))
    at = np.stack([table["projection_x"].to_numpy(), table["projection_y"].to_numpy()], 1)
    assert np.array_equal(at, found.positions)
    near = table["neighbors"].to_pylist()
    assert [row["ids"] for row in near] == found.neighbours.tolist()
    assert [row["distances"] for row in near] == found.distances.tolist()
    assert (
        str(table.schema.field("neighbors").type)
        == "struct<ids: list<element: int64>, distances: list<element: float>>"
    )
    images = table["image"].to_pylist()
    assert [row["path"] for row in images] == names_of(run)
    assert [row["bytes"] for row in images] == [Path(name).read_bytes() for name in names_of(run)]


def test_a_parquet_export_is_a_source_again(run):
    export(run, "parquet", Path("out.parquet"))
    source = open_source("out.parquet")
    assert source.read(3) == Path(names_of(run)[3]).read_bytes()


def test_row_groups_are_short_and_of_few_bytes(run, monkeypatch):
    size = max(path.stat().st_size for path in Path("in").iterdir())
    monkeypatch.setattr(tables, "ROWS", 5)
    export(run, "parquet", Path("out.parquet"))
    groups = pq.ParquetFile("out.parquet").metadata
    assert [groups.row_group(i).num_rows for i in range(groups.num_row_groups)] == [5, 5, 5, 5, 4]
    monkeypatch.setattr(tables, "GROUP", 2 * size + size // 2)
    export(run, "parquet", Path("out.parquet"), overwrite=True)
    groups = pq.ParquetFile("out.parquet").metadata
    assert {groups.row_group(i).num_rows for i in range(groups.num_row_groups)} <= {2, 3}
    assert pq.read_table("out.parquet")["image"].to_pylist()[7]["bytes"] == Path(names_of(run)[7]).read_bytes()


def test_images_that_are_gone(run, caplog):
    Path(names_of(run)[4]).unlink()
    export(run, "parquet", Path("out.parquet"))
    images = pq.read_table("out.parquet")["image"].to_pylist()
    assert [i for i, row in enumerate(images) if row["bytes"] is None] == [4]
    assert "1 of 24 images cannot be read" in caplog.text
    shutil.rmtree("in")
    caplog.clear()
    assert "paths" in export(run, "parquet", Path("out.parquet"), overwrite=True)
    assert {row["bytes"] for row in pq.read_table("out.parquet")["image"].to_pylist()} == {None}
    assert "in does not exist" in caplog.text


@pytest.mark.parametrize("kind", ["npy", "safetensors", "parquet", "model", "projector"])
def test_vectors(tmp_path, monkeypatch, kind, caplog):
    monkeypatch.chdir(tmp_path)
    np.save("f.npy", np.random.default_rng(0).normal(size=(N, 6)).astype(np.float32))
    export(finished(Path("run"), "f.npy"), kind, out_of(kind))
    assert ("holds vectors" in caplog.text) == (kind in ("parquet", "projector"))


@pytest.mark.parametrize("edited", [False, True])
def test_the_model_is_loaded_elsewhere(run, edited):
    if edited:
        edit(run, edits.Merge((0, 2)), edits.Name(1, "x"), edits.Junk(1))
    assert f"{int(edited)} edits" in export(run, "model", Path("out"))
    x = np.load(run / "features.npy")
    own, other = (Classifier.load(folder, torch.device("cpu")) for folder in (run / "model", Path("out")))
    table = pq.read_table(run / "assignments.parquet")
    assert np.array_equal(other.describe(x)["cluster"], table["cluster"].to_numpy())
    assert (other.names, other.junk, other.n_clusters) == (own.names, own.junk, own.n_clusters)
    images = torch.rand(5, 1, 8, 8)
    assert all(torch.equal(a, b) for a, b in zip(own.eval()(images), other.eval()(images), strict=True))


def test_edits_are_obeyed(run):
    edit(run, edits.Merge((0, 2)), edits.Name(0, "both"))
    export(run, "parquet", Path("out.parquet"))
    table = pq.read_table("out.parquet")
    assert set(table["cluster"].to_pylist()) == {0, 1}
    assert "both" in table["name"].to_pylist()


def refused(*args, **options):
    """The one line that says why; nothing was changed."""
    before = everything(Path())
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the caller looks at what it says)
        export(*args, **options)
    assert everything(Path()) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("kind", "meant"), [("parket", "'parquet'"), ("folder", "'folders'"), ("zip", "choose from")])
def test_an_unknown_format(run, kind, meant):
    assert meant in refused(run, kind, Path("out"))


def test_copy_is_for_folders(run):
    assert "--copy is for" in refused(run, "npy", Path("out.npy"), copy=True)


@pytest.mark.parametrize("kind", FORMATS)
def test_places_that_are_refused(run, kind):
    suffix = package.KINDS[kind][1]
    if suffix:
        assert f"must name a {suffix} file" in refused(run, kind, Path("out.txt"))
        Path("d" + suffix).mkdir()
        assert "is a folder" in refused(run, kind, Path("d" + suffix), overwrite=True)
    else:
        assert "is where you are" in refused(run, kind, Path(), overwrite=True)
        assert "is where you are" in refused(run, kind, Path(".."), overwrite=True)
        Path("a file").touch()
        assert "is a file" in refused(run, kind, Path("a file"), overwrite=True)
    assert "lies in the run" in refused(run, kind, Path(f"run/out{suffix}"), overwrite=True)
    assert "lies in the run" in refused(run, kind, Path(f"in/../run/out{suffix}"), overwrite=True)
    assert "lies in the source" in refused(run, kind, Path(f"in/out{suffix}"), overwrite=True)
    Path("link").symlink_to("in")
    assert "lies in the source" in refused(run, kind, Path(f"link/out{suffix}"), overwrite=True)
    assert "is a file" in refused(run, kind, Path(f"run/config.json/out{suffix}"))


def test_the_run_itself_and_what_holds_it(run):
    for place in ("run", "in"):
        Path(place, MARKER).touch()
        assert "lies in the" in refused(run, "folders", Path(place), overwrite=True)
    Path("all").mkdir()
    Path("all", MARKER).touch()
    shutil.move("run", "all/run")
    assert "lies in --out" in refused(Path("all/run"), "folders", Path("all"), overwrite=True)


def test_a_source_given_from_elsewhere_or_by_a_pattern(run, tmp_path, monkeypatch):
    Path("away").mkdir()
    monkeypatch.chdir("away")
    assert "lies in the source" in refused(Path("../run"), "npy", Path("../in/x.npy"))
    monkeypatch.chdir("..")
    change(run, source="in/**/*.png")
    assert "lies in the source" in refused(run, "folders", Path("in/sorted"))
    change(run, source="in/*.png")
    export(run, "folders", Path("in/sorted"))


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind != "onnx"])
def test_what_is_there_is_replaced_only_if_asked(run, kind):
    out = out_of(kind)
    export(run, kind, out)
    first = everything(Path())
    assert "--overwrite" in refused(run, kind, out)
    edit(run, edits.Merge((0, 1)))
    export(run, kind, out, overwrite=True)
    second = everything(Path())
    assert {path for path in first if path.startswith("out")} - set(second) == (
        {path for path in first if path.startswith("out/1/")} if kind == "folders" else set()
    )
    assert not [path for path in Path().iterdir() if path.name.startswith(".deepcluster-")]


def test_the_names_beside_an_array_are_not_overwritten(run):
    Path("out.names.json").write_text("mine")
    assert "out.names.json is there already" in refused(run, "npy", Path("out.npy"))


@pytest.mark.parametrize("kind", ["model", "folders", "projector"])
def test_a_folder_of_other_files_is_never_replaced(run, kind):
    Path("mine").mkdir()
    export(run, kind, Path("mine"))
    shutil.rmtree("mine")
    Path("mine").mkdir()
    Path("mine/letter.txt").touch()
    assert "left alone" in refused(run, kind, Path("mine"), overwrite=True)


def test_folders_above_are_made(run):
    export(run, "npy", Path("a/b/out.npy"))
    assert Path("a/b/out.npy").exists()
    export(run, "model", Path("new/deeper/.."))
    assert Path("new/config.json").exists()


def fails(task):
    task.new.write_bytes(b"half") if not task.new.is_dir() else (task.new / "half").write_bytes(b"half")
    raise fails.error


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("x")])
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("there", [False, True])
def test_an_interrupted_export_leaves_what_was_there(run, monkeypatch, kind, error, there):
    out, suffix = out_of(kind), package.KINDS[kind][1]
    if there and suffix:
        out.write_bytes(b"old")
    elif there:
        out.mkdir()
        (out / MARKER).write_text("old")
    before = everything(Path())
    fails.error = error
    monkeypatch.setitem(package.KINDS, kind, (fails, suffix))
    with pytest.raises(type(error)):
        export(run, kind, out, overwrite=True)
    assert everything(Path()) == before
    assert not [path for path in Path().iterdir() if path.name.startswith(".deepcluster-")]


def test_a_folder_that_cannot_be_put_in_place_comes_back(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "there/old").touch()
    with pytest.raises(FileNotFoundError):
        package._put(tmp_path / "missing", tmp_path / "there", tmp_path / "aside")
    assert (tmp_path / "there/old").exists()


@pytest.mark.parametrize("name", ["config.json", "assignments.parquet", "features.npy"])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_an_unfinished_or_damaged_run(run, name, damage):
    data = (run / name).read_bytes()
    (run / name).unlink() if damage == "missing" else (run / name).write_bytes(data[: len(data) // 2])
    said = refused(run, "npy", Path("out.npy"))
    assert name in said
    assert str(run) in said


def test_files_of_two_runs(run):
    np.save(run / "features.npy", np.load(run / "features.npy")[:-1])
    assert "24 rows, features.npy 23" in refused(run, "npy", Path("out.npy"))


@pytest.mark.parametrize("kind", ["model", "onnx"])
def test_a_damaged_model(run, kind):
    (run / "model/model.safetensors").write_bytes(b"x")
    assert "cannot read the model" in refused(run, kind, out_of(kind))
