"""Reading a folder of photographs for the first time, and every time after that."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision import transforms as T
from torchvision.datasets import ImageFolder

from benchmarks.common import CPU, Case, rates
from deepcluster import heap
from deepcluster.batches import train_batches
from deepcluster.losses import pseudo_label
from deepcluster.recipe import Recipe, Targets
from deepcluster.sources import open_source
from deepcluster.store import open_store

PIXELS = 64  # a side of what is read
BATCH = 256
WORKERS = 2


def photographs(root: Path, n: int) -> None:
    """JPEGs of 500 x 375 in two folders: parts of scikit-learn's two photographs, a little enlarged, some mirrored."""
    rng, whole = np.random.default_rng(0), [Image.fromarray(pixels) for pixels in load_sample_images().images]
    for i in range(n):
        zoom = rng.uniform(1, 1.6)
        image = whole[i % 2].resize((round(640 * zoom), round(427 * zoom)), Image.Resampling.BICUBIC)
        left, top = (int(rng.integers(0, side)) for side in (image.width - 499, image.height - 374))
        image = image.crop((left, top, left + 500, top + 375))
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        (root / str(i % 2)).mkdir(parents=True, exist_ok=True)
        image.save(root / str(i % 2) / f"{i:05}.jpg", quality=int(rng.integers(75, 96)))


def store(device: torch.device = CPU, n: int = 1536) -> Iterator[Case]:
    """Seconds on two threads until all images were decoded, and until they were seen once more, beside torchvision."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, DEEPCLUSTER_CACHE=f"{folder}/cache"):
        photographs(Path(folder) / "images", n)
        steps = T.Compose([T.Resize(PIXELS), T.CenterCrop(PIXELS), T.ToTensor()])
        images = ImageFolder(f"{folder}/images", steps)
        loader = torch.utils.data.DataLoader(images, BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=True,
                                             pin_memory=device.type == "cuda")  # fmt: skip

        def peer() -> None:
            for batch, _ in loader:
                batch.to(device, non_blocking=True)

        def first() -> None:
            shutil.rmtree(f"{folder}/cache", ignore_errors=True)
            open_store(open_source(f"{folder}/images"), size=PIXELS, channels=3, device=device, workers=WORKERS)

        yield rates("first read", "torchvision", n, first, peer, 7, threads=WORKERS, device=device)
        kept = open_store(open_source(f"{folder}/images"), size=PIXELS, channels=3, device=device)
        targets, recipe = Targets.unlabelled(1, n), Recipe((10,), pseudo_label, views=("clean",))

        def later() -> None:
            for _ in train_batches(kept, targets, recipe, BATCH, seed=0):
                pass

        with heap.reused():  # as in training
            yield rates("later epochs", "torchvision", n, later, peer, 7, threads=WORKERS, device=device)
