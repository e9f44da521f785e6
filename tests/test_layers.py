"""What keeps the package readable: imports point down, labels stay out of training, files stay short."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "deepcluster"
LAYERS = [
    {"dist", "metrics", "doctor", "settings", "draws", "atomic", "checked", "terminal", "heap", "trust", "onnxnet"},
    {
        "transport",
        "losses",
        "norm",
        "decode",
        "kmeans",
        "views",
        "scratch",
        "tree",
        "foreign",
        "weights",
        "reliability",
    },
    {"model", "recipe", "pretrained", "backbones", "networks", "edits", "howmany", "confidence"},
    {"assign", "neighbors", "sources", "store", "methods", "tuning", "decisions"},
    {"batches", "frozen"},
    {"features", "checkpoint", "evaluate", "probe", "classifier"},
    {"health", "oddities", "cam", "nuisance"},
    {"trainer"},
    {"log", "sentinel"},
    {"stages"},
    {"plan"},
    {"outputs", "choosing", "options", "advise"},
    {"results", "landscape", "recut"},
    {"report", "export", "ending"},
    {"runs"},
    {"dryrun"},
    {"editable"},
    {"estimator"},
    {"counting"},
    {"commands"},
    {"__main__"},
]
RANK = {name: i for i, layer in enumerate(LAYERS) for name in layer}
SIDEWAYS = {
    ("recipe", "model"),
    ("networks", "model"),
    ("backbones", "recipe"),
    ("backbones", "pretrained"),
    ("weights", "foreign"),
    ("trust", "doctor"),
    ("methods", "assign"),
    ("methods", "neighbors"),
    ("store", "sources"),
    ("frozen", "batches"),
}
SEE_LABELS = {"metrics", "evaluate", "probe", "sources", "plan", "runs", "estimator", "outputs", "report", "commands"}
LABEL_WORDS = re.compile(r"(?<!pseudo-)\bclasses\b|true_labels|ground.?truth", re.I)
FILES = sorted(ROOT.rglob("*.py"))
each_file = pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])


def module(path: Path) -> str:
    """The layered module a file belongs to: "methods" for methods/iic.py."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(source: str) -> set[str]:
    """Layered modules imported anywhere in a source; a name re-exported by the package itself counts as "estimator"."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import: write 'from deepcluster.x import y'"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    found = {name.split(".")[1] for name in names if name.startswith("deepcluster.")} - {"__version__"}
    return {name if name in RANK or known(name) else "estimator" for name in found}


def known(name: str) -> bool:
    """Whether the package has such a module."""
    return (ROOT / name).is_dir() or (ROOT / f"{name}.py").exists()


def wrong(me: str, source: str) -> list[str]:
    """Imports of module ``me`` that do not point down."""
    return sorted(
        other
        for other in imports(source) - {me}
        if RANK.get(other, len(LAYERS)) >= RANK[me] and (me, other) not in SIDEWAYS
    )


@each_file
def test_imports_point_down(path):
    me = module(path)
    if me == "__init__":
        return
    assert me in RANK, f"{me} has no layer: add it to LAYERS in {Path(__file__).name} and to CONTRIBUTING.md"
    assert not wrong(me, path.read_text()), f"{me} (layer {RANK[me]}) may import only from layers below its own"


@pytest.mark.parametrize(
    ("me", "source", "expected"),
    [
        ("losses", "from deepcluster.dist import rank", []),
        ("losses", "from deepcluster import dist, __version__", []),
        ("losses", "from deepcluster import trainer", ["trainer"]),
        ("losses", "from deepcluster import DeepCluster", ["estimator"]),
        ("losses", "def f():\n    import deepcluster.transport", ["transport"]),
        ("methods", "from deepcluster.methods.iic import iic\nfrom deepcluster.assign import KMeans", []),
        ("methods", "from deepcluster.trainer import fit", ["trainer"]),
        ("assign", "from deepcluster.methods import iic", ["methods"]),
        ("store", "from deepcluster.sources import open_source", []),
        ("sources", "from deepcluster.store import ImageStore\nfrom deepcluster.decode import decode", ["store"]),
    ],
)
def test_the_rule_itself(me, source, expected):
    assert wrong(me, source) == expected


def test_relative_imports_are_refused():
    with pytest.raises(AssertionError, match="relative import"):
        imports("from .dist import rank")


@each_file
def test_training_never_sees_true_labels(path):
    if module(path) not in SEE_LABELS:
        found = LABEL_WORDS.search(path.read_text())
        assert not found, f"{found[0]!r}: only {sorted(SEE_LABELS)} know true labels"


def test_the_label_words_themselves():
    assert all(LABEL_WORDS.search(text) for text in ("the classes", "true_labels", "ground-truth", "Ground truth"))
    assert not any(LABEL_WORDS.search(text) for text in ("dataclasses", "pseudo-classes", "subclasses"))


@each_file
def test_files_fit_in_the_head(path):
    assert len(path.read_text().splitlines()) <= 300, "split it or cut it"


@each_file
def test_nothing_asks_which_method_it_is(path):
    assert not re.search(r"\bmethod\s*[!=]=", path.read_text()), "put the difference into the Recipe"


def test_the_loop_fits_on_one_screen():
    path = ROOT / "trainer.py"
    if not path.exists():
        pytest.skip("no trainer yet")
    fit = next(n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef) and n.name == "fit")
    assert fit.end_lineno - fit.lineno < 60
