"""The benchmarks: every name is known, every case has the agreed form, and the table says what was measured."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
bench, common, peers, table = map(
    importlib.import_module, ("bench", "benchmarks.common", "benchmarks.peers", "benchmarks.table")
)
NAMES = {"views", "store", "extract", "loop", "kmeans", "sinkhorn", "refresh", "memory", "scale", "peers"}
FORM = {"bench": str, "case": str, "peer": str, "ours": float, "theirs": float, "unit": str, "ratio": float, "n": int,
        "low": float, "high": float}  # fmt: skip


def small():
    """Every way a case is made, with next to no work."""
    yield common.rates("rates", "bare", 10, lambda: sum(range(20_000)), lambda: sum(range(20_000)), rounds=2)
    yield common.within("within", 2.0, 10.0, "s")
    yield peers.case("pairs", "s", [(1.0, 4.0), (2.0, 4.0)], more=False)


@pytest.fixture
def call(monkeypatch, capsys):
    """The command line in this process, with one bench more: ``small``."""
    monkeypatch.setitem(bench.BENCHES, "small", small)

    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["bench.py", *words])
        bench.main()
        return capsys.readouterr().out

    return run


def formed(case: dict) -> None:
    assert {name: type(value) for name, value in case.items()} == FORM
    assert case["low"] <= case["ratio"] <= case["high"]
    assert case["n"] >= 1


def test_all_names_are_known_and_explained():
    assert set(bench.BENCHES) >= NAMES
    for name in bench.BENCHES:
        assert re.search(rf"^{name} ", bench.__doc__, re.M), f"bench.py --help does not say what {name} is"


def test_every_case_is_one_json_object_of_the_agreed_form(call):
    cases = [json.loads(line) for line in call("small", "--json").splitlines()]
    assert [case["case"] for case in cases] == ["rates", "within", "pairs"]
    for case in cases:
        formed(case)
    assert cases[1]["ratio"] == 5
    assert (cases[2]["ours"], cases[2]["ratio"], cases[2]["low"], cases[2]["high"], cases[2]["n"]) == (1.5, 3, 2, 4, 2)


@pytest.mark.slow
def test_a_real_case_has_the_agreed_form(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    formed({"bench": "predict", **next(bench.BENCHES["predict"]())})


def test_more_is_better_for_rates_and_less_for_times():
    assert peers.case("x", "ACC", [(0.9, 0.6)], more=True)["ratio"] == pytest.approx(1.5)
    assert peers.case("x", "s", [(2.0, 6.0)], more=False)["ratio"] == pytest.approx(3)


def test_a_section_replaces_its_own_only(call, tmp_path):
    file = tmp_path / "benchmarks.md"
    file.write_text("# Old title\n\n## peers\n\nkept\n\n## gone\n\nno such bench\n\n## small\n\nold\n")
    call("small", "--table", str(file))
    found = table.sections(file.read_text())
    assert list(found) == ["peers", "small"]
    assert found["peers"] == "## peers\n\nkept\n"
    text = found["small"]
    assert f"`python scripts/bench.py small --table {file}`. Commit " in text
    assert f"torch {torch.__version__.partition('+')[0]}" in text
    assert "| within | 2 | limit | 10 | s | 5.00 | 5.00–5.00 | 1 |" in text
    assert "| pairs | 1.5 | clustpy | 4 | s | 3.00 | 2.00–4.00 | 2 |" in text
    before = file.read_text()
    call("small", "--table", str(file))
    assert before.count("\n") == file.read_text().count("\n")


def test_the_published_table_is_of_benches_that_exist():
    text = (ROOT / "docs/benchmarks.md").read_text()
    assert text.startswith(table.TITLE)
    found = table.sections(text)
    assert found
    assert list(found) == [name for name in bench.BENCHES if name in found]
    for section in found.values():
        assert re.search(r"`python scripts/bench.py .+`\. Commit [0-9a-f]{7,}", section)
        assert re.search(r", 20\d\d-\d\d-\d\d; .+ cores, load [\d.]+ at the start; Python 3.+ torch ", section)
        rows = [row.strip("| ").split(" | ") for row in section.splitlines() if row.startswith("| ")]
        assert rows[0] == list(table.COLUMNS)
        assert len(rows) > 1
        for row in rows[1:]:
            low, high = map(float, row[6].split("–"))
            assert low <= float(row[5]) <= high


def test_a_peer_that_is_not_installed_is_left_out_with_one_line(monkeypatch, capsys):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    assert list(peers.peers()) == []
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    for package, line in zip(("clustpy", "lightly"), lines, strict=True):
        assert package in line
        assert "pip install 'deepcluster[bench]'" in line


def test_the_peers_quickest_run_that_reaches_the_target_counts():
    ours = [(1.0, 0.3), (2.0, 0.91), (5.0, 0.89)]
    theirs = {"DEC": [(10.0, 0.5), (40.0, 0.92)], "DDC": [(8.0, 0.7), (30.0, 0.95)]}
    assert peers.compared(ours, theirs) == ((2.0, 30.0), (0.89, 0.95))
    theirs = {"DEC": [(10.0, 0.5), (40.0, 0.7)], "DDC": [(4.0, 0.8), (30.0, 0.75)]}  # none does: all of the nearest's
    assert peers.compared(ours, theirs) == ((2.0, 30.0), (0.91, 0.8))
    assert peers.compared([(5.0, 0.2), (6.0, 0.4)], theirs) == ((6.0, 30.0), (0.0, 0.8))


def test_a_short_run_goes_on_with_the_nearest_method_only(monkeypatch):
    acc = {("DEC", 0.1): 0.6, ("IDEC", 0.1): 0.7, ("DCN", 0.1): 0.5, ("DDC", 0.1): 0.6, ("IDEC", 0.3): 0.91}
    asked = []

    def run(method, share, *_):
        asked.append((method, share))
        return share, acc.get((method, share), 0.8)

    monkeypatch.setattr(peers, "theirs", run)
    peers.lengths(None, None, 0, None, full=False)
    assert asked == [*((method, 0.1) for method in peers.METHODS), ("IDEC", 1.0)]
    asked.clear()
    peers.lengths(None, None, 0, None, full=True)
    assert len(asked) == 11  # all but the longest of what was there before
    assert ("IDEC", 1.0) not in asked


def test_a_pace_leaves_out_the_first_step_and_stops(monkeypatch):
    moments, seen = iter([0.0, 100.0, 103.0, 109.0]), []
    monkeypatch.setattr(peers.time, "perf_counter", lambda: next(moments))

    def train(times):
        for batch in peers.counted(iter(range(50)), 2, common.CPU, times):
            seen.append(batch)

    assert peers.timed(train, 2) == 4.5  # from 100 to 109 in two steps
    assert seen == [0, 1, 2]


def test_our_curve_ends_with_the_clusters_and_includes_reading(monkeypatch):
    from sklearn.datasets import load_digits

    images, y = load_digits(return_X_y=True)
    first = (images[:200].reshape(-1, 8, 8) * 15).astype("uint8")
    settings = peers.Settings
    monkeypatch.setattr(peers, "Settings", lambda **given: settings(**given, epochs=2, params={"sub_heads": 1}))
    points = peers.curve("iic", first, y[:200], 0, common.CPU)
    assert len(points) == 3
    assert [seconds for seconds, _ in points] == sorted(seconds for seconds, _ in points)
    assert all(0 < acc <= 1 for _, acc in points)
