"""``deepcluster fit`` that is stopped or killed, and ``fit --resume``: in process, and in processes that are killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_cli import RESULTS, rows
from test_methods import Crash, assert_same
from test_resume import at_step

from deepcluster import checkpoint, outputs
from deepcluster.__main__ import main


def crash():
    raise Crash


QUICK = ["--n-clusters", "2", "--image-size", "8", "--batch-size", "8", "--precision", "fp32", "--quiet", "--method"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """40 grey images of 8 px; the runs are beside them, and so is what they decode."""
    where = tmp_path_factory.mktemp("home")
    (where / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(40):
        image = (rng.integers(0, 100, (8, 8)) + 150 * (i % 2)).astype(np.uint8)
        Image.fromarray(image).save(where / f"photos/{i:02d}.png")
    (where / "photos/broken.png").write_bytes(b"no image")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(where)
        patch.setenv("DEEPCLUSTER_CACHE", str(where / "cache"))
        yield where


@pytest.fixture(autouse=True)
def _there(request, monkeypatch):
    if "home" in request.fixturenames:
        where = request.getfixturevalue("home")
        monkeypatch.setenv("DEEPCLUSTER_CACHE", str(where / "cache"))


WHOLE: dict[tuple[str, ...], str] = {}


def whole(*options):
    """A run with these options that nothing happened to."""
    if options not in WHOLE:
        WHOLE[options] = f"whole{len(WHOLE)}"
        assert main(["fit", "photos", *QUICK, *options, "--out", WHOLE[options]]) == 0
    return WHOLE[options]


def same_runs(one, other):
    assert rows(one) == rows(other)
    for name in (*RESULTS, "skipped.csv"):
        assert (Path(one) / name).read_bytes() == (Path(other) / name).read_bytes(), name
    a, b = (checkpoint.read(Path(run) / "checkpoints/last.pt") for run in (one, other))
    assert_same(a["network"], b["network"])
    assert [a[key] for key in ("stage", "epoch", "step")] == [b[key] for key in ("stage", "epoch", "step")]
    assert not list(Path(other).rglob("*.tmp"))


def go_on(run):
    assert main(["fit", "--resume", str(run), "--quiet"]) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_command_says_how_to_go_on(home, tmp_path, monkeypatch, capsys, number):
    options, run = ("iic+sela", "--epochs", "2"), tmp_path / "run"
    expected = whole(*options)
    with monkeypatch.context() as patch:
        at_step(patch, 12, lambda: os.kill(os.getpid(), number))
        assert main(["fit", "photos", *QUICK, *options, "--out", str(run)]) == 130
    assert capsys.readouterr().err == f"deepcluster: interrupted; go on with: deepcluster fit --resume {run}\n"
    saved = checkpoint.read(run / "checkpoints/last.pt")
    assert (saved["stage"], saved["epoch"], saved["step"]) == (1, 0, 3)
    go_on(run)
    same_runs(expected, run)


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(home, tmp_path, monkeypatch, capsys):
    resource = pytest.importorskip("resource")
    options, run = ("iic", "--epochs", "2", "--checkpoint-every", "0.000001"), tmp_path / "run"
    expected, (soft, hard) = whole(*options), resource.getrlimit(resource.RLIMIT_FSIZE)
    full = 100_000  # bytes a file may have, less than a checkpoint
    assert Path(expected, "checkpoints/last.pt").stat().st_size > full
    try:
        with monkeypatch.context() as patch:
            at_step(patch, 7, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (full, hard)))
            assert main(["fit", "photos", *QUICK, *options, "--out", str(run)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().err
    assert said.startswith(f"deepcluster: error: cannot write {run}/checkpoints/last.pt: ")
    assert "free some space and go on with" in said
    assert "--resume" in said
    assert said.count("\n") == 1
    saved = checkpoint.read(run / "checkpoints/last.pt")
    assert (saved["epoch"], saved["step"]) == (1, 2)
    go_on(run)
    same_runs(expected, run)


def test_a_run_directory_is_refused_while_another_process_has_it(home, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["fit", "photos", *QUICK, "iic", "--epochs", "1", "--out", str(run)]) == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with outputs.locked(run):
        for more in (["--resume", str(run)], ["photos", *QUICK, "iic", "--overwrite", "--out", str(run)]):
            capsys.readouterr()
            assert main(["fit", *more]) == 2
            assert f"another process is at work in {run}; wait for it" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    go_on(run)


@pytest.mark.parametrize("name", ["write_skipped", "prepare"])
def test_a_run_that_was_killed_while_it_began_is_begun_by_the_same_command(home, tmp_path, monkeypatch, name):
    """config.json comes last: with it a run can be gone on with, without it nothing is there yet."""
    options, run = ("iic", "--epochs", "1"), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(outputs, name, lambda *_: crash())
        assert main(["fit", "photos", *QUICK, *options, "--out", str(run)]) == 1
    assert main(["fit", "--resume", str(run)]) == 2
    assert main(["fit", "photos", *QUICK, *options, "--out", str(run)]) == 0
    same_runs(whole(*options), run)


def test_a_run_whose_removal_was_cut_short_can_still_be_overwritten(tmp_path, monkeypatch):
    unlink = Path.unlink
    for removed in range(2 * len(outputs.FILES)):
        for name in outputs.FILES:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        left = iter(range(removed))

        def cut(self, missing_ok=False, left=left):
            if next(left, None) is None:
                raise Crash
            unlink(self, missing_ok)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", cut)
            with pytest.raises(Crash):
                outputs.prepare(tmp_path)
        outputs.check(tmp_path, overwrite=True)


def test_what_is_changed_on_going_on_stays_so(home, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["fit", "photos", *QUICK, "sela", "--epochs", "1", "--out", str(run)]) == 0
    assert main(["fit", "--resume", str(run), "--on-collapse", "rescue", "--checkpoint-every", "7m", "--quiet"]) == 0
    plan = json.loads((run / "config.json").read_text())["plan"]
    assert (plan["on_collapse"], plan["checkpoint_every"]) == ("rescue", "7m")
    assert main(["fit", "--resume", str(run), "--on-collapse", "perhaps"]) == 2
    assert "on_collapse must be warn, stop or rescue" in capsys.readouterr().err


def test_no_locks_is_said(home, tmp_path, monkeypatch, caplog):
    def refused(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(outputs.fcntl, "flock", refused)
    with outputs.locked(tmp_path / "run"):
        pass
    assert "no locks here (No locks available)" in caplog.text


# --- real processes ---


def command(*options):
    """A process of its own that runs ``deepcluster fit``."""
    words = [sys.executable, "-m", "deepcluster", "fit", *options]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def when(process, run, stage):
    """Wait until a run has saved itself in the middle of an epoch of this stage."""
    last = Path(run) / "checkpoints/last.pt"
    while True:
        assert process.poll() is None, process.communicate()
        saved = checkpoint.read(last) if last.exists() else {"stage": -1}
        if saved["stage"] == stage and saved["step"]:
            return
        time.sleep(0.005)


LONG = ("simclr+scan+selflabel", "--epochs", "10", "--checkpoint-every", "0.001s")  # after each step


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_sigkill_in_every_stage_of_a_plan(home, tmp_path, stage):
    expected, run = whole(*LONG), tmp_path / "run"
    with command("photos", *QUICK, *LONG, "--out", str(run)) as process:
        when(process, run, stage)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    go_on(run)
    same_runs(expected, run)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_to_a_real_process(home, tmp_path, number):
    expected, run = whole(*LONG), tmp_path / "run"
    with command("photos", *QUICK, *LONG, "--out", str(run)) as process:
        when(process, run, 1)
        process.send_signal(number)
        said = process.communicate()[1]
    assert process.returncode == 130
    assert said.splitlines()[-1] == f"deepcluster: interrupted; go on with: deepcluster fit --resume {run}"
    checkpoint.read(run / "checkpoints/last.pt")
    go_on(run)
    same_runs(expected, run)


@pytest.mark.slow
def test_two_processes_on_one_run_directory(home, tmp_path, capsys):
    expected, run = whole(*LONG), tmp_path / "run"
    with command("photos", *QUICK, *LONG, "--out", str(run)) as process:
        when(process, run, 0)
        assert main(["fit", "--resume", str(run)]) == 2
        assert main(["fit", "photos", *QUICK, *LONG, "--out", str(run), "--overwrite"]) == 2
        assert process.poll() is None
    assert capsys.readouterr().err.count("another process is at work") == 2
    assert process.returncode == 0
    same_runs(expected, run)
