"""New labels for all images, beside the epoch they are for."""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from benchmarks.common import CPU, Case, finished, within
from deepcluster.backbones import make_backbone
from deepcluster.model import Model
from deepcluster.recipe import make_recipe
from deepcluster.store import Store
from deepcluster.trainer import Report, Training, fit

METHODS = ("deepcluster", "sela", "deepcluster_v2", "uic")
N, SIDE, STEPS = 10_000, 32, 4  # steps of an epoch that are done; its time is that of all
LIMIT = 10  # % of an epoch


def refreshes(device: torch.device = CPU, epochs: int = 2) -> Iterator[Case]:
    """Share of an epoch that the assigner and what it does to the heads take, extraction aside; the small convnet.

    The first epoch, whose labels come from nothing, and the next; each beside its own epoch.
    """
    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(0)
    kinds = torch.rand(10, 3, SIDE, SIDE, generator=rng) * 128
    noise = torch.rand(N, 3, SIDE, SIDE, generator=rng) * 127
    images = (kinds[torch.arange(N) % 10] + noise).to(torch.uint8)
    place = "memory" if device.type == "cpu" else "device"
    store = Store(images.to(device), np.arange(N), [str(i) for i in range(N)], [""] * N, [], device, place)
    for name in METHODS:
        shares = list(_shares(name, store, epochs))
        yield within(f"{name}, first", 100 * shares[0], LIMIT, "%")
        yield within(f"{name}, later", 100 * statistics.median(shares[1:]), LIMIT, "%", epochs - 1)


def _shares(name: str, store: Store, epochs: int) -> Iterable[float]:
    recipe, training = make_recipe(name), Training(epochs=epochs)
    torch.manual_seed(0)
    model = Model(*make_backbone("convnet", store.shape), recipe.heads, recipe.head).to(store.device)
    steps, labelling, other, shares = -(-len(store) // training.batch_size), [0.0], [0.0], []

    def now() -> float:
        finished(store.device)
        return time.process_time() if store.device.type == "cpu" else time.perf_counter()

    def timed(part: Callable) -> Callable:
        def run(*given: Any) -> Any:
            began = now()
            out = part(*given)
            labelling[0] += now() - began
            return out

        return run

    def some(batches: Iterable) -> Iterator:
        began = now()
        yield from islice(batches, STEPS)
        other[0] += (now() - began) * (steps - STEPS) / STEPS  # those that are left out

    started = [now()]

    def epoch_ends(report: Report) -> None:
        whole = now() - started[0] + other[0]
        shares.append(labelling[0] / whole)
        labelling[0], other[0], started[0] = 0.0, 0.0, now()

    part = replace(recipe, assigner=timed(recipe.assigner), reassign=timed(recipe.reassign))
    fit(model, store, part, training, [epoch_ends], progress=some)
    return shares
