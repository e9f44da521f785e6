"""What saving costs."""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from benchmarks.common import Case, within
from deepcluster import checkpoint
from deepcluster.backbones import make_backbone
from deepcluster.checkpoint import Saver
from deepcluster.model import Model
from deepcluster.recipe import make_recipe
from deepcluster.store import Store
from deepcluster.trainer import Training, start


def checkpoints(n_images: int = 50_000, epochs: int = 40, steps: int = 100) -> Iterator[Case]:
    """Share of training that saving takes, in epochs of ten seconds, beside what it may be: 2 %.

    States are written and flushed to the disk where temporary files are, in real seconds. Training is not done: the
    clock that Saver looks at is put forward instead.
    """
    store = Store(torch.zeros(n_images, 1, 1, 1, dtype=torch.uint8), np.arange(n_images), [""] * n_images,
                  [""] * n_images, [], torch.device("cpu"), "memory")  # fmt: skip
    for name, shape in (("convnet", (3, 32, 32)), ("resnet18", (3, 64, 64))):
        recipe, passed = make_recipe("sela"), 0.0
        state = start(Model(*make_backbone(name, shape), recipe.heads, recipe.head), store, recipe, Training())
        sum(z.square().sum() for z in state.network([torch.rand(4, *shape)])).backward()
        state.optimizer.step()  # AdamW has its moments now
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(checkpoint, "time") as clock:
            clock.monotonic = lambda: time.monotonic() + passed  # noqa: B023
            taken = []
            with Saver(Path(folder)) as saver:
                for epoch in range(epochs):
                    began = time.perf_counter()
                    for step in saver.during(range(steps), state):
                        passed += 10 / steps
                        state.step = step + 1
                    state.step, state.epoch = 0, epoch + 1
                    saver.epoch(state, epoch + 1 == epochs)
                    taken.append(time.perf_counter() - began)
            size = (Path(folder) / "last.pt").stat().st_size / 1e6
        saves, share = sum(seconds > 1e-3 for seconds in taken), 100 * sum(taken) / (10 * epochs)
        yield within(f"{name} {size:.0f} MB, {saves} saves", share, 2, "%", epochs)
