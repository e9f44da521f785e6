"""The comparison of methods: what is asked for is run once, nothing that fails is lost, and the figures are right."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))
baselines, compare, tables = map(importlib.import_module, ("baselines", "compare", "tables"))
DONE = {"exit": 0, "error": None, "wall_s": 9.0, "memory_mb": 700.0, "train_s": 5.0, "acc": 0.5, "nmi": 0.4, "ari": 0.3,
        "n_found": 10, "n_images": 1797, "shape": [1, 16, 16]}  # fmt: skip


def record(method: str, seed: int, **changed) -> dict:
    same = {"source": "digits", "first": None, "n_clusters": 10, "kind": "method", "options": [], **DONE,
            "commit": "abc1234", "torch": "2.15.0", "threads": 2, "jobs": 1}  # fmt: skip
    return {**same, "method": method, "seed": seed, **changed}


def failed(method: str, seed: int, error: str, code: int) -> dict:
    return {k: v for k, v in record(method, seed, exit=code, error=error).items() if k not in ("acc", "nmi", "ari")}


def script(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SCRIPTS / "compare.py"), *words], capture_output=True, text=True)


def write(file: Path, *records: dict) -> str:
    file.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(file)


def rows(text: str) -> list[list[str]]:
    """Cells of the Markdown rows below their headers."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith(("|---", "| method"))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_table_has_medians_means_ranges_and_every_failure(tmp_path):
    names = ("acc", "nmi", "ari", "train_s", "wall_s", "memory_mb")
    values = ((0.5, 0.1, 0.2, 1.0, 10.0, 500.0), (0.9, 0.2, 0.4, 3.0, 14.0, 900.4), (0.6, 0.6, 0.3, 2.0, 11.0, 700.0))
    worse = [record("iic", seed, **dict(zip(names, row, strict=True))) for seed, row in enumerate(values)]
    better = [record("sela", 0, acc=0.7), record("sela", 1, acc=0.8), failed("sela", 2, "too | slow", -9)]
    file = write(tmp_path / "a.jsonl", *worse, failed("clustpy:dec", 0, "not installed", 4), *better)
    assert rows(script("--table", file).stdout) == [
        ["sela", "2", "0.750", "0.750", "0.700–0.800", "0.400", "0.300", "5.0", "9.0", "700", "1: too / slow"],
        ["iic", "3", "0.600", "0.667", "0.500–0.900", "0.200", "0.300", "2.0", "11.0", "900", "0"],
        ["clustpy:dec", "0", "–", "–", "–", "–", "–", "–", "–", "700", "1: not installed"],
    ]


def test_one_table_a_source_and_the_last_word_on_a_run_counts(tmp_path):
    one = write(tmp_path / "a.jsonl", record("iic", 0, acc=0.1), record("iic", 0, options=["--set", "a=1"], acc=0.2))
    two = write(tmp_path / "b.jsonl", record("iic", 0, source="x", first=500, acc=0.3), record("iic", 0, acc=0.4))
    text = script("--table", one, two).stdout
    assert [line for line in text.splitlines() if line.startswith("###")] == [
        "### digits: 1,797 images, 1x16x16, 10 clusters asked for",
        "### x: first 500 rows, 1,797 images, 1x16x16, 10 clusters asked for",
    ]
    assert [row[:3] for row in rows(text)] == [
        ["iic", "1", "0.400"], ["iic --set a=1", "1", "0.200"], ["iic", "1", "0.300"]
    ]  # fmt: skip
    assert "abc1234, torch 2.15.0, 2 threads a run, 1 at once" in text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nowhere", "--seeds", "1", "--baselines", "kmaens"], ["'kmaens'", *baselines.NAMES]),
        (["nowhere", "--seeds", "1", "--", "--n-clusters", "5"], ["--n-clusters", "before any --"]),
        (["nowhere", "--seeds", "1", "--", "--image-size", "5"], ["--image-size"]),
        (["nowhere", "--seeds", "1", "--methods", "iic --seed 3"], ["--seed"]),
        ([], ["SOURCE"]),
        (["--table", "nowhere.jsonl"], ["nowhere.jsonl"]),
    ],
)
def test_wrong_words_are_one_line_and_exit_2(words, says):
    got = script(*words)
    assert got.returncode == 2
    assert got.stdout == ""
    assert len(got.stderr.splitlines()) == 1
    assert all(word in got.stderr for word in says)


@pytest.fixture
def started(monkeypatch):
    """Runs that are started, each of which ends well at once; ``call`` is the command line in this process."""
    runs = []

    def fit(task, source, env, limit):
        runs.append((task["method"], task["options"], task["seed"]))
        return dict(DONE)

    def call(*words: str) -> int:
        runs.clear()
        monkeypatch.setattr(sys, "argv", ["compare.py", *words])
        return compare.main()

    monkeypatch.setattr(compare, "fit", fit)
    monkeypatch.setattr(compare, "known", fit)
    return runs, call


def test_what_is_in_the_file_is_not_run_again(started, tmp_path):
    runs, call = started
    out = write(tmp_path / "a.jsonl", record("iic", 0, options=["--set", "x=1"]), record("iic", 1, n_clusters=9),
                failed("sela", 0, "broken", 1), failed("clustpy:dec", 0, baselines.MISSING, 4))  # fmt: skip
    words = ["digits", "--seeds", "2", "--methods", "iic --set x=1", "sela", "--baselines", "clustpy:dec", "--out", out]
    assert call(*words) == 0
    assert sorted(runs) == [("clustpy:dec", [], 0), ("clustpy:dec", [], 1), ("iic", ["--set", "x=1"], 1),
                            ("sela", [], 1)]  # fmt: skip
    assert len(tables.read([out])) == 7
    assert len(Path(out).read_text().splitlines()) == 8  # one more: clustpy, now installed
    call(*words)
    assert runs == []
    call(*words, "--again", "failed")
    assert runs == [("sela", [], 0)]
    call(*words, "--again")
    assert len(runs) == 6
    call(*words, "--", "--epochs", "1")
    assert ("iic", ["--set", "x=1", "--epochs", "1"], 0) in runs
    assert ("clustpy:dec", [], 0) not in runs  # what goes to fit is nothing to a baseline
    call(*words, "--image-size", "8")
    assert ("clustpy:dec", ["--image-size", "8"], 0) in runs


def test_a_line_cut_short_costs_one_run(started, tmp_path, capsys):
    runs, call = started
    out = write(tmp_path / "a.jsonl", record("iic", 0), record("iic", 1))
    Path(out).write_text(Path(out).read_text()[:-30])
    assert call("digits", "--seeds", "2", "--methods", "iic", "--out", out) == 0
    assert runs == [("iic", [], 1)]
    assert "line 2" in capsys.readouterr().err
    assert len(tables.read([out])) == 2


def test_first_rows_of_parquet(monkeypatch, tmp_path):
    pq.write_table(pa.table({"image": [b"a", b"b", b"c"], "label": [0, 1, 2]}), tmp_path / "x.parquet")
    seen = []

    def fit(task, source, env, limit):
        seen.append((task["source"], task["first"], pq.read_table(source)["label"].to_pylist()))
        assert Path(env["DEEPCLUSTER_CACHE"]).parent == Path(source).parent
        return dict(DONE)

    monkeypatch.setattr(compare, "fit", fit)
    monkeypatch.setattr(sys, "argv", ["compare.py", str(tmp_path / "x.parquet"), "--first", "2", "--seeds", "1"])
    assert compare.main() == 0
    assert seen == [(str(tmp_path / "x.parquet"), 2, [0, 1])]


def test_processors_are_shared_by_the_runs_at_once(monkeypatch):
    got = []
    monkeypatch.setattr(compare, "fit", lambda task, source, env, limit: got.append(env["OMP_NUM_THREADS"]) or DONE)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setattr(sys, "argv", ["compare.py", "digits", "--seeds", "3", "--jobs", "2"])
    assert compare.main() == 0
    assert got == ["3"] * 3


def test_a_run_that_fails_leaves_its_last_line():
    found, _ = compare.run([sys.executable, "-c", "import sys; sys.exit('one\\nlast')"], dict(os.environ), None)
    assert (found["exit"], found["error"]) == (1, "last")
    found, _ = compare.run([sys.executable, "-c", "import os; os.kill(os.getpid(), 11)"], dict(os.environ), None)
    assert (found["exit"], found["error"]) == (-11, "killed by signal 11")


def test_the_time_limit_ends_a_run_with_all_it_started(tmp_path):
    inner = f"import time; time.sleep(2); open({str(tmp_path / 'alive')!r}, 'w')"
    outer = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {inner!r}]); time.sleep(60)"
    began = time.perf_counter()
    found, _ = compare.run([sys.executable, "-c", outer], dict(os.environ), 1)
    assert time.perf_counter() - began < 10
    assert (found["exit"], found["error"]) == (-9, "took longer than the 1 s of --time-limit")
    time.sleep(2)
    assert not (tmp_path / "alive").exists()


def test_memory_is_that_of_the_run_itself():
    """In a small process: a child's peak begins at its parent's, and pytest with torch is big."""
    code = """if True:
        import os, sys, compare
        for child in ("x = bytearray(b'1') * (150 << 20)", "pass"):
            print(compare.run([sys.executable, "-c", child], dict(os.environ), None)[0]["memory_mb"])
    """
    got = subprocess.run([sys.executable, "-c", code], cwd=SCRIPTS, capture_output=True, text=True, check=True)
    big, small = map(float, got.stdout.split())
    assert 150 < big < 200
    assert small < 50


def test_noise_is_no_cluster_and_wrong():
    true = np.repeat([0, 1, 2], 10)
    found = baselines.result(np.repeat([0, 1, -1], 10), true, 3)  # the noise is a whole class, and gets nothing for it
    assert (found["acc"], found["n_found"], found["noise"]) == (0.666667, 2, 0.3333)


def test_hdbscan_leaves_scattered_points_and_small_clumps_out():
    rng = np.random.default_rng(0)
    blobs = [rng.normal(centre, 0.05, (100, 2)) for centre in ((0, 0), (5, 5))]
    clump = rng.normal(20, 0.05, (25, 2))  # dense, but less than a quarter of an equal share
    z = np.concatenate([*blobs, clump, rng.uniform(-40, 40, (40, 2))]).astype(np.float32)
    labels = baselines.hdbscan(z, 2)
    assert len(set(labels[:100])) == len(set(labels[100:200])) == 1
    assert labels[0] != labels[100]
    assert min(labels[:200]) >= 0
    assert (labels[200:] == -1).mean() > 0.9


def test_standardised_is_a_channel():
    x = np.random.default_rng(0).random((20, 3, 4, 4), np.float32) * np.array([1, 2, 3], np.float32)[:, None, None]
    z = baselines.standardised(x)
    np.testing.assert_allclose(z.mean((0, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(z.std((0, 2, 3)), 1, atol=1e-4)


@pytest.mark.slow
def test_a_method_and_a_baseline_see_the_same_images(tmp_path):
    out = tmp_path / "deep/a.jsonl"
    got = script("digits", "--seeds", "1", "--methods", "iic --set sub_heads=1", "--baselines", "kmeans", "--out",
                 str(out), "--image-size", "8", "--", "--epochs", "1", "--precision", "fp32")  # fmt: skip
    found = {r["kind"]: r for r in tables.read([str(out)])}
    assert got.returncode == 0, got.stderr
    assert [r["error"] for r in found.values()] == [None, None]
    assert all(r["n_images"] == 1797 and r["shape"] == [1, 8, 8] for r in found.values())
    assert all(0 < r["train_s"] < r["wall_s"] and r["memory_mb"] > 100 for r in found.values())
    assert found["baseline"]["acc"] == pytest.approx(0.79, abs=0.03)  # k-means on digits, as everybody has it
    options = "--image-size 8 --set sub_heads=1 --epochs 1 --precision fp32"
    assert found["method"]["options"] == options.split()
    assert found["method"]["n_found"] <= 10
    assert len(rows(got.stdout)) == 2


def test_every_feature_of_vectors_counts_alike():
    x = np.random.default_rng(0).normal(size=(200, 2)) * [1.0, 1000.0]
    np.testing.assert_allclose(baselines.standardised(x).std(0), [1, 1], atol=1e-6)
