"""Make notebooks/NAME.ipynb, without outputs, of notebooks/src/NAME.py; with --render also the pages in docs/notebooks.

A source is plain Python in the percent format: `# %% [markdown]` or `# %%` begins a cell.

    python scripts/notebooks.py                            # all .ipynb
    python scripts/notebooks.py --render first_clusters    # execute one, and write its page and pictures
"""

import argparse
import ast
import io
import os
import re
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "notebooks" / "src"
PAGES = ROOT / "docs" / "notebooks"
NAMES = ("first_clusters", "choosing_k", "river_of_labels", "export_search_probe", "compare_methods")  # as to be read
COLOURS = 256  # of a picture's palette


def source(name: str) -> str:
    """What notebooks/src/NAME.py holds: a docstring, then cells."""
    return (SOURCES / f"{name}.py").read_text(encoding="utf-8")


def notebook(name: str) -> nbformat.NotebookNode:
    """The cells of a source; the same source gives the same notebook."""
    parts = re.split(r"^# %%( \[markdown\])?\n", source(name), flags=re.M)
    cells = []
    for number, (prose, text) in enumerate(zip(parts[1::2], parts[2::2], strict=True)):
        cell = nbformat.v4.new_markdown_cell if prose else nbformat.v4.new_code_cell
        text = re.sub(r"^# ?", "", text, flags=re.M) if prose else text
        cells.append(cell(text.strip(), id=f"{name}-{number}"))
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})


def written(name: str) -> str:
    """What notebooks/NAME.ipynb holds."""
    return nbformat.writes(notebook(name)) + "\n"


def executed(name: str) -> nbformat.NotebookNode:
    """The notebook with its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
        ValueError: a cell warned, or showed a path of this machine.
    """
    client = NotebookClient(notebook(name), timeout=600, kernel_name="python3", coalesce_streams=True,
                            extra_arguments=["--log-level=40"])  # fmt: skip
    book = client.execute(env={**os.environ, "OMP_NUM_THREADS": "1"})  # sums over more threads differ by machine
    for output in (output for cell in book.cells for output in cell.get("outputs", [])):
        said = str(output.get("text", "")) + str({k: v for k, v in output.get("data", {}).items() if "text" in k})
        if output.get("name") == "stderr" or any(path in said for path in (tempfile.gettempdir(), str(ROOT))):
            raise ValueError(f"{name} should not say: {said}")
    return book


def small(picture: bytes) -> bytes:
    """The same PNG with a palette."""
    file = io.BytesIO()
    Image.open(io.BytesIO(picture)).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(
        file, "PNG", optimize=True
    )
    return file.getvalue()


def render(name: str) -> None:
    """Write docs/notebooks/NAME.md and its pictures; a picture is described by the first comment of its cell."""
    book, folder = executed(name), PAGES / f"{name}_files"
    page, found = MarkdownExporter().from_notebook_node(
        book, resources={"unique_key": name, "output_files_dir": folder.name}
    )
    said = [re.search("^# (.+)", cell.source, re.M) for cell in book.cells for output in cell.get("outputs", [])
            if "image/png" in output.get("data", {})]  # fmt: skip
    texts = iter(comment[1] if comment else "a picture" for comment in said)
    page = re.sub(r"!\[png\]", lambda _: f"![{next(texts)}]", page)
    page = re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+$", "", page, flags=re.M)).strip()
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for path, picture in found["outputs"].items():
        (PAGES / path).write_bytes(small(picture))
    origin = f"Made from [{name}.ipynb](../../notebooks/{name}.ipynb) by `make notebooks`.\n"
    (PAGES / f"{name}.md").write_text(f"{page}\n\n---\n{origin}", encoding="utf-8")


def contents() -> str:
    """The page that lists the others."""
    lines = [f"- [{notebook(name).cells[0].source.splitlines()[0].strip('# ')}]({name}.md): "
             f"{ast.get_docstring(ast.parse(source(name)))}" for name in NAMES]  # fmt: skip
    return "\n".join(["# Notebooks\n", *lines]) + "\n"


def main() -> None:
    """Write what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default all: {', '.join(NAMES)}")
    parser.add_argument("--render", action="store_true", help="also execute them, and write their pages")
    args = parser.parse_args()
    if unknown := set(args.names) - set(NAMES):
        parser.error(f"no notebook {', '.join(sorted(unknown))}; choose from {', '.join(NAMES)}")
    for name in args.names or NAMES:
        (ROOT / "notebooks" / f"{name}.ipynb").write_text(written(name), encoding="utf-8")
        if args.render:
            render(name)
            print(f"{PAGES.relative_to(ROOT) / name}.md", flush=True)
    if args.render:
        (PAGES / "README.md").write_text(contents(), encoding="utf-8")


if __name__ == "__main__":
    main()
