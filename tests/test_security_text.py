"""Attacks by names, of files, clusters and sources, in what is written and printed.

Tested elsewhere: scripts in names on the report page (test_report.py and, in a browser, test_report_browser.py), names
of exported files (test_export_folders.py).
"""

import csv
import logging
import re
from pathlib import Path

import pytest
from attack import png
from finished import edit, finished

from deepcluster import outputs
from deepcluster.__main__ import main
from deepcluster.edits import Name
from deepcluster.export import export
from deepcluster.log import Recording
from deepcluster.report.words import data, text
from deepcluster.terminal import visible

FORMULAS = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "＝1", "=cmd|' /C calc'!A0", '=HYPERLINK("x")']
QUOTED = ["'", "''", "'=1", "''=1", "'a", "a'=1", "a=1", "", "a;=1", "a,=1", 'a"=1', "a\n=1", "a\0b", "\u2028=1"]
ESCAPES = "\x1b]0;owned\x07\x1b[2J\x1b[31m\x9b1m\u202e"
FORGED = "a.png\n2026-01-01 00:00:00,000 all is well\r\x1b[1A\u2028b.png"
STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e]")

# --- spreadsheets ---


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])  # as a spreadsheet may take it, by its country
def test_no_cell_of_the_skipped_images_is_a_formula(tmp_path, delimiter):
    outputs.write_skipped(tmp_path / "skipped.csv", [(name, "no image") for name in FORMULAS + QUOTED])
    with (tmp_path / "skipped.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file, delimiter=delimiter))[1:]
    cells = [one for row in rows for one in row]
    assert len(cells) >= len(rows) == len(FORMULAS + QUOTED)
    assert not [one for one in cells if one.startswith(tuple("=+-@\t\r\n＝＋－＠"))]


def test_skipped_images_are_read_as_they_were(tmp_path):
    before = [(name, reason) for name, reason in zip(FORMULAS + QUOTED, reversed(FORMULAS + QUOTED), strict=True)]
    outputs.write_skipped(tmp_path / "skipped.csv", before)
    assert outputs.read_skipped(tmp_path) == before


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for i, name in enumerate(("=1+1", "@x", "-2", "+3", "\x1b[2J", "a\tb", "a\n=1", "'=1", "plain")):
        Path(f"photos/{name}.png").write_bytes(png(i))
    monkeypatch.chdir(tmp_path / "photos")
    made = finished(tmp_path / "run", "*.png")
    (made / "metrics.jsonl").touch()
    return made


def test_no_cell_of_the_projector_is_a_formula(run, tmp_path):
    edit(run, *(Name(c, name) for c, name in enumerate(["=cmd|'/C calc'!A0", "@x\ty", "\r-1\n=2"])))
    export(run, "projector", tmp_path / "out")
    lines = (tmp_path / "out/metadata.tsv").read_text(encoding="utf-8").split("\n")
    assert len(lines) == 1 + 9 + 1
    assert {line.count("\t") for line in lines[:-1]} == {6}
    cells = [cell for line in lines[1:-1] for cell in line.split("\t")]
    assert "'=1+1.png" in cells
    assert not [c for c in cells if c.startswith(tuple("=+-@\r＝")) and not re.fullmatch(r"-?\d+(\.\d+)?", c)]


# --- logs and terminals ---


def test_every_letter_that_steers_is_written_out():
    for code in [
        *range(0x20),
        *range(0x7F, 0xA0),
        0x2028,
        0x2029,
        *range(0x202A, 0x202F),
        *range(0x2066, 0x206A),
        0xDCFF,
    ]:
        shown = visible(f"a{chr(code)}b")
        assert shown.isprintable()
        assert shown != f"a{chr(code)}b"
    assert visible("Grüße, 東京 🦄.png") == "Grüße, 東京 🦄.png"


def test_a_name_forges_no_line_of_a_log(tmp_path):
    logger = logging.getLogger("deepcluster")
    with Recording() as record:
        logger.warning("before: %s", FORGED)
        record.into(tmp_path / "train.log")
        logger.warning("%s", ESCAPES)
    written = (tmp_path / "train.log").read_bytes().decode()
    assert len(written.splitlines()) == 2
    assert not STEERING.search(written)
    assert "all is well" in written  # to be read, not to be believed


def damaged(folder):
    folder.mkdir()
    for i in range(8):
        (folder / f"{i}.png").write_bytes(png(i))
    for name in (FORGED, f"{ESCAPES}.png"):
        (folder / name).write_bytes(b"no image")


def printed(capfd, code, *argv):
    assert main(list(argv)) == code
    shown = capfd.readouterr()
    assert not STEERING.search(shown.out + shown.err)
    assert not re.search(r"^2026-01-01", shown.out + shown.err, re.M)
    return shown.out + shown.err


def test_nothing_that_is_printed_steers_the_terminal(run, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    damaged(tmp_path / "new")
    assert r"\x1b" in printed(capfd, 0, "predict", "run", "new", "--out", "p.parquet")
    Path(f"new/{ESCAPES}.png").unlink()
    assert r"a.png\n2026" in printed(capfd, 0, "predict", "run", "new", "--out", "p.parquet")
    for name in (f"{ESCAPES}.npy", f"{ESCAPES}.csv", f"{ESCAPES}.txt", f"{ESCAPES}.parquet", f"{ESCAPES}.tar"):
        Path(name).write_bytes(b"path,label\n" + ESCAPES.encode())
        assert r"\x1b" in printed(capfd, 2, "predict", "run", name, "--out", "p.parquet")
    Path("labels.csv").write_text(f"path,label\n{ESCAPES}{FORGED!r},1\n", encoding="utf-8")
    assert r"\x1b" in printed(capfd, 2, "evaluate", "run", "new", "--labels", "labels.csv")
    Path("new/0.png").rename(f"new/{ESCAPES}0.png")
    Path("photos").rename(ESCAPES)  # its source is gone, which a warning says
    printed(capfd, 0, "report", "run")


def test_a_run_keeps_its_log_and_its_table_in_order(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    damaged(tmp_path / ESCAPES)
    options = ["--n-clusters", "2", "--method", "iic", "--epochs", "1", "--image-size", "8", "--batch-size", "4"]
    Path(f"{ESCAPES}.csv").write_text("path,label\n0.png,1\n1.png,2\n", encoding="utf-8")
    printed(capfd, 0, "fit", ESCAPES, "--out", "run", "--labels", f"{ESCAPES}.csv", *options)
    assert r"have no label in \x1b" in Path("run/train.log").read_text()
    assert not STEERING.search(Path("run/train.log").read_text())
    assert {name for name, _ in outputs.read_skipped(Path("run"))} == {
        f"{ESCAPES}/{FORGED}",
        f"{ESCAPES}/{ESCAPES}.png",
    }


# --- the page ---


@pytest.mark.parametrize("bad", ["</script>", "<!--", "\u2028", "'\"", "&lt;", "\udcff", "\0", "]]>"])
def test_words_of_the_page_hold_no_letter_that_ends_anything(bad):
    assert not re.search(r"[<>\"']", text(bad).replace("&#x27;", "").replace("&quot;", ""))
    assert data({bad: bad}).isascii()
    assert not re.search(r"[<>&\0]", data({bad: [bad]}))
