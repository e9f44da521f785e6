"""Labelling images with a trained model."""

from collections.abc import Iterator

import torch

from benchmarks.common import Case, rates
from deepcluster.backbones import make_backbone
from deepcluster.classifier import COLUMNS, ROWS, Classifier, Spec
from deepcluster.store import Store


def predict() -> Iterator[Case]:
    """Classifier.predict over a store, beside the network alone over the same batches as float tensors."""
    for name, shape, n in (
        ("convnet", (1, 16, 16), 4096),
        ("convnet", (3, 32, 32), 1024),
        ("resnet18", (3, 64, 64), 128),
    ):
        torch.manual_seed(0)
        backbone, dim = make_backbone(name, shape)
        classifier = Classifier(Spec(name, shape, "Linear", 10, "0"), backbone, torch.nn.Linear(dim, 10), dim)
        store = Store(torch.randint(0, 256, (n, *shape), dtype=torch.uint8), torch.arange(n).numpy(),
                      [str(i) for i in range(n)], [""] * n, [], torch.device("cpu"), "memory")  # fmt: skip
        ready = (store.data.float() / 255).contiguous(memory_format=torch.channels_last).split(ROWS)

        @torch.no_grad()
        def bare(network: torch.nn.Module = backbone, ready: tuple[torch.Tensor, ...] = ready) -> None:
            for images in ready:
                network(images)

        def ours(classifier: Classifier = classifier, store: Store = store) -> None:
            classifier.predict(store, COLUMNS)

        yield rates(f"{name} {shape[0]}x{shape[1]}x{shape[2]}", "bare", n, ours, bare)
