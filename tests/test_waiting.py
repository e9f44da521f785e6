"""The steps of an epoch give a device its work without waiting for what comes out of it."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import make_model, tiny_store
from torch.utils._python_dispatch import TorchDispatchMode

import deepcluster.methods  # noqa: F401
from deepcluster.batches import Batch
from deepcluster.recipe import METHODS, make_recipe
from deepcluster.trainer import Training, fit

TRAINING = Training(epochs=2, batch_size=32, lr=0.01)
KNOWN = torch.where(torch.arange(96) < 30, torch.arange(96) % 3, -1)
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "is_nonzero"}
every_method = pytest.mark.parametrize("name", sorted(METHODS))


class Watched(TorchDispatchMode):
    """Fails where a kernel's result, or the size of it, is wanted by Python: on a GPU all work has to end first."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        waits = masks or name in WAITS
        assert not waits, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


def trained(name: str, device: str, progress, **options) -> None:
    recipe = make_recipe(name, n_clusters=3)
    store = tiny_store()
    place = "device" if device == "cuda" else "memory"
    store = replace(store, data=store.data.to(device), device=torch.device(device), place=place)
    known = KNOWN if recipe.supervised else None
    fit(make_model(recipe).to(device), store, recipe, replace(TRAINING, **options), progress=progress, known=known)


@every_method
def test_no_step_asks_for_a_value(name: str, tmp_path: Path) -> None:
    begun = []

    def watched(batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            if begun:  # the very first step notes the loss of a flat network
                with Watched():
                    yield batch
            else:
                yield batch
            begun.append(batch)

    trained(name, "cpu", watched, out=tmp_path)
    assert len(begun) == 6


@pytest.mark.gpu
@pytest.mark.parametrize("bf16", [False, True])
@every_method
def test_no_step_waits_for_the_gpu(name: str, bf16: bool, tmp_path: Path) -> None:
    epochs = []

    def watched(batches: Iterable[Batch]) -> Iterator[Batch]:
        torch.cuda.set_sync_debug_mode("error" if epochs else "default")  # views and draws included
        try:
            yield from batches
        finally:
            torch.cuda.set_sync_debug_mode("default")
        epochs.append(1)

    trained(name, "cuda", watched, out=tmp_path, bf16=bf16)
    assert len(epochs) == 2
