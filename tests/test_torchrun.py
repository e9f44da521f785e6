"""Several processes by torchrun, as a user starts them: the same clusters, one writer, and nothing lost with a process.

Sums over two processes are rounded differently (see docs/determinism.md), so losses agree to some digits and labels but
for images that lie between two clusters; two runs with the same number of processes are the same bit for bit.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

pytestmark = [pytest.mark.slow, pytest.mark.ddp]
PLAN = ["--method", "simclr+iic", "--epochs", "4", "--batch-size", "62", "--n-clusters", "6", "--quiet"]
PLAN += ["--device", "cpu", "--precision", "fp32", "--image-size", "8", "--lr", "0.002"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torchrun")
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(6), (110, 90, 70, 55, 45, 30))
    images = rng.integers(0, 200, (6, 8, 8))[group] + rng.integers(0, 56, (400, 8, 8))
    np.save(folder / "images.npy", images[rng.permutation(400)].astype(np.uint8))
    return folder


def command(n, *args, restarts=0):
    alone = [sys.executable, "-m", "deepcluster", "fit", *args]
    many = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}", f"--max-restarts={restarts}"]
    return alone if n == 1 else [sys.executable, *many, "-m", "deepcluster", "fit", *args]


def started(place, n, *args, restarts=0):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD_SIZE", "TORCHELASTIC"))}
    env |= {"OMP_NUM_THREADS": "1", "DEEPCLUSTER_CACHE": str(place / "cache")}
    return subprocess.Popen(command(n, *args, restarts=restarts), cwd=place, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def run(place, n, *args):
    process = started(place, n, *args)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out, err


@pytest.fixture(scope="module")
def runs(place):
    """The same run by one and by two processes; the second twice."""
    said = {}
    for name, n in (("one", 1), ("two", 2), ("two-again", 2)):
        said[name] = run(place, n, "images.npy", "--out", name, *PLAN)
    return said


def labels(run: Path):
    return pq.read_table(run / "assignments.parquet")["cluster"].to_numpy()


def rows(run: Path):
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in found]


def same_bits(a: Path, b: Path):
    one, other = (load_file(run / "model/model.safetensors") for run in (a, b))
    assert all(np.array_equal(one[k], other[k]) for k in one)
    assert (a / "assignments.parquet").read_bytes() == (b / "assignments.parquet").read_bytes()
    assert (a / "features.npy").read_bytes() == (b / "features.npy").read_bytes()
    assert rows(a) == rows(b)


def alike(a: Path, b: Path):
    """Up to rounding: 99 of 100 labels, and the losses to a per mille."""
    assert (labels(a) == labels(b)).mean() >= 0.99
    for mine, other in zip(rows(a), rows(b), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-3, abs=1e-3)


def test_two_processes_give_the_labels_of_one(place, runs):
    alike(place / "one", place / "two")


def test_two_processes_twice_are_the_same_bit_for_bit(place, runs):
    same_bits(place / "two", place / "two-again")


def test_only_the_first_process_speaks_and_writes(place, runs):
    out, _ = runs["two"]
    assert out.count("to look at: two/report.html") == 1
    assert {p.name for p in (place / "one").rglob("*")} == {p.name for p in (place / "two").rglob("*")}
    assert len(rows(place / "two")) == 8


def steps_done(run: Path):
    file = run / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def wait_for(process, ready, seconds=120):
    for _ in range(int(seconds / 0.02)):
        if ready():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise AssertionError("it takes too long")


def workers(process):
    """Process ids of the ranks of a torchrun."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False).stdout
    return [int(pid) for pid in found.split()]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_is_started_again_and_the_result_is_the_same(place, runs, victim):
    out = f"killed-{victim}"
    process = started(place, 2, "images.npy", "--out", out, *PLAN, "--checkpoint-every", "0.1s", restarts=1)
    wait_for(process, lambda: steps_done(place / out) >= 2)
    os.kill(sorted(workers(process))[victim], signal.SIGKILL)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    same_bits(place / "two", place / out)


def test_a_rank_that_is_killed_at_once_is_started_again(place, runs):
    process = started(place, 2, "images.npy", "--out", "early", *PLAN, restarts=1)
    wait_for(process, lambda: len(workers(process)) == 2)
    time.sleep(1)
    os.kill(workers(process)[0], signal.SIGKILL)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    same_bits(place / "two", place / "early")


@pytest.mark.parametrize("other", [["--seed", "5"], []])
def test_a_restart_never_takes_over_a_run_of_another_launch(place, runs, other, monkeypatch):
    """Whatever its plan is: a restarted command is refused as a first one would be."""
    before = (place / "one/config.json").read_bytes()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    env = os.environ | {"OMP_NUM_THREADS": "1", "DEEPCLUSTER_CACHE": str(place / "cache")}
    args = [*command(1, "images.npy", "--out", "one", *PLAN), *other]
    done = subprocess.run(args, cwd=place, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "one is not empty; give another --out" in done.stderr
    assert (place / "one/config.json").read_bytes() == before


def test_who_is_left_does_not_take_the_blame(place, runs):
    process = started(place, 2, "images.npy", "--out", "left", *PLAN)
    wait_for(process, lambda: steps_done(place / "left") >= 2)
    os.kill(workers(process)[0], signal.SIGKILL)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "internal error" not in err


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(place, runs, first, then):
    out = f"from-{first}-to-{then}"
    process = started(place, first, "images.npy", "--out", out, *PLAN, "--checkpoint-every", "0.1s")
    wait_for(process, lambda: steps_done(place / out) >= 4)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert not (place / out / "assignments.parquet").exists()
    run(place, then, "--resume", out)
    alike(place / "one", place / out)
