"""Features of all images of a store."""

from collections.abc import Iterator

import numpy as np
import torch

from benchmarks.common import CPU, Case, finished, rates
from deepcluster import features, heap
from deepcluster.backbones import make_backbone
from deepcluster.model import Model
from deepcluster.store import Store

BATCH = 512  # what extract takes at a time by itself


def ready_store(shape: tuple[int, int, int], n: int, device: torch.device) -> Store:
    """Random images, in memory or on the device."""
    data = torch.randint(0, 256, (n, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    place = "memory" if device.type == "cpu" else "device"
    return Store(data.to(device), np.arange(n), [str(i) for i in range(n)], [""] * n, [], device, place)


def extract(device: torch.device = CPU) -> Iterator[Case]:
    """features.extract, beside the backbone alone on the same batches as float tensors that are there already."""
    more = 1 if device.type == "cpu" else 32
    for name, shape, n, rounds in (
        ("convnet", (1, 16, 16), 8 * BATCH, 11),
        ("convnet", (3, 32, 32), 2 * BATCH, 11),
        ("resnet18", (3, 32, 32), BATCH // 2, 5),
    ):
        torch.manual_seed(0)
        model = Model(*make_backbone(name, shape), (10,), torch.nn.Linear).to(device, memory_format=torch.channels_last)
        store = ready_store(shape, n * more, device)
        model.eval()
        ready = [(p.float() / 255).contiguous(memory_format=torch.channels_last) for p in store.data.split(BATCH)]

        @torch.no_grad()
        def bare(model: Model = model, ready: list[torch.Tensor] = ready) -> None:
            for images in ready:
                model.backbone(images)

        def ours(model: Model = model, store: Store = store) -> None:
            features.extract(model, store)

        finished(device)
        with heap.reused():  # by both
            yield rates(f"{name} {'x'.join(map(str, shape))}", "bare", n * more, ours, bare, rounds, device=device)
