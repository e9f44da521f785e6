"""A run, a model, a checkpoint, decisions, labels, with any damage: the command line goes on, or exits with 2."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from finished import CPU, edit, finished
from fuzzing import BENT, DAMAGE, VALUES, WAYS, bent, cases, changed, command, copy_of, damaged, documented, tried
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save

from deepcluster import decisions, edits
from deepcluster.classifier import Classifier
from deepcluster.edits import Junk, Merge, Name
from deepcluster.estimator import load

COMMANDS = [
    ["report", "run"],
    ["report", "run"],
    ["evaluate", "run"],
    ["evaluate", "run", "in"],
    ["evaluate", "run", "--probe", "knn"],
    ["predict", "run", "in", "--out", "p.parquet"],
    ["merge", "run", "0", "2"],
    ["merge", "run", "--from", "decisions.json"],
    ["undo", "run"],
    ["split", "run", "0"],
    ["name", "run", "0", "é"],
    ["junk", "run", "1"],
    ["reduce-outliers", "run"],
    ["fit", "--resume", "run"],
    *(
        ["export", "run", "--format", kind, "--out", out]
        for kind, out in (
            ("npy", "o.npy"),
            ("parquet", "o.parquet"),
            ("folders", "o"),
            ("safetensors", "o.safetensors"),
            ("model", "o"),
            ("projector", "o"),
        )
    ),
]
MODEL = ["model/model.safetensors", "model/edits.safetensors", "model/config.json", "model/names.json"]
FILES = [
    *MODEL,
    "config.json",
    "assignments.parquet",
    "clusters.parquet",
    "features.npy",
    "metrics.jsonl",
    "map.npz",
    "skipped.csv",
]
INSTEAD = st.one_of(VALUES, st.just("drop"))


def remade(file: Path, way: list[int], instead, bend, columns) -> None:
    """Damage what a file says, not how it is written."""
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            words = stored.metadata()
        if words and way[0] % 2:
            words = {"edits": json.dumps(changed(json.loads(words["edits"]), way, instead))}
        else:
            tensors = bent(tensors, *bend)
        file.write_bytes(save(tensors, metadata=words))
    elif file.suffix == ".json":
        file.write_text(json.dumps(changed(json.loads(file.read_text()), way, instead)))
    elif file.suffix == ".jsonl":
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        found = changed(lines, way, instead)
        file.write_text("".join(json.dumps(one) + "\n" for one in (found if isinstance(found, list) else [found])))
    elif file.suffix == ".npy":
        _, how, value = bend
        x = np.load(file)
        x = {
            "drop": lambda: x[:-1],
            "type": lambda: x.astype(str(value).split(".")[1]),
            "shape": lambda: np.zeros(value),
            "fill": lambda: np.full_like(x, value),
        }[how]()
        np.save(file, x)
    elif file.suffix == ".npz":
        at, how, value = bend
        x = dict(np.load(file))
        name = sorted(x)[at % len(x)]
        x[name] = {
            "drop": lambda: x[name][:-1] if x[name].ndim else x[name],
            "type": lambda: np.zeros(x[name].shape, str(value).split(".")[1]),
            "shape": lambda: np.zeros(value),
            "fill": lambda: np.full(x[name].shape, value),
        }[how]()
        np.savez(file, **x)
    elif file.suffix == ".parquet":
        table = pq.read_table(file)
        at, how = columns
        name = table.column_names[at % table.num_columns]
        column = table[name]
        if how == "rows":
            table = table.slice(1)
        elif how == "twice":
            table = pa.concat_tables([table, table])
        elif how == "drop":
            table = table.drop_columns([name])
        elif how == "double":
            table = table.append_column(name, column)
        else:
            other = {
                "null": lambda: [None] * len(column),
                "text": lambda: [f"{value}\n" for value in column.to_pylist()],
                "number": lambda: list(range(len(column))),
                "far": lambda: [2**40] * len(column),
                "below": lambda: [-1] * len(column),
                "nan": lambda: [float("nan")] * len(column),
                "lists": lambda: [[0]] * len(column),
                "true": lambda: [True] * len(column),
                "same": lambda: [column[0].as_py()] * len(column),
            }[how]()
            table = table.set_column(table.column_names.index(name), name, pa.array(other))
        pq.write_table(table, file)
    else:
        file.write_text(f"path,reason\n{instead}")


HOWS = ["rows", "twice", "drop", "double", "null", "text", "number", "far", "below", "nan", "lists", "true", "same"]
STRUCTURED = st.tuples(WAYS, INSTEAD, BENT, st.tuples(st.integers(0, 20), st.sampled_from(HOWS)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run over a few images, edited, with a report, and what else the commands take."""
    at = tmp_path_factory.mktemp("whole")
    rng = np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(at)
        patch.setenv("DEEPCLUSTER_CACHE", str(at / "cache"))
        for kind in "ab":
            Path("in", kind).mkdir(parents=True)
            for i in range(6):
                Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(Path("in", kind, f"{i}.png"))
        finished(Path("run"), "in", k=4, channels=1)
        edit(Path("run"), Merge((1, 3)), Name(0, "n"), Junk(2))
        model = load("run")
        model.split_cluster(int(np.bincount(model.labels_).argmax()))
        Path("run/metrics.jsonl").write_text(
            '{"stage": 0, "epoch": 1, "loss": 1.0, "seconds": 0.1, "health": {"active": 4, "nmi_previous": null}}\n'
        )
        Path("run/skipped.csv").write_text("path,reason\nx.png,truncated\n")
        model.report()
        shutil.rmtree("cache")
        Path("decisions.json").write_text(
            json.dumps({"format": 1, "names": {"0": "x"}, "merge": [[0, 2]], "junk": [0]})
        )
    return at


@cases(250)
def test_commands_on_a_damaged_run(n, whole, capfd):
    def check(name, argv, damage, other, structured, form):
        with copy_of(whole):
            file = Path("run", name)
            if form == "words":
                remade(file, *structured)
            elif form == "missing":
                file.unlink()
            else:
                file.write_bytes(
                    Path("run", other).read_bytes() if form == "other" else damaged(file.read_bytes(), damage)
                )
            command([*argv, "--quiet"], capfd)

    forms = st.sampled_from(["words"] * 5 + ["bytes"] * 4 + ["other", "missing"])
    tried(
        n, check, st.sampled_from(FILES), st.sampled_from(COMMANDS), DAMAGE, st.sampled_from(FILES), STRUCTURED, forms
    )


@cases(150)
def test_a_damaged_model(n, whole):
    def check(name, damage, structured, form):
        with copy_of(whole):
            file = Path("run", name)
            remade(file, *structured) if form == "words" else file.write_bytes(damaged(file.read_bytes(), damage))
            model = documented(lambda: Classifier.load(Path("run/model"), CPU), ValueError)
            if model is not None:
                with torch.no_grad():
                    _, p, cluster = model(torch.rand(2, 1, 8, 8))
                assert p.shape == (2, model.n_clusters)
                assert 0 <= cluster.min() <= cluster.max() < model.n_clusters
                assert len(model.names) == model.n_clusters
                documented(lambda: model.save(Path("again")), ValueError)

    tried(n, check, st.sampled_from(MODEL), DAMAGE, STRUCTURED, st.sampled_from(["words", "words", "bytes"]))


@cases(100)
def test_decisions_of_any_shape(n, tmp_path):
    good = {"format": 1, "of": "x", "names": {"0": "a", "3": ""}, "merge": [[0, 2], [1, 4]], "junk": [3]}

    def check(found, way, instead, damage):
        data = json.dumps(changed(found, way, instead)).encode("utf-8", "surrogatepass")
        (tmp_path / "d.json").write_bytes(damaged(data, damage) if damage else data)
        step = documented(lambda: decisions.read(tmp_path / "d.json", "x"), ValueError)
        if step is not None:
            documented(lambda: edits.ids_after([""] * 5, [step]), ValueError)
            json.dumps(step.words())

    keys = st.sampled_from(["names", "merge", "junk", "of", "format"])
    tried(
        n,
        check,
        st.one_of(st.just(good), st.just(good), st.dictionaries(keys, VALUES)),
        WAYS,
        INSTEAD,
        st.one_of(st.none(), DAMAGE),
    )


@cases(100)
def test_labels_of_any_form(n, whole, capfd):
    def check(rows, encoding, damage, argv):
        text = "\n".join(",".join(row) for row in rows).encode(
            encoding, "surrogatepass" if "utf" in encoding else "replace"
        )
        Path("labels.csv").write_bytes(damaged(text, damage) if damage else text)
        command([*argv, "--labels", "labels.csv", "--quiet"], capfd)

    cells = st.one_of(
        st.sampled_from(["path", "label", "in/a/0.png", "0.png", "b/1.png", "cat", "-1", "", '"', "\0"]),
        st.text(max_size=5),
    )
    rows = st.lists(st.lists(cells, min_size=1, max_size=3), max_size=6)
    few = ["fit", "in", "--dry-run", "--use-labels", "--method", "simclr+fixmatch", "--n-clusters", "1000"]
    codes = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1"])
    with copy_of(whole):
        tried(n, check, rows, codes, st.one_of(st.none(), DAMAGE), st.sampled_from([["evaluate", "run"], few]))
