"""The command line: exit codes, one clear line for every wrong input, nothing lost, and runs that go on where they
stopped."""

import contextlib
import csv
import json
import os
import signal
import struct
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from deepcluster import checkpoint, plan, results
from deepcluster.__main__ import main

QUICK = [
    "--method",
    "iic",
    "--n-clusters",
    "2",
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
TRAINING = ("is_representative", "look", "reason", "duplicate_of")  # columns that new images lack
RESULTS = ("assignments.parquet", "clusters.parquet", "features.npy", "model/model.safetensors")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """20 grey images of 8 px in two sub-folders; the tests run beside it."""
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "photos", 20)
    return tmp_path


def draw(root, n):
    rng = np.random.default_rng(0)
    for i in range(n):
        name = root / ("dark" if i % 2 else "light") / f"{i:02d}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((rng.integers(0, 100, (8, 8)) + 150 * (i % 2 == 0)).astype(np.uint8)).save(name)


def fit(*args, out="run"):
    return main(["fit", *QUICK, *args, *(["--out", out] if out else [])])


def rows(run):
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in lines]


def same_results(one, other):
    assert rows(one) == rows(other)
    for name in RESULTS:
        assert (Path(one) / name).read_bytes() == (Path(other) / name).read_bytes(), name


def refused(capsys, argv, *said):
    """Exit code 2 and exactly one line on stderr that says all of ``said``."""
    try:
        code = main(argv if argv[0] == "fitt" else [*argv, "--quiet"])
    except SystemExit as left:  # argparse's way
        code = left.code
    shown = capsys.readouterr()
    assert code == 2, shown
    assert shown.out == ""
    assert shown.err.count("\n") == 1, shown.err
    assert "Traceback" not in shown.err
    for text in said:
        assert text in shown.err, shown.err


# --- words ---


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["fitt"], ["did you mean fit?"]),
        (["fit", "photos", "--out", "r", "--epocs", "3"], ["--epocs", "did you mean --epochs?"]),
        (["fit", "photos", "--out", "r", "--epoch", "3"], ["did you mean --epochs?"]),
        (["fit", "photos", "--out", "r", "--epochs", "many"], ["--epochs", "'many'", "whole number or auto"]),
        (["fit", "photos"], ["SOURCE and --out RUN"]),
        (["fit"], ["SOURCE and --out RUN"]),
        (["fit", "photos", "--out", "r", "--method", "iicc"], ["'iicc'", "did you mean 'iic'?"]),
        (["fit", "photos", "--out", "r", "--method", "simclr"], ["let a clustering method follow", "simclr+sela"]),
        (["fit", "photos", "--out", "r", "--backbone", "resnet81"], ["'resnet81'", "did you mean 'resnet18'?"]),
        (["fit", "photos", "--out", "r", "--method", "iic", "--set", "overclutser=3"], ["did you mean 'overcluster'?"]),
        (["fit", "photos", "--out", "r", "--set", "zzz=3"], ["no parameter 'zzz'", "choose from"]),
        (["fit", "photos", "--out", "r", "--set", "overcluster"], ["NAME=VALUE", "'overcluster'"]),
        (["fit", "photos", "--out", "r", "--n-clusters", "21"], ["20 images", "21 clusters", "--n-clusters 4"]),
        (["fit", "photos", "--out", "r", "--n-clusters", "1"], ["n_clusters", "at least 2", "got 1"]),
        (["fit", "photos", "--out", "r", "--batch-size", "999"], ["20 training images", "got 999"]),
        (["fit", "photos", "--out", "r", "--lr", "nan"], ["lr must be", "nan"]),
        (["fit", "photos", "--out", "r", "--precision", "fp8"], ["fp32 or bf16", "'fp8'"]),
        (["fit", "photos", "--out", "r", "--device", "tpu"], ["'tpu'", "cpu"]),
        (["fit", "photos", "--out", "r", "--backbone", "mlp"], ["mlp takes vectors"]),
        (["fit", "photos", "--out", "r", "--weights", "w.pth"], ["no weight file w.pth"]),
        (["fit", "photos", "--out", "r", "--init-from", "nowhere"], ["no model in nowhere"]),
        (["fit", "photos", "--out", "r", "--labels", "l.csv"], ["no label file l.csv", "path,label"]),
        (["fit", "photos", "--out", "r", "--config", "c.json"], ["--config c.json", "no such file"]),
        (["fit", "photoz", "--out", "r"], ["photoz does not exist", "did you mean photos?"]),
        (["fit", "photos", "--resume", "r"], ["source cannot be given with --resume"]),
        (["fit", "--resume", "r", "--epochs", "3"], ["--epochs cannot be given with --resume"]),
        (["fit", "--resume", "r", "--set", "a=3"], ["--params cannot be given with --resume"]),
        (["fit", "--resume", "r"], ["r is not a run directory"]),
        (["predict", "r", "photos", "--out", "p.parquet"], ["r is not a run directory"]),
        (["predict", "r", "photos", "--out", "p.csv"], [".parquet", "p.csv"]),
        (["evaluate", "r"], ["r is not a run directory"]),
    ],
)
def test_a_wrong_word_is_answered_with_the_right_one(folder, capsys, argv, said):
    refused(capsys, argv, *[text.replace("no such file", "No such file") for text in said])
    assert sorted(p.name for p in folder.iterdir()) == ["photos"], "nothing may be left behind"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("[1]", "must hold one JSON object"),
        ("{", "cannot read --config"),
        ('{"epocs": 1}', "did you mean 'epochs'?"),
        ('{"epochs": "1"}', "epochs must be a whole number"),
        ('{"method": 3}', "method must be a name; got 3"),
        ('{"params": [1]}', "params must be an object"),
    ],
)
def test_a_wrong_config_file(folder, capsys, config, said):
    (folder / "c.json").write_text(config)
    refused(capsys, ["fit", "photos", "--out", "r", "--config", "c.json"], said)


def test_flags_win_over_the_config_file_and_set_over_its_params(folder):
    (folder / "c.json").write_text('{"method": "iic", "seed": 5, "epochs": 7, "params": {"overcluster": 2}}')
    assert fit("photos", "--config", "c.json", "--set", "overcluster=3") == 0
    saved = json.loads(Path("run/config.json").read_text())["plan"]
    (stage,) = saved["stages"]
    assert (saved["seed"], stage["epochs"], stage["params"]["overcluster"]) == (5, 1, 3)


@pytest.mark.parametrize("argv", [["--help"], ["fit", "--help"], ["--version"], ["methods"], ["doctor"]])
def test_what_only_tells(argv, capsys):
    with contextlib.suppress(SystemExit):
        assert main(argv) == 0
    shown = capsys.readouterr()
    assert shown.out
    assert not shown.err


def test_every_option_of_fit_is_explained(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "highest learning rate (default auto)" in text
    assert "--init-from RUN finished run whose backbone to start from" in text


def test_help_needs_no_torch():
    code = "import sys, deepcluster.__main__ as m\ntry: m.main(['fit', '--help'])\nexcept SystemExit: pass\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


# --- wrong data ---


def test_folders_without_images(folder, capsys):
    (folder / "empty").mkdir()
    refused(capsys, ["fit", "empty", "--out", "r"], "empty is empty")
    (folder / "empty/notes.txt.md").write_text("no image")
    refused(capsys, ["fit", "empty", "--out", "r"], "has no images", ".jpg", "1 .md")


def test_parquet_without_an_image_column(folder, capsys):
    pq.write_table(pa.table({"picture": [b"x"]}), "t.parquet")
    refused(capsys, ["fit", "t.parquet", "--out", "r"], "no column 'image'", "picture")


def bomb():
    """A PNG that says it is 60,000 pixels a side."""
    head = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_bad_images_are_listed_and_odd_names_survive(folder, capsys):
    photos = folder / "photos"
    good = (photos / "light/00.png").read_bytes()
    bad = {"zero.jpg": b"", "text.jpg": b"hello", "cut.png": good[: len(good) // 2], "bomb.png": bomb()}
    for name, data in bad.items():
        (photos / "dark" / name).write_bytes(data)
    (photos / "dark/gone.png").symlink_to("nowhere.png")
    (photos / "dark/loop.png").symlink_to("loop.png")
    (photos / "light/up").symlink_to("..")
    odd = [b"a b.png", b'it\'s "so".png', b"two\nlines.png", b"\xff\xfe.png", "ä☃.png".encode(), b"=1+1.png"]
    for i, name in enumerate(odd):
        Path(os.fsdecode(bytes(photos / "light") + b"/" + name)).write_bytes(good + bytes([i]))
    Path(os.fsdecode(bytes(photos / "light") + b"/\xff=bad.png")).write_bytes(b"")
    assert fit("photos") == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "7 images were skipped; see run/skipped.csv" in shown.out
    with Path("run/skipped.csv").open(newline="", encoding="utf-8") as f:
        skipped = {Path(row["path"]).name: row["reason"] for row in csv.DictReader(f)}
    assert skipped.keys() == {*bad, "gone.png", "loop.png", "\\xff=bad.png"}
    assert skipped["zero.jpg"] == "empty file"
    assert skipped["text.jpg"] == "not an image"
    assert skipped["cut.png"] == "truncated"
    assert skipped["bomb.png"].startswith("too large")
    paths = pq.read_table("run/assignments.parquet")["path"].to_pylist()
    names = {Path(path).name for path in paths}
    assert len(paths) == 26
    assert {"two\nlines.png", "\\xff\\xfe.png", "ä☃.png", "=1+1.png", 'it\'s "so".png'} <= names


def test_no_image_can_be_read(folder, capsys):
    for path in (folder / "photos").rglob("*.png"):
        path.write_bytes(b"")
    refused(capsys, ["fit", "photos", "--out", "r"], "no image can be read", "empty file")


def test_a_run_and_a_source_with_bytes_that_are_no_utf8(folder, capsys):
    source, run = os.fsdecode(b"p\xff"), os.fsdecode(b"r\xff")
    (folder / "photos").rename(folder / source)
    assert fit(source, out=run) == 0
    assert main(["evaluate", run]) == 0
    assert main(["fit", "--resume", run, "--quiet"]) == 0
    assert main(["predict", run, source, "--out", os.fsdecode(b"new\xff.parquet"), "--quiet"]) == 0
    assert capsys.readouterr().err == ""


# --- labels ---


def label_file(name, paths, head="path,label"):
    text = "\n".join([head, *(f"{p},{Path(p).parent.name}" for p in paths)])
    Path(name).write_text(text + "\n")


def test_labels_are_never_used_in_training(folder, capsys):
    paths = sorted(str(p.relative_to(folder)) for p in (folder / "photos").rglob("*.png"))
    label_file("half.csv", paths[::2])
    for labels in ("auto", "none", "half.csv"):
        assert fit("photos", "--labels", labels, out=labels + ".run") == 0
    for name in RESULTS:
        one, two, three = ((folder / f"{labels}.run" / name).read_bytes() for labels in ("auto", "none", "half.csv"))
        assert one == two == three
    assert "acc" in rows("auto.run")[0]
    assert "acc" not in rows("none.run")[0]
    assert "10 of 20 images have no label in half.csv" in capsys.readouterr().err
    main(["evaluate", "half.csv.run"])
    assert json.loads(capsys.readouterr().out)["n_images"] == 10


def test_label_files_that_are_wrong(folder, capsys):
    label_file("other.csv", ["elsewhere/a.png", "elsewhere/b.png"])
    refused(
        capsys, ["fit", "photos", "--out", "r", "--labels", "other.csv"], "none of the 20 images", "elsewhere/a.png"
    )
    Path("one.csv").write_text("path\nphotos/dark/01.png\n")
    refused(capsys, ["fit", "photos", "--out", "r", "--labels", "one.csv"], "path,label")
    assert fit("photos", "--labels", "none") == 0
    capsys.readouterr()
    refused(capsys, ["evaluate", "run", "--labels", "other.csv"], "none of the 20 images")


# --- the place of a run ---


def test_a_run_is_not_overwritten_unless_asked_and_strangers_never(folder, capsys):
    assert fit("photos") == 0
    (folder / "run/notes.txt").write_text("mine")
    (folder / "run/model/card.md").write_text("mine")
    before = (folder / "run/assignments.parquet").read_bytes()
    capsys.readouterr()
    refused(capsys, ["fit", "photos", "--out", "run"], "run is not empty", "--overwrite", "fit --resume run")
    refused(capsys, ["fit", "photos", "--out", "run", "--overwrite", "--n-clusters", "30"], "30 clusters")
    assert (folder / "run/assignments.parquet").read_bytes() == before, "a wrong word cost an old run"
    assert fit("photos", "--overwrite", "--seed", "1") == 0
    assert json.loads((folder / "run/config.json").read_text())["plan"]["seed"] == 1
    assert len(rows("run")) == 1, "metrics of the old run are left"
    assert (folder / "run/notes.txt").read_text() == (folder / "run/model/card.md").read_text() == "mine"


def test_an_overwriting_run_never_resumes_from_the_one_before(folder, monkeypatch):
    assert fit("photos") == fit("photos", "--seed", "1", out="whole") == 0
    with monkeypatch.context() as patch:
        stop_at(patch, checkpoint, "save", 1)
        with pytest.raises(Killed):
            fit("photos", "--seed", "1", "--overwrite")
    assert main(["fit", "--resume", "run", "--quiet"]) == 0
    same_results("run", "whole")


def test_overwrite_does_not_take_somebody_elses_folder_for_a_run(folder, capsys):
    (folder / "project").mkdir()
    (folder / "project/config.json").write_text("{}")
    refused(capsys, ["fit", "photos", "--out", "project", "--overwrite"], "config.json", "no run")
    assert (folder / "project/config.json").read_text() == "{}"


def test_places_that_cannot_be_written(folder, capsys):
    (folder / "file").write_text("")
    refused(capsys, ["fit", "photos", "--out", "file"], "file is a file")
    refused(capsys, ["fit", "photos", "--out", "file/run"], "file is a file")
    refused(capsys, ["fit", "photos", "--out", "/proc/run"], "/proc") if Path("/proc").exists() else None


@contextlib.contextmanager
def mounted(path, options):
    path.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
    if sys.platform != "linux" or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def test_a_read_only_disk(folder, capsys):
    with mounted(folder / "disk", "ro,size=64k"):
        refused(capsys, ["fit", "photos", "--out", "disk/run"], "cannot be written", "another place")


@pytest.mark.parametrize(
    "share", [0.005, 0.3, 0.7, 0.95]
)  # of what the run takes: it ends in config, checkpoint, model, features
def test_a_full_disk(folder, capsys, share):
    """Of what the run takes, so that it ends within the config, the checkpoint, the model or the tables."""
    assert fit("photos", out="whole") == 0
    size = sum(path.stat().st_size for path in Path("whole").rglob("*"))
    with mounted(folder / "disk", f"size={int(size * share)}"):
        capsys.readouterr()
        assert fit("photos", out="disk/run") == 2
        shown = capsys.readouterr()
        assert shown.err.count("\n") == 1
        assert "no space left" in shown.err.lower()
        assert "free some space" in shown.err
        assert subprocess.run(["mount", "-o", "remount,size=64m", "disk"], check=False).returncode == 0
        if "--resume" in shown.err:
            assert main(["fit", "--resume", "disk/run", "--quiet"]) == 0
        else:
            assert fit("photos", out="disk/run") == 0
        same_results("disk/run", "whole")


@pytest.mark.parametrize("hungry", [lambda *_: torch.empty(10**15), lambda *_: bytearray(10**18)])
def test_out_of_memory(folder, capsys, monkeypatch, hungry):
    monkeypatch.setattr(checkpoint, "save", hungry)
    assert fit("photos") == 2
    assert "error: out of memory; a smaller --batch-size or --image-size" in capsys.readouterr().err


# --- resume ---


class Killed(BaseException):
    """Nothing in the package may catch it, as nothing catches SIGKILL."""


def stop_at(monkeypatch, module, name, call, after=False):
    """Dies in the ``call``-th call of module.name, before or after its work."""
    real, count = getattr(module, name), [0]

    def counted(*args, **options):
        count[0] += 1
        if count[0] == call and not after:
            raise Killed
        value = real(*args, **options)
        if count[0] == call:
            raise Killed
        return value

    monkeypatch.setattr(module, name, counted)


STOPS = {
    "after config.json": (plan, "run", 1, False),
    "before the first checkpoint": (checkpoint, "save", 1, False),
    "between metrics and checkpoint": (checkpoint, "save", 2, False),
    "after a checkpoint": (checkpoint, "save", 2, True),
    "between the stages": (checkpoint, "save", 3, True),
    "in the second stage": (checkpoint, "save", 5, False),
    "before the outputs": (results, "write", 1, False),
    "within the outputs": (results, "write_table", 2, False),
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    where = tmp_path_factory.mktemp("whole")
    draw(where / "photos", 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(where)
        patch.setenv("DEEPCLUSTER_CACHE", str(where / "cache"))
        assert main(["fit", "photos", *LONG, "--out", "whole"]) == 0
    return where


LONG = [*QUICK, "--method", "simclr+sela", "--epochs", "3"]


@pytest.mark.parametrize("stop", STOPS)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(uninterrupted, tmp_path, monkeypatch, stop):
    monkeypatch.chdir(uninterrupted)
    with monkeypatch.context() as patch:
        stop_at(patch, *STOPS[stop])
        with pytest.raises(Killed):
            main(["fit", "photos", *LONG, "--out", str(tmp_path / "run")])
    assert main(["fit", "--resume", str(tmp_path / "run"), "--quiet"]) == 0
    same_results(tmp_path / "run", "whole")
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_resuming_a_finished_run_rewrites_its_outputs(folder):
    assert fit("photos") == 0
    before = [(folder / "run" / name).read_bytes() for name in RESULTS]
    for name in RESULTS:
        (folder / "run" / name).write_bytes(b"damaged")
    assert main(["fit", "--resume", "run", "--quiet"]) == 0
    assert before == [(folder / "run" / name).read_bytes() for name in RESULTS]
    assert len(rows("run")) == 1


def test_a_half_written_line_of_metrics_is_written_anew(uninterrupted, tmp_path, monkeypatch):
    monkeypatch.chdir(uninterrupted)
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(patch, checkpoint, "save", 2)
        with pytest.raises(Killed):
            main(["fit", "photos", *LONG, "--out", str(run)])
    metrics = run / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-20])
    assert main(["fit", "--resume", str(run), "--quiet"]) == 0
    assert rows(run) == rows("whole")


def test_ctrl_c_and_sigterm_say_how_to_go_on(folder, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert fit("photos") == 130
    assert "interrupted; go on with: deepcluster fit --resume run" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(plan, "resolve", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        assert fit("photos", out="never") == 130
    assert "nothing was written" in capsys.readouterr().err
    assert not (folder / "never").exists()


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        ("checkpoints/last.pt", b"", "cannot read the checkpoint run/checkpoints/last.pt"),
        ("checkpoints/last.pt", b"PK\3\4 and so on", "cannot read the checkpoint"),
        ("config.json", b"{", "cannot read run/config.json"),
        ("config.json", b"{}", "cannot read run/config.json: it has no 'data'"),
        ("config.json", b"[]", "cannot read run/config.json"),
        ("config.json", b"\xff\xfe", "cannot read run/config.json"),
    ],
)
def test_resume_of_what_is_damaged(folder, capsys, file, damage, said):
    assert fit("photos") == 0
    capsys.readouterr()
    before = (folder / "run/assignments.parquet").read_bytes()
    (folder / "run" / file).write_bytes(damage)
    refused(capsys, ["fit", "--resume", "run"], said)
    assert (folder / "run/assignments.parquet").read_bytes() == before


def test_resume_with_a_checkpoint_of_another_run(folder, capsys):
    assert fit("photos", "--method", "sela", out="a") == fit("photos", "--method", "iic", out="b") == 0
    (folder / "a/checkpoints/last.pt").replace("b/checkpoints/last.pt")
    capsys.readouterr()
    refused(capsys, ["fit", "--resume", "b", "--quiet"], "does not fit config.json", "--overwrite")


def test_resume_when_the_images_are_others_or_elsewhere(folder, capsys, monkeypatch):
    assert fit("photos") == 0
    (folder / "photos/dark/01.png").write_bytes((folder / "photos/dark/03.png").read_bytes())
    capsys.readouterr()
    refused(capsys, ["fit", "--resume", "run", "--quiet"], "other images than when run began")
    monkeypatch.chdir(folder / "photos")
    refused(capsys, ["fit", "--resume", "../run", "--quiet"], f"the run began in {folder}")


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        ("model/model.safetensors", b"12", "cannot read the model in run/model"),
        ("model/config.json", b"{}", "cannot read the model in run/model"),
        ("model/config.json", b"[]", "cannot read the model in run/model"),
        ("model/names.json", None, "names.json is missing"),
        ("assignments.parquet", b"no", "cannot read run/assignments.parquet"),
        ("assignments.parquet", None, "it did not finish: go on with deepcluster fit --resume run"),
    ],
)
def test_predict_with_a_damaged_run(folder, capsys, file, damage, said):
    assert fit("photos") == 0
    capsys.readouterr()
    (folder / "run" / file).unlink()
    if damage is not None:
        (folder / "run" / file).write_bytes(damage)
    refused(capsys, ["predict", "run", "photos", "--out", "p.parquet"], said)
    assert not (folder / "p.parquet").exists()


def test_training_that_stops_itself_is_code_3(folder, capsys):
    assert fit("photos", "--lr", "1e30", "--epochs", "9") == 3
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "became" in shown
    assert "lower --lr" in shown


def test_an_error_of_ours_is_code_1_and_says_so(folder, capsys, monkeypatch):
    monkeypatch.setattr(plan, "resolve", lambda *_: 1 / 0)
    assert fit("photos") == 1
    assert "internal error: ZeroDivisionError" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        fit("photos", "--debug")


# --- the other commands ---


def test_predict_and_evaluate(folder, capsys):
    assert fit("photos") == 0
    draw(folder / "more", 6)
    (folder / "more/dark/bad.png").write_bytes(b"")
    capsys.readouterr()
    assert main(["predict", "run", "more", "--out", "deep/new.parquet", "--quiet"]) == 0
    assert "1 images were skipped" in capsys.readouterr().out
    table = pq.read_table("deep/new.parquet")
    own = pq.read_table("run/assignments.parquet")
    assert table.column_names == [name for name in own.column_names if name not in TRAINING]
    assert len(table) == 6
    assert set(table["cluster"].to_pylist()) <= {0, 1}
    for argv in (["evaluate", "run"], ["evaluate", "run", "more"], ["evaluate", "run", "--labels", "auto"]):
        assert main(argv) == 0
        (line,) = capsys.readouterr().out.splitlines()
        found = json.loads(line)
        assert {"acc", "nmi", "ari", "ami", "purity", "n_found", "n_clusters", "splits"} <= found.keys()
        assert found["n_clusters"] == 2
        assert 0 <= found["acc"] <= 1


def test_dry_run_plans_and_writes_nothing(folder, capsys):
    assert fit("photos", "--dry-run") == fit("photos", "--dry-run", out=None) == 0
    shown = capsys.readouterr().out
    for word in ("images       20 of 1x8x8", "memory", "disk", "decoding", "iic", "nothing was written"):
        assert word in shown
    assert sorted(p.name for p in folder.iterdir()) == ["photos"]
    assert not list(Path(os.environ["DEEPCLUSTER_CACHE"]).iterdir())


def test_init_from_starts_with_the_backbone_of_a_run(folder, capsys, monkeypatch):
    assert fit("photos", out="first") == 0
    assert fit("photos", "--init-from", "first", "--lr", "1e-12", out="second") == 0
    from deepcluster import load

    one, two = (load(run).classifier_.backbone.state_dict() for run in ("first", "second"))
    weights = [key for key in one if key.endswith("weight")]
    assert weights
    assert all(np.allclose(one[key], two[key], atol=1e-6) for key in weights)
    capsys.readouterr()
    refused(capsys, ["fit", "photos", "--init-from", "first", "--backbone", "resnet18", "--out", "r"],
            "first holds convnet", "resnet18")  # fmt: skip
    assert not (folder / "r").exists()


def test_overwrite_does_not_remove_what_the_run_starts_from(folder, capsys):
    fit("photos")
    capsys.readouterr()
    (folder / "link").symlink_to("run")
    (folder / "run/w.pth").write_bytes(b"")
    kept = {p: p.read_bytes() for p in (folder / "run").rglob("*") if p.is_file()}
    for extra, said in (
        (["photos", "--init-from", "link"], "--init-from link lies in run"),
        (["photos", "--weights", "run/w.pth"], "--weights run/w.pth lies in run"),
        (["run/features.npy"], "the source run/features.npy lies in run"),
    ):
        refused(capsys, ["fit", *QUICK, *extra, "--out", "run", "--overwrite"], said, "give another --out")
    assert {p: p.read_bytes() for p in (folder / "run").rglob("*") if p.is_file()} == kept
    fit("photos", "--init-from", "run", "--overwrite", out="other")
    assert (folder / "other/model/config.json").exists()


def test_predict_does_not_replace_its_source_or_its_run(folder, capsys):
    fit("photos")
    capsys.readouterr()
    images = [p.read_bytes() for p in sorted((folder / "photos").rglob("*.png"))]
    pq.write_table(pa.table({"image": images}), "src.parquet")
    (folder / "link.parquet").symlink_to("src.parquet")
    (folder / "folder.parquet").mkdir()
    (folder / "file").write_text("")
    kept = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    for out, said in (
        ("src.parquet", "is the source"),
        ("link.parquet", "is the source"),
        ("run/assignments.parquet", "lies in the run run"),
        ("folder.parquet", "is a folder"),
        ("file/new.parquet", "file is a file"),
    ):
        refused(capsys, ["predict", "run", "src.parquet", "--out", out], said, "give --out")
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == kept


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, 3, 5])
def test_sigkill_of_a_real_process(tmp_path, monkeypatch, after):
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-m", "deepcluster", "fit"]
    options = ["digits", "--method", "simclr+sela", "--epochs", "3", "--quiet", "--out"]
    subprocess.run([*command, *options, "whole"], check=True, capture_output=True)
    process = subprocess.Popen([*command, *options, "run"], stdout=subprocess.DEVNULL)
    while not Path("run/metrics.jsonl").exists() or len(Path("run/metrics.jsonl").read_text().splitlines()) < after:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    subprocess.run([*command, "--resume", "run"], check=True, capture_output=True)
    same_results("run", "whole")


def test_warnings_of_libraries_are_shown_to_those_who_debug_only(folder, capsys, monkeypatch):
    real = plan.resolve

    def resolve(*args):
        warnings.warn("a library says", stacklevel=1)
        return real(*args)

    monkeypatch.setattr(plan, "resolve", resolve)
    assert fit("photos") == 0
    assert capsys.readouterr().err == ""
    with pytest.raises(UserWarning, match="a library says"):  # pytest's doing: here warnings are errors
        fit("photos", "--debug", out="other")


def test_no_bar_reaches_a_pipe(folder):
    command = [sys.executable, "-m", "deepcluster", "fit", "photos", "--out", "run", *QUICK[:-1]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    lines = [line for line in done.stderr.splitlines() if "collapsed" not in line]  # one epoch may end so
    assert [line.split()[0] for line in lines] == ["20", "plan:", "iic", "20"], done.stderr


def test_a_collapse_is_said_in_plain_words(tmp_path, monkeypatch, capsys):
    """Identical images can only be one cluster."""
    monkeypatch.chdir(tmp_path)
    np.save("same.npy", np.full((24, 8, 8), 90, np.uint8))
    options = ["--out", "run", "--epochs", "2", "--n-clusters", "2", "--method", "iic", "--precision", "fp32"]
    assert main(["fit", "same.npy", *options]) == 0
    assert "warning: collapsed: all 24 images are in one cluster" in capsys.readouterr().err
