"""Feature extraction: one pass over the training set, in order, without gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from deepcluster import dist, heap, scratch
from deepcluster.batches import eval_batches
from deepcluster.model import Model
from deepcluster.store import Store


@heap.reused()
@torch.no_grad()
def extract(
    model: Model,
    store: Store,
    views: Sequence[str] = ("clean",),
    *,
    batch_size: int = 512,
    seed: int = 0,
    bf16: bool = False,
) -> Tensor:
    """This rank's contiguous shard of the features, in eval mode.

    Args:
        model: gives the features.
        store: gives the images.
        views: several of them give the mean of their features (of random views: a steadier estimate).
        batch_size: images at a time; changes the result by rounding only.
        seed: of random views.
        bf16: compute in bfloat16, store in float32.

    Returns:
        (n, D) float32 on the model's device; row i belongs to image ``dist.shard(N)[0] + i``. Many of them on the CPU
        are mapped from a nameless file.
    """
    lo, hi = dist.shard(len(store))
    was_training = model.training
    model.eval()
    shape = (hi - lo, model.dim)
    on_cpu = store.device.type == "cpu"
    kind = torch.empty(0).numpy().dtype.type  # float32, unless somebody made float64 the default
    out = torch.from_numpy(scratch.zeros(shape, kind)) if on_cpu else torch.zeros(shape, device=store.device)
    with torch.autocast(store.device.type, torch.bfloat16, enabled=bf16):
        for number, view in enumerate(views):
            row = 0
            for images in eval_batches(store, view, batch_size, (seed + number) % 2**31):
                out[row : row + len(images)] += model.embed(images).float()
                row += len(images)
    model.train(was_training)
    return out.div_(len(views))
