"""The notebooks run, are what their sources say, and their pages show what they show."""

import ast
import importlib
import io
import json
import re
import sys
import tempfile
from pathlib import Path

import pytest
from PIL import Image
from tiny import noise

from deepcluster import METHODS, DeepCluster

for package in ("nbformat", "nbclient", "nbconvert", "ipykernel", "matplotlib"):
    pytest.importorskip(package)
from nbclient.exceptions import CellExecutionError  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
notebooks = importlib.import_module("notebooks")
PAGES = notebooks.PAGES
every = pytest.mark.parametrize("name", notebooks.NAMES)


def code(name: str) -> list[str]:
    return [cell.source for cell in notebooks.notebook(name).cells if cell.cell_type == "code"]


def test_every_source_is_a_notebook():
    assert {path.stem for path in notebooks.SOURCES.glob("*.py")} == set(notebooks.NAMES)
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == set(notebooks.NAMES)


@every
def test_the_notebook_is_that_of_its_source_and_has_no_outputs(name):
    path = ROOT / "notebooks" / f"{name}.ipynb"
    assert path.read_text(encoding="utf-8") == notebooks.written(name), "run python scripts/notebooks.py"
    book = json.loads(path.read_text(encoding="utf-8"))
    assert len({cell["id"] for cell in book["cells"]}) == len(book["cells"])
    for cell in book["cells"]:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None
    assert book["cells"][0]["source"][0].startswith("# "), "no title"


def test_cells_are_split_where_the_source_says(tmp_path, monkeypatch):
    monkeypatch.setattr(notebooks, "SOURCES", tmp_path)
    (tmp_path / "a.py").write_text(
        '"""Doc."""\n\n# %% [markdown]\n# # T\n#\n# b  # c\n\n# %%\nx = 1  # %%\n\n# %%\n# d\n'
    )
    cells = notebooks.notebook("a").cells
    assert [(cell.cell_type, cell.source) for cell in cells] == [
        ("markdown", "# T\n\nb  # c"), ("code", "x = 1  # %%"), ("code", "# d")
    ]  # fmt: skip


@pytest.fixture(scope="module")
def model() -> DeepCluster:
    return DeepCluster(2, method="uic", epochs=1, batch_size=8, image_size=8).fit(noise(16, 1, 8)[:, 0].numpy())


@every
def test_the_source_uses_what_there_is_and_is_public(name, model):
    tree = ast.parse(notebooks.source(name))
    ours = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "deepcluster":
            for alias in node.names:
                found = getattr(importlib.import_module(node.module), alias.name, None)
                ours[alias.name] = found or importlib.import_module(f"{node.module}.{alias.name}")
    assert "DeepCluster" in ours
    ours["model"] = model
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            assert not node.attr.startswith("_"), ast.unparse(node)
            if isinstance(node.value, ast.Name) and node.value.id in ours:
                assert hasattr(ours[node.value.id], node.attr), ast.unparse(node)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "DeepCluster":
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            DeepCluster().set_params(**dict.fromkeys(given))
            if isinstance(given["method"], ast.Constant):
                assert given["method"].value in METHODS


def shown(name: str) -> str:
    return (PAGES / f"{name}.md").read_text(encoding="utf-8")


@every
def test_the_page_shows_the_pictures_and_is_that_of_its_source(name):
    page = shown(name)
    pictures = re.findall(r"!\[(.*?)\]\((.*?)\)", page)
    assert len(pictures) >= 3
    assert all(len(text) > 20 for text, _ in pictures), "describe the picture in the first comment of its cell"
    assert len({text for text, _ in pictures}) == len(pictures)
    there = {f"{name}_files/{path.name}" for path in (PAGES / f"{name}_files").iterdir()}
    assert there == {path for _, path in pictures}
    for path in there:
        with Image.open(PAGES / path) as picture:
            assert (picture.format, picture.mode) == ("PNG", "P")
            assert 300 < picture.width < 1000
    for text in code(name):
        assert re.sub(r"\n{3,}", "\n\n", text) in page, "run make notebooks"
    for word in ("Warning", "Traceback", "\x1b", tempfile.gettempdir(), str(ROOT)):
        assert word not in re.sub("```python.*?```", "", page, flags=re.S)


def test_the_pages_are_listed_and_small():
    assert (PAGES / "README.md").read_text(encoding="utf-8") == notebooks.contents()
    assert set(re.findall(r"\((\w+)\.md\)", notebooks.contents())) == set(notebooks.NAMES)
    assert {path.name for path in PAGES.iterdir()} == {
        "README.md", *(f"{name}.md" for name in notebooks.NAMES), *(f"{name}_files" for name in notebooks.NAMES)
    }  # fmt: skip
    assert sum(path.stat().st_size for path in PAGES.rglob("*.png")) < 2e6


def test_small_pictures_look_the_same():
    plain = Image.new("RGB", (40, 30), "white")
    for i in range(40):
        plain.putpixel((i, 10), (6 * i, 20, 255 - 6 * i))
    file = io.BytesIO()
    plain.save(file, "PNG")
    again = Image.open(io.BytesIO(notebooks.small(file.getvalue())))
    assert again.mode == "P"
    assert again.convert("RGB").tobytes() == plain.tobytes()


@pytest.fixture
def source_of(tmp_path, monkeypatch):
    """Makes a notebook "a" of one cell."""
    monkeypatch.setattr(notebooks, "SOURCES", tmp_path)
    monkeypatch.setattr(notebooks, "PAGES", tmp_path / "pages")
    return lambda text: (tmp_path / "a.py").write_text(f'"""Doc."""\n\n# %% [markdown]\n# # T\n\n# %%\n{text}\n')


@pytest.mark.slow
@pytest.mark.notebook
@pytest.mark.parametrize(
    "text", ["import sys\nprint('old', file=sys.stderr)", "import tempfile\nprint(tempfile.mkdtemp())", "1 / 0"]
)
def test_a_cell_that_fails_warns_or_shows_a_path_is_refused(text, source_of):
    source_of(text)
    with pytest.raises((ValueError, CellExecutionError), match=r"should not say|ZeroDivisionError"):
        notebooks.executed("a")


@pytest.mark.slow
@pytest.mark.notebook
def test_a_page_is_made_anew(source_of):
    old = notebooks.PAGES / "a_files" / "old.png"
    old.parent.mkdir(parents=True)
    old.touch()
    source_of("# A line\nimport matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()\nprint(6 * 7)")
    notebooks.render("a")
    assert "![A line](a_files/a_1_0.png)\n\n    42\n" in (notebooks.PAGES / "a.md").read_text()
    assert [path.name for path in old.parent.iterdir()] == ["a_1_0.png"]
    with Image.open(old.with_name("a_1_0.png")) as picture:
        assert picture.mode == "P"


@pytest.mark.slow
@pytest.mark.notebook
@every
def test_the_notebook_runs(name):
    book = notebooks.executed(name)
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == shown(name).count("![")
