"""Going on from a checkpoint with any damage: to the end, or exit 2 with one line."""

from pathlib import Path

import numpy as np
import pytest
import torch
from fuzzing import BENT, DAMAGE, SCALARS, bent, cases, command, copy_of, damaged, documented, tried
from hypothesis import strategies as st

from deepcluster import checkpoint
from deepcluster.estimator import DeepCluster


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was stopped after one epoch of two: its directory, to be gone on with."""
    at = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(at)
        np.save("x.npy", np.random.default_rng(0).normal(size=(24, 4)))
        model = DeepCluster(
            3,
            method="deepcluster",
            params={"n_heads": 1, "restarts": 1},
            overcluster=1,
            epochs=2,
            batch_size=8,
            out="run",
            backbone="mlp",
            image_size="auto",
        )
        model.fit("x.npy")
    return at


def flat(value, way=()):
    """Every tensor, number and text in a checkpoint, with the way to it."""
    if isinstance(value, dict | list):
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flat(one, (*way, key))
    yield way, value


def bent_within(saved: dict, at: int, instead, bend) -> None:
    """Damage one of the tensors, numbers and tables in a checkpoint, or leave it out."""
    ways = [way for way, _ in flat(saved) if way]
    *above, last = ways[at % len(ways)]
    inner = saved
    for key in above:
        inner = inner[key]
    if isinstance(inner[last], torch.Tensor) and bend[1] != "drop":
        inner[last] = bent({"it": inner[last]}, *bend)["it"]
    elif instead == "drop" or isinstance(inner[last], torch.Tensor):
        del inner[last]
    else:
        inner[last] = instead


@cases(100)
def test_going_on_from_a_damaged_checkpoint(n, stopped, capfd):
    def check(form, damage, at, instead, bend, run):
        with copy_of(stopped):
            last = Path("run/checkpoints/last.pt")
            if form == "words":
                saved = torch.load(last, weights_only=True)
                saved["epoch"] = 1
                bent_within(saved, at, instead, bend)
                torch.save(saved, last)
            else:
                last.write_bytes(damaged(last.read_bytes(), damage))
            if run or form == "words":
                command(["fit", "--resume", "run", "--quiet"], capfd)
            else:
                documented(lambda: checkpoint.read(last), ValueError)

    plain = SCALARS.filter(lambda value: not isinstance(value, int) or abs(value) < 2**63)
    plain = st.one_of(plain, st.sampled_from(["drop", [], {}]))
    forms = st.sampled_from(["words", "words", "bytes"])
    tried(n, check, forms, DAMAGE, st.integers(0, 10**4), plain, BENT, st.sampled_from([True, False, False]))
