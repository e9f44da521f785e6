"""Any words on the command line, any values in --config, --set and the parameters: exit 2 with one line."""

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from finished import finished
from fuzzing import SCALARS, VALUES, cases, command, documented, tried
from hypothesis import strategies as st

from deepcluster import options, plan
from deepcluster.recipe import METHODS, make_recipe
from deepcluster.settings import Settings
from deepcluster.stages import Plan


def joined(parts):
    return [word for part in parts for word in part]


WORDS = st.one_of(
    st.sampled_from(
        [
            "one.npy",
            "many.npy",
            "run",
            "empty",
            "here",
            "loop",
            "no.csv",
            "labels.csv",
            "c.json",
            "d.json",
            "out.npy",
            "p.parquet",
            "new",
            "digit",
            "auto",
            "none",
            "0",
            "-1",
            "1",
            "2",
            "3",
            "1e9",
            "nan",
            "inf",
            "0x1",
            "١",
            "9" * 30,
            "9" * 5000,
            "",
            " ",
            "--",
            "-",
            "=",
            "a=b",
            "n_heads=x",
            "sub_heads=3",
            "temperature=NaN",
            "view=7",
            "x=[[[[",
            "x=" + "[" * 100_000,
            "torchvision:CIFAR10",
            "torchvision:",
            "*",
            "{0..9}.png",
            "{1..a}",
            "\udcff\udc80",
            "\ud83d",
            "a\nb",
            "\0",
            "%s%n",
            "linear,knn",
            "knn,,",
            "x" * 5000,
        ]
    ),
    st.text(max_size=8).filter(lambda text: "/" not in text and text[:1] not in ("~", ".")),
)
options.parser("")  # fills Parser.flags
FLAGS = sorted(options.Parser.flags)
COMMANDS = [name for name in options.COMMANDS if name != "demo"]  # which would train
LINES = st.one_of(
    st.lists(st.one_of(st.sampled_from([*COMMANDS, *FLAGS]), WORDS), max_size=5),
    st.tuples(
        st.sampled_from(COMMANDS).map(lambda name: [name]),
        st.sampled_from(
            [[], ["run"], ["one.npy"], ["one.npy", "--out", "new"], ["run", "one.npy", "--out", "p.parquet"]]
        ),
        st.lists(WORDS, max_size=2),
        st.lists(st.tuples(st.sampled_from(FLAGS), WORDS).map(list), max_size=3).map(joined),
    ).map(joined),
)
SENSIBLE = {
    "method": st.sampled_from(["auto", *METHODS, "iic+sela", "simclr+scan", "simclr+fixmatch", "iic+", "ii"]),
    "backbone": st.sampled_from(
        ["auto", "convnet", "mlp", "resnet18", "torchvision:x", "torchvision:", "timm:", "con"]
    ),
    "preset": st.sampled_from(["default", "paper"]),
    "precision": st.sampled_from(["auto", "fp32", "bf16"]),
    "n_clusters": st.sampled_from([2, 3, 10, 50, 10**6]),
    "overcluster": st.sampled_from(["auto", 1, 2, 5, 10**4, 10**12]),
    "batch_size": st.sampled_from(["auto", 2, 8, 40, 41, 10**9]),
    "seed": st.sampled_from([0, 2**31, 2**63, 2**64, 10**30]),
    "epochs": st.sampled_from(["auto", 1, 10**9]),
    "image_size": st.sampled_from(["auto", 4, 8, 10**6, 2**32, 10**12]),
    "lr": st.sampled_from(["auto", 1e-300, 1e300, 1, 0.1]),
}
EXTREME = st.sampled_from(
    [0, 1, 2, 3, -1, 10**4, 10**12, 2**63, 10**25, 10**400, 0.5, 1.0, 0.0, -0.5, 1e-300, 1e300, True, "strong", "reset"]
)
OWN = {name: sorted(inspect.signature(make).parameters) for name, make in METHODS.items()}
ALL = sorted({name for names in OWN.values() for name in names})
ANY = st.one_of(EXTREME, EXTREME, SCALARS, VALUES)


@st.composite
def settings(draw):
    """Sensible ones, of which some are not; a few parameters, mostly of the method."""
    asked = draw(st.fixed_dictionaries({}, optional=SENSIBLE))
    for name in draw(st.lists(st.sampled_from(sorted(SENSIBLE)), max_size=1)):
        asked[name] = draw(st.one_of(EXTREME, VALUES))
    method = asked.get("method")
    last = method.split("+")[-1] if isinstance(method, str) else ""
    names = st.sampled_from(OWN.get(last, ALL))
    names = st.one_of(
        names, names, st.sampled_from([*ALL, "iic.sub_heads", "sela.", ".view", "."]), st.text(max_size=5)
    )
    asked["params"] = draw(st.dictionaries(names, ANY, max_size=2))
    return asked | draw(
        st.sampled_from([{}, {"use_labels": True}, {"params": []}, {"weights": "no", "init_from": "x"}])
    )


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Where a run, sources of one and many rows, and files of other kinds lie."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    np.save("one.npy", rng.normal(size=(1, 5)))
    np.save("many.npy", rng.normal(size=(30, 5)))
    finished(Path("run"), "many.npy")
    np.save("many.npy", rng.normal(size=(1, 5)))  # others now
    Path("empty").mkdir()
    Path("here").symlink_to(".")
    Path("loop").symlink_to("loop")
    Path("labels.csv").write_text("path,label\na,b\n")
    Path("c.json").write_text(json.dumps({"n_clusters": 3}))
    Path("d.json").write_text(json.dumps({"merge": [[0, 1]]}))
    return tmp_path


@cases(500)
def test_words_of_the_command_line(n, here, capfd):
    tried(n, lambda argv: command([*argv, "--quiet"], capfd), LINES)


@cases(150)
def test_a_config_of_any_shape(n, here, capfd):
    def check(config, pairs):
        Path("c.json").write_text(config if isinstance(config, str) else json.dumps(config), "utf-8", "surrogatepass")
        sets = [word for name, value in pairs for word in ("--set", f"{name}={value}")]
        assert command(["fit", "one.npy", "--out", "new", "--config", "c.json", "--quiet", *sets], capfd) == 2

    texts = st.sampled_from(["", "[" * 100_000, '{"a":' * 100_000, "NaN", '"\\ud800"', "{}{}", "\0", "1" * 5000])
    configs = st.one_of(settings(), settings(), VALUES, st.dictionaries(st.text(max_size=9), VALUES, max_size=2), texts)
    pairs = st.lists(st.tuples(st.one_of(st.sampled_from(ALL), st.text(max_size=4)), SCALARS), max_size=2)
    tried(n, check, configs, pairs)


@cases(300)
def test_any_settings_make_a_plan_or_are_refused(n):
    def check(asked, n_images, shape):
        settings = documented(lambda: Settings(**asked), ValueError)
        if settings is not None:
            documented(lambda: plan.check(settings), ValueError)
            made = documented(lambda: plan.resolve(settings, n_images, shape, torch.device("cpu")), ValueError)
            assert made is None or Plan.from_dict(json.loads(json.dumps(made.to_dict()))) == made

    shapes = st.sampled_from([(5,), (1, 8, 8), (1, 4, 4), (3, 8, 8), (3, 32, 32), (1,), (3, 65, 65)])
    tried(n, check, settings(), st.sampled_from([1, 2, 40, 40, 40, 3000, 10**7]), shapes)


@cases(100)
def test_any_parameters_of_a_method_make_a_recipe_or_are_refused(n):
    def check(name, pairs):
        own = OWN.get(name, ALL)
        params = {own[i % len(own)]: value for i, value in pairs}
        made = documented(lambda: make_recipe(name, **params), ValueError)
        assert made is None or all(k >= 1 for k in made.heads)

    names = st.sampled_from(sorted(METHODS))
    tried(
        n, check, st.one_of(names, names, st.text(max_size=6)), st.lists(st.tuples(st.integers(0, 20), ANY), max_size=2)
    )
